"""What several rooms ask of operators by name, whatever their rules are."""

from __future__ import annotations

RANDOM = frozenset(
    """Bernoulli Dropout Multinomial RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike""".split()
)
"""Make noise (``Dropout`` in training mode only)."""

JUMPS = frozenset(
    """ArgMax ArgMin Ceil DynamicQuantizeLinear Equal Floor Greater GreaterOrEqual Hardmax Less
    LessOrEqual Mod NonMaxSuppression NonZero QuantizeLinear Round Shrink Sign ThresholdedRelu TopK
    Unique""".split()
)
"""Jump: rounding of what comes in can change what comes out by more than rounding."""

SELECTS = frozenset("Compress NonMaxSuppression NonZero TopK Unique".split())
"""Choose or sort rows by their values, so that near-ties may come in another order."""

COARSE = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
"""Round to a few bits, in the middle of a network."""

OVERFLOWS = frozenset(
    """Acosh Atanh Cosh Div Exp Log Mod Pow Reciprocal ReduceLogSum ReduceLogSumExp ReduceProd
    ReduceSumSquare Sinh Sqrt Tan""".split()
)
"""Can give infinity or NaN for ordinary numbers."""

BOUNDED = frozenset("Cos Erf HardSigmoid Sigmoid Sin Softmax Softsign Tanh".split())
"""Compute in steps of numbers around one, however close to zero the result is."""

SIZES = frozenset({"Shape", "Size"})
"""Read how large a tensor is, not what it holds."""
