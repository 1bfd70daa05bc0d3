"""Prune PyTorch models in the ways the literature does.

Independently, each layer by itself, as `torch.nn.utils.prune
<https://docs.pytorch.org/docs/stable/nn.html#utilities>`_ does. Biases stay, and so does the
BatchNorm after a pruned convolution: a pruned channel is a constant, in general not zero.

* `random_structured`: random channels;
* `ln_structured`: the channels of smallest norm (with ``n=1``: Li et al., "Pruning Filters for
  Efficient ConvNets", ICLR 2017, https://arxiv.org/abs/1608.08710);
* `slim`: the scales of BatchNorm (Liu et al., "Learning Efficient Convolutional Networks through
  Network Slimming", ICCV 2017, https://arxiv.org/abs/1708.06519).

Together, in groups of layers that must lose the same channels:

* `coupled`: the groups of torch-pruning's dependency graph (Fang et al., "DepGraph: Towards Any
  Structural Pruning", CVPR 2023, https://arxiv.org/abs/2301.12900), once set to zero and once
  physically removed.

The same seed prunes the same channels. Torch's global random state is left alone.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

BATCHNORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# By how much `coupled`'s two models may differ, relative to the largest output. Rounding makes
# about 1e-6, in networks of 200 layers too. Outputs of a model with random weights may vary with
# the input by no more than 1e-3, so a mistake in what varies can be as small as that.
_TOLERANCE = 1e-5

# ------------------------------------------------------------------------------------------------
# Each layer by itself


def random_structured(
    model: nn.Module,
    amount: float = 0.5,
    dim: int = 0,
    seed: int = 0,
    types: tuple[type[nn.Module], ...] = (nn.Conv2d,),
    skip: Sequence[str] = (),
    *,
    permanent: bool = True,
) -> nn.Module:
    """Set random slices of the weights of every layer to zero, in place.

    This is ``torch.nn.utils.prune.random_structured`` on one layer after the other; for weights
    of one dimension, such as BatchNorm's, ``random_unstructured``. At least one slice of each
    layer stays.

    Args:
        model: The module to prune.
        amount: The share of slices to prune in each layer, from 0 to 1; rounded as ``round``
            does to a number of slices.
        dim: The dimension of the weight to prune along. For convolutions of weight
            ``[out, in / groups, ...]`` and linear layers of weight ``[out, in]``, 0 prunes output
            channels and 1 input channels; a transposed convolution has them the other way round.
        seed: Seed of the choice.
        types: The layers to prune. Layers among them without a weight are passed over.
        skip: Names (as in ``model.named_modules()``) of modules to leave alone, with all they
            contain.
        permanent: Write the zeros into the weights. False leaves torch's reparametrisation on:
            ``weight_orig``, ``weight_mask`` and a hook that multiplies them.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: An amount outside of 0 to 1, no layer to prune, a dimension that a weight
            does not have, or an unknown name in ``skip``.
    """

    def apply(layer: nn.Module, count: int) -> None:
        if layer.weight.dim() == 1:
            prune.random_unstructured(layer, "weight", amount=count)
        else:
            prune.random_structured(layer, "weight", amount=count, dim=dim)

    return _prune_layers(model, apply, amount, dim, seed, types, skip, permanent)


def ln_structured(
    model: nn.Module,
    amount: float = 0.5,
    n: float = 1,
    dim: int = 0,
    types: tuple[type[nn.Module], ...] = (nn.Conv2d,),
    skip: Sequence[str] = (),
    *,
    permanent: bool = True,
) -> nn.Module:
    """Set the slices of smallest norm in the weights of every layer to zero, in place.

    This is ``torch.nn.utils.prune.ln_structured`` on one layer after the other; for weights of
    one dimension, such as BatchNorm's, ``l1_unstructured`` (every norm of a single number is its
    absolute value). At least one slice of each layer stays. Nothing here is random.

    Args:
        model: The module to prune.
        amount: See `random_structured`.
        n: Which norm: 1 (L1), 2 (L2), any other p, or ``float("inf")`` for the maximum.
        dim: See `random_structured`.
        types: See `random_structured`.
        skip: See `random_structured`.
        permanent: See `random_structured`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: See `random_structured`.
    """

    def apply(layer: nn.Module, count: int) -> None:
        if layer.weight.dim() == 1:
            prune.l1_unstructured(layer, "weight", amount=count)
        else:
            prune.ln_structured(layer, "weight", amount=count, n=n, dim=dim)

    return _prune_layers(model, apply, amount, dim, 0, types, skip, permanent)


def slim(
    model: nn.Module,
    amount: float = 0.5,
    seed: int = 0,
    skip: Sequence[str] = (),
    *,
    permanent: bool = True,
) -> nn.Module:
    """Set the weight of random channels of every BatchNorm to zero, in place; the bias stays.

    What network slimming (https://arxiv.org/abs/1708.06519) leaves behind: a slimmed channel is
    the constant of its bias, whatever the convolution before it computes. There the training
    drives scales to zero; here they are chosen at random.

    Args:
        model: The module to prune.
        amount: The share of channels to prune in each layer, from 0 to 1.
        seed: Seed of the choice.
        skip: See `random_structured`.
        permanent: See `random_structured`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: A model without BatchNorm; otherwise see `random_structured`.
    """
    return random_structured(model, amount, 0, seed, BATCHNORMS, skip, permanent=permanent)


def _prune_layers(
    model: nn.Module,
    apply: Callable[[nn.Module, int], None],
    amount: float,
    dim: int,
    seed: int,
    types: tuple[type[nn.Module], ...],
    skip: Sequence[str],
    permanent: bool,
) -> nn.Module:
    """Call ``apply(layer, number of slices)`` on the chosen layers; see `random_structured`."""
    _check_share("amount", amount)
    layers = _layers(model, types, skip)
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in types)
        raise ValueError(f"{type(model).__name__} has no layer to prune of type {kinds}")
    for name, layer in layers.items():
        dims = layer.weight.dim()
        if not 0 <= dim < dims:
            raise ValueError(f"dim is {dim}, but the weight of {name!r} has {dims} dimension(s)")
    # Without gradients the pruned weight is a leaf: a model with its masks on can be copied.
    with seeded(seed), torch.no_grad():
        for layer in layers.values():
            apply(layer, _count(layer, dim, amount))
            if permanent:
                prune.remove(layer, "weight")
    return model


def _layers(
    model: nn.Module, types: tuple[type[nn.Module], ...], skip: Sequence[str]
) -> dict[str, nn.Module]:
    """The layers of these types that have a weight, by name, without the skipped ones."""
    modules = dict(model.named_modules())
    unknown = [name for name in skip if name not in modules]
    if unknown:
        raise ValueError(f"skip names no module of the model: {', '.join(map(repr, unknown))}")
    skipped = {id(module) for name in skip for module in modules[name].modules()}
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, types)
        and id(module) not in skipped
        and getattr(module, "weight", None) is not None
    }


def _count(layer: nn.Module, dim: int, amount: float) -> int:
    """How many of the slices that no mask covers yet to prune: one stays at least."""
    size: int = layer.weight.shape[dim]
    mask = getattr(layer, "weight_mask", None)
    if mask is not None:
        size = int((mask != 0).movedim(dim, 0).flatten(1).any(1).sum())
    return max(0, min(round(amount * size), size - 1))


def _check_share(name: str, share: float) -> None:
    """Raise ValueError unless ``share`` is between 0 and 1."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {share}, but must be from 0 to 1")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers on the CPU, and put their state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------------------
# Groups of layers


@dataclass(frozen=True)
class _Step:
    """One group to prune: a layer of it, by name, and which output channels that layer loses."""

    root: str
    channels: tuple[int, ...]


def coupled(
    model: nn.Module,
    example_inputs: Any,
    ratio: float = 0.5,
    round_to: int = 8,
    seed: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Prune random channels in groups: once by setting them to zero, once by removing them.

    The layers of a group share their channels, through residual links, concatenations, depthwise
    or grouped convolutions, as torch-pruning's dependency graph
    (https://arxiv.org/abs/2301.12900) has it. In the masked model the group's filters, their
    biases, and the weights and biases of its BatchNorms are zero; in the oracle torch-pruning has
    removed them, and the inputs that read them. Both compute the same function, which is checked
    on ``example_inputs``: groups that torch-pruning gets wrong (it takes a channel shuffle for an
    elementwise operation, and miscounts the channels of a concatenation that holds parts of a
    split) are left whole in both models, with a warning.

    Layers whose channels are those of the model's output stay whole. Grouped convolutions lose
    the same positions of each of their groups.

    Args:
        model: The module. It is not changed.
        example_inputs: A tensor, a tuple or list of positional arguments, or a dictionary of
            keyword arguments.
        ratio: The share of channels to prune in each group, from 0 to 1.
        round_to: The number of channels left is rounded down to a multiple of this, but not to
            zero: a group of ``round_to`` channels or less stays whole.
        seed: Seed of the choice.

    Returns:
        The masked model and the oracle, two copies of ``model`` in inference mode.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: A ratio outside of 0 to 1, ``round_to`` below 1, a model that torch-pruning
            fails on (a ShuffleNet, for one), or one without a single group that can be pruned.
    """
    tp = _torch_pruning()
    _check_share("ratio", ratio)
    if round_to < 1:
        raise ValueError(f"round_to is {round_to}, but must be at least 1")
    call = _call(example_inputs)
    with torch.random.fork_rng(devices=[]):
        steps = _plan(tp, model, call, ratio, round_to, seed)
        if not steps:
            raise ValueError(f"{type(model).__name__} has no group of channels to prune")
        pair, done = _apply(tp, model, call, steps)
        if not _agree(pair, call):
            sound = [step for step in steps if _agree(_apply(tp, model, call, [step])[0], call)]
            pair, done = _apply(tp, model, call, sound)
        if not done or not _agree(pair, call):
            raise ValueError(
                f"torch-pruning changes what {type(model).__name__} computes, whatever it removes"
            )
    left = [step.root for step in steps if step not in done]
    if left:
        warnings.warn(
            f"torch-pruning cannot prune {len(left)} of the {len(steps)} groups of "
            f"{type(model).__name__}: those of {', '.join(left)}",
            stacklevel=2,
        )
    return pair


def _torch_pruning() -> ModuleType:
    """The package, which is an optional dependency.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "torch_bridge.pruning.coupled needs torch-pruning; "
            "get it with: pip install onnx-simplify[pruning]"
        ) from error
    return torch_pruning


def _call(example_inputs: Any) -> Callable[[nn.Module], Any]:
    """A function that calls a model with the example inputs."""
    if isinstance(example_inputs, Mapping):
        return lambda model: model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return lambda model: model(*example_inputs)
    return lambda model: model(example_inputs)


def _graph(tp: Any, model: nn.Module, call: Callable[[nn.Module], Any]) -> Any:
    """The dependency graph of a model, which must be in inference mode.

    Raises:
        ValueError: torch-pruning, or the model itself, fails.
    """
    model.requires_grad_(True)  # the graph is read off the one that autograd records
    with torch.enable_grad():
        try:
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs=None,
                # Left to itself it tries ``model(*example_inputs)``, even of a single tensor.
                forward_fn=lambda traced, _: call(traced),
                verbose=False,
            )
        except Exception as error:
            raise ValueError(
                f"torch-pruning cannot analyse {type(model).__name__}: "
                f"{type(error).__name__}: {error}"
            ) from error


def _plan(
    tp: Any,
    model: nn.Module,
    call: Callable[[nn.Module], Any],
    ratio: float,
    round_to: int,
    seed: int,
) -> list[_Step]:
    """Choose the channels to prune, in the numbering of the whole model."""
    random = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model).eval()
    graph = _graph(tp, copied, call)
    names = {module: name for name, module in copied.named_modules()}
    steps = []
    for group in graph.get_all_groups():
        if _is_output(graph, group):
            continue
        channels = len(group[0].idxs)
        parts = math.lcm(*(_parts(graph, item.dep) for item in group))
        if channels % parts:
            continue
        size = channels // parts
        kept = _kept(size, ratio, round_to // math.gcd(parts, round_to))
        gone = sorted(torch.randperm(size, generator=random)[kept:].tolist())
        if gone:
            every = tuple(part * size + channel for part in range(parts) for channel in gone)
            steps.append(_Step(names[group[0].dep.target.module], every))
    return steps


def _kept(size: int, ratio: float, multiple: int) -> int:
    """How many of ``size`` channels to keep: rounded down to a multiple, which is the least."""
    kept = size - round(ratio * size)
    return min(size, max(multiple, kept - kept % multiple))


def _is_output(graph: Any, group: Any) -> bool:
    """Whether the channels of a group are channels of the model's output."""
    return any(
        not item.dep.target.outputs and graph.is_out_channel_pruning_fn(item.dep.handler)
        for item in group
    )


def _parts(graph: Any, dep: Any) -> int:
    """Into how many equal parts a layer divides the channels that a dependency prunes."""
    layer = dep.target.module
    pruner = graph.get_pruner_of_module(layer)
    if isinstance(layer, _ConvNd) and pruner.prune_in_channels == pruner.prune_out_channels:
        return 1  # depthwise: every channel is its own group
    if graph.is_out_channel_pruning_fn(dep.handler):
        return int(pruner.get_out_channel_groups(layer))
    return int(pruner.get_in_channel_groups(layer))


def _fits(graph: Any, group: Any) -> bool:
    """Whether pruning the group leaves every layer some channels, as many in each part of it."""
    if not graph.check_pruning_group(group):
        return False
    for item in group:
        output = graph.is_out_channel_pruning_fn(item.dep.handler)
        count = graph.get_out_channels if output else graph.get_in_channels
        channels = count(item.dep.target.module)
        # Behind a concatenation of what a split returns, torch-pruning counts on past the end.
        if channels is not None and not all(0 <= i < channels for i in item.idxs):
            return False
        parts = _parts(graph, item.dep)
        if parts == 1:
            continue
        size = channels // parts
        positions = [[i % size for i in item.idxs if i // size == part] for part in range(parts)]
        if any(sorted(position) != sorted(positions[0]) for position in positions):
            return False
    return True


def _apply(
    tp: Any, model: nn.Module, call: Callable[[nn.Module], Any], steps: Sequence[_Step]
) -> tuple[tuple[nn.Module, nn.Module], list[_Step]]:
    """The masked model and the oracle after those of these steps that fit, and which these are."""
    masked, oracle = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    graph = _graph(tp, oracle, call)
    names = {module: name for name, module in oracle.named_modules()}
    # Per layer, what is left of its output channels, in the numbering of the masked model.
    left: dict[str, list[int]] = {
        name: list(range(graph.get_out_channels(module)))
        for module, name in names.items()
        if module in graph.module2node and isinstance(module, (_ConvNd, nn.Linear, _BatchNorm))
    }
    done = []
    for step in steps:
        root = oracle.get_submodule(step.root)
        gone = set(step.channels)
        channels = [place for place, number in enumerate(left[step.root]) if number in gone]
        prune_outputs = graph.get_pruner_of_module(root).prune_out_channels
        group = graph.get_pruning_group(root, prune_outputs, channels)
        if not _fits(graph, group):
            continue
        for item in group:
            name = names.get(item.dep.target.module)
            if name in left and graph.is_out_channel_pruning_fn(item.dep.handler):
                places = set(item.idxs)
                _silence(masked.get_submodule(name), [left[name][place] for place in places])
                left[name] = [n for place, n in enumerate(left[name]) if place not in places]
        group.prune()
        done.append(step)
    wanted = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        parameter.requires_grad_(wanted[name].requires_grad)
    return (masked, oracle), done


@torch.no_grad()
def _silence(layer: nn.Module, channels: list[int]) -> None:
    """Set output channels of a convolution, linear layer or BatchNorm to zero, bias included."""
    if layer.weight is not None:
        transposed = isinstance(layer, _ConvNd) and layer.transposed
        layer.weight.data[(slice(None), channels) if transposed else channels] = 0
    if layer.bias is not None:
        layer.bias.data[channels] = 0


@torch.no_grad()
def _agree(pair: tuple[nn.Module, nn.Module], call: Callable[[nn.Module], Any]) -> bool:
    """Whether both models run and give the same outputs."""
    masked, oracle = pair
    expected = pytree.tree_leaves(call(masked))
    try:
        actual = pytree.tree_leaves(call(oracle))
    except (RuntimeError, ValueError, IndexError):  # channels that do not fit together
        return False
    return len(actual) == len(expected) and all(map(_close, actual, expected))


def _close(actual: Any, expected: Any) -> bool:
    """Whether two outputs are equal up to rounding."""
    if not isinstance(expected, torch.Tensor):
        return bool(actual == expected)
    if actual.shape != expected.shape:
        return False
    limit = _TOLERANCE * expected.abs().max() if expected.numel() else 0
    return bool(((actual - expected).abs() <= limit).all())  # False where a value is not finite
