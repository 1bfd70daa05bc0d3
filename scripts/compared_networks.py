"""Small seeded networks that lost half of their channels, each with another thing to remove."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch_bridge import export  # noqa: E402

SIZE = 16
# Widths are multiples of the blocks in which onnxruntime stores channels: it pads nothing.
WIDTH = 16
# Irregular, but the same in both halves, so that grouped convolutions can lose them.
PRUNED = [0, 3, 4, 6, 8, 11, 12, 14]
DYNAMIC = {0: "batch", 2: "height", 3: "width"}


class Net(nn.Module):
    """Named layers and the function that connects them."""

    def __init__(self, connect: Callable[[Any, Tensor], Tensor], **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.connect = connect

    def forward(self, x: Tensor) -> Tensor:
        return self.connect(self, x)


@dataclass(frozen=True)
class Network:
    """A network and what is pruned in it.

    Attributes:
        name: what it is about.
        build: makes the module.
        removable: how many output channels of convolutions and linear layers can go.
        roots: layers that are to lose `PRUNED`, one of each coupled group (for torch-pruning).
        masked: layers whose output channels `PRUNED` get weight zero.
        silent: whether the bias of these channels is zero as well, BatchNorm's included.
        unread: layers whose input channels `PRUNED` get weight zero.
    """

    name: str
    build: Callable[[], nn.Module]
    removable: int
    roots: tuple[str, ...]
    masked: tuple[str, ...] = ()
    silent: bool = False
    unread: tuple[str, ...] = ()

    @functools.cached_property
    def module(self) -> nn.Module:
        """The pruned module, with biases and statistics in which a mistake shows."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            module = self.build().eval()
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    nn.init.uniform_(layer.weight, 0.5, 1.5)
                    nn.init.normal_(layer.running_mean, 0, 0.5)
                    nn.init.uniform_(layer.running_var, 0.5, 2)
                if getattr(layer, "bias", None) is not None:
                    nn.init.normal_(layer.bias, 0, 0.5)
            for name in self.masked:
                for layer in module.get_submodule(name).modules():
                    if self.silent or isinstance(layer, (nn.Conv2d, nn.Linear)):
                        _mask(layer, self.silent)
            for name in self.unread:
                weights(module, name).weight[:, PRUNED] = 0
        return module

    @functools.cache  # noqa: B019 (networks live as long as the script)
    def model(self, dynamic: bool = False) -> ModelProto:
        """The module as ONNX."""
        return to_onnx(self.module, dynamic)


def _mask(layer: nn.Module, bias: bool) -> None:
    for name, values in layer.named_parameters(recurse=False):
        if bias or name == "weight":
            values[PRUNED] = 0


def weights(module: nn.Module, name: str) -> nn.Module:
    """The convolution or linear layer of this name, or inside the block of this name."""
    layers = module.get_submodule(name).modules()
    return next(layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear)))


def to_onnx(module: nn.Module, dynamic: bool = False) -> ModelProto:
    """A module as ONNX, its BatchNorms as nodes."""
    return export(
        module,
        torch.zeros(1, 3, SIZE, SIZE),
        dynamic_shapes=DYNAMIC if dynamic else None,
        exporter="torchscript",
        fuse_batchnorm=False,
    )


def conv(inputs: int, kernel: int = 3, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(inputs, WIDTH, kernel, padding=kernel // 2, bias=bias, groups=groups)


def block(inputs: int, groups: int = 1) -> nn.Sequential:
    """A convolution and a BatchNorm."""
    return nn.Sequential(conv(inputs, bias=False, groups=groups), nn.BatchNorm2d(WIDTH))


def chain(
    layer: Callable[[int], nn.Module], activation: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """Three layers in a row."""
    return lambda: nn.Sequential(
        layer(3), activation(), layer(WIDTH), activation(), conv(WIDTH, bias=False)
    )


def residual(net: Any, x: Tensor) -> Tensor:
    x = torch.relu(net.stem(x))
    return net.head(torch.relu(x + net.outer(torch.relu(net.inner(x)))))


def concat(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.cat([torch.relu(net.left(x)), torch.relu(net.right(x))], 1))


def flatten(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.flatten(functional.max_pool2d(torch.relu(net.stem(x)), 4), 1))


def sequence(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.relu(net.middle(torch.relu(net.stem(x)))))


def shuffle(net: Any, x: Tensor) -> Tensor:
    x = torch.relu(net.stem(x))
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
    return net.head(x.view(batch, channels, height, width))


def gate(net: Any, x: Tensor) -> Tensor:
    x = torch.relu(net.stem(x))
    squeezed = torch.relu(net.reduce(functional.adaptive_avg_pool2d(x, 1)))
    return net.head(x * torch.sigmoid(net.expand(squeezed)))


N = len(PRUNED)
# The layers of a chain that are pruned, and those that read them.
FRONT, BACK = ("0", "2"), ("2", "4")

ZERO = Network("no bias", chain(lambda i: conv(i, bias=False), nn.ReLU), 2 * N, FRONT, FRONT)
BATCHNORM = Network("BatchNorm", chain(block, nn.ReLU), 2 * N, FRONT, FRONT)
CONSTANT = (
    Network("bias", chain(conv, nn.ReLU), 2 * N, FRONT, FRONT),
    BATCHNORM,
    Network("sigmoid", chain(lambda i: conv(i, bias=False), nn.Sigmoid), 2 * N, FRONT, FRONT),
)
UNREAD = Network("never read", chain(block, nn.ReLU), 2 * N, FRONT, unread=BACK)
COUPLED = (
    Network(
        "residual",
        lambda: Net(
            residual, stem=block(3), inner=block(WIDTH), outer=block(WIDTH), head=conv(WIDTH)
        ),
        3 * N,
        ("stem", "inner"),
        ("stem", "inner", "outer"),
    ),
    Network(
        "concat",
        lambda: Net(concat, left=block(3), right=block(3), head=conv(2 * WIDTH)),
        2 * N,
        ("left", "right"),
        ("left", "right"),
    ),
    Network(
        "flatten",
        lambda: Net(flatten, stem=block(3), head=nn.Linear(WIDTH * (SIZE // 4) ** 2, WIDTH)),
        N,
        ("stem",),
        ("stem",),
    ),
    Network(
        "depthwise",
        lambda: Net(sequence, stem=block(3), middle=block(WIDTH, groups=WIDTH), head=conv(WIDTH)),
        2 * N,
        ("stem",),
        ("stem", "middle"),
    ),
    Network(
        "grouped",
        lambda: Net(sequence, stem=block(3), middle=block(WIDTH, groups=2), head=conv(WIDTH)),
        2 * N,
        ("stem", "middle"),
        ("stem", "middle"),
    ),
    Network(
        "shuffle",
        lambda: Net(shuffle, stem=block(3), head=conv(WIDTH)),
        N,
        ("stem",),
        ("stem",),
    ),
)
# A constant channel times a gate that varies is no constant: only a zero channel can go.
GATE = Network(
    "squeeze-and-excite",
    lambda: Net(
        gate, stem=block(3), reduce=conv(WIDTH, 1), expand=conv(WIDTH, 1), head=conv(WIDTH)
    ),
    2 * N,
    ("stem",),
    ("stem",),
    silent=True,
)
COUPLED_ZERO = (*(replace(n, name=f"{n.name}, zero", silent=True) for n in COUPLED), GATE)
COUPLED_CONSTANT = tuple(replace(n, name=f"{n.name}, constant") for n in COUPLED)
# The stream stays as wide as it is; only the layer that feeds it can compute less. torch-pruning is
# not asked to: its groups contain the living channels of the other branch.
ONE_BRANCH = tuple(
    replace(
        COUPLED[0],
        name=f"one branch, {kind}",
        removable=N,
        roots=(),
        masked=("outer",),
        silent=kind == "zero",
    )
    for kind in ("zero", "constant")
)
NETWORKS = (ZERO, *CONSTANT, UNREAD, *COUPLED_ZERO, *COUPLED_CONSTANT, *ONE_BRANCH)
