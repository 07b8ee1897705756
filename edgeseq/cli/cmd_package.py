"""`edgeseq package`: a bundle becomes a kit to build into an app."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("package")
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--for", "kind", type=click.Choice(["c", "android", "python"]), default="c", help="What embeds it.")
def command(bundle: Path, out: Path, kind: str) -> None:
    """Write an embed kit: the runtime in one C file, the model, an example and how to build it.

    --for android adds a Java binding for the NDK; --for python is a folder to import, which needs NumPy alone.
    """
    from edgeseq.package import package

    click.echo(str(package(bundle, out, kind)))
