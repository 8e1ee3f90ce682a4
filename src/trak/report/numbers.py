"""Numbers as text: three significant digits, a real minus sign, a dash where there is no number."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
NO_NUMBER = "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """0.0123, 1.23, 1 230, 1.20e−6: `digits` significant digits, no exponent between 1e-4 and 1e6."""
    if value is None or not math.isfinite(value):
        return NO_NUMBER
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}".replace("-", MINUS).replace(
        ",", "\N{NARROW NO-BREAK SPACE}"
    )


def signed(value: float | None, digits: int = 3) -> str:
    """As `number`, with a plus sign in front of positive numbers."""
    text = number(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text


def fixed(value: float | None, decimals: int = 3) -> str:
    """A fixed number of decimals, for columns: correlations and areas."""
    if value is None or not math.isfinite(value):
        return NO_NUMBER
    return f"{value:.{decimals}f}".replace("-", MINUS)


def percent(value: float | None, decimals: int | None = None) -> str:
    """A fraction as per cent: 10 %, 2.5 %; with a fixed number of decimals for columns."""
    if value is None or not math.isfinite(value):
        return NO_NUMBER
    text = f"{100 * value:.3g}" if decimals is None else f"{100 * value:.{decimals}f}"
    return f"{text}\N{NARROW NO-BREAK SPACE}%".replace("-", MINUS)
