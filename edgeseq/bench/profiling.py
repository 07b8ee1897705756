"""Where a step's time goes: every launch timed, kernel by kernel, beside the bytes the plan says it moves.

On a GPU the times are the device's own (event timers), without the gaps between launches; on the CPU they are taken
around each launch. The sum is therefore less, or more, than a token takes.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from edgeseq.bench.engines import BundleEngine
from edgeseq.bench.rows import Row
from edgeseq.bundle.ledger import launch_traffic

REPETITIONS = 25
MOVED = ("weights", "state", "activations")


def profile_rows(engine: BundleEngine, repetitions: int = REPETITIONS) -> list[Row]:
    """One row per kernel of the step, the slowest first.

    launches: in one token; ns: of all of them, each launch's median over the repetitions; share: of the sum over all
    kernels; bytes: that they move by the plan, a cache at the depth of the first token; gbs: bytes per ns.
    """
    assert engine.plan is not None
    plan, step = engine.plan, engine.plan.step
    taken = _times(engine, repetitions)
    launches: defaultdict[str, int] = defaultdict(int)
    spent: defaultdict[str, float] = defaultdict(float)
    moved: defaultdict[str, int] = defaultdict(int)
    for launch, ns in zip(step.launches, taken, strict=True):
        traffic = launch_traffic(plan, step, launch)
        launches[launch.kernel] += 1
        spent[launch.kernel] += float(ns)
        moved[launch.kernel] += sum(traffic[key] for key in MOVED) + traffic["kv"]
    total = sum(spent.values()) or 1.0
    return [
        {
            "test": "profile",
            "model_filename": engine.name,
            "backends": engine.backend,
            "n_threads": engine.threads,
            "kernel": name,
            "launches": launches[name],
            "ns": round(ns),
            "share": ns / total,
            "bytes": moved[name],
            "gbs": moved[name] / ns if ns else None,
        }
        for name, ns in sorted(spent.items(), key=lambda item: -item[1])
    ]


def _times(engine: BundleEngine, repetitions: int) -> np.ndarray:
    """Median nanoseconds of each launch of the step. The first step warms up."""
    session = engine.session
    session.reset()
    session.step(int(engine.ids(1)[0]))
    samples = []
    for _ in range(repetitions):
        if engine.context and session.position >= engine.context:
            session.reset()
            session.step(int(engine.ids(1)[0]))
        samples.append(session.profile())
    return np.median(np.stack(samples), axis=0)
