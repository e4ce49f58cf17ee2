"""Constants and small helpers that several files share, without torch."""

GIB = 2**30
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # our word → torch's name
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Unknown(Exception):
    """A probe has no answer; its text says why."""


def significant(value: float, digits: int = 3) -> str:
    """The number with so many significant digits, a larger one whole: 0.0123, 45.6, 1,235."""
    return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:,.0f}"


def first_line(text: object) -> str:
    """The first line of an exception's text, for a sentence; or the exception's class."""
    lines = str(text).strip().splitlines()
    return lines[0][:200] if lines else type(text).__name__
