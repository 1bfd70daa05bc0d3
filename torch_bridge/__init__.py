"""From PyTorch to ONNX: export a module, simplify it, prune one as the literature does.

Needs the ``torch`` extra (``pip install onnx-simplify[torch]``); `torch_bridge.pruning.coupled`
needs the ``pruning`` extra as well. Nothing in ``onnx_simplify`` imports this package.
"""

from torch_bridge.export import ExportError, export
from torch_bridge.pruning import coupled, ln_structured, random_structured, slim
from torch_bridge.sessions import CallError
from torch_bridge.simplified import SimplifiedModel
from torch_bridge.simplify import (
    fuse,
    get_bn_folding,
    get_pinned,
    propagate_bias,
    remove_zeroed,
    simplify,
)

__all__ = [
    "CallError",
    "ExportError",
    "SimplifiedModel",
    "coupled",
    "export",
    "fuse",
    "get_bn_folding",
    "get_pinned",
    "ln_structured",
    "propagate_bias",
    "random_structured",
    "remove_zeroed",
    "simplify",
    "slim",
]
