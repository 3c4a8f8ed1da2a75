"""Parse and print quantities; in memory everything is SI base (seconds, bytes, FLOPs, watts, dollars).

Decimal prefixes are powers of ten (``GB`` = 1e9 B), binary ones powers of two (``GiB`` = 2**30 B), and
``bit`` is an eighth of a byte. A bare number where a unit is due is an error, and so is a unit of another
kind: a silent factor of eight or 1e9 costs more than a retyped flag.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from meshwright.errors import SpecError, did_you_mean

__all__ = ["Kind", "format_change", "format_quantity", "parse_quantity"]

Kind = Literal[
    "bytes",
    "bytes_per_second",
    "flops_per_second",
    "seconds",
    "watts",
    "hertz",
    "dollars_per_hour",
    "per_second",
    "fraction",
]

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_PREFIXES = _DECIMAL | _BINARY

_UNITS: dict[Kind, dict[str, float]] = {
    "bytes": {p + "B": f for p, f in _PREFIXES.items()},
    "bytes_per_second": {p + "B/s": f for p, f in _PREFIXES.items()}
    | {p + unit: f / 8.0 for p, f in _DECIMAL.items() for unit in ("bit/s", "b/s", "bps")},
    "flops_per_second": {
        p + unit: f for p, f in _DECIMAL.items() for unit in ("FLOP/s", "FLOPS", "FLOPs/s", "OP/s")
    },
    "seconds": {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0},
    "watts": {"mW": 1e-3, "W": 1.0, "kW": 1e3, "MW": 1e6},
    "hertz": {"Hz": 1.0, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9},
    "dollars_per_hour": {"$/h": 1.0, "USD/h": 1.0},
    "per_second": {"/s": 1.0, "/min": 1.0 / 60.0, "/h": 1.0 / 3600.0},
    "fraction": {"%": 1e-2},
}
_EXAMPLES: dict[Kind, str] = {
    "bytes": "80 GiB",
    "bytes_per_second": "3.35 TB/s or 400 Gbit/s",
    "flops_per_second": "989.4 TFLOP/s",
    "seconds": "5 us",
    "watts": "700 W",
    "hertz": "1.83 GHz",
    "dollars_per_hour": "2.50 $/h",
    "per_second": "4 /s",
    "fraction": "5 %",
}
# The unit each kind is printed in, largest first; a value takes the first that leaves it >= 1.
_PRINTED: dict[Kind, tuple[str, ...]] = {
    "bytes": ("TiB", "GiB", "MiB", "KiB", "B"),
    "bytes_per_second": ("TB/s", "GB/s", "MB/s", "kB/s", "B/s"),
    "flops_per_second": ("PFLOP/s", "TFLOP/s", "GFLOP/s", "MFLOP/s", "FLOP/s"),
    "seconds": ("h", "min", "s", "ms", "us", "ns"),
    "watts": ("MW", "kW", "W"),
    "hertz": ("GHz", "MHz", "kHz", "Hz"),
    "dollars_per_hour": ("$/h",),
    "per_second": ("/s",),
    "fraction": ("%",),
}
_NUMBER = re.compile(r"^([+-]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*)$")


def parse_quantity(text: str, kind: Kind) -> float:
    """Return the SI value of a quantity written with its unit.

    Parameters
    ----------
    text : str
        Number and unit, with or without a space: ``"80 GiB"``, ``"400Gbit/s"``, ``"5 us"``, ``"5 %"``.
    kind : Kind
        What the quantity measures; a unit of another kind is refused.

    Returns
    -------
    float
        The value in the SI base unit of ``kind``; fractions are plain numbers (``"5 %"`` is 0.05).

    Raises
    ------
    SpecError
        If the unit is missing or unknown, or the number is negative or not finite.

    Examples
    --------
    >>> parse_quantity("400 Gbit/s", "bytes_per_second")
    50000000000.0
    >>> parse_quantity("1.5 KiB", "bytes")
    1536.0
    """
    match = _NUMBER.match(str(text).strip())
    if match is None:
        raise SpecError(f"{text!r} is not a quantity; write a number and a unit, e.g. '{_EXAMPLES[kind]}'")
    number, unit = float(match.group(1).replace("_", "")), match.group(2).strip()
    units = _UNITS[kind]
    if not unit:
        raise SpecError(f"'{text}' has no unit; write for example '{_EXAMPLES[kind]}'")
    if unit not in units:
        # A rate without its '/s' is nearer to what was meant than any other spelling.
        rate = f"{unit}/s"
        guess = f"; did you mean '{rate}'?" if rate in units else did_you_mean(unit, units) or ";"
        raise SpecError(
            f"'{text}': unknown unit '{unit}' for {_spoken(kind)}{guess} write for example "
            f"'{_EXAMPLES[kind]}'"
        )
    value = number * units[unit]
    if not math.isfinite(value) or value < 0:
        raise SpecError(f"'{text}' must be a finite quantity, not negative")
    return value


def format_quantity(value: float, kind: Kind, digits: int = 4) -> str:
    """Return a quantity with the largest unit that leaves it at least 1.

    Examples
    --------
    >>> format_quantity(5e10, "bytes_per_second")
    '50 GB/s'
    >>> format_quantity(0.0125, "seconds")
    '12.5 ms'
    >>> format_quantity(85520809984.0, "bytes")
    '79.65 GiB'
    """
    units = _UNITS[kind]
    for unit in _PRINTED[kind]:
        if abs(value) >= units[unit] or unit == _PRINTED[kind][-1]:
            return f"{value / units[unit]:.{digits}g} {unit}"
    raise AssertionError("unreachable: the last unit always matches")


def format_change(share: float, decimals: int = 1) -> str:
    """Return a signed share in percent; what rounds to zero has no sign.

    Examples
    --------
    >>> format_change(0.025), format_change(-0.0004)
    ('+2.5%', '0.0%')
    """
    text = f"{abs(share):.{decimals}%}"
    if not text.strip("0.%"):
        return text
    return f"{'-' if share < 0.0 else '+'}{text}"


def _spoken(kind: Kind) -> str:
    return kind.replace("_", " ")
