"""The torchvision classifiers that the project is measured on, with weights fit for testing.

A freshly built model is a poor test: BatchNorm has mean 0 and shift 0, so that a pruned channel
is zero, and propagating its constant can never go wrong. `realistic` gives every architecture
weights, biases and statistics in which a mistake shows, from nothing but a seed: nothing is
downloaded. `prune` then prunes it by one of the named protocols. Needs torchvision.

The list of architectures and the protocols "P1" and "P1-seed" are those of `Simplify
<https://github.com/EIDOSlab/simplify>`_ (Bragagnolo and Barbano, "Simplify: A Python library for
optimizing pruned neural networks", SoftwareX 2022). Pruning coupled layers together is
`torch_bridge.pruning.coupled`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from torch_bridge.pruning import random_structured, seeded, slim

ARCHITECTURES: tuple[str, ...] = (
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "squeezenet1_0",
    "squeezenet1_1",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "inception_v3",
    "googlenet",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
)

Protocol = Literal["P1", "P1-80", "P1-seed", "P1-in", "P1-slim"]
PROTOCOLS: tuple[Protocol, ...] = ("P1", "P1-80", "P1-seed", "P1-in", "P1-slim")

# Heads for training alone, and a first step that rescales ImageNet's colours, are left out.
_OPTIONS: dict[str, dict[str, Any]] = {
    name: {"aux_logits": False, "transform_input": False, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}


def image_size(name: str) -> int:
    """Height and width of the images that an architecture takes.

    Args:
        name: One of `ARCHITECTURES`.

    Returns:
        299 for ``inception_v3``, otherwise 224.

    Raises:
        ValueError: An unknown name.
    """
    _check_name(name)
    return 299 if name == "inception_v3" else 224


def realistic(name: str, seed: int = 0) -> nn.Module:
    """Build an architecture with random weights whose activations look like a trained model's.

    Convolution and linear weights are Kaiming normal (He et al., "Delving Deep into Rectifiers",
    ICCV 2015, https://arxiv.org/abs/1502.01852), their biases N(0, 0.1). BatchNorm weights are
    U(0.5, 1.5) and biases N(0, 0.2); its statistics are those of two images N(0, 1).

    Args:
        name: One of `ARCHITECTURES`.
        seed: Seed of weights and images. Torch's global random state is left alone.

    Returns:
        The model in inference mode, float32 on the CPU. It maps images
        ``[N, 3, image_size(name), image_size(name)]`` to ``[N, 1000]``.

    Raises:
        ValueError: An unknown name.
    """
    size = image_size(name)
    with torch.random.fork_rng(devices=[]):
        model = torchvision.models.get_model(name, weights=None, **_OPTIONS.get(name, {}))
    model.eval()
    # Seeded after building: how many numbers torchvision draws for its own weights is its affair.
    with seeded(seed), torch.no_grad():
        for module in model.modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0, 0.1)
            elif isinstance(module, _BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
        _fit_statistics(model, torch.randn(2, 3, size, size))
    return model


def prune(
    model: nn.Module,
    name: str,
    protocol: Protocol = "P1",
    seed: int = 0,
    amount: float | None = None,
) -> nn.Module:
    """Prune a model by a named protocol, in place.

    ============  ========================================================================
    ``P1``        half of the filters of every convolution
    ``P1-80``     80% of the filters of every convolution
    ``P1-seed``   80% of the filters of every convolution, and of the weights of every
                  BatchNorm2d, chosen independently
    ``P1-in``     half of the input channels of every convolution
    ``P1-slim``   half of the weights of every BatchNorm
    ============  ========================================================================

    All of them choose at random and leave biases, and therefore constants, behind. SqueezeNet's
    last convolution, which is its classifier, is not pruned.

    Pruned outputs vary little with the input beside their constant part: by 0.1% of the largest
    one or less in small architectures under ``P1``, and not at all in many under ``P1-seed``. A
    comparison of outputs must be sharper than that.

    Args:
        model: The model, as `realistic` builds it.
        name: Its architecture, one of `ARCHITECTURES`.
        protocol: One of `PROTOCOLS`.
        seed: Seed of the choice. Torch's global random state is left alone.
        amount: Another share to prune in each layer than the protocol's own, from 0 to 1.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: An unknown name or protocol, an amount outside of 0 to 1, or ``P1-slim`` for an
            architecture without BatchNorm.
    """
    _check_name(name)
    skip = ("classifier.1",) if name.startswith("squeezenet") else ()
    share = (0.8 if protocol in ("P1-80", "P1-seed") else 0.5) if amount is None else amount
    match protocol:
        case "P1" | "P1-80":
            return random_structured(model, share, 0, seed, skip=skip)
        case "P1-seed":
            return random_structured(model, share, 0, seed, (nn.Conv2d, nn.BatchNorm2d), skip)
        case "P1-in":
            return random_structured(model, share, 1, seed, skip=skip)
        case "P1-slim":
            return slim(model, share, seed, skip)
        case _:
            raise ValueError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")


def _fit_statistics(model: nn.Module, images: torch.Tensor) -> None:
    """Set the statistics of every BatchNorm to those of ``images`` ``[N, 3, H, W]``.

    Only BatchNorm is put in training mode: dropout stays off.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches, of which there is one
        norm.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is one of `ARCHITECTURES`."""
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; known are {', '.join(ARCHITECTURES)}")
