"""How exceptions, dtypes and tables are put into messages and reports, and which dtypes there are kernels for."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights, activations and caches


def first_line(error: Exception) -> str:
    """First line of what an exception says, with the second where that only announces it; its type if it says nothing."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


def in_words(error: Exception) -> str:
    """Type of an exception and its first line."""
    kind = type(error).__name__
    return f"{kind}: {first_line(error)}" if str(error).strip() else kind


def counted(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtypes_in_words(last: str = "") -> str:
    """Those of weights: `torch.float32, torch.bfloat16 or torch.float16`; with a last one more."""
    *first, end = [*map(str, DTYPES), *filter(None, [last])]
    return f"{', '.join(first)} or {end}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of text with aligned columns."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = tuple("-" * width for width in widths)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, rule, *rows)
    ]
