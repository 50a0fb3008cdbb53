"""Range checks shared by the specs; every failure names the owner, the rule and the value."""

import math


def require_positive(owner: str, **values: float) -> None:
    """Raise ``ValueError`` unless every value is finite and greater than zero."""
    for field, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{owner}: {field} must be finite and > 0, got {value}")


def require_non_negative(owner: str, **values: float) -> None:
    """Raise ``ValueError`` unless every value is finite and not negative."""
    for field, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{owner}: {field} must be finite and >= 0, got {value}")


def require_share(owner: str, **values: float) -> None:
    """Raise ``ValueError`` unless every value lies in (0, 1]."""
    for field, value in values.items():
        if not 0 < value <= 1:
            raise ValueError(f"{owner}: {field} must be in (0, 1], got {value}")
