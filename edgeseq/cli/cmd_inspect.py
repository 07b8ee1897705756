"""`edgeseq inspect`: what a bundle or an export directory holds, and what follows from it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeseq.cli.params import Ints

if TYPE_CHECKING:
    from edgeseq.bundle.plan import Plan
    from edgeseq.spec import Manifest

DEPTHS = (0, 128, 1 << 10, 8 << 10, 64 << 10, 1 << 20)


@click.command("inspect")
@click.argument("path", metavar="BUNDLE|DIR", type=click.Path(path_type=Path))
@click.option("--context", metavar="N,…", type=Ints(suffix=True), default=DEPTHS, help="Depths to tabulate.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: Path, context: tuple[int, ...], as_json: bool) -> None:
    """Show what a bundle or an export holds.

    Of a bundle: the plan, bytes per token, state, memory need. Of an export: graphs, operators, state.
    """
    from edgeseq.bundle.directory import is_bundle
    from edgeseq.errors import UsageError

    if not path.exists():
        raise UsageError(f"{path} does not exist", "give a bundle or an export directory")
    if is_bundle(path) or path.is_file():
        facts, text = _bundle(path, context)
    else:
        facts, text = _export(path)
    click.echo(json.dumps(facts, indent=1) if as_json else text)


def _bundle(path: Path, depths: tuple[int, ...]) -> tuple[dict[str, Any], str]:
    from edgeseq.bundle.directory import bundle_facts
    from edgeseq.bundle.reader import BundleFile

    with BundleFile(path, check_weights=False) as bundle:
        plan = bundle.plan
        facts = {"kind": "bundle", **bundle_facts(plan, bundle.plan_id)}
        facts["launches_per_token"] = len(plan.step.launches)
        facts["kernels"] = _kernels(plan)
        facts["depths"] = _depths(plan, depths)
        facts["bound"] = _bound(plan, depths)
    return facts, _bundle_text(facts, plan)


def _kernels(plan: Plan) -> list[dict[str, Any]]:
    """The step's kernels: how often each is launched and what one token moves through it at depth 0."""
    from edgeseq.bundle.ledger import launch_traffic

    launches: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for launch in plan.step.launches:
        traffic = launch_traffic(plan, plan.step, launch)
        launches[launch.kernel] += 1
        moved[launch.kernel] += sum(traffic[key] for key in ("weights", "state", "kv", "activations"))
    return [{"name": name, "launches": launches[name], "bytes": moved[name]} for name, _ in moved.most_common()]


def _depths(plan: Plan, depths: tuple[int, ...]) -> list[dict[str, int]]:
    """Per depth: bytes read from caches, bytes moved in all, and the state's size if it were built for that context."""
    from edgeseq.bundle.ledger import ledger, state_bytes_at

    counted = ledger(plan)
    return [
        {
            "depth": depth,
            "kv_bytes_read": counted.kv_bytes_read(depth),
            "bytes_per_token": counted.bytes_per_token(depth),
            "state_bytes": state_bytes_at(plan, max(depth, 1)),
        }
        for depth in depths
    ]


def _bound(plan: Plan, depths: tuple[int, ...]) -> dict[str, Any] | None:
    """What the target's memory allows by its data sheet: a bound and no measurement. None where that is not known."""
    from devices.profile import load_profile, profile_names
    from edgeseq.bundle.ledger import ledger

    name = plan.target.get("name")
    rate, source = plan.target.get("peak_bandwidth_gbs", 0.0), plan.target.get("bandwidth_source", "")
    if not rate and name in profile_names():  # a bundle of an older version
        profile = load_profile(name)
        rate, source = profile.peak_bandwidth_gbs, profile.bandwidth_source
    if not isinstance(rate, int | float) or not rate > 0:
        return None
    return {
        "device": name,
        "peak_bandwidth_gbs": rate,
        "source": source,
        "tok_s": {str(depth): round(ledger(plan).bound_tok_s(rate, depth), 2) for depth in depths},
    }


def _bundle_text(facts: dict[str, Any], plan: Plan) -> str:
    from edgeseq.cli.table import count, depth, size, table

    target = plan.target
    backend = {"opencl": "OpenCL on", "cuda": "CUDA on"}.get(plan.backend, "")
    about = " ".join([*backend.split(), *(str(target[key]) for key in ("triple", "cpu") if target.get(key))])
    graphs = [
        (g.name, g.tokens, "token" if g.tokens == 1 else "tokens", len(g.launches), "launches", size(g.arena_bytes))
        for g in plan.graphs
    ]
    counted = facts["ledger"]
    moved = [
        ("weights read", size(counted["weight_bytes"])),
        ("state read + written", size(counted["state_bytes_rw"])),
        ("activations read + written", size(counted["activation_bytes"])),
    ]
    rows = [
        (depth(d["depth"]), size(d["kv_bytes_read"]), size(d["bytes_per_token"]), size(d["state_bytes"]))
        for d in facts["depths"]
    ]
    sections = [
        _title(plan.manifest),
        f"compiled for {target.get('name', '?')}{f' ({about})' if about else ''}, plan {facts['plan_id']:08x}",
        "graphs and their arenas\n" + table(graphs),
        "one token of decode moves\n" + table(moved),
        "at depth\n" + table(rows, ("depth", "cache read", "bytes per token", "state")),
        *_bound_text(facts["bound"]),
        *_tuning_text(plan),
        f"kernels of the step, {facts['launches_per_token']} launches per token\n"
        + table([(k["name"], count(k["launches"]), size(k["bytes"])) for k in facts["kernels"]]),
        "state\n" + _slots([slot for slot, _ in plan.state]),
        "memory\n" + table([(name, size(n)) for name, n in facts["memory"].items()]),
    ]
    return "\n\n".join(sections)


def _bound_text(bound: dict[str, Any] | None) -> list[str]:
    if bound is None:
        return []
    from edgeseq.cli.table import depth, table

    rows = [(depth(int(at)), f"{rate:.0f}") for at, rate in bound["tok_s"].items()]
    title = (
        f"no more tokens/s than this on {bound['device']}: a bound by its {bound['peak_bandwidth_gbs']} GB/s "
        f"({bound['source']}), not a measurement"
    )
    return [title + "\n" + table(rows, ("depth", "tokens/s"))]


def _tuning_text(plan: Plan) -> list[str]:
    """Which variants were measured, and which was taken."""
    from edgeseq.bundle.tuning import record_of
    from edgeseq.cli.table import table

    record = record_of(plan)
    if record is None:
        return []
    rows = [
        (
            e.kernel,
            len(e.tried),
            *(f"{ns / 1e3:.1f}" for ns in (e.tried[0].ns, e.fastest.ns)),
            _choice(e.fastest.choice),
        )
        for e in record.kernels
    ]
    title = f"tuned on {record.device}, {record.threads} threads, medians of {record.repetitions} runs in µs"
    return [title + "\n" + table(rows, ("kernel", "variants", "default", "fastest", "")) if rows else title]


def _choice(choice: dict[str, Any]) -> str:
    return ", ".join(f"{key} {'x'.join(map(str, v)) if isinstance(v, list) else v}" for key, v in choice.items())


def _title(manifest: Manifest) -> str:
    from edgeseq.cli.table import count

    context = f"context {count(manifest.context)}" if manifest.context else "unbounded context"
    return (
        f"{manifest.source}: {manifest.family}, {count(manifest.params)} parameters, {manifest.dtype}, "
        f"quantisation {manifest.quant}, {context}\nmodel {manifest.model_id}"
    )


def _slots(slots: list[Any]) -> str:
    from edgeseq.cli.table import size, table

    if not slots:
        return "  none"
    alike = Counter(
        (re.sub(r"\d+", "*", s.name), s.dtype, "x".join(map(str, s.shape)), s.update, s.nbytes) for s in slots
    )
    return table([(n, *what, size(nbytes)) for (*what, nbytes), n in alike.items()], ("slots", "", "", "", "", "each"))


def _export(path: Path) -> tuple[dict[str, Any], str]:
    from dataclasses import asdict

    from edgeseq.cli.table import size, table
    from edgeseq.manifest import load_manifest

    manifest = load_manifest(path)
    graphs: list[dict[str, Any]] = [
        {"name": g.file, "tokens": g.signature.tokens, "ops": _ops(path / g.file)} for g in manifest.graphs
    ]
    slots = list(manifest.step.signature.state)
    facts: dict[str, Any] = {
        "kind": "export",
        **asdict(manifest),
        "graphs": graphs,
        "state": [asdict(s) for s in slots],
    }
    facts["state_bytes"] = sum(s.nbytes for s in slots)
    ops = {op for graph in graphs for op in graph["ops"]}
    rows = [[op, *(graph["ops"].get(op, 0) for graph in graphs)] for op in sorted(ops)]
    sections = [
        _title(manifest),
        "operators\n" + table(rows, ["", *(graph["name"] for graph in graphs)]),
        f"state, {size(facts['state_bytes'])}\n" + _slots(slots),
    ]
    return facts, "\n\n".join(sections)


def _ops(path: Path) -> dict[str, int]:
    """How often each operator stands in a graph."""
    import onnx
    from google.protobuf.message import DecodeError

    from edgeseq.errors import BundleError

    if not path.is_file():
        raise BundleError(f"{path} is missing, though manifest.json names it", "export the model again")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        raise BundleError(f"{path} is not an ONNX file", "export the model again") from None
    return dict(Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph.node))
