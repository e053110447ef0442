"""Checks of the numbers that things are made with: each names what it refuses."""

import math
import numbers
from typing import Any


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError where `value` is not an integer of at least `least`."""
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not fits or value < least:
        raise ValueError(f"{name} {value!r} must be an integer of at least {least}")


def boolean(name: str, value: Any) -> None:
    """Raises ValueError where `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} {value!r} must be True or False")


def real(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raises ValueError where `value` is not a finite number within these bounds."""
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or value < least or value <= above:
        bound = f" above {above:g}" if above > -math.inf else ""
        bound = f" of at least {least:g}" if least > -math.inf else bound
        raise ValueError(f"{name} {value!r} must be a finite number{bound}")
