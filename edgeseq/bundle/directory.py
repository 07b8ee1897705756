"""The bundle directory: how it is made, recognised and described."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeseq.bundle import format as f
from edgeseq.bundle.ledger import ledger, memory_need
from edgeseq.bundle.plan import Plan
from edgeseq.bundle.tuning import KEY
from edgeseq.errors import UsageError
from edgeseq.files import new_directory

FACTS_FILE = "bundle.json"
FACTS_VERSION = 1


def is_bundle(path: Path) -> bool:
    """Whether `path` is a directory that holds a `model.edgeseq` (not whether that is sound)."""
    try:
        with open(Path(path) / f.MODEL_FILE, "rb") as file:
            return file.read(len(f.MAGIC)) == f.MAGIC
    except OSError:
        return False


@contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """Yield a directory to fill; it replaces `out` when the block ends well, see `files.new_directory`."""
    with new_directory(out, is_bundle, "bundle") as temporary:
        yield temporary


def bundle_facts(plan: Plan, plan_id: int) -> dict[str, Any]:
    """What `model.edgeseq` says, for people and scripts that do not read it; sizes in bytes."""
    manifest = plan.manifest
    return {
        "version": FACTS_VERSION,
        "plan_id": plan_id,
        "family": manifest.family,
        "source": manifest.source,
        "model_id": manifest.model_id,
        "dtype": manifest.dtype,
        "quant": manifest.quant,
        "context": manifest.context,
        "vocab_size": manifest.vocab_size,
        "params": manifest.params,
        "tokenizer": manifest.tokenizer,
        "target": plan.target,
        "graphs": {g.name: {"tokens": g.tokens, "launches": len(g.launches)} for g in plan.graphs},
        "state": [asdict(slot) | {"bytes": slot.nbytes} for slot, _ in plan.state],
        "memory": memory_need(plan),
        "ledger": asdict(ledger(plan)),
        "tuning": plan.meta.get(KEY),
    }


def write_facts(plan: Plan, plan_id: int, directory: Path) -> None:
    """Write `bundle.json`."""
    text = json.dumps(bundle_facts(plan, plan_id), indent=1, sort_keys=True)
    (directory / FACTS_FILE).write_text(text + "\n")


def require_bundle(path: Path) -> Path:
    """`path` if it is a bundle directory; UsageError if there is none."""
    if not is_bundle(path):
        raise UsageError(f"{path} is not a bundle directory", "make one with 'edgeseq compile'")
    return path
