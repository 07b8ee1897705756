"""`edgeseq verify`: does what was made say what the model said?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from edgeseq.verify.report import Report


@click.command("verify")
@click.argument("path", metavar="BUNDLE|DIR", type=click.Path(path_type=Path))
@click.option("--device", metavar="D", help="Run the bundle's driver on this device instead of here.")
@click.option("--export", metavar="DIR", type=click.Path(path_type=Path), help="The export a bundle was made from.")
@click.option("--live", is_flag=True, help="Build the PyTorch model again from its source.")
@click.option("-t", "--threads", metavar="N", type=click.IntRange(1, 256), help="Default: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: Path, device: str | None, export: Path | None, live: bool, threads: int | None, as_json: bool) -> int:
    """Compare PyTorch, onnxruntime and the runtime.

    Of an export: the graphs on stock onnxruntime. Of a bundle: every form, the state's life and the greedy tokens in
    the runtime; with --export the export's stages too. Exit code 1 if a stage fails.
    """
    from edgeseq.errors import EdgeseqError
    from edgeseq.verify.chain import verify

    report = verify(path, device=device, export=export, live=live, threads=threads)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        show(report)
    if not report.ok:
        failed = ", ".join(report.failed)
        raise EdgeseqError(f"{path} fails {len(report.failed)} of {len(report.stages)} stages: {failed}")
    return 0


def show(report: Report) -> None:
    """The table of stages on stdout, in colour on a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    where = f" on {report.device}" if report.device else ""
    console.print(f"{report.source}, model {report.model_id}{where}", highlight=False)
    console.print(stage_table(report))


def stage_table(report: Report) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "compared with"):
        table.add_column(name)
    for name in ("worst |difference|", "tolerance"):
        table.add_column(name, justify="right")
    for name in ("where", ""):
        table.add_column(name)
    for stage in report.stages:
        result = "[green]ok[/]" if stage.ok else "[bold red]FAILED[/]"
        where = "  ".join(part for part in (stage.where, stage.note) if part)
        table.add_row(stage.name, stage.against, _number(stage.worst), _number(stage.tolerance), where, result)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.2g}"
