"""Plain tables and sizes for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER = re.compile(r"(\d[\d .,]*( ?[A-Za-z%/]+)?)?|-")  # with its unit; nothing and a dash stand for none


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = (), indent: str = "  ") -> str:
    """Columns as wide as they need to be: numbers to the right, words to the left."""
    cells = [[str(c) for c in row] for row in ([header, *rows] if header else rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(widths))]
    lines = (
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) for row in cells
    )
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def _is_number(value: object) -> bool:
    return NUMBER.fullmatch(str(value)) is not None


def size(nbytes: int) -> str:
    """Bytes in the unit that leaves three or four digits: 1023 B, 4.00 KiB, 1.46 GiB."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{nbytes} B"
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def count(number: int) -> str:
    """1234567 as 1 234 567."""
    return f"{number:,}".replace(",", " ")


def depth(number: int) -> str:
    """A context length: 128, 8k, 1M."""
    for unit, scale in (("M", 1 << 20), ("k", 1 << 10)):
        if number and number % scale == 0:
            return f"{number // scale}{unit}"
    return str(number)
