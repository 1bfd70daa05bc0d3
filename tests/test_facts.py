"""What is known of each operator: a row of a table, without a whole model around it.

In front of the operator is ``a`` to ``f``, six channels of 4x4 pixels of which ``b`` and ``e`` are
constant, and for some ``g`` to ``l``, of which ``h`` and ``j`` are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from build import Graph, pruned, run
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.load import load
from onnx_simplify.operators import Operator, bind
from onnx_simplify.runtime.evidence import Evidence

IMAGE = [1, 3, 4, 4]


class Row(NamedTuple):
    """What is known of one operator.

    Attributes:
        build: makes it and gives its output, from a graph and the names of ``a..f`` and ``g..l``.
        labels: the channels of the output, in order: those of an input, or ``-`` for new ones.
        level: which of them are constant: ``.`` varies, ``m`` is a map, ``c`` is one number.
        needs: positions of the operator's first input that the first output needs (``n``).
        maps: the levels by the rules alone, which are optimistic, where they are others.
        opset: version of the operator set.
    """

    build: Callable[[Graph, str, str], str]
    labels: str
    level: str
    needs: str
    maps: str | None = None
    opset: int = 17


def ints(g: Graph, *values: int) -> str:
    return g.const(np.array(values, np.int64))


def flat(g: Graph, x: str) -> str:
    return g.op("Flatten", g.op("GlobalMaxPool", x))


def shuffled(g: Graph, x: str) -> str:
    x = g.op("Transpose", g.op("Reshape", x, ints(g, 1, 2, 3, 4, 4)), perm=[0, 2, 1, 3, 4])
    return g.op("Reshape", x, ints(g, 1, 6, 4, 4))


def grid(g: Graph) -> np.ndarray:
    """Places to look at, some of them outside."""
    return g.rng.uniform(-1.5, 1.5, (1, 4, 4, 2)).astype(np.float32)


def heads(g: Graph, x: str) -> str:
    """Three heads of two channels, ``[1, 3, 16, 2]``."""
    return g.op("Transpose", g.op("Reshape", x, ints(g, 1, 3, 2, 16)), perm=[0, 1, 3, 2])


def transposed(g: Graph, x: str) -> str:
    weight = pruned(g.normal(6, 6, 2, 2), [0], axis=1)
    return g.op("ConvTranspose", x, weight, strides=[2, 2])


def last(g: Graph, x: str) -> str:
    return g.op("Transpose", x, perm=[0, 2, 3, 1])


SAME = ("abcdef", ".c..c.", "n.....")
MAPS = ("abcdef", ".m..m.", "n.....", ".c..c.")
NEW = "------"
ROWS = {
    "Relu": Row(lambda g, x, y: g.op("Relu", x), *SAME),
    "Sigmoid": Row(lambda g, x, y: g.op("Sigmoid", x), *SAME),
    "Cast": Row(lambda g, x, y: g.op("Cast", x, to=10), *SAME),
    "Dropout": Row(lambda g, x, y: g.op("Dropout", x), *SAME),
    "Clip": Row(lambda g, x, y: g.op("Clip", x, np.float32(0), np.float32(6)), *SAME),
    "PRelu": Row(lambda g, x, y: g.op("PRelu", x, np.full((6, 1, 1), 0.25, "f")), *SAME),
    "Add": Row(lambda g, x, y: g.op("Add", x, y), "abcdef", ".c....", "n....."),
    "Mul": Row(lambda g, x, y: g.op("Mul", x, y), "abcdef", ".c....", "n.....", ".c.cc."),
    "Where": Row(
        lambda g, x, y: g.op("Where", g.op("Greater", x, y), x, y), "abcdef", ".c....", "n....."
    ),
    "BatchNormalization": Row(lambda g, x, y: g.batchnorm(x, 6), *SAME),
    "InstanceNormalization": Row(
        lambda g, x, y: g.op("InstanceNormalization", x, g.normal(6), g.normal(6)), *MAPS
    ),
    "GroupNormalization": Row(
        lambda g, x, y: g.op(
            "GroupNormalization", x, np.array([1, 2, 0, 0, 3, 4], "f"), g.normal(6), num_groups=3
        ),
        "aaccee",
        "..cc..",
        "nn....",
        opset=21,
    ),
    "Gelu": Row(lambda g, x, y: g.op("Gelu", x, domain="com.microsoft"), *SAME),
    "Conv": Row(
        lambda g, x, y: g.conv(x, pruned(g.normal(6, 6, 3, 3), [5]), g.normal(6), pads=[1] * 4),
        NEW,
        ".....c",
        "nnnnnn",
    ),
    "Conv that does not read": Row(
        lambda g, x, y: g.conv(x, pruned(g.normal(6, 6, 1, 1), [0, 3], axis=1)),
        NEW,
        "......",
        ".nn.nn",
    ),
    "Conv, grouped": Row(
        lambda g, x, y: g.conv(x, g.normal(6, 3, 1, 1), g.normal(6), group=2),
        NEW,
        "......",
        "nnn...",
    ),
    "Conv, depthwise": Row(lambda g, x, y: g.conv(x, g.normal(6, 1, 1, 1), group=6), *SAME),
    "Conv, depthwise, padded": Row(
        lambda g, x, y: g.conv(x, g.normal(6, 1, 3, 3), group=6, pads=[1] * 4), *MAPS
    ),
    "ConvTranspose": Row(lambda g, x, y: transposed(g, x), NEW, "c.....", "......"),
    "Gemm": Row(
        lambda g, x, y: g.gemm(flat(g, x), pruned(g.normal(5, 6), [2]), g.normal(5)),
        "-----",
        "..c..",
        "nnnnnn",
    ),
    "MatMul": Row(
        lambda g, x, y: g.op("MatMul", last(g, x), pruned(g.normal(6, 5), [2], axis=1)),
        "-----",
        "..c..",
        "nnnnnn",
    ),
    "FusedMatMul": Row(
        lambda g, x, y: g.op(
            *("FusedMatMul", last(g, x), pruned(g.normal(5, 6), [2])),
            domain="com.microsoft",
            transB=1,
            alpha=0.5,
        ),
        "-----",
        "..c..",
        "nnnnnn",
    ),
    "Einsum": Row(
        lambda g, x, y: g.op("Einsum", x, pruned(g.normal(5, 6), [2]), equation="bchw, oc -> bohw"),
        "-----",
        "..c..",
        "nnnnnn",
    ),
    "GridSample": Row(lambda g, x, y: g.op("GridSample", x, grid(g), padding_mode="border"), *SAME),
    "GridSample over zeros": Row(lambda g, x, y: g.op("GridSample", x, grid(g)), *MAPS),
    "Softmax": Row(
        lambda g, x, y: g.op("Softmax", x, axis=3), "abcdef", ".m..m.", "n.....", ".m..m."
    ),
    "MatMul, mixing": Row(
        # A constant row of weights is taken for zero, at first.
        lambda g, x, y: g.op("MatMul", g.op("Softmax", y), x),
        *("abcdef", ".c..c.", "n.....", ".c.cc."),
    ),
    "MatMul, scores": Row(
        lambda g, x, y: g.op(
            "MatMul", heads(g, x), g.op("Transpose", heads(g, y), perm=[0, 1, 3, 2])
        ),
        # Before anything is measured, a constant factor is taken for zero.
        *("---", "...", "n....."),
    ),
    "GlobalAveragePool": Row(lambda g, x, y: g.op("GlobalAveragePool", x), *SAME),
    "MaxPool": Row(lambda g, x, y: g.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4), *SAME),
    "AveragePool": Row(lambda g, x, y: g.op("AveragePool", x, kernel_shape=[2, 2]), *SAME),
    "AveragePool over zeros": Row(
        lambda g, x, y: g.op(
            "AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1
        ),
        *MAPS,
    ),
    "Resize": Row(
        lambda g, x, y: g.op("Resize", x, "", np.array([1, 1, 2, 2], "f"), mode="nearest"), *SAME
    ),
    "Pad": Row(lambda g, x, y: g.op("Pad", x, ints(g, 0, 0, 1, 1, 0, 0, 1, 1)), *MAPS),
    "ReduceMean": Row(lambda g, x, y: g.op("ReduceMean", x, axes=[2, 3], keepdims=1), *SAME),
    "Reshape": Row(lambda g, x, y: shuffled(g, x), "adbecf", "..cc..", "n....."),
    "Flatten": Row(lambda g, x, y: flat(g, x), *SAME),
    "Transpose": Row(lambda g, x, y: last(g, x), *SAME),
    "Squeeze": Row(lambda g, x, y: g.op("Squeeze", g.op("GlobalMaxPool", x), ints(g, 2, 3)), *SAME),
    "Unsqueeze": Row(lambda g, x, y: g.op("Unsqueeze", x, ints(g, 0)), *SAME),
    "Expand": Row(
        lambda g, x, y: g.op("Expand", g.op("GlobalMaxPool", x), ints(g, 1, 6, 4, 4)), *SAME
    ),
    "Tile": Row(
        lambda g, x, y: g.op("Tile", x, ints(g, 1, 2, 1, 1)),
        "abcdefabcdef",
        ".c..c..c..c.",
        "n.....",
    ),
    "Concat": Row(
        lambda g, x, y: g.op("Concat", x, y, axis=1), "abcdefghijkl", ".c..c..c.c..", "n....."
    ),
    "Split": Row(
        lambda g, x, y: g.op("Split", x, ints(g, 2, 4), axis=1, outputs=2)[1],
        "cdef",
        "..c.",
        "..n...",
    ),
    "Slice": Row(
        lambda g, x, y: g.op("Slice", x, ints(g, 1), ints(g, 6), ints(g, 1), ints(g, 2)),
        "bdf",
        "c..",
        ".n....",
    ),
    "Gather": Row(
        lambda g, x, y: g.op("Gather", x, ints(g, 5, 0, 1), axis=1), "fab", "..c", ".....n"
    ),
    "SpaceToDepth": Row(
        lambda g, x, y: g.op("SpaceToDepth", x, blocksize=2),
        "abcdef" * 4,
        ".c..c." * 4,
        "n.....",
    ),
    "DepthToSpace": Row(
        lambda g, x, y: g.op("DepthToSpace", g.op("Concat", x, x, axis=1), blocksize=2),
        "abc",
        ".m.",
        "n..n..n..n..",
        ".c.",
    ),
    "DepthToSpace of equals": Row(
        lambda g, x, y: g.op("DepthToSpace", g.op("Concat", x, x, x, x, axis=1), blocksize=2),
        "abcdef",
        ".c..c.",
        "n.....n.....n.....n.....",
    ),
}


def built(row: Row, seed: int = 0, *, other: str = "") -> tuple[Graph, str, str, str]:
    """The graph of a row; channels ``other`` of ``a..f`` are made by other weights."""
    g = Graph(row.opset, seed=seed, domains={"com.microsoft": 1})
    image = g.input("image", IMAGE)
    weight, bias = pruned(g.normal(6, 3, 1, 1), [1, 4]), g.normal(6)
    for channel, mark in enumerate(other):
        if mark == ".":
            weight[channel], bias[channel] = 1 + channel, 5
    x = g.conv(image, weight, bias)
    y = g.conv(image, pruned(g.normal(6, 3, 1, 1), [1, 3]), g.normal(6))
    z = row.build(g, x, y)
    g.output(z)
    return g, x, y, z


def images() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"image": random.standard_normal(IMAGE).astype(np.float32)} for _ in range(2)]


def text(values: np.ndarray, letters: str) -> str:
    return "".join(letters[int(v)] for v in values.ravel())


@pytest.mark.parametrize("name", ROWS)
def test_facts(name):
    row = ROWS[name]
    g, x, y, z = built(row)
    facts = Facts(load(g.model()))
    assert not [op.node.op for op in facts.operators if op.is_opaque]
    labels = facts.layouts.of
    # Channels that are one have the first one's name.
    channels = [*labels[x].ravel(), *labels[y].ravel()]
    known = dict(zip(channels[::-1], "abcdefghijkl"[::-1], strict=True))
    assert "".join(known.get(label, "-") for label in labels[z].ravel()) == row.labels
    assert text(facts.level[z], ".mc") == (row.maps or row.level)
    measured = Evidence(images()).measured(facts)
    assert text(measured.level[z], ".mc") == row.level
    assert text(facts.level[z], ".mc") == (row.maps or row.level), "facts do not change"
    op = facts.producer[z]
    wanted = [np.zeros(labels[t.name].shape, bool) for t in op.outputs]
    wanted[[t.name for t in op.outputs].index(z)].flat[0] = True
    needed = op.need(facts, wanted)[0]
    assert needed is not None and text(needed, ".n") == row.needs


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if len(row.needs) == 6])
def test_facts_are_true(name):
    """What is not needed may change, and what is constant is constant."""
    row = ROWS[name]
    g, _, _, z = built(row)
    facts = Facts(load(g.model()))
    (axis,) = (k for k, size in enumerate(facts.layouts.of[z].shape) if size > 1)
    first, second = (np.moveaxis(run(g.model(), feeds)[z], axis, 0) for feeds in images())
    for channel, level in enumerate(row.level):
        same = np.allclose(first[channel], second[channel], rtol=0, atol=1e-6)
        assert same == (level != "."), channel
        assert level != "c" or np.ptp(first[channel].astype(np.float64)) < 1e-5, channel
    op = facts.producer[z]
    if op.inputs[0].name == facts.model.graph.nodes[0].outputs[0].name:
        changed = run(built(row, other=row.needs)[0].model(), images()[0])[z]
        assert np.allclose(np.moveaxis(changed, axis, 0)[0], first[0], rtol=0, atol=1e-6)


def test_every_rule_has_a_row():
    def rules(kind: type[Operator]) -> set[type[Operator]]:
        return {kind}.union(*(rules(sub) for sub in kind.__subclasses__()))

    bound = {
        type(bind(node))
        for row in ROWS.values()
        for node in load(built(row)[0].model()).graph.nodes
    }
    own = {c for c in rules(Operator) if c.__module__.startswith("onnx_simplify.operators.")}
    known = {c for kind in bound for c in kind.__mro__}
    # Quantised weights and what is about sizes have tests of their own.
    assert {c.__name__ for c in own - known} <= {
        *("Quantization", "Shape", "Size", "ConstantOfShape"),
        "LikeFirst",
    }
