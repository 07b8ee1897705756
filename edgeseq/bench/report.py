"""One HTML page of a benchmark: figures, tables, checks and facts, with nothing to load from elsewhere."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeseq import __version__
from edgeseq.bench.engines import BACKENDS
from edgeseq.bench.page import PAGE
from edgeseq.bench.pipeline import Result
from edgeseq.bench.rows import Row
from edgeseq.errors import EdgeseqError


def html_report(result: Result, command: Sequence[str]) -> str:
    """The page, as text. `command` is the command line that made it."""
    try:
        import jinja2

        from edgeseq.bench import figures
    except ImportError as error:
        raise EdgeseqError(f"a report needs {error.name}", f"pip install {error.name}") from None

    rows = result.tests
    names = contenders(rows)
    decode = [(name, row) for name, row in zip(names, rows, strict=True) if row["n_gen"]]
    counted = [(name, row) for name, row in zip(names, rows, strict=True) if row["bytes_per_token"]]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    return environment.from_string(PAGE).render(
        title=" against ".join(dict.fromkeys(Path(row["model_filename"]).name for row in rows)),
        depth_figure=figures.by_depth([r for _, r in decode], [n for n, _ in decode]) if _several(decode) else "",
        ledger_figure=figures.ledger_bars([r for _, r in counted], [f"{n}  {r['test']}" for n, r in counted]),
        rows=[row | {"contender": name} for name, row in zip(names, rows, strict=True)],
        crossovers=[row for row in result.rows if row["test"] == "crossover"],
        ratios=[row for row in result.rows if row["test"] == "ratio"],
        reports=[report for report in result.reports if report.stages],
        facts=facts(rows, command),
        cached=any(row["roof"] == "cache" for row in rows),
        made_up=any(row["depth_by"] == "state" for row in rows),
    )


def contenders(rows: Sequence[Row]) -> list[str]:
    """For each row a bundle's name, or a rival's, with its threads where they differ."""
    names = [Path(r["model_filename"]).name if r["backends"] in BACKENDS.values() else str(r["backends"]) for r in rows]
    if len({row["n_threads"] for row in rows}) == 1:
        return names
    return [f"{name}, {r['n_threads']} thread{'s'[: r['n_threads'] - 1]}" for name, r in zip(names, rows, strict=True)]


def _several(decode: Sequence[tuple[str, Row]]) -> bool:
    return len({row["n_depth"] for _, row in decode}) > 1


def facts(rows: Sequence[Row], command: Sequence[str]) -> dict[str, str]:
    """What stands at the foot of the page."""
    first = rows[0]
    load = first["load_avg"]
    known = {
        "Device": f"{first['device']}, {first['gpu_info'] or first['cpu_info']}",
        "System": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Threads": ", ".join(str(n) for n in sorted({row["n_threads"] for row in rows})),
        "Repetitions": str(len(first["samples_ns"])),
        "Clock": f"{first['clock_mhz']:.0f} MHz" if first["clock_mhz"] else "not readable",
        "Temperature": f"{first['temperature_c']:.0f} °C" if first["temperature_c"] else "not readable",
        "Energy": "in the table" if any(row["joules_per_token"] for row in rows) else "not readable",
        "Load before": "not known" if load is None else f"{load:.2f} processes",
        "Date": str(first["test_time"]),
        "edgeseq": __version__,
        "Command": shlex.join(command),
    }
    return known


def number(value: Any, digits: int = 3) -> str:
    """Three significant digits without an exponent, thousands set apart; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.{digits}g}"
