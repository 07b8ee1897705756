"""`edgeseq compile`: an export becomes a bundle for one target."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compile")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="host, a device profile, or a target file.")
@click.option("-o", "--out", required=True, metavar="BUNDLE", type=click.Path(path_type=Path), help="Bundle to write.")
@click.option("--dump", metavar="DIR", type=click.Path(path_type=Path), help="Write the IR after each phase here.")
def command(directory: Path, target: str, out: Path, dump: Path | None) -> None:
    """Compile an export for a target.

    `edgeseq list targets` names the targets; a path to a device profile of your own works too.
    """
    from devices.profile import load_profile
    from edgeseq.cli.progress import progress
    from edgeseq.manifest import load_manifest

    load_manifest(directory)  # refuse wrong names before TVM takes its seconds to load
    load_profile(target)
    from edgeseq.compiler import compile_export

    with progress() as show:
        path = compile_export(directory, target, out, progress=show, dump=dump)
    click.echo(str(path))
