"""Make structurally pruned ONNX models as small and fast as their pruning allows.

``simplify`` does everything; ``fold_batchnorm``, ``propagate_bias`` and ``remove_zeroed`` are its
three steps.  See :mod:`onnx_simplify.api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from onnx_simplify.errors import (
    CannotVerifyError,
    ModelError,
    RunError,
    SimplifyError,
    VerificationError,
)
from onnx_simplify.version import __version__

if TYPE_CHECKING:
    from onnx_simplify.api import (
        benchmark,
        fold_batchnorm,
        get_bn_folding,
        get_pinned,
        propagate_bias,
        remove_zeroed,
        simplify,
        verify,
    )
    from onnx_simplify.options import PASSES
    from onnx_simplify.report import Report
    from onnx_simplify.runtime.benchmark import Timing
    from onnx_simplify.runtime.verdict import Verification

__all__ = [
    "PASSES",
    "CannotVerifyError",
    "ModelError",
    "RunError",
    "Report",
    "SimplifyError",
    "Timing",
    "Verification",
    "VerificationError",
    "__version__",
    "benchmark",
    "fold_batchnorm",
    "get_bn_folding",
    "get_pinned",
    "propagate_bias",
    "remove_zeroed",
    "simplify",
    "verify",
]

# Where names are that need onnxruntime. It is loaded when the first of them is asked for, so that
# the command line can start the process it works in before: onnxruntime does not survive a fork.
_HOMES = {
    "PASSES": "options",
    "Report": "report",
    "Timing": "runtime.benchmark",
    "Verification": "runtime.verdict",
}

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import what was asked for."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted(__all__)
