"""`edgeseq export`: a model source becomes ONNX step and chunk graphs over one weights file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeseq.cli.params import Ints


def export_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `export` and `twin` have in common."""
    for option in reversed(
        (
            click.option(
                "-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Export to write."
            ),
            click.option(
                "--flavour",
                type=click.Choice(["onnx", "ort"]),
                default="onnx",
                show_default=True,
                help="Portable ONNX, or onnxruntime's own operators where they are faster.",
            ),
            click.option(
                "--quant",
                type=click.Choice(["none", "int8", "int4"]),
                default="none",
                show_default=True,
                help="Round the matrices to 8 or 4 bits in blocks of 32; see docs/quantisation.md.",
            ),
            click.option(
                "--chunk",
                "chunks",
                type=Ints(),
                help="Tokens per call of the prefill graphs.  [default: 8,64 as far as the context allows]",
            ),
            click.option(
                "--context",
                metavar="N",
                type=int,
                help="Longest sequence a KV cache holds; recurrent models ignore it.  "
                "[default: 2048, or as many positions as the model has]",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["fp32", "fp16", "bf16"]),
                default="fp32",
                show_default=True,
                help="Storage of the matrices that are not quantised; arithmetic is fp32.",
            ),
            click.option(
                "--calibrate",
                metavar="TOKENS",
                type=int,
                help="Tokens the model writes for itself so that int4 corrects its rounding; 0 for none.  "
                "[default: 4096 where weights are learned and at most 1e9]",
            ),
        )
    ):
        function = option(function)
    return function


@click.command("export")
@click.argument("source", metavar="SOURCE")
@export_options
@click.option(
    "--distill",
    metavar="ORDER",
    type=int,
    help="Turn long convolutions (Hyena) into this many modes per channel, whose state does not grow.",
)
@click.option(
    "--distill-tolerance",
    metavar="ERROR",
    type=float,
    help="Layers with a larger relative error keep their exact filters.  [default: 0.02]",
)
def command(source: str, out: Path, **options: Any) -> None:
    """Export a model as ONNX step and chunk graphs.

    SOURCE is a Hugging Face directory, a .pth file of RWKV weights, zoo:NAME (see `edgeseq list zoo`), or
    path/to/file.py:factory.
    """
    from edgeseq.cli.progress import progress

    with progress() as show:
        from exporters import export

        export(source, out, progress=show, **options)
    if options["distill"] is not None:
        _say_what_was_distilled(out)
    click.echo(str(out))


def _say_what_was_distilled(out: Path) -> None:
    from edgeseq.cli.table import table
    from exporters.distill import load

    facts = load(out)
    rows = [
        (
            layer["layer"],
            f"{layer['modes']} modes" if layer["modes"] else "kept exact",
            *(f"{100 * layer[name]:.2g} %" for name in ("error", "median", "beyond")),
        )
        for layer in facts["layers"]
    ]
    click.echo(f"Filters as {facts['order']} modes, at most {100 * facts['tolerance']:g} % of error in any channel:")
    click.echo(table(rows, ["layer", "", "worst channel", "median", "past the horizon"]))
