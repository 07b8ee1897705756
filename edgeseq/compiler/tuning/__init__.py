"""Tuning: which variant of a kernel is the fastest on the target, found by running all of them there.

| stage   | function         | file             | artefact                                               |
|---------|------------------|------------------|--------------------------------------------------------|
| collect | subjects         | subject.py       | kernels with a choice: `candidates` of kernels/<op>.py |
| build   | write_bundle     | measure.py       | a bundle of nothing but their launches                 |
| run     | measured         | measure.py       | nanoseconds, by the bundle's driver on the device      |
| choose  | tune             | __init__.py      | the parameters that go into the plan                   |
| keep    | Record           | bundle/tuning.py | `meta.tuning` of the final bundle                      |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeseq.bundle.reader import BundleFile
from edgeseq.bundle.tuning import Entry, Record, record_of
from edgeseq.errors import UsageError
from edgeseq.spec import Manifest

from ..ir import Call, KernelRef
from ..targets import Target
from .measure import Progress, identity, measured
from .subject import Subject, subjects

__all__ = ["Tuning", "tune"]


@dataclass(frozen=True)
class Tuning:
    """Where the choice comes from.

    device: the profile of the device to measure on; empty is the target's own.
    record: a bundle whose measurements decide; nothing is measured then.
    """

    device: str = ""
    record: Path | None = None


def tune(
    graphs: Sequence[tuple[int, Sequence[Call]]], manifest: Manifest, target: Target, tuning: Tuning, report: Progress
) -> Record:
    """Give every call the fastest variant of its kernel; returns what decided, for the bundle.

    graphs: tokens of each and its calls.
    A kernel that a given record does not know keeps its parameters. Raises UsageError for a target without variants
    or a record of another target, DeviceError when the device fails.
    """
    if target.gpu:
        raise UsageError(f"the kernels for {target.name} have no variants to choose from", "only CPU kernels are tuned")
    found = subjects(graphs, target)
    if tuning.record is not None:
        record = _load(tuning.record, target)
    else:
        record = measured(found, manifest, target, tuning.device, report)
    entries = {s: entry for s in found if (entry := _entry(record, s)) is not None}
    chosen = {s.ref: _choice(s, entry) for s, entry in entries.items()}
    for call in (call for _, calls in graphs for call in calls):
        call.kernel = chosen.get(call.kernel, call.kernel)
    return replace(record, kernels=tuple(entries.values()))


def _entry(record: Record, subject: Subject) -> Entry | None:
    """What the record says of the subject."""
    return next((e for e in record.kernels if e.op == subject.ref.op and e.params == subject.fixed), None)


def _choice(subject: Subject, entry: Entry) -> KernelRef:
    """The fastest of those variants that the subject still has."""
    tried = [t for t in entry.tried if t.choice in subject.choices]
    if not tried:
        return subject.ref
    best = replace(entry, tried=tuple(tried)).fastest.choice
    return replace(subject.ref, params=subject.variants[subject.choices.index(best)])


def _load(bundle: Path, target: Target) -> Record:
    """The record in a bundle. UsageError when it has none, or one of another target."""
    with BundleFile(bundle, check_weights=False) as file:
        record = record_of(file.plan)
    if record is None:
        raise UsageError(f"{bundle} holds no measurements", "compile it with --tune")
    ours = identity(target)
    if record.target != ours:
        theirs, these = (" ".join(str(t.get(k, "?")) for k in ("triple", "cpu")) for t in (record.target, ours))
        raise UsageError(f"{bundle} was tuned for {theirs}, this is for {these}", "measure with --tune")
    return record
