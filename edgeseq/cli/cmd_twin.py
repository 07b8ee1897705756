"""`edgeseq twin`: the matched KV-cached attention model of a recurrent one, exported for a fair comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeseq.cli.cmd_export import export_options


@click.command("twin")
@click.argument("source", metavar="SOURCE")
@export_options
def command(source: str, out: Path, **options: Any) -> None:
    """Export the KV-cached attention twin of a model.

    The twin has the same width and vocabulary and the same number of parameters within 2 %. Its weights are random
    and seeded, but for the trained twins of the zoo's tiny models.
    """
    from edgeseq.cli.progress import progress

    with progress() as show:
        from edgeseq.models.source import open_source, twin_of
        from exporters import export

        export(twin_of(open_source(source)), out, progress=show, **options)
    click.echo(str(out))
