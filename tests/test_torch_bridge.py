"""PyTorch modules: exported, simplified, called, and compared with the module itself."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import dataclass

import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

import onnx_simplify  # noqa: E402
import torch_bridge  # noqa: E402
from onnx_simplify import SimplifyError, VerificationError  # noqa: E402
from onnx_simplify.errors import RunError  # noqa: E402
from torch_bridge import ExportError, pruning  # noqa: E402
from torch_bridge.calls import Call  # noqa: E402

pytestmark = pytest.mark.torch
EXPORTERS = ("dynamo", "torchscript")


class Block(nn.Module):
    """A residual block whose last operation on a branch is in place."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + x, inplace=True)


class Network(nn.Module):
    """A stem, two residual blocks in a list, and a linear layer."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels))
        self.blocks = nn.ModuleList([Block(channels), Block(channels)])
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Dictionary(Network):
    """Two inputs, one by keyword only, and a nested dictionary of outputs."""

    def forward(self, image, scale: int = 1, *, extra):
        features = F.relu(self.stem(image * scale))
        deep = self.blocks[0](features)
        return {"scores": self.head(deep.mean((2, 3))) + extra, "maps": (features, deep)}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Live biases and BatchNorm statistics."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                if tensor.dim() == 1:
                    tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.2)
                else:
                    tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.2)
    return model


def pruned_network(permanent: bool = True) -> nn.Module:
    return torch_bridge.random_structured(randomised(Network()), 0.5, permanent=permanent)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (1, 3, 16, 16), generator=torch.Generator().manual_seed(7))


def expected(model: nn.Module, *args, **kwargs):
    training = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        found = model.eval()(*args, **kwargs)
    for name, module in model.named_modules():
        module.training = training[name]
    return found


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found - wanted).abs().max() / wanted.abs().max())


def channels(small: torch_bridge.SimplifiedModel) -> dict[str, tuple[int, int]]:
    """Output channels of convolutions before and after, in execution order."""
    layers = [x for x in small.report.layers if x.op == "Conv"]
    return [(x.outputs, x.outputs_after) for x in layers]


def state(model: nn.Module) -> dict[str, object]:
    """Everything about a module that must survive."""
    found: dict[str, object] = {k: v.clone() for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        found[f"{name} training"] = module.training
        found[f"{name} names"] = sorted(module.__dict__)
        found[f"{name} hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        found[f"{name} requires"] = [p.requires_grad for p in module.parameters()]
    return found


def assert_same_state(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name


# export


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_export_names_values_and_dynamic_sizes(exporter, tmp_path):
    model = randomised(Dictionary()).train()
    model.blocks[0].eval()
    before = state(model)
    example = ((images(2, 3, 16, 16),), {"scale": 2, "extra": images(2, 5)})
    proto = torch_bridge.export(
        model,
        example,
        tmp_path / "model.onnx",
        dynamic_shapes={"image": {0: "batch"}, "extra": {0: "batch"}},
        exporter=exporter,
    )
    assert_same_state(before, state(model))
    onnx.checker.check_model(proto)
    assert onnx.load(tmp_path / "model.onnx") == proto
    names = [value.name for value in proto.graph.output]
    assert [i.type.tensor_type.shape.dim[0].dim_param for i in proto.graph.input] == ["batch"] * 2
    session = ort.InferenceSession(proto.SerializeToString())
    image, extra = images(3, 3, 16, 16), images(3, 5)
    inputs = [value.name for value in proto.graph.input]
    found = session.run(names, dict(zip(inputs, (image.numpy(), extra.numpy()), strict=True)))
    wanted = expected(model, image, 2, extra=extra)
    for actual, value in zip(found, (wanted["scores"], *wanted["maps"]), strict=True):
        assert error(torch.from_numpy(actual), value) < 1e-5


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("fuse", [True, False])
def test_export_keeps_batchnorm_on_request(exporter, fuse):
    proto = torch_bridge.export(
        randomised(Network()), images(), exporter=exporter, fuse_batchnorm=fuse
    )
    assert any(n.op_type == "BatchNormalization" for n in proto.graph.node) == (not fuse)


def test_export_says_why_and_what_to_try():
    class Undecided(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError, match="(?s)dynamo.*Try next: exporter=.torchscript."):
        torch_bridge.export(Undecided(), torch.ones(3))
    torch_bridge.export(Undecided(), torch.ones(3), exporter="torchscript")
    with pytest.raises(ExportError, match="(?s)the model itself fails.*Reason: RuntimeError"):
        torch_bridge.export(Network(), torch.ones(1, 4, 8, 8))
    with pytest.raises(TypeError, match="do not fit Network.forward"):
        torch_bridge.export(Network(), (images(), images()))
    with pytest.raises(ValueError, match="unknown exporter 'onnx'"):
        torch_bridge.export(Network(), images(), exporter="onnx")


# simplify


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", ["zeros", "masks", "parametrization", "training"])
def test_simplify(exporter, kind, tmp_path):
    model = pruned_network(permanent=kind != "masks")
    if kind == "parametrization":
        # Its norm is taken per filter: a pruned one would be divided by zero.
        parametrizations.weight_norm(model.head)
        parametrize.register_parametrization(model.stem[0], "weight", Half())
    if kind == "training":
        model.train()
    before = state(model)
    small = torch_bridge.simplify(model, images(), exporter=exporter, channel_multiple=1)
    assert_same_state(before, state(model))
    # Half of the inner layers' channels are gone; blocks and stem share theirs.
    assert channels(small)[1][1] == channels(small)[3][1] == 8
    assert small.verification.passed and small.verification.worst < 1e-5
    other = images(1, 3, 16, 16) + 1
    assert error(small(other), expected(model, other)) < 1e-5
    small.save(tmp_path / "small.onnx")
    assert onnx.load(tmp_path / "small.onnx") == small.onnx_model
    assert not any(n.op_type == "BatchNormalization" for n in small.onnx_model.graph.node)
    assert small.report.after.parameters < 0.7 * small.report.before.parameters


class Half(nn.Module):
    """A parametrization that zeroes every other filter."""

    def forward(self, weight):
        return weight * (torch.arange(len(weight)) % 2).view(-1, 1, 1, 1)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_without_bias(exporter, dims):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = randomised(
        nn.Sequential(
            conv(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(), conv(8, 5, 3, bias=False)
        )
    )
    torch_bridge.random_structured(model, 0.5, types=(conv,), skip=["3"])
    example = images(1, 3, *[8] * dims)
    small = torch_bridge.simplify(
        model, example, exporter=exporter, dynamic_shapes={0: "batch"}, channel_multiple=1
    )
    assert channels(small) == [(8, 4), (5, 5)]
    clips = images(2, 3, *[8] * dims)
    assert error(small(clips), expected(model, clips)) < 1e-5


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_result_is_called_like_the_module(exporter):
    model = torch_bridge.random_structured(randomised(Dictionary()), 0.5)
    example = ((images(2, 3, 16, 16), 2), {"extra": images(2, 5)})
    small = torch_bridge.simplify(
        model,
        example,
        dynamic_shapes={"image": {0: "n"}, "extra": {0: "n"}},
        exporter=exporter,
    )
    assert small.verification.runs == 3  # the example, other values, a larger batch
    image, extra = images(3, 3, 16, 16) * 2, images(3, 5)
    wanted = expected(model, image, 2, extra=extra)
    found = small(image, scale=2, extra=extra.requires_grad_())
    assert found.keys() == wanted.keys() and isinstance(found["maps"], tuple)
    assert error(found["scores"], wanted["scores"]) < 1e-5
    assert not found["scores"].requires_grad
    for actual, value in zip(found["maps"], wanted["maps"], strict=True):
        assert error(actual, value) < 1e-5
    with pytest.raises(ValueError, match="'scale' is fixed"):
        small(image, 3, extra=extra)
    with pytest.raises(ValueError, match="arguments that it was exported with"):
        small(image, extra=extra)
    with pytest.raises(TypeError, match="do not fit"):
        small()


def test_integers_and_an_unused_input():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 16)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, tokens, mask):
            return self.down(F.relu(self.up(self.table(tokens))))

    model = randomised(Tokens())
    torch_bridge.random_structured(model, 0.5, types=(nn.Linear,), skip=["down"])
    tokens = torch.arange(10).view(2, 5)
    for exporter in EXPORTERS:
        small = torch_bridge.simplify(model, (tokens, tokens > 3), exporter=exporter)
        assert [x.outputs_after for x in small.report.layers] == [16, 4]
        wanted = expected(model, tokens % 3, tokens > 1)
        assert error(small(tokens % 3, tokens > 1), wanted) < 1e-5


def test_half_precision_is_compared_with_its_own_tolerance():
    model = randomised(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))).half()
    torch_bridge.random_structured(model, 0.5)
    small = torch_bridge.simplify(model, images().half(), exporter="torchscript")
    assert small.verification.tolerance == 1e-2
    assert small(images().half()).dtype == torch.float16
    assert channels(small)[0] == (16, 8)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_pinned_modules_keep_their_channels(exporter):
    model = pruned_network()
    free = torch_bridge.simplify(model, images(), exporter=exporter, channel_multiple=1)
    assert channels(free)[1] == channels(free)[3] == (16, 8)
    for name in ("blocks.0.conv1", "blocks.0.bn1"):
        small = torch_bridge.simplify(
            model, images(), pinned=[name], exporter=exporter, channel_multiple=1
        )
        assert [after for _, after in channels(small)][1:4:2] == [16, 8]
        assert error(small(images()), expected(model, images())) < 1e-5


def test_pinned_names_must_be_modules_that_run():
    model = pruned_network()
    model.spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="no module 'blocks.0.conv3'; did you mean 'blocks.0.conv"):
        torch_bridge.simplify(model, images(), pinned=["blocks.0.conv3"])
    with pytest.raises(ValueError, match="cannot pin 'spare'"):
        torch_bridge.simplify(model, images(), pinned=["spare"])
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        torch_bridge.simplify(3)


def test_a_result_that_differs_is_refused(monkeypatch):
    real = onnx_simplify.simplify

    def wrong(*args, **kwargs):
        proto, report = real(*args, **kwargs)
        weight = proto.graph.initializer[0]
        values = onnx.numpy_helper.to_array(weight) * 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return proto, report

    monkeypatch.setattr(onnx_simplify, "simplify", wrong)
    with pytest.raises(VerificationError, match="differs from the torch model .relative error"):
        torch_bridge.simplify(pruned_network(), images())
    small = torch_bridge.simplify(pruned_network(), images(), verify=False)
    assert small.verification is None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_export_that_differs_is_blamed_on_the_exporter():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() == 0 else x * 3

    with pytest.raises(VerificationError, match="so does the exported model: try the other"):
        torch_bridge.simplify(Branch(), torch.zeros(1, 4), exporter="torchscript")


class Anchored(nn.Module):
    """A detector whose anchors are made for the size of the images, in Python."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        boxes = self.head(F.relu(self.stem(x)))
        height, width = map(int, boxes.shape[2:])
        anchors = [[i, j, i + 8, j + 8] for i in range(height) for j in range(width)]
        return boxes.flatten(2).transpose(1, 2) + torch.tensor(anchors)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_sizes_that_the_recording_froze_end_in_one_line():
    model = torch_bridge.random_structured(randomised(Anchored()), 0.5, skip=["head"])
    small = torch_bridge.simplify(model, images(), exporter="torchscript")
    assert error(small(images() + 1), expected(model, images() + 1)) < 1e-5
    with pytest.raises(VerificationError) as caught:
        torch_bridge.simplify(
            model, images(), exporter="torchscript", dynamic_shapes={2: "height", 3: "width"}
        )
    (line,) = str(caught.value).splitlines()
    assert "the model does not take x [1, 3, 32, 32]: " in line
    assert line.endswith("the exported model: try the other exporter, or fewer dynamic_shapes")


def test_an_export_that_does_not_run(monkeypatch):
    exporting = sys.modules["torch_bridge.export"]  # the package has a function of that name
    monkeypatch.setattr(exporting, "_drop_zero_biases", lambda model: None)
    model = nn.Conv3d(3, 4, 3, bias=False)
    for verify in (True, False):
        with pytest.raises(SimplifyError) as caught:
            torch_bridge.simplify(model, images(1, 3, 4, 4, 4), verify=verify)
        (line,) = str(caught.value).splitlines()
        assert line.startswith("the exported model does not run on the example inputs")
        assert "bias must be a 1D tensor" in line and "--" not in line


def test_a_model_that_onnxruntime_does_not_load():
    small = torch_bridge.simplify(pruned_network(), images(), exporter="torchscript")
    small.onnx_model.graph.node[0].domain = "nowhere"
    small.onnx_model.opset_import.add(domain="nowhere", version=1)
    small = pickle.loads(pickle.dumps(small))  # the session is opened again
    for use in (lambda: small(images()), lambda: small.session, small.benchmark):
        with pytest.raises(RunError, match="^onnxruntime cannot load the model: [^\n]*nowhere"):
            use()


class Lambda(nn.Module):
    """A module out of a function."""

    def __init__(self, function, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self.layers, *args, **kwargs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "function, example",
    [
        (lambda _, x, k: x * int(k), (images(1, 4), torch.tensor(2))),
        (lambda _, x, k: x if k.all() else -x, (images(1, 4), torch.tensor([True]))),
        (lambda _, x, k: x * sum(k.tolist()), (images(1, 4), torch.tensor([1, 5, 3]))),
        (lambda _, x: (x * 2, float(x.mean())), (images(1, 4),)),
    ],
    ids=["number", "flag", "list", "number out"],
)
def test_what_the_recording_froze_is_found(function, example):
    with pytest.raises(VerificationError):
        torch_bridge.simplify(Lambda(function), example, exporter="torchscript")


def test_a_size_that_is_returned_is_no_constant():
    model = Lambda(lambda _, x: (x * 2, x.shape[0]))
    small = torch_bridge.simplify(model, images(2, 4), exporter="torchscript")
    assert small(images(2, 4))[1] == 2
    with pytest.raises(VerificationError, match="beside tensors that depends on its inputs"):
        torch_bridge.simplify(
            model, images(2, 4), dynamic_shapes={"args": [{0: "n"}]}, exporter="torchscript"
        )


@dataclass
class Pair:
    """What torch's pytree does not know."""

    first: object
    second: object


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_objects_that_hide_tensors_are_refused(exporter):
    for model, example in (
        (Lambda(lambda _, x: (x, Pair(x, x + 1))), (images(1, 4),)),
        (Lambda(lambda _, pair: pair.first + pair.second), (Pair(images(1, 4), images(1, 4)),)),
    ):
        with pytest.raises(TypeError, match="hold a Pair, which cannot be followed"):
            torch_bridge.export(model, example, exporter=exporter)
    with pytest.raises(ExportError, match="returns no tensor"):
        torch_bridge.export(Lambda(lambda _, x: None), images(1, 4), exporter=exporter)


@pytest.mark.parametrize(
    "shapes",
    [
        ("batch",),
        {"x": "batch"},
        {"x": {4: "n"}},
        {"x": {"n": 0}},
        {"x": [0, 2]},
        {0: True},
        {"x": 0},
    ],
)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_dynamic_shapes_that_say_nothing_are_refused(shapes, exporter):
    with pytest.raises(ValueError, match="dynamic_shapes"):
        torch_bridge.export(Network(), images(), dynamic_shapes=shapes, exporter=exporter)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_dimensions_count_from_the_end_as_well(exporter):
    model = nn.Conv2d(3, 4, 1)
    proto = torch_bridge.export(model, images(), dynamic_shapes={-1: "w"}, exporter=exporter)
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in dims] == ["", "", "", "w"]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_hooks_of_the_model_itself_see_what_they_always_saw(exporter):
    model = pruned_network()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: output + 1)
    small = torch_bridge.simplify(
        model, images(), exporter=exporter, pinned="blocks.0.conv1", channel_multiple=1
    )
    assert error(small(images()), expected(model, images())) < 1e-5
    assert [after for _, after in channels(small)][1:4:2] == [16, 8]


def test_a_graph_module_is_exported_with_its_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, k=2):
            return self.linear(x) * k

    traced = torch.fx.symbolic_trace(Scaled())
    for exporter in EXPORTERS:
        small = torch_bridge.simplify(traced, (images(2, 4), 5), exporter=exporter)
        assert error(small(images(2, 4), 5), expected(traced, images(2, 4), 5)) < 1e-5


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_statistics_that_change_unnoticed_are_put_back(exporter):
    norm = randomised(nn.BatchNorm2d(3))

    def forward(layers, x):
        mean, var = layers[0].running_mean, layers[0].running_var
        return F.batch_norm(x, mean, var, training=True) + mean.view(-1, 1, 1)

    before = norm.running_mean.clone()
    torch_bridge.export(Lambda(forward, norm), images(2, 3, 4, 4), exporter=exporter)
    assert torch.equal(norm.running_mean, before)


def test_attention_is_exported_by_its_parts():
    attention = randomised(nn.MultiheadAttention(8, 2, batch_first=True))
    model = Lambda(lambda layers, x: layers[0](x, x, x)[0], attention)
    enabled = torch.backends.mha.get_fastpath_enabled()
    for exporter in EXPORTERS:
        small = torch_bridge.simplify(model, images(2, 5, 8), exporter=exporter)
        assert error(small(images(2, 5, 8)), expected(model, images(2, 5, 8))) < 1e-5
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_calls_that_do_not_fit():
    small = torch_bridge.simplify(pruned_network(), images(), exporter="torchscript")
    for wrong in (images(2, 3, 16, 16), images().double(), images(3, 16, 16)):
        with pytest.raises(torch_bridge.CallError, match="^the model does not take x.*dynamic_sh"):
            small(wrong)
    flag = torch_bridge.simplify(Lambda(lambda _, x, k: x * k), (images(1, 4), 1))
    with pytest.raises(ValueError, match="is fixed"):
        flag(images(1, 4), True)


def test_a_simplified_model_can_be_copied_and_pickled():
    small = torch_bridge.simplify(Network(), images(), exporter="torchscript")
    wanted = small(images())
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(images()), wanted)


def test_session_and_benchmark():
    model = pruned_network().train()
    threads = torch.get_num_threads()
    small = torch_bridge.simplify(model, images(), exporter="torchscript")
    assert small.session is small.session
    assert [value.name for value in small.session.get_inputs()] == ["x"]
    times = small.benchmark(rounds=2)
    assert list(times) == ["dense", "simplified", "torch"]
    assert all(0 < t.low <= t.median <= t.high and t.rounds == 2 for t in times.values())
    assert torch.get_num_threads() == threads and model.training
    assert list(small.benchmark(rounds=1, eager=False)) == ["dense", "simplified"]


# steps


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_get_bn_folding_and_get_pinned(exporter):
    # All BatchNorms hold the same numbers, so that the exporters share their initializers.
    model = Network()
    pairs = torch_bridge.get_bn_folding(model, images(), exporter=exporter)
    assert pairs == [
        ("stem.0", "stem.1"),
        *((f"blocks.{k}.conv{n}", f"blocks.{k}.bn{n}") for k in (0, 1) for n in (1, 2)),
    ]
    assert torch_bridge.get_pinned(model, images(), exporter=exporter) == ["head"]
    # Without an example one is guessed from the first layer.
    assert torch_bridge.get_bn_folding(model, exporter=exporter) == pairs


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_steps_one_after_the_other(exporter):
    model = pruned_network()
    pairs = torch_bridge.get_bn_folding(model, images(), exporter=exporter)
    fused = torch_bridge.fuse(model, pairs[:2], images(), exporter=exporter)
    assert fused.report.batchnorms_folded == 2
    rest = torch_bridge.fuse(fused, pairs[2:])
    assert rest.report.batchnorms_folded == 3
    assert torch_bridge.get_bn_folding(rest) == []
    assert torch_bridge.get_pinned(rest) == ["head"]
    shifted = torch_bridge.propagate_bias(rest, pinned=["blocks.1.bn1"])
    assert all(before == after for before, after in channels(shifted))
    small = torch_bridge.remove_zeroed(shifted, pinned=["blocks.1.conv1"], channel_multiple=1)
    assert channels(small)[1] == (16, 8) and channels(small)[3] == (16, 16)
    for step in (fused, rest, shifted, small):
        assert step.verification.worst < 1e-5
        assert error(step(images() * 3), expected(model, images() * 3)) < 1e-5


def test_a_container_does_not_take_the_name_of_its_last_layer():
    model = pruned_network()
    pairs = torch_bridge.get_bn_folding(model, images(), exporter="torchscript")
    small = torch_bridge.simplify(
        model, images(), pinned=["stem"], bn_folding=pairs, exporter="torchscript"
    )
    assert small.report.batchnorms_folded == 5
    with pytest.raises(ValueError, match="those of the first step"):
        torch_bridge.fuse(small, None, images())


def test_functional_layers_have_no_name():
    weight = nn.Parameter(images(4, 3, 3, 3))

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bn = weight, nn.BatchNorm2d(4)
            self.conv, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.last(self.conv(self.bn(F.conv2d(x, self.weight))))

    pairs = torch_bridge.get_bn_folding(randomised(Functional()), images(), exporter="torchscript")
    assert pairs == [("conv", "last")]


def test_pairs_that_cannot_be_folded():
    with pytest.raises(ValueError, match=r"cannot fold \('stem.0', 'blocks.0.bn1'\)"):
        torch_bridge.fuse(pruned_network(), [("stem.0", "blocks.0.bn1")], images())


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(2, 3, 5), (1, 2, 224)),
        (nn.Conv2d(2, 3, 5), (1, 2, 224, 224)),
        (nn.Conv3d(2, 3, 5), (1, 2, 64, 64, 64)),
        (nn.Linear(7, 3), (1, 7)),
    ],
)
def test_guessed_inputs(layer, shape):
    small = torch_bridge.simplify(nn.Sequential(layer), exporter="torchscript")
    found = small.onnx_model.graph.input[0].type.tensor_type.shape.dim
    assert tuple(d.dim_value for d in found) == shape


def test_inputs_that_cannot_be_guessed():
    for model in (Dictionary(), nn.Embedding(3, 4), nn.ReLU()):
        with pytest.raises(ValueError, match="give example_inputs"):
            torch_bridge.simplify(model)


def test_call_binds_and_copies():
    call = Call.of(Dictionary(), ((images(),), {"extra": images(1, 5)}))
    assert list(call.arguments) == ["image", "extra"]
    args, _ = call.copied()
    args[0].zero_()
    assert call.args[0].abs().sum() > 0


# pruning helpers


def zero_slices(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return (weight.movedim(dim, 0).flatten(1) == 0).all(1)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("n", [None, 1, 2, float("inf")])
def test_structured_pruning(dim, n):
    model = randomised(Network())
    original = {k: v.clone() for k, v in model.state_dict().items()}
    if n is None:
        torch_bridge.random_structured(model, 0.25, dim, seed=3, skip=["blocks.1"])
    else:
        torch_bridge.ln_structured(model, 0.25, n, dim, skip=["blocks.1"])
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        weight = original[f"{name}.weight"]
        gone = zero_slices(layer.weight, dim)
        if name.startswith("blocks.1"):
            assert torch.equal(layer.weight, weight)
            continue
        assert int(gone.sum()) == round(0.25 * weight.shape[dim])
        kept = layer.weight.movedim(dim, 0)[~gone]
        assert torch.equal(kept, weight.movedim(dim, 0)[~gone])
        if n is not None:
            norms = weight.movedim(dim, 0).flatten(1).norm(n, dim=1)
            assert gone.sum() == 0 or norms[gone].max() <= norms[~gone].min()


def test_random_pruning_is_seeded():
    network = randomised(Network())

    def chosen(seed: int) -> list[bool]:
        model = torch_bridge.random_structured(copy.deepcopy(network), 0.5, seed=seed)
        return zero_slices(model.blocks[0].conv1.weight, 0).tolist()

    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    assert chosen(1) == chosen(1) != chosen(2)
    assert torch.rand(1) == first  # torch's own random state is left alone


def test_slimming_leaves_the_shift():
    model = torch_bridge.slim(randomised(Network()), 0.5)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert int((bn.weight == 0).sum()) == 8 and (bn.bias != 0).all()
    with pytest.raises(ValueError, match="no layer to prune"):
        torch_bridge.slim(nn.Conv2d(3, 4, 1))


def test_masks_stay_on_request():
    model = torch_bridge.random_structured(randomised(Network()), 0.5, permanent=False)
    assert prune.is_pruned(model) and "stem.0.weight_mask" in dict(model.named_buffers())


def test_coupled_pruning():
    pytest.importorskip("torch_pruning")
    model = randomised(Network())
    masked, oracle = torch_bridge.coupled(model, images(), 0.5, round_to=4)
    assert oracle.blocks[0].conv1.weight.shape == (8, 8, 3, 3)
    assert int(zero_slices(masked.blocks[0].conv1.weight, 0).sum()) == 8
    assert not masked.stem[1].bias[zero_slices(masked.stem[0].weight, 0)].any()
    wanted = expected(oracle, images())
    assert error(expected(masked, images()), wanted) < 1e-5
    small = torch_bridge.simplify(masked, images(), exporter="torchscript", channel_multiple=1)
    assert channels(small) == [(16, 8)] * 5
    assert error(small(images()), wanted) < 1e-5


class Split(nn.Module):
    """Halves of a layer, the second through two residual layers, all concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.first = nn.Conv2d(16, 32, 1)
        self.inner = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)])
        self.last, self.head = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        parts = list(self.first(self.stem(x)).chunk(2, 1))
        for layer in self.inner:
            parts.append(parts[-1] + layer(parts[-1]))
        return self.head(F.relu(self.last(torch.cat(parts, 1))))


def test_coupled_pruning_leaves_what_torch_pruning_miscounts():
    pytest.importorskip("torch_pruning")
    with pytest.warns(UserWarning, match="cannot prune 1 of the 3 groups of Split: those of inner"):
        masked, oracle = torch_bridge.coupled(randomised(Split()), images(), 0.5, round_to=4)
    assert oracle.stem[0].out_channels == oracle.last.out_channels == 8
    assert oracle.first.out_channels == 32
    assert error(expected(masked, images()), expected(oracle, images())) < 1e-5


def test_shares_are_checked():
    with pytest.raises(ValueError, match="amount is 1.5"):
        pruning.random_structured(Network(), 1.5)
