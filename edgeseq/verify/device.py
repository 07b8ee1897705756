"""The bundle's own driver, run where the bundle is for, against the golden."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from devices.profile import Profile
from devices.transports import Transport, open_transport
from edgeseq.errors import DeviceError
from edgeseq.spec import Manifest
from edgeseq.verify.golden import Golden, load_golden
from edgeseq.verify.report import Array, Stage, compare
from edgeseq.verify.runtime import bundle_manifest, greedy_stage, rounding_stages
from edgeseq.verify.streams import AFTER, SEED, WHOLE, random_cuts

MAX_CUTS = 64
"""Pieces that the driver takes in one list."""


def device_stages(bundle: Path, profile: Profile, threads: int | None = None) -> list[Stage]:
    """Checksum, steps, random cuts, state saved in one process and resumed in another, greedy tokens: all there."""
    manifest = bundle_manifest(bundle)
    golden = load_golden(bundle, manifest.step.signature, manifest.family)
    with open_transport(profile) as transport:
        return _Driver(transport, bundle, manifest, profile.pool_options(threads)).stages(golden)


class _Driver:
    def __init__(self, transport: Transport, bundle: Path, manifest: Manifest, options: list[str]) -> None:
        self.transport, self.options = transport, ["--poison", *options]
        self.name = transport.profile.name
        self.signature = manifest.step.signature
        self.vocabulary = self.signature.outputs[0].shape[-1]
        self.model_id = manifest.model_id
        self.handle = transport.push(bundle)

    def stages(self, golden: Golden) -> list[Stage]:
        if golden.tokens is None or golden.logits is None:
            return self.named_stages(golden)
        tokens: list[int] = golden.tokens.tolist()
        bound = golden.bound("runtime", golden.logits)
        about = self.info()
        rows = self.logits(tokens, [1])
        cuts = random_cuts(len(tokens), np.random.default_rng(SEED))[:MAX_CUTS]
        ends = _ends(len(tokens), cuts)
        pieces = self.logits(tokens, cuts)
        found = str(about["model_id"])
        return [
            self.same_model(found),
            self.checksum(),
            compare(f"{self.name} step", WHOLE, rows, golden.logits, bound),
            compare(f"{self.name} prefill", WHOLE, pieces, golden.logits[ends], bound, ends),
            *self.graphs(golden, sorted(about["graph_tokens"]), int(about["context"])),
            self.resumed(tokens, rows),
            *rounding_stages(f"{self.name} rounding", rows, golden),
            greedy_stage(f"{self.name} greedy tokens", rows, golden),
        ]

    def same_model(self, found: str) -> Stage:
        return Stage(f"{self.name} model", "the bundle here", None, None, "", found == self.model_id, found)

    def named_stages(self, golden: Golden) -> list[Stage]:
        """Every step, then the same with the state saved by one process and resumed by another."""
        n = len(next(iter(golden.inputs.values())))
        state = self.transport.scratch("state")
        straight = self.frames(golden, 0, n)
        first = self.frames(golden, 0, n // 2, "--save-state", state)
        second = self.frames(golden, n // 2, n, "--load-state", state)
        stages = [self.same_model(str(self.info()["model_id"])), self.checksum()]
        for name, wanted in golden.outputs.items():
            bound, axes = golden.bound("runtime", wanted, name), ("step", f"{name} element")
            against = f"{golden.said_by} step"
            stages.append(compare(f"{self.name} step", against, straight[name], wanted, bound, axes=axes))
            moved = np.concatenate([first[name], second[name]])
            stages.append(
                compare(f"{self.name} state resumed", "the undisturbed stream", moved, straight[name], 0.0, axes=axes)
            )
        return stages

    def frames(self, golden: Golden, begin: int, end: int, *more: str) -> dict[str, Array]:
        """Outputs [n,...] of the golden's steps begin <= i < end."""
        source, out = self.transport.scratch("frames.in"), self.transport.scratch("frames.out")
        specs = [spec for spec in self.signature.inputs if spec.role == "data"]
        data = [golden.inputs[spec.name][i].tobytes() for i in range(begin, end) for spec in specs]
        self.transport.write(source, b"".join(data))
        self.transport.driver(self.handle, "frames", "--in", source, "--out", out, *self.options, *more)
        made = self.transport.read(out)
        step = sum(spec.nbytes for spec in self.signature.outputs)
        if len(made) != step * (end - begin):
            raise DeviceError(f"the driver on {self.name} wrote {len(made)} bytes, not {end - begin} x {step}")
        rows = np.frombuffer(made, np.uint8).reshape(end - begin, step)
        found, at = {}, 0
        for spec in self.signature.outputs:
            raw = np.ascontiguousarray(rows[:, at : at + spec.nbytes])
            found[spec.name] = raw.view(golden.outputs[spec.name].dtype).reshape(end - begin, *spec.shape)
            at += spec.nbytes
        return found

    def info(self) -> dict[str, Any]:
        """What the driver says about its model: model_id, graph_tokens, context."""
        said = self.transport.driver(self.handle, "info", *self.options).stdout
        try:
            facts: dict[str, Any] = json.loads(said)
            if not {"model_id", "graph_tokens", "context"} <= facts.keys():
                raise ValueError
        except (ValueError, AttributeError):
            raise DeviceError(f"the driver on {self.name} does not describe its model: {said[:80]!r}") from None
        return facts

    def graphs(self, golden: Golden, sizes: list[int], context: int) -> list[Stage]:
        """Each chunk graph against the next smaller one, as in streams.graph_stages."""
        stages = []
        assert golden.tokens is not None
        state = self.transport.scratch("state")
        for smaller, size in pairwise(sizes):
            after = min(AFTER, context - size) if context else AFTER
            tokens = np.resize(golden.tokens, size + after).tolist()
            got = self.logits(tokens, [size, 1])
            wanted = self.logits(tokens[:size], [smaller], "--save-state", state)[-1:]
            if after:
                wanted = np.concatenate([wanted, self.logits(tokens[size:], [1], "--load-state", state)])
            bound = golden.bound("runtime", wanted)
            name, against = f"{self.name} chunk{size} graph", f"{smaller} tokens at a time"
            stages.append(compare(name, against, got, wanted, bound, range(size - 1, size + after)))
        return stages

    def checksum(self) -> Stage:
        try:
            self.transport.driver(self.handle, "check", *self.options)
        except DeviceError as error:
            return Stage(f"{self.name} weights", "their checksum", None, None, "", False, error.sentence)
        return Stage(f"{self.name} weights", "their checksum", None, None, "", True)

    def logits(self, tokens: list[int], cuts: list[int], *more: str) -> Array:
        """Logits [pieces,V] after each piece of tokens."""
        out = self.transport.scratch("logits.f32")
        ids, pieces = ",".join(map(str, tokens)), ",".join(map(str, cuts))
        self.transport.driver(
            self.handle, "logits", "--tokens", ids, "--cut", pieces, "--out", out, *self.options, *more
        )
        data = self.transport.read(out)
        if not data or len(data) % (4 * self.vocabulary):
            raise DeviceError(
                f"the driver on {self.name} wrote {len(data)} bytes of logits, not rows of {self.vocabulary}"
            )
        return np.frombuffer(data, "<f4").reshape(-1, self.vocabulary)

    def resumed(self, tokens: list[int], undisturbed: Array) -> Stage:
        half = max(1, len(tokens) // 2)
        state = self.transport.scratch("state")
        rows = self.logits(tokens[:half], [1], "--save-state", state)
        if half < len(tokens):
            rows = np.concatenate([rows, self.logits(tokens[half:], [1], "--load-state", state)])
        return compare(f"{self.name} state resumed", "the undisturbed stream", rows, undisturbed, 0.0)


def _ends(total: int, cuts: list[int]) -> list[int]:
    """Index of the last token of each piece; the driver repeats the last size."""
    ends: list[int] = []
    at = 0
    while at < total:
        at = min(total, at + cuts[min(len(ends), len(cuts) - 1)])
        ends.append(at - 1)
    return ends
