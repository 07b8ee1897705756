"""`edgeseq bench`: tokens per second, and the bytes that bound them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeseq.cli.params import Ints

if TYPE_CHECKING:
    from rich.console import Console

    from edgeseq.bench.pipeline import Result

MANY = Ints(suffix=True)


@click.command("bench")
@click.argument("bundles", metavar="BUNDLE…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--context", metavar="N,…", type=MANY, default=(), help="Generate at these depths: 128,1k,8k.")
@click.option("-p", "prompts", metavar="N,…", type=MANY, help="Prompt lengths (ppN); 0 for none.  [default: 512]")
@click.option("-n", "generate", metavar="N,…", type=MANY, help="Tokens to make (tgN); 0 for none.  [default: 128]")
@click.option("-d", "depths", metavar="N,…", type=MANY, help="Tokens in the state before.  [default: 0]")
@click.option("-t", "threads", metavar="N,…", type=Ints(1), default=(), help="Threads.  [default: one per core]")
@click.option("-r", "repetitions", metavar="N", type=click.IntRange(1, 10000), help="[default: 5, more if short]")
@click.option("--device", metavar="D", help="Run the bundles' drivers on this device instead of here.")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="Write JSON lines.")
@click.option("--report", "html_file", metavar="FILE", type=click.Path(path_type=Path), help="Write one HTML page.")
@click.option(
    "--against",
    type=click.Choice(["torch", "torch-compile", "onnxruntime", "llama-bench"]),
    multiple=True,
    help="Time the same weights there too; llama-bench needs --gguf, the others --export.",
)
@click.option("--profile", is_flag=True, help="Also time every launch of a step: a table of kernels.")
@click.option("--export", metavar="DIR", type=click.Path(path_type=Path), help="The export with those weights.")
@click.option("--gguf", metavar="FILE", type=click.Path(path_type=Path), help="Those weights for llama.cpp.")
@click.option(
    "--llama-bench", metavar="PATH", type=click.Path(path_type=Path), help="llama.cpp's program.  [default: on PATH]"
)
def command(bundles: tuple[Path, ...], json_file: Path | None, html_file: Path | None, **options: Any) -> None:
    """Measure bundles beside the bytes they move.

    Each is verified before it is timed. Several are timed in turn, repetition by repetition. Tests are llama-bench's:
    ppN reads a prompt, tgN makes tokens, @ dN says how many tokens came before.
    """
    from edgeseq.bench.pipeline import Request, bench
    from edgeseq.cli.progress import progress

    for path in (json_file, html_file):
        _check_writable(path)
    with progress() as show:
        result = bench(Request(bundles, **options), show)
    show_result(result)
    if json_file:
        _write(json_file, "".join(json.dumps(row) + "\n" for row in result.rows))
    if html_file:
        from edgeseq.bench.report import html_report

        _write(html_file, html_report(result, ["edgeseq", *sys.argv[1:]]))


def _check_writable(path: Path | None) -> None:
    from edgeseq.errors import UsageError

    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"{path} cannot be written", "name a file in a directory that exists")


def _write(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader sees all or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def show_result(result: Result) -> None:
    """Tables on stdout, in colour on a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    names = _short([row["model_filename"] for row in result.tests])
    _tests(console, result.tests, names)
    crossovers = [row for row in result.rows if row["test"] == "crossover"]
    if len({row["n_depth"] for row in result.tests if row["n_gen"]}) > 1:
        _by_depth(console, result.tests, names)
    for row in result.rows:
        if row["test"] == "ratio":
            console.print(ratio_sentence(row, names), highlight=False)
    for name in dict.fromkeys(row["model_filename"] for row in result.rows if row["test"] == "profile"):
        rows = [r for r in result.rows if r["test"] == "profile" and r["model_filename"] == name]
        _profile(console, names[name], [r for r in rows if r["n_threads"] == rows[0]["n_threads"]])
    for row in crossovers:
        console.print(crossover_sentence(row, names), highlight=False)
    load, cores = result.tests[0]["load_avg"], len(_cores())
    if load is not None and load > 0.5 * cores:
        console.print(f"[yellow]{load:.1f} other processes wanted the {cores} cores while this ran[/]")


def _cores() -> Sequence[int]:
    import os

    return sorted(os.sched_getaffinity(0))


def _tests(console: Console, rows: Sequence[dict[str, Any]], names: dict[str, str]) -> None:
    from rich import box
    from rich.table import Table

    first = rows[0]
    verified = "verified" if all(row["verified"] for row in rows) else "not all verified: " + _unverified(rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="")
    table.title = f"{first['device']}, {first['gpu_info'] or first['cpu_info']}, {verified}"
    heads = (
        "t",
        "tok/s",
        "±",
        "first token ms",
        "p50 ms",
        "p99 ms",
        "MB/token",
        "GB/s",
        "read GB/s",
        "of roof",
        "RSS MB",
    )
    for name in ("model", "in", "test"):
        table.add_column(name)
    for name in heads:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            names[row["model_filename"]],
            row["backends"],
            row["test"] + ("*" if row["depth_by"] == "state" else ""),
            str(row["n_threads"]),
            _round(row["median_ts"]),
            _round(row["stddev_ts"]),
            *(_round(row[key]) for key in ("ttft_ms", "p50_ms", "p99_ms")),
            _round(row["bytes_per_token"], 1e6),
            _round(row["achieved_gbs"]),
            _round(row["weights_bw_gbs"] if row["roof"] == "cache" else row["read_bw_gbs"]),
            _share(row),
            _round(row["peak_rss_bytes"], 1e6),
        )
    console.print(table)
    if any(row["roof"] == "cache" for row in rows):
        console.print("(c): what one token touches fits the cache, so the roof is reading the weights from there")
    if any(row["depth_by"] == "state" for row in rows):
        console.print("*: the depth was reached by loading a made-up state, since reading so much takes long")


def _unverified(rows: Sequence[dict[str, Any]]) -> str:
    rivals = {row["backends"] for row in rows if row["verified"] is None and row["bytes_per_token"] is None}
    return f"{', '.join(sorted(rivals))} says no logits" if rivals else "no golden"


def _profile(console: Console, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """A step, kernel by kernel."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="")
    launches, spent = sum(r["launches"] for r in rows), sum(r["ns"] for r in rows)
    table.title = f"{name}: a step is {launches} launches, together {_round(spent, 1e3)} us"
    table.add_column("kernel", overflow="fold")
    for head in ("launches", "us", "share", "KB", "GB/s"):
        table.add_column(head, justify="right")
    for r in rows:
        table.add_row(r["kernel"], str(r["launches"]), _round(r["ns"], 1e3), f"{r['share']:.0%}",
                      _round(r["bytes"], 1e3), _round(r["gbs"]))  # fmt: skip
    console.print(table)


def _share(row: dict[str, Any]) -> str:
    if row["roof_fraction"] is None:
        return ""
    return f"{row['roof_fraction']:.0%}" + (" (c)" if row["roof"] == "cache" else "")


def _by_depth(console: Console, rows: Sequence[dict[str, Any]], names: dict[str, str]) -> None:
    """Tokens per second: depths down, contenders across."""
    from rich import box
    from rich.table import Table

    from edgeseq.cli.table import depth

    decode = [row for row in rows if row["n_gen"]]
    keys = list(dict.fromkeys(_contender(row, names) for row in decode))
    table = Table("depth", box=box.SIMPLE_HEAD, pad_edge=False, title="tokens per second", title_style="")
    for key in keys:
        table.add_column(key, justify="right")
    if len(keys) == 2:
        table.add_column("ratio", justify="right")
    for at in sorted({row["n_depth"] for row in decode}):
        found = {_contender(row, names): row["median_ts"] for row in decode if row["n_depth"] == at}
        ratio = [f"{found[keys[0]] / found[keys[1]]:.2f}"] if len(keys) == 2 and len(found) == 2 else []
        table.add_row(depth(at), *(_round(found.get(key)) for key in keys), *ratio)
    console.print(table)


def _contender(row: dict[str, Any], names: dict[str, str]) -> str:
    where = "" if row["backends"] == "CPU" else f" {row['backends']}"
    return f"{names[row['model_filename']]}{where} tg{row['n_gen']} t{row['n_threads']}"


def ratio_sentence(row: dict[str, Any], names: dict[str, str]) -> str:
    """What a ratio row says."""
    name = f"{names[row['model_filename']]} {row['case']} t{row['n_threads']}"
    unchecked = "" if row["against_verified"] else ", whose results were not checked"
    return f"{name}: {row['ratio']:.2f} times {row['against']} ({row['against_type']}{unchecked})"


def crossover_sentence(row: dict[str, Any], names: dict[str, str]) -> str:
    """What a crossover row says."""
    ours, theirs = names[row["model_filename"]], names[row["rival_filename"]]
    predicted, measured = row["predicted_depth"], row["measured_depth"]
    says = "never" if predicted is None else f"from depth {predicted}"
    if measured is None:
        found = f"not up to depth {max(row['depths'])}"
    elif row["measured_is"] == "at most":
        found = f"at the smallest depth measured already, {measured}"
    else:
        found = f"from depth {measured}"
    return f"{ours} is faster than {theirs}: by the bytes they move {says}, measured {found}"


def _short(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or the whole where that is not enough to tell them apart."""
    whole = list(dict.fromkeys(paths))
    last = [Path(path).name for path in whole]
    return {path: name if last.count(name) == 1 and name else path for path, name in zip(whole, last, strict=True)}


def _round(value: float | None, scale: float = 1.0) -> str:
    """Three digits, no exponent."""
    if value is None:
        return ""
    value /= scale
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
