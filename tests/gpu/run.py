"""The script behind tests/gpu/run: checks and measures bundles on this machine's GPU, one process per bundle."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from checks import CHECKS, Case, Wrong  # noqa: E402
from refill import refill  # noqa: E402
from runtime import Model, Refused  # noqa: E402
from speed import measure  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck")
SANITIZER = ("--report-api-errors", "no")  # the runtime reports those, and asks the driver what it may not know
SANITIZED = ("steps", "chunks", "greedy", "state", "fork")
LIMIT = 300
LARGE_LIMIT = 1500  # weights are drawn and written first
TWIN_DEPTHS = "1024,2048,4096,8192,16384,32768,65536,131072"
RIVAL = HERE / "rival.py"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/run", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="what `python -m tests.gpu.prepare` wrote, or one case")
    parser.add_argument("--only", default="", help="names of checks, with commas; 'speed' for the measurement alone")
    parser.add_argument("--tokens", type=int, default=512, help="greedy tokens of one measurement")
    parser.add_argument(
        "--depths", default="", help="positions to decode at too, with commas, by made-up states; of twins 1k to 128k"
    )
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--profile", action="store_true", help="print the slowest launches")
    parser.add_argument(
        "--no-sanitizer", action="store_true", help="do not run compute-sanitizer where it is installed"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(folders: list[Path]) -> list[Path]:
    """Folders with a `gpu` bundle, themselves or one level below."""
    found: list[Path] = []
    for folder in folders:
        found += [folder] if (folder / "gpu").is_dir() else sorted(p.parent for p in folder.glob("*/gpu"))
    if not found:
        sys.exit(f"no bundles in {', '.join(map(str, folders))}")
    return found


def expected(folder: Path) -> dict[str, Any]:
    """What prepare.py knows of a case."""
    facts: dict[str, Any] = json.loads((folder / "expect.json").read_text())
    return facts


def one(folder: Path, only: set[str], tokens: int, depths: list[int]) -> None:
    """All checks of one case in this process; a JSON line for each."""

    def say(name: str, verdict: str, note: str, **more: Any) -> None:
        print(json.dumps({"case": folder.name, "check": name, "verdict": verdict, "note": note, **more}), flush=True)

    facts = expected(folder)
    try:
        refill(folder / "gpu")
        if "tokens" in facts:
            check(folder, only, say)
        if not only or "speed" in only:
            model = Model(folder / "gpu")
            say("device", "ok", model.device.text.decode())
            made = measure(model, facts, tokens, depths or twin_depths(facts))
            say("speed", "ok", summary(made), measured=made, launches=facts.get("launches"))
    except (Refused, OSError) as error:
        say("open", "FAILED", str(error))


def twin_depths(facts: dict[str, Any]) -> list[int]:
    """Where a KV-cached twin is measured unless told."""
    return [int(depth) for depth in TWIN_DEPTHS.split(",")] if "twin_of" in facts else []


def check(folder: Path, only: set[str], say: Callable[[str, str, str], None]) -> None:
    """Every comparison, with scratch memory full of NaN."""
    model = Model(folder / "gpu", poison=True)
    case = Case(folder, model)
    for name, run in CHECKS.items():
        if only and name not in only:
            continue
        try:
            say(name, "ok", run(case))
        except (Wrong, Refused) as error:
            say(name, "FAILED", str(error))
        except Exception:
            say(name, "FAILED", traceback.format_exc(limit=2).strip().splitlines()[-1])


def summary(made: dict[str, Any]) -> str:
    text = f"{made['tokens_per_second']:.0f} tokens/s"
    if "achieved_bandwidth" in made:
        text += f", {made['achieved_bandwidth'] / 1e9:.0f} GB/s"
    if "fraction_of_read" in made:
        text += f" = {100 * made['fraction_of_read']:.0f} % of {made['read_bandwidth'] / 1e9:.0f}"
    if "joules_per_token" in made:
        text += f", {1e3 * made['joules_per_token']:.3g} mJ/token"
    text += f", {made['launches']} launches in {made['launches_us']:.0f} us"
    if "launch_ns" in made:
        text += f", an empty one {made['launch_ns']:.0f} ns"
    return text + "".join(f"; at {depth}: {rate:.0f}" for depth, rate in made.get("at_depth", {}).items())


def spawn(folder: Path, options: argparse.Namespace, only: str, prefix: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The results of one case, and what went wrong with its process or ''."""
    command = [*prefix, sys.executable, str(HERE / "run.py"), "--one", "--tokens", str(options.tokens), str(folder)]
    command += ["--only", only, "--depths", options.depths]
    limit = LIMIT if "tokens" in expected(folder) else LARGE_LIMIT
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return [], f"stopped after {limit} s"
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0:
        return results, ""
    words = [
        line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========") or "rror" in line
    ]
    return results, f"exit {done.returncode}: {'; '.join(words[:3]) or done.stderr.strip()[-200:]}"


def sanitizer() -> str | None:
    known = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    return next((p for p in known if p and os.access(p, os.X_OK)), None)


def row(result: dict[str, Any]) -> None:
    print(f"{result['case']:28} {result['check']:12} {result['verdict']:7} {result['note']}", flush=True)


def slowest(result: dict[str, Any], n: int = 12) -> None:
    """Kernels by their share of a step."""
    ns = result["measured"]["profile_ns"]
    names = result.get("launches") or [f"launch {i}" for i in range(len(ns))]
    totals: dict[str, list[int]] = {}
    for name, value in zip(names, ns):
        totals.setdefault(name, []).append(value)
    for name, values in sorted(totals.items(), key=lambda item: -sum(item[1]))[:n]:
        print(f"    {sum(values) / 1e3:10.1f} us  {len(values):4} x {sum(values) / len(values) / 1e3:8.2f} us  {name}")


def rival(folder: Path, measured: dict[str, Any]) -> dict[str, Any] | None:
    """PyTorch on the same shapes where it is installed with a GPU and this is a checkout; None for what it lacks."""
    facts = expected(folder)
    if "source" not in facts or "twin_of" in facts or facts["quant"] != "none" or not RIVAL.is_file():
        return None
    command = [sys.executable, str(RIVAL), facts["source"], "--dtype", facts["dtype"]]
    result = {"case": folder.name, "check": "pytorch", "verdict": "ok"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LARGE_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return result | {"note": f"stopped after {LARGE_LIMIT} s"}
    if done.returncode:
        return result | {"note": f"did not run: {(done.stderr.strip().splitlines() or ['no message'])[-1][-120:]}"}
    made = json.loads(done.stdout.splitlines()[-1])
    rates = {
        name: made[f"{name}_tokens_per_second"] for name in ("eager", "graph") if f"{name}_tokens_per_second" in made
    }
    best = max(rates.values(), default=0.0)
    note = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()) or "did not decode"
    if best:
        note += f"; edgeseq is {measured['tokens_per_second'] / best:.2f} times that"
    return result | {"note": note, "measured_torch": made}


def crossovers(everything: list[dict[str, Any]], folders: list[Path]) -> list[dict[str, Any]]:
    """For each twin the rates of both by depth, and from where on the recurrent model is the faster one."""
    speeds = {r["case"]: r["measured"] for r in everything if r["check"] == "speed" and "measured" in r}
    found = []
    for folder in folders:
        of = expected(folder).get("twin_of")
        if of not in speeds or folder.name not in speeds:
            continue
        flat = speeds[of]["tokens_per_second"]  # a recurrent step does not depend on the depth
        rates = {int(depth): rate for depth, rate in speeds[folder.name].get("at_depth", {}).items()}
        faster = [depth for depth, rate in sorted(rates.items()) if rate < flat]
        where = f"the recurrent one is faster from {faster[0]} on" if faster else "the twin is faster at all of them"
        note = (
            f"{of} {flat:.0f} tokens/s; twin " + ", ".join(f"{d}: {rates[d]:.0f}" for d in sorted(rates)) + f"; {where}"
        )
        found.append({"case": folder.name, "check": "crossover", "verdict": "ok", "note": note})
    return found


def main() -> int:
    options = arguments()
    if options.one:
        only, depths = (set(filter(None, text.split(","))) for text in (options.only, options.depths))
        one(options.folders[0], only, options.tokens, sorted(map(int, depths)))
        return 0
    failed, everything, tool = 0, [], None if options.no_sanitizer else sanitizer()
    for folder in cases(options.folders):
        results, trouble = spawn(folder, options, options.only, [])
        if trouble:
            results.append({"case": folder.name, "check": "process", "verdict": "FAILED", "note": trouble})
        if tool and not options.only and "tokens" in expected(folder):
            for name in TOOLS:
                prefix = [tool, "--tool", name, "--error-exitcode", "9", *SANITIZER]
                inner, trouble = spawn(folder, options, ",".join(SANITIZED), prefix)
                trouble = trouble or "; ".join(r["note"] for r in inner if r["verdict"] != "ok")
                verdict = "FAILED" if trouble else "ok"
                results.append({"case": folder.name, "check": name, "verdict": verdict, "note": trouble or "clean"})
        speed = next((r for r in results if r["check"] == "speed" and "measured" in r), None)
        other = rival(folder, speed["measured"]) if speed else None
        results += [other] if other else []
        for result in results:
            row(result)
            if options.profile and "measured" in result:
                slowest(result)
        failed += sum(r["verdict"] != "ok" for r in results)
        everything += results
        if options.json:
            options.json.write_text(json.dumps(everything))
    for result in crossovers(everything, cases(options.folders)):
        everything.append(result)
        row(result)
    if options.json:
        options.json.write_text(json.dumps(everything))
    if not tool:
        print("compute-sanitizer was not run" + ("" if options.no_sanitizer else ": it is not installed here"))
    print(f"{len(everything)} results, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
