"""From PyTorch to ONNX: export a module, and prune one in the ways the literature does.

Needs the ``torch`` extra (``pip install onnx-simplify[torch]``); `torch_bridge.pruning.coupled`
needs the ``pruning`` extra as well. Nothing in ``onnx_simplify`` imports this package.
"""

from torch_bridge.export import ExportError, export
from torch_bridge.pruning import coupled, ln_structured, random_structured, slim

__all__ = ["ExportError", "coupled", "export", "ln_structured", "random_structured", "slim"]
