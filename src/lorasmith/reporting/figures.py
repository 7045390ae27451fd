"""How numbers are written on the page, and where they lie on an axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

MISSING = "not measured"
_MINUS = "−"


def number(value: float | str | None, digits: int = 3) -> str:
    """`digits` significant digits; very small and very large numbers in powers of ten."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return (_MINUS if value < 0 else "") + text


def plain(value: float | str) -> str:
    """A number that someone wrote down, such as a threshold: as short as it can be."""
    return value if isinstance(value, str) else f"{value:g}"


def signed(value: float | None, digits: int = 3) -> str:
    """The same with its sign always shown."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction in 0..1 as `99.13 %`."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def count(value: int | None) -> str:
    """`134,515,008`."""
    return MISSING if value is None else f"{value:,}"


def plural(value: int, noun: str) -> str:
    """`1 gate`, `3 gates`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def duration(seconds: float) -> str:
    """`0.4 s`, `1 min 21 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def dollars(amount: float) -> str:
    """`$12.50`, and below a cent as many digits as it takes."""
    return f"${amount:.2f}" if amount >= 0.01 or amount == 0 else f"${amount:.2g}"


def energy(joules: float | None) -> str:
    """An energy in watt-hours: `12.5 Wh`."""
    return "not measured" if joules is None else f"{joules / 3600:.3g} Wh"


def short_hash(sha256: str) -> str:
    """The first 12 digits: enough to recognise, never to prove."""
    return sha256[:12]


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def labels(self) -> list[tuple[float, str]]:
        """Place in percent and text of each tick."""
        return [(self.at(tick), self._label(tick)) for tick in self.ticks]

    def _label(self, tick: float) -> str:
        if self.log:
            return f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
        return plain(round(tick, 12)).replace("-", _MINUS, 1 if tick < 0 else 0)

    def at(self, value: float) -> float:
        """Position in percent of the axis, 0..100; a value outside lies on the edge."""
        low, high, here = self.low, self.high, value
        if self.log:
            low, high = math.log10(low), math.log10(high)
            here = math.log10(value) if value > 0 else low
        share = (here - low) / (high - low)
        return round(100 * min(1.0, max(0.0, share)), 3)


def linear_axis(values: list[float], *, include: float | None = None) -> Axis:
    """An axis that covers the values, with at most six ticks at 1, 2, 2.5 or 5 times a power of ten."""
    points = values + ([] if include is None else [include])
    low, high = min(points), max(points)
    if high - low < 1e-12:
        spread = max(abs(high), 1.0) * 0.1
        low, high = low - spread, high + spread
    margin = 0.03 * (high - low)
    low, high = low - margin, high + margin
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step)
    ticks = tuple(step * index for index in range(first, math.floor(high / step) + 1))
    return Axis(low, high, ticks)


def log_axis(values: list[float]) -> Axis:
    """A logarithmic axis over whole powers of ten that covers the positive values."""
    positive = [value for value in values if value > 0] or [1.0]
    low = math.floor(math.log10(min(positive)))
    high = max(low + 1, math.ceil(math.log10(max(positive))))
    stride = max(1, math.ceil((high - low) / 6))
    return Axis(10.0**low, 10.0**high, tuple(10.0**power for power in range(low, high + 1, stride)), log=True)
