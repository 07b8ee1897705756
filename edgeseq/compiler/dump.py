"""`--dump DIR`: every form a graph takes on its way, numbered, one file each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeseq.spec import GraphFile

    from .codegen import KernelSet
    from .ir import Call


def write(folder: Path, lowered: list[tuple[GraphFile, list[Call], int]], kernels: KernelSet) -> None:
    """01-<graph>.calls: launches with their values; 02-kernels.tir: every kernel after lowering."""
    folder.mkdir(parents=True, exist_ok=True)
    for graph, calls, arena in lowered:
        lines = [f"# {graph.file}: {len(calls)} launches, arena {arena} bytes"]
        for i, call in enumerate(calls):
            flag = " (outputs only)" if call.outputs_only else ""
            lines.append(f"{i:4} {kernels.names[call.kernel]}{flag}")
            for arg in call.args:
                v = arg.value
                where = f"{v.storage.kind} {v.storage.name}+{v.offset}"
                lines.append(f"        {arg.access:2} {v.dtype}{list(v.shape)} ld {v.ld} {where} at {v.storage.offset}")
        (folder / f"01-{Path(graph.file).stem}.calls").write_text("\n".join(lines) + "\n")
    (folder / "02-kernels.tir").write_text("\n\n".join(str(f) for f in kernels.funcs.values()) + "\n")
