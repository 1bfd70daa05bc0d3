"""onnxruntime sessions over a working model, sharing its weights instead of copying them."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import ModelProto

from onnx_simplify.errors import CannotVerifyError, RunError, first_line
from onnx_simplify.graph.message import headless
from onnx_simplify.graph.model import Model
from onnx_simplify.graph.order import all_nodes
from onnx_simplify.graph.traits import RANDOM
from onnx_simplify.runtime.widen import as_float32, widen

PROVIDERS = ["CPUExecutionProvider"]
# Weights of more bytes are only optimised where that is the point: it copies them.
_LARGE = 1 << 30
# Seconds that a loop may run, which need not end.
_PATIENCE = 40


def silence() -> None:
    """Keep onnxruntime from writing to the standard error what it raises anyway."""
    ort.set_default_logger_severity(4)


class Session:
    """An onnxruntime CPU session; holds the weights it refers to.

    Attributes:
        raw: onnxruntime's session; not to be used without this object.
        output_names: names of the outputs.
        own: how many of these are the model's own; what was exposed besides follows.
        is_random: whether the model makes random numbers of its own.
    """

    def __init__(
        self,
        model: Model,
        extra_outputs: Iterable[str] = (),
        *,
        threads: int = 0,
        optimize: bool = False,
        always: bool = True,
    ):
        """Open a session.

        Raises:
            RunError: onnxruntime does not load the model.

        Args:
            model: the model.
            extra_outputs: inner tensors to expose behind the graph's own outputs.
            threads: intra-op threads; 0 lets onnxruntime decide.
            optimize: apply onnxruntime's graph optimisations and weight packing, as a deployment
                would (see ``always``); without, weights are fed as inputs, which saves opening
                the session two copies of them.
            always: with ``optimize``, also if there is more than 1 GiB of weights, which takes one
                to three times their memory.
        """
        # A deployment reads what the file states of shapes.
        proto, constants = model.structure(extra_outputs, infos=optimize)
        large = {name: tensor.values for name, tensor in constants.items()}
        self._stand_in = model.stand_in
        if self._stand_in:
            widen(proto)
            large = {name: as_float32(values) for name, values in large.items()}
        nodes = list(all_nodes(proto.graph))
        noisy = [n for n in nodes if _makes_noise(n)]
        for node in noisy:
            _fix_seed(node)
        self.is_random = bool(noisy)
        self._loops = any(n.op_type in ("Loop", "Scan") for n in nodes)
        self.output_names = [o.name for o in proto.graph.output]
        self.own = len(model.template.graph.output)
        self._weights: dict[str, np.ndarray] = {}
        if not always and sum(a.nbytes for a in large.values()) > _LARGE:
            optimize = False
        if not optimize and all(a.dtype.kind in "fiub" for a in large.values()):
            try:
                self._open(headless(proto), session_options(threads=threads, optimize=False))
            except Exception:  # some operators insist on initializers
                pass
            else:
                self._weights = large
                return
        options = session_options(threads=threads, optimize=optimize)
        # Values must outlive the session: it refers to their memory.
        self._values = [_ort_value(a) for a in large.values()]
        if large:
            options.add_external_initializers(list(large), self._values)
        self._open(proto, options)

    def _open(self, proto: ModelProto, options: ort.SessionOptions) -> None:
        self.raw = open_session(proto, options)

    def run(
        self, feeds: dict[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Run once and return the outputs (all, or those named).

        Raises:
            CannotVerifyError: a loop runs for too long.
            RunError: onnxruntime does not run the model.
        """
        # Scalars that come out of arithmetic are none of the types that onnxruntime takes.
        feeds = {name: np.asarray(values) for name, values in feeds.items()}
        if self._stand_in:
            feeds = {name: as_float32(values) for name, values in feeds.items()}
        feeds = {**self._weights, **feeds}
        found: list[np.ndarray]
        if not self._loops:
            with readable():
                found = self.raw.run(outputs, feeds)
            return found
        options = ort.RunOptions()
        options.log_severity_level = 4
        timer = threading.Timer(_PATIENCE, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            with readable():
                found = self.raw.run(outputs, feeds, options)
        except RunError as error:
            if options.terminate:
                raise CannotVerifyError(
                    f"the model loops for more than {_PATIENCE} seconds: give input data"
                ) from error
            raise
        finally:
            timer.cancel()
        return found


@contextmanager
def readable() -> Iterator[None]:
    """Raise what onnxruntime raises as a :class:`RunError` of one line."""
    try:
        yield
    except Exception as error:  # it has a dozen types of its own, without a common base
        raise RunError(first_line(error)) from error


def open_session(proto: ModelProto, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session of onnxruntime's.

    Raises:
        RunError: it does not load the model.
    """
    with readable():
        return ort.InferenceSession(proto.SerializeToString(), options, providers=PROVIDERS)


def _makes_noise(node: onnx.NodeProto) -> bool:
    if node.op_type == "Dropout":
        return not node.domain and len(node.input) > 2
    return not node.domain and node.op_type in RANDOM


def _fix_seed(node: onnx.NodeProto) -> None:
    """Give an operator that makes random numbers a seed, if it has none, in place.

    Without, the numbers depend on how many nodes come before, so that no two models agree.
    """
    if not any(a.name == "seed" for a in node.attribute):
        seed = zlib.crc32(node.output[0].encode()) % 2**16
        kind = int if node.op_type == "Dropout" else float
        node.attribute.append(onnx.helper.make_attribute("seed", kind(seed)))


def session_options(*, threads: int = 0, optimize: bool = True) -> ort.SessionOptions:
    """Quiet session options, with or without graph optimisation."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if threads > 1:
        # Threads that wait busily for the next run would take the cores of other sessions' ones.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    return options


def run_proto(proto: ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a small self-contained model once.

    Raises:
        RunError: onnxruntime does not.
    """
    session = open_session(proto, session_options(optimize=False))
    with readable():
        found: list[np.ndarray] = session.run(None, feeds)
    return found


def run_nodes(model: Model, nodes: list[gs.Node], outputs: list[str]) -> list[np.ndarray] | None:
    """Evaluate a list of nodes that depend on initializers only.

    Returns:
        The values of the tensors named, or None when onnxruntime cannot run these nodes.
    """
    if not outputs:
        return []
    constants = {t.name: t.values for n in nodes for t in n.inputs if isinstance(t, gs.Constant)}
    graph = onnx.helper.make_graph(
        [model.export_node(n) for n in nodes],
        "constants",
        [],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    proto = ModelProto(ir_version=min(model.template.ir_version, 10), graph=graph)
    proto.opset_import.extend(model.template.opset_import)
    try:
        return run_proto(proto, {})
    except RunError:  # not folding is always right
        return None


def _ort_value(array: np.ndarray) -> ort.OrtValue:
    array = np.require(array, requirements=["C", "A"])
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    if array.dtype.kind == "V" or array.dtype.type.__module__ == "ml_dtypes":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), kind)
    return ort.OrtValue.ortvalue_from_numpy(array)
