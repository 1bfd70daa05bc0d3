"""What is not computation survives: names, documentation, properties, versions, symbolic sizes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.shape_inference
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from build import (
    Dim,
    Graph,
    assert_same_function,
    count,
    initializer,
    node,
    pruned,
    random_feeds,
    run,
    small_cnn,
    with_outputs,
)
from onnx_simplify import (
    benchmark,
    fold_batchnorm,
    get_bn_folding,
    get_pinned,
    propagate_bias,
    remove_zeroed,
    simplify,
    verify,
)
from versions import opsets

# Each function from model to model, and what of the networks here it leaves.
STEPS: dict[str, Callable[..., ModelProto]] = {
    "simplify": lambda model: simplify(model)[0],
    "fold_batchnorm": fold_batchnorm,
    "propagate_bias": propagate_bias,
    "remove_zeroed": remove_zeroed,
}
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def described(height: Dim = "height", width: Dim = "width") -> ModelProto:
    """A network with something in every field that describes it."""
    g = small_cnn(shape=("batch", 3, height, width), name="detector")
    g.domains["acme.unused"] = 3
    model = g.model(
        producer_name="trainer",
        producer_version="1.2.3",
        domain="org.example",
        model_version=42,
        doc_string="A model.\nTwo lines, and ünïcode.",
    )
    helper.set_model_props(
        model, {"names": "{0: 'ant', 1: 'bee'}", "stride": "32", "empty": "", "ключ": "значение"}
    )
    graph = model.graph
    graph.doc_string = "A graph."
    _note(graph, scope="all")
    for n in graph.node:
        n.doc_string = f"This is {n.name}."
        _note(n, origin=f"layers/{n.name}", number="1")
    for info in (*graph.input, *graph.output):
        info.doc_string = f"Tensor {info.name}."
        _note(info, tensor=info.name)
    graph.input[0].type.denotation = "IMAGE"
    for dim, meaning in zip(
        graph.input[0].type.tensor_type.shape.dim,
        ("DATA_BATCH", "DATA_CHANNEL", "DATA_FEATURE", "DATA_FEATURE"),
        strict=True,
    ):
        dim.denotation = meaning
    inferred = onnx.shape_inference.infer_shapes(model)
    graph.value_info.extend(inferred.graph.value_info)
    for info in graph.value_info:
        info.doc_string = f"Value {info.name}."
    onnx.checker.check_model(model, full_check=True)
    return model


def _note(message, **properties: str) -> None:
    for key, value in properties.items():
        message.metadata_props.add(key=key, value=value)


def check(model: ModelProto) -> None:
    """The model is valid, and all the shapes it states are right."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def same(model: ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


@each_step
@pytest.mark.parametrize(
    "field",
    "ir_version producer_name producer_version domain model_version doc_string metadata_props "
    "opset_import".split(),
)
def test_model_fields(step, field):
    model = described()
    result = step(model)
    assert getattr(result, field) == getattr(model, field)


@each_step
@pytest.mark.parametrize("field", "name doc_string metadata_props input output".split())
def test_graph_fields(step, field):
    """Inputs and outputs with their names, types, symbolic sizes and documentation."""
    model = described()
    result = step(model)
    assert getattr(result.graph, field) == getattr(model.graph, field)


@each_step
def test_node_fields(step):
    model = described()
    result = step(model)
    check(result)
    before = {n.name: n for n in model.graph.node}
    survivors = [n for n in result.graph.node if n.name in before]
    assert {n.name for n in survivors} >= {"conv1", "relu1", "conv2", "relu2", "gemm1"}
    for n in survivors:
        old = before[n.name]
        assert n.op_type == old.op_type
        assert n.doc_string == old.doc_string
        assert n.metadata_props == old.metadata_props
        assert sorted(a.name for a in n.attribute) == sorted(a.name for a in old.attribute)


@each_step
def test_node_names_are_unique(step):
    result = step(described())
    names = [n.name for n in result.graph.node]
    assert len(set(names)) == len(names) and all(names)


@each_step
def test_value_info(step):
    model = described()
    result = step(model)
    check(result)
    tensors = {name for n in result.graph.node for name in n.output}
    stated = {v.name: v for v in result.graph.value_info}
    known = {v.name: v for v in model.graph.value_info}
    outputs = {o.name for o in result.graph.output}
    assert set(stated) <= tensors, "of a tensor that has gone"
    assert set(stated) >= (tensors & set(known)) - outputs
    for name in set(stated) & set(known):
        assert stated[name].doc_string == known[name].doc_string
    bare = ModelProto.FromString(same(result))
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph.value_info
    right = {v.name: v.type.tensor_type for v in inferred}
    for name, info in stated.items():
        kind = info.type.tensor_type
        assert kind.elem_type == right[name].elem_type
        sizes = [d.dim_value for d in kind.shape.dim]
        assert sizes == [d.dim_value for d in right[name].shape.dim]
        assert len(sizes) < 4 or kind.shape.dim[0].dim_param == "batch"


def test_value_info_has_the_new_sizes():
    result, _ = simplify(described(12, 12))
    sizes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in result.graph.value_info
    }
    assert sizes["relu1.out"] == ["batch", 8, 12, 12]
    assert sizes["globalaveragepool1.out"] == ["batch", 12, 1, 1]
    assert sizes["flatten1.out"] == ["batch", 12]


def test_function_is_the_same():
    model = described()
    for step in STEPS.values():
        result = step(model)
        for sizes in ({"height": 10, "width": 13}, {"height": 17, "width": 8, "batch": 3}):
            assert_same_function(model, result, random_feeds(model, 1, **sizes))


def test_sample(sample_model):
    result, report = simplify(sample_model)
    check(result)
    assert report.channels_removed > 0
    for field in "ir_version producer_name metadata_props opset_import doc_string".split():
        assert getattr(result, field) == getattr(sample_model, field)
    assert result.graph.input == sample_model.graph.input
    assert result.graph.output == sample_model.graph.output


def test_through_a_file(cli, tmp_path):
    model = described()
    onnx.save(model, tmp_path / "in.onnx")
    expected, _ = simplify(model)
    for options in ([], ["--save-external-data"]):
        assert cli(tmp_path / "in.onnx", tmp_path / "out.onnx", *options).code == 0
        found = onnx.load(tmp_path / "out.onnx")
        for tensor in expected.graph.initializer:
            np.testing.assert_array_equal(
                initializer(found, tensor.name), numpy_helper.to_array(tensor)
            )
        found.graph.ClearField("initializer")
        rest = ModelProto.FromString(same(expected))
        rest.graph.ClearField("initializer")
        assert same(found) == same(rest)


# Versions.


@pytest.mark.parametrize("opset", opsets(range(7, 23)))
def test_opset(opset):
    model = small_cnn(opset=opset).model()
    result, report = simplify(model)
    check(result)
    assert result.opset_import == model.opset_import
    assert report.channels_removed == 20
    assert_same_function(model, result, random_feeds(model))


@pytest.mark.parametrize("version", [3, 4, 6, 8, 9, 10])
def test_ir_version(version):
    g = small_cnn(opset=8)
    g.ir_version = version
    model = g.model()
    before = same(model)
    result, report = simplify(model)
    check(result)
    assert same(model) == before
    assert result.ir_version == version
    assert report.channels_removed == 20
    weights = {t.name for t in result.graph.initializer}
    assert [i.name for i in result.graph.input if i.name not in weights] == ["image"]
    assert weights <= {i.name for i in result.graph.input} or version > 3
    assert_same_function(model, result, random_feeds(model))


def test_the_domain_may_be_spelled_out():
    model = small_cnn().model()
    model.opset_import[0].domain = "ai.onnx"
    result, report = simplify(model)
    assert report.channels_removed == 20
    assert result.opset_import == model.opset_import


# Inputs and outputs.


@pytest.mark.parametrize(
    "shape",
    [
        ("batch", 3, "height", "width"),
        ("N", 3, 12, "N"),
        (None, 3, None, None),
        (None, 3, 12, 12),
        (1, 3, 12, 12),
        ("batch + 1", 3, 12, 12),
    ],
    ids=str,
)
def test_dimensions(shape):
    model = small_cnn(shape=shape).model()
    result, report = simplify(model)
    check(result)
    assert result.graph.input == model.graph.input
    assert result.graph.output == model.graph.output
    free = any(not isinstance(size, int) for size in shape[2:])
    assert report.channels_removed > 0 if free else report.channels_removed == 20


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8, np.bool_])
def test_types_of_inputs(dtype):
    g = Graph()
    x = g.op("Cast", g.input("x", ["n", 3, 8, 8], dtype), to=TensorProto.FLOAT)
    x = g.conv(x, pruned(g.normal(8, 3, 3, 3), [0, 1, 4, 6]), g.normal(8))
    x = g.conv(g.op("Sigmoid", g.batchnorm(x, 8)), g.normal(4, 8, 1, 1), g.normal(4))
    to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    g.output(x)
    if dtype in (np.float16, np.float64):
        g.output(g.op("Cast", x, to=to))
    model = g.model()
    result, report = simplify(model)
    check(result)
    assert report.channels_removed == 4
    assert result.graph.input == model.graph.input
    assert result.graph.output == model.graph.output
    assert_same_function(model, result, random_feeds(model), rtol=1e-3)


def test_many_inputs_and_outputs_keep_their_order():
    g = Graph()
    a, unused, b = (g.input(n, ["n", 3, 8, 8]) for n in "a unused b".split())
    x = g.op("Add", a, b)
    weight = pruned(g.normal(8, 3, 3, 3), [0, 1, 4, 6])
    x = g.op("Relu", g.batchnorm(g.conv(x, weight, g.normal(8), pads=[1] * 4), 8), outputs=["z"])
    y = g.conv(x, g.normal(4, 8, 3, 3), g.normal(4), outputs=["y"])
    g.output(y, x, g.op("Sigmoid", y, outputs=["a_last"]))
    model = g.model()
    result, _ = simplify(model)
    check(result)
    assert result.graph.input == model.graph.input
    assert result.graph.output == model.graph.output
    assert_same_function(model, result, random_feeds(model))
    assert unused in {i.name for i in result.graph.input}


@pytest.mark.parametrize("kind", ["input", "initializer"])
def test_outputs_that_are_not_computed(kind):
    g = small_cnn()
    model = g.model()
    if kind == "input":
        model.graph.output.append(model.graph.input[0])
    else:
        info = helper.make_tensor_value_info("conv1.weight", TensorProto.FLOAT, (16, 3, 3, 3))
        model.graph.output.append(info)
    result, _ = simplify(model)
    check(result)
    assert result.graph.output == model.graph.output
    assert_same_function(model, result, random_feeds(model))


# Representations.


def local_function() -> ModelProto:
    """A network whose first activation is a local function."""
    g = small_cnn()
    g.domains["local"] = 1
    g.functions.append(
        helper.make_function(
            "local",
            "Swish",
            ["x"],
            ["y"],
            [
                helper.make_node("Sigmoid", ["x"], ["s"], name="inner"),
                helper.make_node("Mul", ["x", "s"], ["y"]),
            ],
            [helper.make_opsetid("", 17)],
        )
    )
    n = g.nodes[2]
    n.op_type, n.domain = "Swish", "local"
    model = g.model(producer_name="trainer", model_version=7)
    helper.set_model_props(model, {"names": "ant, bee"})
    node(model, "conv1").doc_string = "The first one."
    _note(node(model, "conv1"), origin="stem")
    onnx.checker.check_model(model, full_check=True)
    return model


@each_step
def test_functions_are_inlined(step):
    model = local_function()
    before = same(model)
    result = step(model)
    check(result)
    assert same(model) == before
    assert not result.functions
    assert count(result, "Swish") == 0 and count(result, "Mul") == 1
    assert_same_function(model, result, random_feeds(model))
    for field in ("producer_name", "model_version", "metadata_props", "ir_version"):
        assert getattr(result, field) == getattr(model, field)
    assert node(result, "conv1").doc_string == "The first one."
    assert node(result, "conv1").metadata_props == node(model, "conv1").metadata_props


def test_functions_do_not_hinder():
    result, report = simplify(local_function())
    assert report.channels_removed == 20
    assert initializer(result, "conv1.weight").shape == (8, 3, 3, 3)


def test_weights_in_every_representation():
    g = small_cnn()
    model = g.model()
    raw, _ = simplify(model)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values.ravel())
        )
        assert tensor.float_data
    before = same(model)
    typed, _ = simplify(model)
    assert same(model) == before
    assert same(typed) == same(raw)
    # Weights from Constant nodes.
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for tensor in model.graph.initializer:
        model.graph.node.append(helper.make_node("Constant", [], [tensor.name], value=tensor))
    model.graph.node.extend(nodes)
    del model.graph.initializer[:]
    result, report = simplify(model)
    check(result)
    assert report.channels_removed == 20
    assert_same_function(raw, result, random_feeds(raw))


def test_sparse_initializers():
    g = Graph()
    x = g.op("MatMul", g.input("x", ["n", 6]), "sparse")
    x = g.gemm(g.op("Relu", x), pruned(g.normal(8, 4), [2, 3, 5, 7]), g.normal(8))
    g.output(g.gemm(g.op("Sigmoid", x), g.normal(3, 8), g.normal(3)), shape=["n", 3])
    model = g.model()
    values = numpy_helper.from_array(np.array([1, 2, -3], np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([1, 6, 19]), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [6, 4]))
    result, _ = simplify(model)
    onnx.checker.check_model(result)
    assert_same_function(model, result, random_feeds(model))


# Where a model comes from.


@each_step
def test_sources_give_the_same_result(step, tmp_path):
    model = described()
    path = tmp_path / "in.onnx"
    onnx.save(model, path)
    expected = same(step(model))
    for source in (path, str(path), os.fspath(path), path.read_bytes(), model.SerializeToString()):
        assert same(step(source)) == expected
    again = step(ModelProto.FromString(same(model)))
    assert same(again) == expected


def test_external_data_gives_the_same_result(sample_model, tmp_path):
    expected, _ = simplify(sample_model)
    onnx.save(sample_model, tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0)
    found, _ = simplify(tmp_path / "in.onnx")
    assert same(found) == same(expected)


def test_the_reports_agree_as_well(path):
    first, second, third = (simplify(s)[1] for s in (path, path.read_bytes(), onnx.load(path)))
    assert first.layers == second.layers == third.layers
    assert first.after == second.after == third.after
    # A message in memory has no file size of its own; its parts count.
    figures = [replace(r.before, bytes=0) for r in (first, second, third)]
    assert figures[0] == figures[1] == figures[2]


FUNCTIONS: dict[str, Callable[[ModelProto], object]] = {
    **STEPS,
    "simplify, pinned": lambda m: simplify(m, pinned=["conv1"], skip=["fold_batchnorm"]),
    "get_bn_folding": get_bn_folding,
    "get_pinned": get_pinned,
    "verify": lambda m: verify(m, m),
    "benchmark": lambda m: benchmark({"a": m, "b": m}, rounds=1),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("build", [described, local_function], ids=["described", "function"])
def test_the_argument_is_not_modified(function, build):
    model = build()
    before = same(model)
    function(model)
    assert same(model) == before


@each_step
def test_the_argument_and_the_result_are_independent(step):
    model = described()
    before = same(model)
    result = step(model)
    result.graph.node[0].name = "changed"
    for tensor in result.graph.initializer:
        tensor.raw_data = bytes(len(tensor.raw_data))
    assert same(model) == before


@each_step
def test_the_file_is_not_modified(step, path: Path):
    before = path.read_bytes(), path.stat().st_mtime_ns
    step(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert list(path.parent.iterdir()) == [path]


def test_bodies_stay_to_the_letter():
    g = Graph()
    x = g.input("x", ["n", 3, 8, 8])
    flag = g.input("flag", [], np.bool_)
    x = g.conv(x, pruned(g.normal(8, 3, 3, 3), [0, 1, 4, 6]), g.normal(8), pads=[1] * 4)
    x = g.op("Relu", g.batchnorm(x, 8), outputs=["features"])
    branches = []
    for op in ("Sigmoid", "Tanh"):
        inner = helper.make_node(op, ["features"], [f"{op}.out"], f"inner {op}", doc_string="Doc.")
        _note(inner, origin=op)
        info = helper.make_tensor_value_info(f"{op}.out", TensorProto.FLOAT, None)
        branches.append(helper.make_graph([inner], op, [], [info], doc_string="A body."))
    y = g.op("If", flag, then_branch=branches[0], else_branch=branches[1])
    g.output(g.conv(y, g.normal(4, 8, 1, 1), g.normal(4)), shape=["n", 4, 8, 8])
    model = g.model()
    result, _ = simplify(model)
    onnx.checker.check_model(result)
    assert list(node(result, "if1").attribute) == list(node(model, "if1").attribute)
    assert_same_function(model, result, random_feeds(model, 4))


def pruned_branches(view: bool) -> onnx.ModelProto:
    """Filters and scales pruned apart, so that branches die in a second turn; free batch.

    The file states all shapes; those behind a target that is computed, nobody can infer.
    """
    g = Graph(18)
    x = g.input("x", ["batch", 3, 12, 12])
    batch = g.op("Shape", x, start=0, end=1)

    def layer(y: str, inputs: int, outputs: int, kernel: int) -> str:
        dead = g.rng.permutation(outputs)[: int(0.8 * outputs)]
        weight = pruned(g.normal(outputs, inputs, kernel, kernel), dead)
        y = g.conv(y, weight, g.normal(outputs), pads=[kernel // 2] * 4)
        scale, *others = g.statistics(outputs)
        scale[g.rng.permutation(outputs)[: int(0.8 * outputs)]] = 0
        return g.op("Relu", g.op("BatchNormalization", y, scale, *others))

    y = layer(x, 3, 40, 3)
    y = g.op("Concat", *(layer(y, 40, 20, k) for k in (1, 3, 5)), axis=1)
    y = g.op("ReduceMean", y, np.array([2, 3]), keepdims=int(view))
    target = g.op("Concat", g.op("Reshape", batch, np.array([-1])), np.array([60]), axis=0)
    y = g.op("Reshape", y, target, allowzero=1)
    g.output(g.gemm(y, g.normal(10, 60), g.normal(10)))
    return onnx.shape_inference.infer_shapes(g.model(), data_prop=True)


def shapes_of(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors really have, by name."""
    names = [t for n in model.graph.node for t in n.output if t]
    found = run(with_outputs(model, *names), feeds, optimize=False)
    return {name: values.shape for name, values in found.items()}


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("skip", [(), ("fold_batchnorm",)])
def test_stated_shapes_are_true(view, steps, skip):
    model = pruned_branches(view)
    if steps:
        folded = model if skip else fold_batchnorm(model)
        result = remove_zeroed(propagate_bias(folded))
    else:
        result, _ = simplify(model, skip=skip)
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)}
    assert_same_function(model, result, [feeds])
    real = shapes_of(result, feeds)
    for info in result.graph.value_info:
        dims = info.type.tensor_type.shape.dim
        assert len(dims) == len(real[info.name]), info.name
        for dim, size in zip(dims, real[info.name], strict=True):
            assert not dim.HasField("dim_value") or dim.dim_value == size, info.name


# Training information.


def trained(model: ModelProto) -> ModelProto:
    """The model, and how its weights are updated: they shrink by a tenth."""
    updates, bindings = [], []
    for tensor in model.graph.initializer:
        updates.append(helper.make_node("Mul", [tensor.name, "rate"], [f"{tensor.name}.new"]))
        bindings.append((tensor.name, f"{tensor.name}.new"))
    rate = numpy_helper.from_array(np.array(0.9, np.float32), "rate")
    algorithm = helper.make_graph(updates, "shrink", [], [], [rate])
    model.training_info.append(helper.make_training_info(algorithm, bindings, None, None))
    onnx.checker.check_model(model)
    return model


def dense() -> ModelProto:
    """A network of which nothing can be removed."""
    g = Graph()
    x = g.op("Relu", g.conv(g.input("x", ["n", 3, 8, 8]), g.normal(8, 3, 3, 3), g.normal(8)))
    g.output(g.conv(x, g.normal(4, 8, 3, 3), g.normal(4)))
    return g.model()


@each_step
def test_training_information_of_other_weights_is_dropped(step):
    """It would bind tensors that are gone, or have other shapes."""
    model = trained(small_cnn().model())
    result = step(model)
    assert not result.training_info and model.training_info
    onnx.checker.check_model(result)
    assert_same_function(model, result, random_feeds(model))


@each_step
def test_training_information_stays_where_the_weights_do(step):
    model = trained(dense())
    assert step(model).training_info == model.training_info


def test_a_note_says_that_training_information_was_dropped(cli, tmp_path):
    onnx.save(trained(small_cnn().model()), tmp_path / "in.onnx")
    result = cli(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert "note: training information was dropped: " in result.out
    for model in (dense(), trained(dense()), small_cnn().model()):
        assert not [n for n in simplify(model)[1].notes if "training" in n]
