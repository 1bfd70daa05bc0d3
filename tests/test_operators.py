"""Small named models: what is removed, and that the function stays, at sizes nobody probed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnx_simplify
from build import Graph, assert_same_function, count, gated_constants, initializer, pruned, run
from onnx_simplify.facts.facts import Facts
from onnx_simplify.graph.load import load


def weight_shape(model: onnx.ModelProto, op: str, index: int = 0) -> tuple[int, ...]:
    """Shape of the weight of the index-th node of this operator."""
    nodes = [n for n in model.graph.node if n.op_type == op]
    return initializer(model, nodes[index].input[1]).shape


def simplified(model: onnx.ModelProto, *sizes: dict[str, int], rtol: float = 1e-5):
    """Simplify as far as possible and compare values, also pass by pass."""
    result, _ = onnx_simplify.simplify(model, channel_multiple=1)
    random = np.random.default_rng(7)
    feeds = []
    for free in sizes or ({}, {}):
        feed = {}
        for info in model.graph.input:
            dims = info.type.tensor_type.shape.dim
            shape = [free.get(d.dim_param, 1) if d.dim_param else d.dim_value for d in dims]
            feed[info.name] = random.standard_normal(shape).astype(np.float32)
        feeds.append(feed)
    assert_same_function(model, result, feeds, rtol=rtol)
    step = onnx_simplify.propagate_bias(onnx_simplify.fold_batchnorm(model))
    assert_same_function(model, step, feeds, rtol=rtol)
    again, report = onnx_simplify.simplify(result, channel_multiple=1)
    assert report.after.parameters == report.before.parameters
    return result


def number(value: float) -> np.ndarray:
    """A scalar initializer."""
    return np.array(value, np.float32)


def two_layers(middle, *, shape=("n", 3, "h", "w"), second=None, opset=17, dead=(0, 2, 5)):
    """Conv of 8 filters, three of them pruned with a live bias, then ``middle``, then Conv."""
    g = Graph(opset=opset)
    x = g.input("x", list(shape))
    first = g.conv(x, pruned(g.normal(8, shape[1], 3, 3), dead), g.normal(8), pads=[1] * 4)
    y = middle(g, first)
    out = g.conv(y, g.normal(4, second or 8, 1, 1), g.normal(4))
    g.output(out)
    return g.model()


SIZES = ({"n": 1, "h": 11, "w": 9}, {"n": 3, "h": 6, "w": 17})

PASSING = {
    "sigmoid": lambda g, y: g.op("Sigmoid", y),
    "hard sigmoid": lambda g, y: g.op("HardSigmoid", y),
    "softplus": lambda g, y: g.op("Softplus", y),
    "clip": lambda g, y: g.op("Clip", y, number(-0.5), number(0.7)),
    "prelu": lambda g, y: g.op("PRelu", y, g.normal(8, 1, 1)),
    "batchnorm": lambda g, y: g.batchnorm(g.op("Relu", y), 8),
    "scale": lambda g, y: g.op("Mul", y, g.normal(1, 8, 1, 1)),
    "compare": lambda g, y: g.op("Cast", g.op("Greater", y, number(0.1)), to=1),
    "where": lambda g, y: g.op("Where", g.op("Less", y, number(0)), number(0.3), y),
    "max pool": lambda g, y: g.op(
        "MaxPool", y, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2], ceil_mode=1
    ),
    "average pool": lambda g, y: g.op("AveragePool", y, kernel_shape=[2, 2]),
    "average pool without padding": lambda g, y: g.op(
        "AveragePool", y, kernel_shape=[3, 3], pads=[1] * 4
    ),
    "resize": lambda g, y: g.op(
        "Resize", y, None, np.array([1, 1, 2, 2], np.float32), mode="nearest"
    ),
    "reflect": lambda g, y: g.op("Pad", y, np.array([0, 0, 1, 2] * 2), mode="reflect"),
    "transpose twice": lambda g, y: g.op(
        "Transpose", g.op("Relu", g.op("Transpose", y, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2]
    ),
    "slice of space": lambda g, y: g.op(
        "Slice", y, np.array([1]), np.array([-1]), np.array([2]), np.array([2])
    ),
    "residual": lambda g, y: g.op("Add", y, g.op("Relu", y)),
}


@pytest.mark.parametrize("name", PASSING)
def test_constant_channels_pass_at_any_size(name):
    result = simplified(two_layers(PASSING[name]), *SIZES)
    assert weight_shape(result, "Conv")[0] == 5
    assert weight_shape(result, "Conv", 1)[1] == 5


def gate(g: Graph, y: str) -> str:
    pooled = g.op("GlobalAveragePool", y)
    small = g.op("Relu", g.conv(pooled, g.normal(4, 8, 1, 1), g.normal(4)))
    return g.op("Mul", y, g.op("Sigmoid", g.conv(small, g.normal(8, 4, 1, 1), g.normal(8))))


def shuffle(g: Graph, y: str) -> str:
    split = g.op("Reshape", y, np.array([0, 2, 4, 6, 6]))
    return g.op("Reshape", g.op("Transpose", split, perm=[0, 2, 1, 3, 4]), np.array([0, 8, 6, 6]))


def computed_reshape(g: Graph, y: str) -> str:
    shape = g.op("Shape", y)
    batch = g.op("Unsqueeze", g.op("Gather", shape, np.array(0)), np.array([0]))
    target = g.op("Concat", batch, np.array([8, 36]), axis=0)
    return g.op("Unsqueeze", g.op("Reshape", y, target), np.array([3]))


STATIC = {
    "shuffle": (shuffle, 5),
    "computed reshape": (computed_reshape, 5),
    "split": (lambda g, y: g.op("Concat", *g.op("Split", y, outputs=2, axis=1), axis=1), 5),
    "gather": (lambda g, y: g.op("Gather", y, np.array([7, 0, 3, 3, 1]), axis=1), 3),
    "step": (
        lambda g, y: g.op("Slice", y, np.array([7]), np.array([-9]), np.array([1]), np.array([-2])),
        3,
    ),
    "space to depth": (lambda g, y: g.op("SpaceToDepth", y, blocksize=2), 5),
    "padding with ones": (
        lambda g, y: g.op("Pad", y, np.array([0, 0, 1, 1] * 2), number(1)),
        5,
    ),
    "average with padding": (
        lambda g, y: g.op("AveragePool", y, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
        5,
    ),
}


@pytest.mark.parametrize("name", STATIC)
def test_structure_with_static_sizes(name):
    middle, kept = STATIC[name]
    second = {"gather": 5, "step": 4, "space to depth": 32}.get(name)
    # Wide enough for a map to be worth less than what it replaces.
    model = two_layers(middle, shape=("n", 24, 6, 6), second=second)
    result = simplified(model, {"n": 1}, {"n": 4})
    assert weight_shape(result, "Conv")[0] == kept


def test_padded_convolution_at_any_size_keeps_one_channel_for_all():
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    y = g.op("Relu", g.conv(x, pruned(g.normal(8, 3, 1, 1), [0, 2, 5]), np.abs(g.normal(8)) + 0.1))
    g.output(g.conv(y, g.normal(4, 8, 3, 3), g.normal(4), pads=[1] * 4))
    result = simplified(g.model(), *SIZES)
    assert weight_shape(result, "Conv", 1)[1] == 6
    assert count(result, "Add") == 0


def test_padded_convolution_of_static_size_adds_a_map():
    g = Graph()
    x = g.input("x", ["n", 3, 24, 24])
    y = g.op("Relu", g.conv(x, pruned(g.normal(8, 3, 1, 1), [0, 2, 5]), np.abs(g.normal(8)) + 0.1))
    g.output(g.conv(y, g.normal(16, 8, 3, 3), g.normal(16), pads=[1] * 4))
    result = simplified(g.model(), {"n": 1}, {"n": 2})
    assert weight_shape(result, "Conv", 1)[1] == 5
    # Stored by its distinct rows and columns.
    assert count(result, "Add") == 1 and count(result, "Gather") == 2


def test_grouped_and_depthwise_convolutions_lose_dead_groups():
    g = Graph()
    x = g.input("x", ["n", 4, 9, 9])
    y = g.conv(x, pruned(g.normal(8, 4, 3, 3), [0, 1, 2, 3]), g.normal(8), pads=[1] * 4)
    y = g.conv(g.op("Relu", y), g.normal(16, 1, 3, 3), g.normal(16), group=8, pads=[1] * 4)
    y = g.conv(g.op("Relu", y), g.normal(6, 8, 3, 3), g.normal(6), group=2, pads=[1] * 4)
    g.output(g.conv(y, g.normal(5, 6, 1, 1), g.normal(5)))
    result = simplified(g.model(), {"n": 1}, {"n": 2})
    assert [weight_shape(result, "Conv", k)[0] for k in range(4)] == [4, 8, 3, 5]


def test_channels_nobody_reads_go():
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    y = g.op("Relu", g.conv(x, g.normal(8, 3, 3, 3), g.normal(8)))
    g.output(g.conv(y, pruned(g.normal(4, 8, 3, 3), [1, 6], axis=1), g.normal(4)))
    result = simplified(g.model(), *SIZES)
    assert weight_shape(result, "Conv") == (6, 3, 3, 3)


def test_constant_branch_of_a_residual_block_disappears():
    g = Graph()
    x = g.input("x", ["n", 4, "h", "w"])
    stream = g.op("Relu", g.conv(x, g.normal(4, 4, 1, 1), g.normal(4)))
    branch = g.conv(stream, np.zeros((4, 4, 3, 3), np.float32), g.normal(4), pads=[1] * 4)
    g.output(g.op("Relu", g.op("Add", stream, g.op("Sigmoid", branch))))
    result = simplified(g.model(), *SIZES)
    assert count(result, "Conv") == 1 and count(result, "Sigmoid") == 0


def test_shared_weights_never_shrink_under_another_user():
    g = Graph()
    x = g.input("x", ["n", 6, "h", "w"])
    shared = g.const(g.normal(6, 6, 1, 1), "shared")
    y = g.conv(g.conv(x, pruned(g.normal(6, 6, 1, 1), [0, 3]), g.normal(6)), shared)
    g.output(y, g.conv(x, shared))
    result = simplified(g.model(), *SIZES)
    assert initializer(result, "shared").shape == (6, 6, 1, 1)


@pytest.mark.parametrize("same", [True, False])
def test_shared_weights_that_are_absorbed_into_and_cut(same):
    """Both users drop the same columns, so they share the new weight, and cut it on their own."""
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    shared = g.const(g.normal(6, 6, 1, 1), "shared")
    outputs = []
    for dead in ([0, 3], [0, 3] if same else [1]):
        y = g.op("Relu", g.conv(x, pruned(g.normal(6, 3, 1, 1), [0, 3]), np.ones(6, np.float32)))
        y = g.conv(y, shared, g.normal(6))
        weight = g.normal(4, 6, 1, 1)
        weight[:, dead] = 0
        outputs.append(g.conv(y, weight, g.normal(4)))
    g.output(*outputs)
    result = simplified(g.model(), *SIZES)
    assert count(result, "Conv") == 6
    rows = {tuple(t.dims)[:2] for t in result.graph.initializer if len(t.dims) == 4}
    assert (4, 4) in rows and ((5, 4) in rows) is not same


def test_one_bias_shared_by_folded_convolutions():
    g = Graph()
    x = g.input("x", ["n", 6, "h", "w"])
    bias = g.const(np.zeros(6, np.float32), "zeros")
    y = x
    for _ in range(4):
        y = g.op("Relu", g.batchnorm(g.conv(y, g.normal(6, 6, 1, 1), bias), 6))
    g.output(y)
    assert count(simplified(g.model(), *SIZES), "BatchNormalization") == 0


def test_same_weight_in_two_orientations():
    g = Graph(opset=13)
    x = g.input("x", ["n", 1])
    weight = g.const(np.array([[0.6], [0.0], [-1.1], [1.3]], np.float32), "weight")
    y = g.op("Relu", g.gemm(x, weight, g.normal(4)))
    g.output(g.gemm(y, weight, g.normal(1), transB=0))
    simplified(g.model(), {"n": 1}, {"n": 5})


def test_scalar_gather_keeps_its_rank():
    model = two_layers(
        lambda g, y: g.op("Unsqueeze", g.op("Gather", y, np.array(3), axis=1), np.array([1])),
        second=1,
    )
    assert weight_shape(simplified(model, *SIZES), "Conv")[0] == 1


@pytest.mark.parametrize("op", ["Gather", "Slice"])
def test_computed_indices_are_needed_and_move_maps(op):
    g = Graph()
    x = g.input("x", [1, 3, 8, 8])
    y = g.conv(x, pruned(g.normal(4, 3, 1, 1), [0, 2]), g.normal(4))
    position = g.op("Add", y, g.normal(1, 1, 8, 1))
    indices = 5 if op == "Gather" else 1
    pooled = g.op("GlobalMaxPool", g.conv(x, g.normal(indices, 3, 1, 1)))
    pooled = g.op("Reshape", pooled, np.array([indices]))
    index = g.op("Cast", g.op("Floor", g.op("Abs", pooled)), to=7)
    index = g.op("Min", index, np.array([7]))
    if op == "Gather":
        z = g.op("Gather", position, index, axis=2)
    else:
        z = g.op("Slice", position, index, np.array([8]), np.array([2]))
    g.output(g.conv(z, g.normal(4, 4, 1, 1), g.normal(4)))
    simplified(g.model())


def test_computed_pad_value_is_no_constant():
    g = Graph()
    x = g.input("x", [1, 3, 5, 5])
    y = g.conv(x, pruned(g.normal(4, 3, 1, 1), [0, 2]), g.normal(4))
    lowest = g.op("ReduceMin", x, keepdims=0)
    y = g.op("Relu", g.op("Pad", y, np.array([0, 0, 1, 1] * 2), lowest))
    g.output(g.conv(y, g.normal(6, 4, 1, 1), g.normal(6)))
    model = g.model()
    # For inputs around zero the lowest value is negative, and ReLU hides that it varies.
    feeds = {"x": np.random.default_rng(1).uniform(0.5, 1.5, (1, 3, 5, 5)).astype(np.float32)}
    assert_same_function(model, simplified(model), [feeds])


def test_where_a_map_is_read_may_be_computed():
    g = Graph()
    x = g.input("x", [1, 3, 8, 8])
    row = g.input("row", [1], dtype=np.int64)
    y = g.conv(x, pruned(g.normal(4, 3, 1, 1), [0, 2]), g.normal(4))
    # Rows 0 and 1, which made-up inputs ask for, hold the same.
    position = g.normal(1, 1, 8, 1)
    position[:, :, 1] = position[:, :, 0]
    z = g.op("Gather", g.op("Add", y, position), row, axis=2)
    g.output(g.conv(z, g.normal(4, 4, 1, 1), g.normal(4)))
    model = g.model()
    result, _ = onnx_simplify.simplify(model, channel_multiple=1)
    image = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    feeds = [{"x": image, "row": np.array([k])} for k in (0, 5)]
    assert_same_function(model, result, feeds)


def test_sums_over_dynamic_sizes_are_no_constants():
    model = two_layers(lambda g, y: g.op("ReduceSum", y, np.array([2, 3]), keepdims=1))
    assert weight_shape(simplified(model, *SIZES), "Conv")[0] == 8


def test_output_that_does_not_depend_on_the_input():
    g = Graph()
    x = g.input("x", ["n", 3, 8, 8])
    y = g.op("Relu", g.conv(x, np.zeros((5, 3, 3, 3), np.float32), g.normal(5)))
    g.output(g.conv(y, g.normal(4, 5, 3, 3), g.normal(4)))
    result = simplified(g.model(), {"n": 1}, {"n": 3})
    assert count(result, "Conv") == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_special_values_in_weights_stay(value):
    g = Graph()
    x = g.input("x", ["n", 3, 8, 8])
    weight = np.zeros((4, 3, 1, 1), np.float32)
    weight[1, 0] = value
    weight[3] = 1
    g.output(g.op("Relu", g.conv(x, weight, g.normal(4))))
    result, _ = onnx_simplify.simplify(g.model(), verify=False, channel_multiple=1)
    assert weight_shape(result, "Conv") == (4, 3, 1, 1)


@pytest.mark.parametrize("kind", ["float16", "float64", "bfloat16"])
def test_other_number_formats(kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(kind, np.dtype(kind))
    g = Graph()
    x = g.input("x", [1, 3, 8, 8], dtype=dtype)
    weight = pruned(g.normal(8, 3, 3, 3), [0, 2, 5]).astype(dtype)
    y = g.op("Relu", g.conv(x, weight, g.normal(8).astype(dtype)))
    g.output(g.conv(y, g.normal(4, 8, 3, 3).astype(dtype), g.normal(4).astype(dtype)), dtype=dtype)
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert weight_shape(result, "Conv")[0] == 5
    assert initializer(result, result.graph.node[0].input[1]).dtype == dtype
    assert report.verification.worst <= (1e-6 if kind == "float64" else 1e-2)


def test_node_order_and_names_do_not_matter():
    model = two_layers(gate, shape=("n", 3, 6, 6))
    result = simplified(model, {"n": 1}, {"n": 2})
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for k, node in enumerate(other.graph.node):
        node.name = f"z{len(other.graph.node) - k}"
    nodes = list(other.graph.node)[::-1]
    del other.graph.node[:]
    other.graph.node.extend(nodes)
    # Nodes in reverse order are no valid model, but what a careless exporter may write.
    again, _ = onnx_simplify.simplify(other, channel_multiple=1)
    shapes = [sorted(tuple(t.dims) for t in m.graph.initializer) for m in (result, again)]
    assert shapes[0] == shapes[1]


def test_alignment_keeps_dead_channels_up_to_a_multiple():
    model = two_layers(PASSING["sigmoid"], dead=(0, 2, 5, 6))
    aligned, _ = onnx_simplify.simplify(model, channel_multiple=8)
    assert weight_shape(aligned, "Conv")[0] == 8
    tight, _ = onnx_simplify.simplify(model, channel_multiple=4)
    assert weight_shape(tight, "Conv")[0] == 4


@pytest.mark.parametrize("dims", [("?", "?", "?"), ("n", "s", "s"), ("n", "n", "w")])
def test_dimension_names_that_stand_for_nothing(dims):
    g = Graph()
    x = g.input("x", [dims[0], 3, dims[1], dims[2]])
    g.output(g.op("Relu", g.conv(x, np.zeros((4, 3, 1, 1), np.float32), g.normal(4))))
    model = g.model()
    result, _ = onnx_simplify.simplify(model, channel_multiple=1)
    feeds = [{"x": np.ones(shape, np.float32)} for shape in ((2, 3, 5, 7), (1, 3, 6, 4))]
    assert_same_function(model, result, feeds)


def test_sizes_that_are_not_known_are_not_equal():
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    q = g.input("q", ["n", 4, "a", "b"])
    small = g.op("MaxPool", q, kernel_shape=[2, 2], strides=[2, 2])
    constant = g.conv(x, np.zeros((4, 3, 3, 3), np.float32), g.normal(4), strides=[2, 2])
    g.output(g.op("Add", small, constant))
    model = g.model()
    result, _ = onnx_simplify.simplify(model, verify=False, channel_multiple=1)
    random = np.random.default_rng(0)
    shapes = {"x": (1, 3, 9, 7), "q": (1, 4, 2, 2)}
    feeds = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    assert_same_function(model, result, [feeds])


def test_map_that_a_representative_is_computed_from_stays():
    # The gate is a map; clipped, the product is the same everywhere and stands for the others.
    model = gated_constants()
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}]
    step = onnx_simplify.propagate_bias(model, target="avx2")
    assert_same_function(model, step, feeds)
    result, _ = onnx_simplify.simplify(model, verify=False, channel_multiple=4)
    assert_same_function(model, result, feeds)


def test_folded_bias_is_rounded_once():
    g = Graph()
    x = g.input("x", [1, 2, 4, 4], dtype=np.float16)
    half = lambda *values: np.array(values, np.float16)  # noqa: E731
    y = g.conv(x, np.zeros((2, 2, 1, 1), np.float16), half(3.0, -2.0))
    scale, shift, mean, var = half(1, 1), half(0.5, 0.25), half(3.0, -2.0), half(1e-3, 1e-3)
    g.output(g.op("BatchNormalization", y, scale, shift, mean, var), dtype=np.float16)
    folded = onnx_simplify.fold_batchnorm(g.model())
    bias = initializer(folded, folded.graph.node[0].input[2])
    np.testing.assert_array_equal(bias, half(0.5, 0.25))


def test_overridable_target_of_a_reshape_stays_overridable():
    g = Graph()
    x = g.input("x", [2, 3, 4, 4])
    target = g.const(np.array([2, 4, 16]), "target")
    y = g.conv(x, pruned(g.normal(4, 3, 1, 1), [1]), g.normal(4))
    y = g.op("Reshape", g.op("Sigmoid", g.op("Reshape", y, target)), np.array([2, 4, 4, 4]))
    g.output(g.conv(y, g.normal(5, 4, 1, 1), g.normal(5)))
    model = g.model()
    info = onnx.helper.make_tensor_value_info("target", onnx.TensorProto.INT64, [3])
    model.graph.input.append(info)
    result, _ = onnx_simplify.simplify(model, channel_multiple=1)
    image = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    feeds = [{"x": image}, {"x": image, "target": np.array([2, 16, 4])}]
    assert_same_function(model, result, feeds)


def test_piece_sizes_of_a_split_are_no_shape():
    # As many pieces as axes, and spatial sizes that inference leaves open.
    g = Graph()
    x = g.input("x", ["n", 3, "h", "w"])
    y = g.conv(x, pruned(g.normal(8, 3, 3, 3), [0, 3, 5]), g.normal(8), strides=[2, 2])
    pieces = g.op("Split", y, np.array([2, 2, 2, 2]), outputs=4, axis=1)
    g.output(g.op("Sum", *pieces))
    facts = Facts(load(g.model()))
    (split,) = [n for n in facts.model.graph.nodes if n.op == "Split"]
    assert all(isinstance(d, str) for d in split.outputs[0].shape[2:])


def test_an_add_of_another_domain_takes_no_bias():
    g = Graph()
    x = g.input("x", [2, 4])
    y = g.batchnorm(g.op("MatMul", x, g.normal(4, 3)), 3)
    addend = g.const(g.normal(3), "addend")
    g.output(g.op("Add", y, addend, domain="example.custom"), shape=[2, 3], dtype=np.float32)
    model = g.model()
    model.opset_import.append(onnx.helper.make_opsetid("example.custom", 1))
    folded = onnx_simplify.fold_batchnorm(model)
    np.testing.assert_array_equal(initializer(folded, "addend"), initializer(model, "addend"))


def test_pooling_where_channels_became_a_batch():
    """Squeezed away, the batch leaves the channels on the first axis."""
    g = Graph(opset=17)
    weight = pruned(g.normal(4, 1, 3, 3), [1, 2])
    y = g.op("Relu", g.conv(g.input("x", [1, 1, 9, 8]), weight, g.normal(4) * 0, pads=[1] * 4))
    y = g.op("Squeeze", y, np.array([0]))
    y = g.op("AveragePool", y, kernel_shape=[3], pads=[1, 1], count_include_pad=1)
    g.output(g.op("ReduceMean", y, axes=[2], keepdims=0))
    simplified(g.model())


@pytest.mark.parametrize("seed", range(30))
def test_response_to_constants_under_padding(seed):
    """What taps see of constants and of padding, summed up, is what the convolution makes."""
    random = np.random.default_rng(seed)
    rank = int(random.integers(1, 4))
    groups, kernel = int(random.choice([1, 1, 2, 3])), random.integers(1, 4, rank).tolist()
    inputs, outputs = groups * int(random.integers(1, 4)), groups * int(random.integers(1, 4))
    sizes = random.integers(6, 11, rank).tolist()
    attributes = {
        "pads": random.integers(0, 3, 2 * rank).tolist(),
        "strides": random.integers(1, 3, rank).tolist(),
        "dilations": random.integers(1, 3, rank).tolist(),
        "group": groups,
    }
    g = Graph()
    weight = g.normal(outputs, inputs // groups, *kernel)
    g.output(g.conv(g.input("x", [1, inputs, *sizes]), weight, **attributes))
    facts = Facts(load(g.model()))
    (product,) = facts.contractions
    values = random.normal(size=inputs) * (random.random(inputs) < 0.7)
    found = product.border_response(values, facts)
    x = np.broadcast_to(values.reshape(-1, *[1] * rank), [1, inputs, *sizes]).astype(np.float32)
    (expected,) = run(g.model(), {"x": x}).values()
    for axis in range(rank):
        padded = attributes["pads"][axis] or attributes["pads"][axis + rank]
        assert found.shape[axis + 2] == (expected.shape[axis + 2] if padded else 1)
    assert np.allclose(np.broadcast_to(found, expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["GlobalAveragePool", "ReduceMean", "ReduceMax", "ReduceSum"])
def test_what_a_reduction_makes_of_a_map_is_a_number(pool):
    """Behind it, where elements go may be computed: there is but one number for each channel."""
    g = Graph()
    x = g.input("x", ["n", 3, 9, 7])
    y = g.op("Relu", g.conv(x, pruned(g.normal(8, 3, 1, 1), range(5)), g.normal(8)))
    # Channels that are maps, for they read constants under padding.
    weight = pruned(g.normal(16, 8, 3, 3), range(0, 16, 2))
    weight[1, 5:] = weight[3, 5:] = weight[5, 5:] = 0
    y = g.op("Relu", g.conv(y, weight, g.normal(16), pads=[1] * 4))
    if pool == "ReduceSum":
        y = g.op(pool, y, np.array([2, 3]))
    else:
        y = g.op(pool, y, **({} if pool.startswith("Global") else {"axes": [2, 3]}))
    batch = g.op("Slice", g.op("Shape", y), np.array([0]), np.array([1]))
    y = g.op("Reshape", y, g.op("Concat", g.op("Abs", batch), np.array([16]), axis=0))
    g.output(g.gemm(y, g.normal(4, 16), g.normal(4)))
    result, report = onnx_simplify.simplify(g.model(), channel_multiple=1)
    assert report.layers[1].outputs_after == 5
    random = np.random.default_rng(0)
    feeds = [{"x": random.standard_normal((n, 3, 9, 7), np.float32)} for n in (1, 3)]
    assert_same_function(g.model(), result, feeds)
