"""Every torchvision architecture once: pruned, simplified, and equal to the torch model."""

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torchvision.models import get_model  # noqa: E402

import onnx_simplify  # noqa: E402
import torch_bridge  # noqa: E402
from onnx_simplify.planning import profiles  # noqa: E402
from torch_bridge import export, zoo  # noqa: E402

pytestmark = pytest.mark.torch

# GMACs of the channels that vary with the input and reach the output, for half of all filters
# pruned independently (seed 0). Without residual links nothing else needs to be computed.
IDEAL_GMACS = {
    "alexnet": 0.221,
    "vgg11": 1.965,
    "vgg11_bn": 1.965,
    "vgg13": 2.890,
    "vgg13_bn": 2.890,
    "vgg16": 3.931,
    "vgg16_bn": 3.931,
    "vgg19": 4.971,
    "vgg19_bn": 4.971,
    "squeezenet1_0": 0.268,
    "squeezenet1_1": 0.114,
    "densenet121": 0.738,
    "densenet161": 1.977,
    "densenet169": 0.870,
    "densenet201": 1.103,
    "inception_v3": 1.434,
    "googlenet": 0.404,
}


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_pruned_architecture(name):
    torch.set_num_threads(1)
    size = zoo.image_size(name)
    model = zoo.prune(zoo.realistic(name), name, "P1")
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    small = torch_bridge.simplify(
        model,
        images[:1],
        dynamic_shapes={0: "batch"},
        exporter="torchscript",
        channel_multiple=1,
    )
    report = small.report
    assert report.verification is not None and report.verification.worst <= 1e-5
    assert small.verification is not None and small.verification.worst <= 1e-5
    with torch.no_grad():
        expected = model.eval()(images)
    assert (small(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert report.after.macs < 0.8 * report.before.macs
    assert report.after.parameters < 0.8 * report.before.parameters
    if name in IDEAL_GMACS:
        assert report.after.macs / 1e9 <= 1.01 * IDEAL_GMACS[name] + 5e-4


def outputs(model, images):
    """What onnxruntime makes of them."""
    session = ort.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return found


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "googlenet", "densenet121"])
def test_any_number_of_images_with_batchnorm_kept_by_the_newer_exporter(name):
    torch.set_num_threads(1)
    model = zoo.prune(zoo.realistic(name), name, "P1-seed")
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    dense = export(
        model,
        images[:1],
        dynamic_shapes={0: "batch"},
        exporter="dynamo",
        fuse_batchnorm=False,
    )
    wanted = outputs(dense, images)
    small, report = onnx_simplify.simplify(dense)
    assert report.verification is not None and report.verification.worst <= 1e-5
    assert report.after.parameters < 0.4 * report.before.parameters
    results = [small]
    for start in (dense, onnx_simplify.fold_batchnorm(dense)):
        shifted = onnx_simplify.propagate_bias(start)
        results += [start, shifted, onnx_simplify.remove_zeroed(shifted)]
    for result in results:
        assert np.abs(outputs(result, images) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18"])
def test_video_network(name):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm3d)):
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.normal_(tensor, 0, 0.2)
    torch_bridge.random_structured(model, 0.5, types=(nn.Conv3d,))
    clips = torch.randn(2, 3, 4, 32, 32)
    small = torch_bridge.simplify(model, clips[:1], dynamic_shapes={0: "batch"})
    assert small.verification is not None and small.verification.worst <= 1e-5
    with torch.no_grad():
        expected = model(clips)
    assert (small(clips) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert small.report.after.macs < 0.5 * small.report.before.macs


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("protocol", ["P1-80", "P1-seed", "P1-in", "P1-slim"])
def test_each_pass_under_the_newer_exporter(name, protocol):
    torch.set_num_threads(1)
    model = zoo.prune(zoo.realistic(name), name, protocol)
    dense = export(model, torch.zeros(1, 3, 224, 224), exporter="dynamo", fuse_batchnorm=False)
    folded = onnx_simplify.fold_batchnorm(dense)
    assert not any(n.op_type == "BatchNormalization" for n in folded.graph.node)
    shifted = onnx_simplify.propagate_bias(folded)
    removed = onnx_simplify.remove_zeroed(shifted)
    for result in (folded, shifted, removed):
        assert onnx_simplify.verify(dense, result).worst <= 1e-5
    assert removed.ByteSize() < 0.8 * dense.ByteSize()


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnext50_32x4d", "densenet121", "shufflenet_v2_x0_5", "mobilenet_v3_small"],
)
def test_every_plan_is_exact(name, monkeypatch):
    torch.set_num_threads(1)
    model = zoo.prune(zoo.realistic(name), name, "P1")
    dense = export(model, torch.zeros(1, 3, 224, 224), exporter="torchscript", fuse_batchnorm=False)
    planned = profiles.PROFILES["avx512"]
    macs = {}
    for plan, profile in {"planned": planned, **profiles.alternatives(planned)}.items():
        monkeypatch.setitem(profiles.PROFILES, "avx512", profile)
        _, report = onnx_simplify.simplify(dense, target="avx512")
        assert report.verification is not None and report.verification.worst <= 1e-5, plan
        assert report.after.bytes < report.before.bytes
        macs[plan] = report.after.macs
    assert len(set(macs.values())) >= 3, macs
