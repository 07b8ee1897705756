"""The C runtime on this machine, its scratch memory full of NaN, against the golden."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeseq.bundle.reader import BundleFile
from edgeseq.errors import BundleError
from edgeseq.runtime import Model, Session, load
from edgeseq.spec import Manifest
from edgeseq.verify.golden import Golden, load_golden
from edgeseq.verify.report import Array, Stage, compare
from edgeseq.verify.streams import (
    SEED,
    WHOLE,
    NamedRun,
    cuts_stage,
    graph_stages,
    named_chunk_stages,
    random_cuts,
    step_stage,
    stepped,
)
from edgeseq.verify.tolerances import ROUNDING_CHOICES, ROUNDING_MEAN, tolerance

GREEDY = 32


def bundle_manifest(bundle: Path) -> Manifest:
    """What the bundle's `model.edgeseq` declares; BundleError when it is damaged."""
    with BundleFile(bundle, check_weights=False) as file:
        return file.plan.manifest


def runtime_stages(bundle: Path, threads: int | None = None, thorough: bool = True) -> list[Stage]:
    """Checksum and every form of the model; if `thorough`, the state's life and the greedy tokens too."""
    manifest = bundle_manifest(bundle)
    golden = load_golden(bundle, manifest.step.signature, manifest.family)
    with load(bundle, threads, poison=True) as model:
        stages = [_checksum(model)]
        if golden.tokens is None:
            return stages + _named_stages(model, golden)
        sizes = [graph.tokens for graph in model.info.graphs]
        stages.append(step_stage("runtime step", "runtime", model.session, golden))
        stages.append(cuts_stage("runtime prefill", "runtime", model.session, golden))
        stages += graph_stages("runtime", "runtime", model.session, sizes, golden, model.info.context)
        if thorough:
            stages += _state_stages(model, golden)
            stages += _greedy_stages(model, golden)
    return stages


def _checksum(model: Model) -> Stage:
    try:
        model.check_weights()
    except BundleError as error:
        return Stage("weights", "their checksum", None, None, "", False, error.sentence)
    return Stage("weights", "their checksum", None, None, "", True)


def _state_stages(model: Model, golden: Golden) -> list[Stage]:
    """Saved and loaded into another session, forked, and reset: bit for bit what the undisturbed stream says."""
    assert golden.tokens is not None
    tokens = golden.tokens.tolist()
    rng = np.random.default_rng(SEED)
    half = max(1, len(tokens) // 2)
    first, rest = tokens[:half], tokens[half:]
    cuts = random_cuts(half, rng)
    at = 0
    through, loaded = model.session(), model.session()
    for piece in cuts:
        through.prefill(first[at : at + piece])
        at += piece
        loaded.reset()
        loaded.load(through.save())
    fork = through.fork()
    wanted = _continued(through, rest)
    saved, forked = _continued(loaded, rest), _continued(fork, rest)
    through.reset()
    again = stepped(through, first)
    fresh = stepped(model.session(), first)
    rows = range(half, half + len(wanted))
    return [
        compare("runtime state loaded", "the stream it was saved from", saved, wanted, 0.0, rows),
        compare("runtime state forked", "the stream it was forked from", forked, wanted, 0.0, rows),
        compare("runtime state reset", "a fresh stream", again, fresh, 0.0),
    ]


def _continued(session: Session, tokens: list[int]) -> Array:
    return stepped(session, tokens) if tokens else np.empty((0, session.model.info.vocab_size), np.float32)


def _greedy_stages(model: Model, golden: Golden) -> list[Stage]:
    """The likeliest token after each of the golden's tokens, and a greedy continuation sampled in C."""
    assert golden.tokens is not None and golden.logits is not None
    rows = stepped(model.session(), golden.tokens.tolist())
    stages = [
        *rounding_stages("runtime rounding", rows, golden),
        greedy_stage("runtime greedy tokens", rows, golden),
    ]
    half = max(1, len(golden.tokens) // 2)
    room = model.info.context - half if model.info.context else GREEDY
    session = model.session()
    session.prefill(golden.tokens[:half].tolist())
    twin = session.fork()
    made = list(session.generate(min(GREEDY, room)))
    logits, wanted = twin.logits, []
    for _ in made:
        assert logits is not None
        wanted.append(int(np.argmax(logits)))
        logits = twin.step(wanted[-1])
    got = _column(made)
    stages.append(compare("runtime generate", "argmax and step", got, _column(wanted), 0.0, axes=("token", "")))
    return stages


def _column(ids: list[int]) -> Array:
    return np.array(ids, np.int64).reshape(-1, 1)


def greedy_stage(name: str, got: Array, golden: Golden) -> Stage:
    """Whether the same tokens are chosen as by the golden. `worst` counts those that differ; where the golden itself
    has two candidates nearer to each other than twice the bound, either choice is right, as long as not many more
    choices of a quantised model differ than its noise alone changes."""
    assert golden.logits is not None
    wanted, noise = golden.logits, golden.noise.get("logits")
    near = 2 * golden.bound("runtime", wanted)
    ours, theirs = np.argmax(got, axis=1), np.argmax(wanted, axis=1)
    at = np.arange(len(wanted))
    ties = (ours != theirs) & (wanted[at, theirs] - wanted[at, ours] <= near)
    wrong = np.flatnonzero((ours != theirs) & ~ties)
    where = f"token {wrong[0]}: {ours[wrong[0]]}, expected {theirs[wrong[0]]}" if len(wrong) else ""
    note = f"{len(at)} tokens" + (f", {int(ties.sum())} of them a tie" if ties.any() else "")
    few = noise is None or float(ties.mean()) <= noise.changed + ROUNDING_CHOICES
    return Stage(name, WHOLE, float(len(wrong)), 0.0, where, len(wrong) == 0 and few, note)


def rounding_stages(name: str, got: Array, golden: Golden) -> list[Stage]:
    """Of a quantised model: the root mean square of all differences, against that of the same rounding in PyTorch."""
    if "logits" not in golden.noise:
        return []
    assert golden.logits is not None
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(np.sqrt(np.square(got.astype(np.float64) - golden.logits).mean()))
    mean = mean if np.isfinite(mean) else float("inf")
    own = golden.float32["logits"].mean if "logits" in golden.float32 else 0.0
    limit = ROUNDING_MEAN * (golden.noise["logits"].mean + own) + tolerance("runtime", "float32", golden.logits)
    return [Stage(name, "the same rounding in PyTorch", mean, limit, "root mean square", mean <= limit)]


def _named_stages(model: Model, golden: Golden) -> list[Stage]:
    """A model whose steps are not tokens: every step, then the same with the state moved to another session."""
    straight = _run_named(model.session(), golden, 0)
    session = model.session()
    half = len(next(iter(golden.inputs.values()))) // 2
    first = _run_named(session, golden, 0, half)
    other = model.session()
    other.load(session.save())
    second = _run_named(other, golden, half)
    fork = _run_named(session.fork(), golden, half)
    stages = []
    for name, wanted in golden.outputs.items():
        bound = golden.bound("runtime", wanted, name)
        axes = ("step", f"{name} element")
        stages.append(compare("runtime step", f"{golden.said_by} step", straight[name], wanted, bound, axes=axes))
        moved = np.concatenate([first[name], second[name]]) if half else second[name]
        stages.append(compare("runtime state loaded", "undisturbed", moved, straight[name], 0.0, axes=axes))
        stages.append(compare("runtime state forked", "undisturbed", fork[name], straight[name][half:], 0.0, axes=axes))
    for index, graph in enumerate(model.info.graphs):
        if graph.tokens > 1:
            stages += named_chunk_stages("runtime", "runtime", _by_length(model, index), graph.tokens, golden)
    return stages


def _by_length(model: Model, chunk: int) -> NamedRun:
    """A fresh stream that takes one step, or as many as graph `chunk` consumes."""
    session = model.session()
    return lambda inputs, steps: session.run(inputs, chunk if steps > 1 else 0)


def _run_named(session: Session, golden: Golden, begin: int, end: int | None = None) -> dict[str, Array]:
    """Outputs [n,...] of the golden's steps begin <= i < end."""
    n = len(next(iter(golden.inputs.values())))
    rows: dict[str, list[Array]] = {name: [] for name in golden.outputs}
    for i in range(begin, n if end is None else end):
        made = session.run({name: value[i] for name, value in golden.inputs.items()})
        for name in rows:
            rows[name].append(made[name])
    return {name: np.stack(values) if values else golden.outputs[name][:0] for name, values in rows.items()}
