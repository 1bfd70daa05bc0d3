"""Exact arithmetic with sizes that are not known: integer polynomials over symbols.

A size is a number or a text. A text that does not start with ``=`` is a symbol; one that does is
an expression, written in one canonical way, so that two sizes are provably the same if they are
the same text:

    h                          a symbol
    =h*w + 1                   a polynomial with integer coefficients
    =floor((h - 1)/2) + 1      rounded quotients count as symbols of their own

Sums, differences, products and divisions by a number give one canonical form: a rounded quotient
sheds all terms that the divisor divides, floor((k p + q) / k) = p + floor(q / k), and quotients of
quotients are merged, floor(floor(p / a) / b) = floor(p / (a b)). Both hold for all integers p, q
and positive a, b, k. What would grow beyond a few terms is not known (None).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import gcd

Dim = int | str
"""A static size, or the symbol or expression of a dynamic one."""

_MARK = "="
_MOST_TERMS = 24
_PLAIN = re.compile(r"[A-Za-z_]\w*")

Monomial = tuple[str, ...]
"""Atoms, sorted: symbols, and rounded quotients by their texts, which start with the mark."""
Polynomial = dict[Monomial, int]
"""Coefficients other than zero by monomial."""

# What texts stand for. A text determines its polynomial, so entries never conflict.
_POLYNOMIALS: dict[str, Polynomial] = {}
_QUOTIENTS: dict[str, tuple[Polynomial, int]] = {}


def is_expression(dim: object) -> bool:
    """Whether a size is computed from symbols, rather than being one."""
    return isinstance(dim, str) and dim.startswith(_MARK)


def total(dims: Iterable[Dim | None]) -> Dim | None:
    """The sum."""
    found: Polynomial = {}
    for dim in dims:
        if dim is None:
            return None
        _add(found, _polynomial(dim), 1)
    return _dim(found)


def difference(left: Dim | None, right: Dim | None) -> Dim | None:
    """What ``right`` lacks to ``left``."""
    if left is None or right is None:
        return None
    found = dict(_polynomial(left))
    _add(found, _polynomial(right), -1)
    return _dim(found)


def product(dims: Iterable[Dim | None]) -> Dim | None:
    """The product."""
    found: Polynomial = {(): 1}
    for dim in dims:
        if dim is None:
            return None
        found = _times(found, _polynomial(dim))
        if len(found) > _MOST_TERMS:
            return None
    return _dim(found)


def floor_quotient(dim: Dim | None, divisor: int) -> Dim | None:
    """The quotient by a positive number, rounded down."""
    if dim is None or divisor < 1:
        return None
    return _dim(_floored(_polynomial(dim), divisor))


def ceil_quotient(dim: Dim | None, divisor: int) -> Dim | None:
    """The quotient by a positive number, rounded up: floor((p + k - 1) / k)."""
    return floor_quotient(total([dim, divisor - 1]), divisor) if divisor > 0 else None


def exact_quotient(dims: Sequence[Dim | None], divisors: Sequence[Dim | None]) -> Dim | None:
    """The size that, multiplied by ``divisors``, gives the product of ``dims``; None if unknown.

    All sizes are taken to be positive.
    """
    if None in dims or None in divisors or 0 in divisors:
        return None
    above: Counter[Dim | None] = Counter(dims)
    below: Counter[Dim | None] = Counter(divisors)
    over = product((above - below).elements())
    under = product((below - above).elements())
    if over is None or under is None or under == 0:
        return None
    top, bottom = _polynomial(over), _polynomial(under)
    if len(bottom) != 1:
        return None
    ((atoms, factor),) = bottom.items()
    found: Polynomial = {}
    for monomial, coefficient in top.items():
        rest = Counter(monomial)
        if Counter(atoms) - rest or coefficient % factor:
            return None
        found[tuple(sorted((rest - Counter(atoms)).elements()))] = coefficient // factor
    return _dim(found)


def evaluate(dim: Dim, value: Callable[[str], int]) -> int:
    """The size, once all symbols are known.

    Args:
        dim: the size.
        value: gives the number that a symbol stands for.
    """
    return _evaluate(_polynomial(dim), value)


def sample(dim: Dim) -> int:
    """The size for one arbitrary choice of symbols, the same choice for all sizes.

    Sizes that are the same have the same sample; the reverse need not be true.
    """
    return evaluate(dim, _arbitrary)


@lru_cache(maxsize=4096)
def _arbitrary(symbol: str) -> int:
    return 1000 + zlib.crc32(symbol.encode("utf-8", "surrogatepass")) % 99991


def _evaluate(polynomial: Polynomial, value: Callable[[str], int]) -> int:
    found = 0
    for monomial, coefficient in polynomial.items():
        for atom in monomial:
            if atom in _QUOTIENTS:
                inner, divisor = _QUOTIENTS[atom]
                coefficient *= _evaluate(inner, value) // divisor
            else:
                coefficient *= value(atom)
        found += coefficient
    return found


def _polynomial(dim: Dim) -> Polynomial:
    if isinstance(dim, str):
        return _POLYNOMIALS[dim] if dim.startswith(_MARK) else {(dim,): 1}
    return {(): int(dim)} if dim else {}


def _dim(polynomial: Polynomial) -> Dim | None:
    """The number, the symbol or the canonical text."""
    if len(polynomial) > _MOST_TERMS:
        return None
    if not polynomial:
        return 0
    if len(polynomial) == 1:
        ((monomial, coefficient),) = polynomial.items()
        if not monomial:
            return coefficient
        if len(monomial) == 1 and coefficient == 1 and monomial[0] not in _QUOTIENTS:
            return monomial[0]
    text = _MARK + _text(polynomial)
    _POLYNOMIALS.setdefault(text, polynomial)
    return text


def _text(polynomial: Polynomial) -> str:
    parts = []
    for monomial in sorted(polynomial, key=lambda m: (-len(m), m)):
        coefficient = polynomial[monomial]
        factors = [_written(atom) for atom in monomial]
        if abs(coefficient) != 1 or not factors:
            factors.insert(0, str(abs(coefficient)))
        sign = "-" if coefficient < 0 else "+"
        parts.append(f"{sign} {'*'.join(factors)}")
    text = " ".join(parts)
    return text[2:] if text.startswith("+ ") else "-" + text[2:]


def _written(atom: str) -> str:
    """A symbol that could be mistaken for an expression is quoted."""
    if atom in _QUOTIENTS:
        return atom[1:]
    return atom if _PLAIN.fullmatch(atom) else repr(atom)


def _add(found: Polynomial, other: Polynomial, factor: int) -> None:
    """Add a multiple of a polynomial, in place."""
    for monomial, coefficient in other.items():
        value = found.get(monomial, 0) + factor * coefficient
        if value:
            found[monomial] = value
        else:
            found.pop(monomial, None)


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    found: Polynomial = {}
    for first, a in left.items():
        _add(found, {tuple(sorted(first + second)): b for second, b in right.items()}, a)
    return found


def _floored(polynomial: Polynomial, divisor: int) -> Polynomial:
    """A polynomial divided by a positive number and rounded down."""
    whole: Polynomial = {}
    rest: Polynomial = {}
    for monomial, coefficient in polynomial.items():
        # The remainder is from 0 to the divisor, so that equal rests have equal texts.
        quotient, remainder = divmod(coefficient, divisor)
        if quotient:
            whole[monomial] = quotient
        if remainder:
            rest[monomial] = remainder
    number = rest.pop((), 0)
    if not rest:
        return whole
    shared = gcd(divisor, *rest.values())
    if shared > 1:
        # floor((s p + r) / (s k)) = floor((p + floor(r / s)) / k)
        rest = {m: c // shared for m, c in rest.items()}
        number, divisor = number // shared, divisor // shared
    ((monomial, coefficient),) = rest.items() if len(rest) == 1 else (((), 0),)
    if len(monomial) == 1 and coefficient == 1 and monomial[0] in _QUOTIENTS and divisor > 1:
        # floor((floor(p / a) + r) / b) = floor((p + a r) / (a b))
        inner, own = _QUOTIENTS[monomial[0]]
        rest = dict(inner)
        _add(rest, {(): own * number} if number else {}, 1)
        _add(whole, _floored(rest, own * divisor), 1)
        return whole
    if number:
        rest[()] = number
    if divisor == 1 or shared > 1:
        _add(whole, rest if divisor == 1 else _floored(rest, divisor), 1)
        return whole
    atom = f"{_MARK}floor(({_text(rest)})/{divisor})"
    _QUOTIENTS.setdefault(atom, (rest, divisor))
    _add(whole, {(atom,): 1}, 1)
    return whole
