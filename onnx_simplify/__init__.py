"""Make structurally pruned ONNX models as small and fast as their pruning allows.

``simplify`` does everything; ``fold_batchnorm``, ``propagate_bias`` and ``remove_zeroed`` are its
three steps.  See :mod:`onnx_simplify.api`.
"""

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
from onnx_simplify.errors import CannotVerifyError, ModelError, SimplifyError, VerificationError
from onnx_simplify.pipeline import PASSES
from onnx_simplify.report import Report
from onnx_simplify.runtime.benchmark import Timing
from onnx_simplify.runtime.verify import Verification
from onnx_simplify.version import __version__

__all__ = [
    "PASSES",
    "CannotVerifyError",
    "ModelError",
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
