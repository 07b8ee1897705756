"""The runtimes that execute a bundle on a device. C sources lie under `C_DIR`; nothing here imports anything."""

from __future__ import annotations

from pathlib import Path

C_DIR = Path(__file__).parent / "c"
"""`include/edgeseq.h`, `src/*.c` (compile them all), `tools/`, `examples/`, `tests/`, `fuzz/`."""


def sources() -> list[Path]:
    """Every C file of the core, sorted; compile with `-I C_DIR/include -std=c99 -fvisibility=hidden -pthread`."""
    return sorted((C_DIR / "src").glob("*.c"))
