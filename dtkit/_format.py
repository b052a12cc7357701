"""Numbers as short text: an unknown one is a dash, one that is not finite a sign."""

from __future__ import annotations

import math

__all__ = [
    "UNKNOWN",
    "format_bytes",
    "format_loss",
    "format_memory",
    "format_ms",
    "format_percent",
    "format_rate",
    "format_size",
    "format_time",
]

UNKNOWN = "–"


def format_loss(value: float) -> str:
    """Return four significant digits: 1.298, 12.98, 1.298e-05."""
    if not math.isfinite(value):
        return _nonfinite(value)
    if value and not 1e-3 <= abs(value) < 1e6:  # noqa: PLR2004
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"  # noqa: PLR2004


def format_rate(value: float) -> str:
    """Return a number of things per second: 5,055 or 12.5."""
    if not math.isfinite(value):
        return _nonfinite(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"  # noqa: PLR2004


def format_ms(value: float) -> str:
    """Return milliseconds without their unit: 0.25, 12.5, 1,250."""
    if not math.isfinite(value):
        return _nonfinite(value)
    if value >= 1000:  # noqa: PLR2004
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 or not value else f"{value:.2f}"


def format_percent(share: float) -> str:
    """Return a share between 0 and 1 as "18 %"."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else _nonfinite(share)


def format_size(gib: float) -> str:
    """Return GiB as "9.4 GiB" or "620 MiB"."""
    if not math.isfinite(gib):
        return _nonfinite(gib)
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.0f} MiB"


def format_memory(num_bytes: float) -> str:
    """Return what lies in memory, in powers of two: 12 B, 4.0 KiB, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024:  # noqa: PLR2004
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} PiB"


def format_bytes(num_bytes: float) -> str:
    """Return what travels, in powers of ten: 999 B, 1.25 MB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:  # noqa: PLR2004  three digits
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def format_time(seconds: float) -> str:
    """Return "0:07", "12:34" or "1:02:03"."""
    if not math.isfinite(seconds):
        return _nonfinite(seconds)
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _nonfinite(value: float) -> str:
    return UNKNOWN if math.isnan(value) else "∞" if value > 0 else "−∞"
