"""Number types of at most 16 bits, all of whose values float32 holds exactly: rounding to them is a function."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SmallFloat:
    """``mantissa`` stored bits; ``least``: exponent of the smallest normal number; ``most``: the largest number.

    ``infinite``: has an infinity, else what is too large becomes a NaN. ``nan``: has a NaN, else what is no number or
    too large becomes the largest one. ``negative_zero``: else -0 is 0. (The 8-bit types: Micikevicius et al., "FP8
    Formats for Deep Learning", 2022, and Noune et al., "8-bit Numerical Formats for Deep Neural Networks", 2022; the
    4-bit type: OCP Microscaling Formats 1.0, 2023.)
    """

    bits: int
    mantissa: int
    least: int
    most: float
    infinite: bool = False
    nan: bool = True
    negative_zero: bool = True


# numpy's names, as ml_dtypes registers them
FLOATS = {
    "bfloat16": SmallFloat(16, 7, -126, (2 - 2**-7) * 2.0**127, infinite=True),
    "float8_e4m3fn": SmallFloat(8, 3, -6, 448.0),
    "float8_e4m3fnuz": SmallFloat(8, 3, -7, 240.0, negative_zero=False),
    "float8_e5m2": SmallFloat(8, 2, -14, 57344.0, infinite=True),
    "float8_e5m2fnuz": SmallFloat(8, 2, -15, 57344.0, negative_zero=False),
    "float4_e2m1fn": SmallFloat(4, 1, 0, 6.0, nan=False),
}
POWERS = "float8_e8m0fnu"  # powers of two alone, 2^-127 … 2^127
INTEGERS = {
    "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2,
}  # fmt: skip


def to_float(x: Wide, kind: SmallFloat, saturate: float) -> Wide:
    """The nearest number of that type, ties to even; what is too large becomes the largest one where ``saturate``."""
    with np.errstate(all="ignore"):
        size = np.abs(x)
        finite = np.isfinite(x)
        exponent = np.maximum(np.frexp(np.where(finite & (size > 0), size, 1.0))[1] - 1, kind.least)
        exponent = np.where(size == 0, kind.least, exponent)
        step = np.ldexp(1.0, exponent - kind.mantissa)
        rounded = np.where(finite, np.rint(size / step) * step, size)
        beyond = kind.most if saturate or not kind.nan else np.inf if kind.infinite else np.nan
        rounded = np.where(rounded > kind.most, beyond, rounded)
        result = np.copysign(rounded, x)
        if not kind.negative_zero:
            result = np.where(result == 0, 0.0, result)
        return np.asarray(np.where(np.isnan(x), x if kind.nan else -0.0, result))


def to_power(x: Wide, saturate: float, mode: float) -> Wide:
    """The exponent alone of a float32: rounded up (0), down (1) or to the nearest (2) power; what is none is a NaN."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.int64)
    exponent, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    nearer = (fraction > 0x400000) | ((fraction == 0x400000) & (exponent > 0))
    up = nearer if mode == 2 else (fraction > 0) & (mode == 0)
    up = up & ((exponent < 0xFE) | (not saturate))
    power = np.ldexp(1.0, exponent + up - 127)
    return np.asarray(np.where((exponent == 0xFF) | (exponent + up == 0xFF), np.nan, power))


def to_integer(x: Wide, bits: int, signed: bool) -> Wide:
    """Cut to a whole number, its lowest ``bits`` bits; 0 for what is no number."""
    with np.errstate(all="ignore"):
        whole = np.where(np.isnan(x), 0.0, np.clip(np.trunc(x), -(2.0**62), 2.0**62)).astype(np.int64)
    low = whole & ((1 << bits) - 1)
    return np.asarray(low - ((low >> (bits - 1)) << bits) if signed else low, np.float64)
