"""`edgeseq list`: what there is. Each of these is a file in a folder; adding one is adding that file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

Row = dict[str, Any]


def _families() -> list[Row]:
    """Token models first, then those with named inputs; what a family lacks is an empty list."""
    from edgeseq.models import families
    from edgeseq.models.pth import SUFFIXES
    from edgeseq.models.source import records, zoo_of
    from edgeseq.models.state_bytes import per_layer

    loaded = {
        family.name: [
            *(kind for checkpoint in family.checkpoints for kind in checkpoint.model_types),
            *(SUFFIXES if family.bare else ()),
        ]
        for family in families().values()
    }
    return [
        {
            "name": record.name,
            "inputs": "tokens" if record.name in loaded else "named",
            "growth": record.growth,
            "state_bytes": record.state_formula,
            "state_bytes_per_layer": per_layer(record.state_formula),
            "ops": list(record.ops),
            "loads": loaded.get(record.name, []),
            "zoo": list(zoo_of(record)),
        }
        for record in records()
    ]


def _zoo() -> list[Row]:
    from edgeseq.models.source import records, zoo_of

    rows = []
    for record in records():
        for name, config in zoo_of(record).items():
            weights = "trained" if config is record.tiny else "random, seeded"
            params = record.param_count(config)
            rows.append({"name": f"zoo:{name}", "family": record.name, "params": params, "weights": weights})
    return rows


def _devices() -> list[Row]:
    from devices.profile import load_profile, profile_names

    return [
        {
            "name": profile.name,
            "triple": profile.triple,
            "cpu": profile.cpu,
            "features": list(profile.features),
            "cores": profile.cores,
            "peak_bandwidth_gbs": profile.peak_bandwidth_gbs,
            "bandwidth_source": profile.bandwidth_source,
            "transport": profile.transport,
            "description": profile.description,
        }
        for profile in map(load_profile, profile_names())
    ]


def _targets() -> list[Row]:
    """Devices that a code generator exists for; the compiler's target files are named after what they make code for."""
    from importlib.util import find_spec
    from pathlib import Path

    from devices.profile import AUTO

    spec = find_spec("edgeseq")
    roots = (spec.submodule_search_locations if spec else None) or []
    generators = {path.stem for root in roots for path in Path(root, "compiler", "targets").glob("[a-z]*.py")}
    return [
        {"name": d["name"], "triple": d["triple"], "cpu": d["cpu"], "description": d["description"]}
        for d in _devices()
        if d["triple"] == AUTO or d["triple"].partition("-")[0] in generators
    ]


LISTS: dict[str, Callable[[], list[Row]]] = {
    "families": _families,
    "targets": _targets,
    "devices": _devices,
    "zoo": _zoo,
}
SHOWN = {
    "families": ("name", "growth", "state_bytes", "state_bytes_per_layer", "ops", "loads"),
    "targets": ("name", "triple", "cpu", "description"),
    "devices": ("name", "triple", "cpu", "cores", "transport", "description"),
    "zoo": ("name", "family", "params", "weights"),
}


@click.command("list")
@click.argument("what", type=click.Choice(list(LISTS)))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(what: str, as_json: bool) -> None:
    """List families, targets, devices or zoo models."""
    rows = LISTS[what]()
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from edgeseq.cli.table import table

    cells = [[_cell(row[key]) for key in SHOWN[what]] for row in rows]
    click.echo(table(cells, [key.replace("_", " ") for key in SHOWN[what]], indent=""))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count}: {formula}" for count, formula in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "-"
    if isinstance(value, int):
        from edgeseq.cli.table import count

        return count(value)
    return str(value)
