"""`edgeseq compile`: an export, or somebody else's ONNX file, becomes a bundle for one target."""

from __future__ import annotations

from pathlib import Path

import click

from edgeseq.cli.params import Named


@click.command("compile")
@click.argument("source", metavar="DIR|MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="host, a device profile, or a target file.")
@click.option("-o", "--out", required=True, metavar="BUNDLE", type=click.Path(path_type=Path), help="Bundle to write.")
@click.option("--state", "states", metavar="IN:OUT,…", multiple=True, help="What leaves as OUT comes back as IN.")
@click.option("--shape", "shapes", metavar="NAME=N,N,…", type=Named(), multiple=True, help="Shape of an input.")
@click.option("--dim", "dims", metavar="NAME=N", type=Named(), multiple=True, help="Size of a symbolic dimension.")
@click.option("--value", "values", metavar="NAME=V", type=Named(), multiple=True, help="An input that never changes.")
@click.option("--role", "roles", metavar="NAME=ROLE", type=Named(), multiple=True, help="tokens, position or logits.")
@click.option("--tune", is_flag=True, help="Run variants of kernels on the target and keep the fastest.")
@click.option("--device", metavar="D", help="Measure on this device instead of the target's own.")
@click.option("--tune-from", "record", metavar="BUNDLE", type=click.Path(path_type=Path), help="Choose as BUNDLE did.")
@click.option("--dump", metavar="DIR", type=click.Path(path_type=Path), help="Write the IR after each phase here.")
def command(
    source: Path,
    target: str,
    out: Path,
    states: tuple[str, ...],
    shapes: tuple[tuple[str, str], ...],
    dims: tuple[tuple[str, str], ...],
    values: tuple[tuple[str, str], ...],
    roles: tuple[tuple[str, str], ...],
    tune: bool,
    device: str | None,
    record: Path | None,
    dump: Path | None,
) -> None:
    """Compile an export for a target.

    `edgeseq list targets` names the targets; a path to a device profile of your own works too. Of somebody else's ONNX
    file, --state says which outputs come back as inputs at the next step, and --shape, --dim and --value give the
    static shapes and constants that the file leaves open. --role makes a token model of it.

    --tune measures on the machine that the target's profile reaches, or on --device, and writes the times into the
    bundle; --tune-from takes them from there, so that the same bytes come out without measuring.
    """
    from devices.profile import load_profile
    from edgeseq.cli.progress import progress
    from edgeseq.errors import UsageError
    from edgeseq.manifest import load_manifest

    is_file = source.is_file()
    given = {"--state": states, "--shape": shapes, "--dim": dims, "--value": values, "--role": roles}
    for option, value in given.items():
        if value and not is_file:
            raise UsageError(f"{option} is for ONNX files, {source} is not a file", "leave it out for an export")
    if not is_file:
        load_manifest(source)  # refuse wrong names before TVM takes its seconds to load
    load_profile(target)
    _check_tuning(tune, device, record)
    from edgeseq.compiler import ImportOptions, Tuning, compile_export, compile_onnx

    tuning = Tuning(device or "", record) if tune or record else None
    with progress() as show:
        if is_file:
            options = ImportOptions(
                states, _lists(shapes), {n: _size(n, v) for n, v in dims}, dict(values), dict(roles)
            )
            path = compile_onnx(source, target, out, options, tuning=tuning, progress=show, dump=dump)
        else:
            path = compile_export(source, target, out, tuning=tuning, progress=show, dump=dump)
    click.echo(str(path))


def _check_tuning(tune: bool, device: str | None, record: Path | None) -> None:
    """Refuse what contradicts itself, names nothing, or cannot be reached."""
    from devices.profile import load_profile
    from edgeseq.bundle.directory import require_bundle
    from edgeseq.errors import UsageError

    if tune and record:
        raise UsageError("--tune measures and --tune-from does not", "give one of them")
    if device and not tune:
        raise UsageError(f"--device {device} is where --tune measures", "give --tune as well")
    if device:
        load_profile(device)
    if record:
        require_bundle(record)


def _lists(pairs: tuple[tuple[str, str], ...]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(_size(name, part) for part in text.split(",") if text) for name, text in pairs}


def _size(name: str, text: str) -> int:
    from edgeseq.errors import UsageError

    text = text.strip()
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 1 << 31):
        raise UsageError(f"{text!r} is not a size for {name!r}", "sizes are whole numbers from 1")
    return int(text)
