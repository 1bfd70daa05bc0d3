"""What several rooms ask of operators by name, whatever their rules are: one row an operator.

The traits:

    random        makes noise (``Dropout`` in training mode only)
    jumps         rounding of what comes in can change what comes out by more than rounding
    selects       chooses or sorts rows by their values, so that near-ties may come in another order
    coarse        rounds to a few bits, in the middle of a network
    overflows     can give infinity or NaN for ordinary numbers
    bounded       computes in steps of numbers around one, however close to zero the result is
    sizes         reads how large a tensor is, not what it holds
    passes        hands on what comes in: with one varying input, the output has its numbers
    disputed      onnx and onnxruntime may not agree on the output's shape
    blocked       onnxruntime computes it in blocks of channels (NCHWc)
    activates     of these, it goes into the kernel of the convolution in front
    averages      gives means of many numbers
    concatenated  computed in blocks behind a concatenation of whole blocks
"""

from __future__ import annotations

_TABLE = """
Acosh                 overflows
Add                   blocked
ArgMax                jumps
ArgMin                jumps
Atanh                 overflows
AveragePool           averages disputed blocked concatenated
BatchNormalization    concatenated
Bernoulli             random
Cast                  passes
Ceil                  jumps
Clip                  activates blocked concatenated
Compress              selects
Concat                passes blocked concatenated
Conv                  blocked concatenated
ConvTranspose         disputed
Cos                   bounded
Cosh                  overflows
Div                   overflows
Dropout               random
DynamicQuantizeLinear jumps coarse
Equal                 jumps
Erf                   bounded
Exp                   overflows
Expand                passes
Flatten               passes
Floor                 jumps
Gather                passes
GlobalAveragePool     averages blocked concatenated
Greater               jumps
GreaterOrEqual        jumps
HardSigmoid           bounded activates blocked
HardSwish             activates blocked
Hardmax               jumps
Identity              passes
LeakyRelu             activates blocked
Less                  jumps
LessOrEqual           jumps
Log                   overflows
LpPool                disputed
MaxPool               disputed blocked concatenated
MaxUnpool             disputed
Mod                   jumps overflows
Mul                   blocked
Multinomial           random
NonMaxSuppression     jumps selects
NonZero               jumps selects
Pow                   overflows
QuantizeLinear        jumps coarse
RandomNormal          random
RandomNormalLike      random
RandomUniform         random
RandomUniformLike     random
Reciprocal            overflows
ReduceLogSum          overflows
ReduceLogSumExp       overflows
ReduceMean            averages
ReduceProd            overflows
ReduceSumSquare       overflows
Relu                  activates blocked concatenated
Reshape               passes
Resize                disputed
Round                 jumps
Shape                 sizes
Shrink                jumps
Sigmoid               bounded activates blocked
Sign                  jumps
Sin                   bounded
Sinh                  overflows
Size                  sizes
Slice                 passes
Softmax               bounded
Softsign              bounded
Split                 passes
Sqrt                  overflows
Squeeze               passes
Tan                   overflows
Tanh                  bounded activates blocked
ThresholdedRelu       jumps
TopK                  jumps selects
Transpose             passes
Unique                jumps selects
Unsqueeze             passes
Upsample              disputed
"""

TRAITS: dict[str, frozenset[str]] = {
    name: frozenset(traits)
    for name, *traits in (line.split() for line in _TABLE.strip().splitlines())
}
"""The traits of each operator of the standard domain that has any."""


def named(trait: str) -> frozenset[str]:
    """The operators that have a trait."""
    return frozenset(name for name, traits in TRAITS.items() if trait in traits)


RANDOM = named("random")
JUMPS = named("jumps")
SELECTS = named("selects")
COARSE = named("coarse")
OVERFLOWS = named("overflows")
BOUNDED = named("bounded")
SIZES = named("sizes")
PASSES = named("passes")
DISPUTED = named("disputed")
BLOCKED = named("blocked")
ACTIVATES = named("activates")
CONCATENATED = named("concatenated")
AVERAGES = named("averages")
