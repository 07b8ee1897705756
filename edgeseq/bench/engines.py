"""What can be timed: an engine holds a stream that can be put at a depth again and again.

Only `prefill` and `decode` are timed, and they time themselves.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeseq.bench.synthetic import saved_state
from edgeseq.bundle.plan import Plan
from edgeseq.bundle.reader import BundleFile
from edgeseq.errors import UsageError
from edgeseq.runtime import load
from edgeseq.spec import Manifest
from edgeseq.verify.report import Array, Stage

Placed = Literal["fresh", "prefill", "state"]
PLACING_SECONDS = 20.0
"""What an engine may spend on reading prompts to get to its depths; beyond that it loads a made-up state."""
PIECE = 512
BACKENDS = {"cpu": "CPU", "opencl": "OpenCL", "cuda": "CUDA"}
"""What runs a bundle, as rows call it; every other backend is a rival."""
SEED = 3


class Engine(ABC):
    """One contender.

    name: what rows call it. backend: of BACKENDS for a bundle, else the rival's name. plan: None for a rival, whose
    traffic is not counted. context: longest sequence, 0 = unbounded. gpu: the GPU that a bundle runs on, in a line.
    placed: how the depth was reached.
    """

    plan: Plan | None = None
    gpu: str = ""

    def __init__(self, name: str, backend: str, threads: int, context: int, vocabulary: int) -> None:
        self.name, self.backend, self.threads = name, backend, threads
        self.context, self.vocabulary = context, vocabulary
        self.placed: Placed = "fresh"
        self._depth = 0
        self._rng = np.random.default_rng(SEED)

    def ids(self, n: int) -> Array:
        """Random tokens: what they are does not change how long they take."""
        return self._rng.integers(0, self.vocabulary, n, np.int32)

    @abstractmethod
    def place(self, depth: int) -> None:
        """Choose the depth that `restore` goes to."""

    @abstractmethod
    def restore(self) -> None:
        """Put the stream at the chosen depth."""

    @abstractmethod
    def prefill(self, ids: Array) -> int:
        """Nanoseconds to read the tokens, ending with the logits of the last."""

    @abstractmethod
    def decode(self, n: int) -> list[int]:
        """Nanoseconds of each of n tokens, one by one; their sum alone where the engine does not tell them apart."""

    def choose(self) -> int | None:
        """The likeliest token after the logits that are there; None where the engine keeps them to itself."""
        return None

    def read_bandwidth(self, buffer: Array) -> float | None:
        """Bytes per second that this engine's threads read from `buffer`; None for a rival."""
        return None

    def weights_bandwidth(self) -> float | None:
        """The same from its own weights, which may lie in a cache."""
        return None

    def close(self) -> None:  # noqa: B027
        """Release threads and memory; nothing to do where the collector does it."""


class Rival(Engine):
    """Another program that runs the same model.

    source, model_id: of that model, as its manifest has them. columns: what a row says of the rival itself.
    """

    def __init__(
        self, name: str, backend: str, threads: int, manifest: Manifest, columns: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(name, backend, threads, manifest.context, manifest.vocab_size)
        self.source, self.model_id = manifest.source, manifest.model_id
        self.columns: Mapping[str, Any] = columns or {}

    def verified(self) -> list[Stage]:
        """What it computes against what PyTorch said; nothing where it cannot be asked."""
        return []


class StreamEngine(Engine):
    """A contender in this process, whose stream can be saved and loaded."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._spent = 0.0
        self._snapshot: Any = None

    def place(self, depth: int) -> None:
        """Read on from the present depth while time allows, else load a made-up state. `placed` says which it was."""
        if depth == 0:
            self._depth, self._snapshot, self.placed = 0, None, "fresh"
            return
        if depth == self._depth and self._snapshot is not None:
            return
        if self.placed == "state" or depth < self._depth or not self._read_to(depth):
            self._snapshot, self.placed = self._made_up(depth), "state"
        self._depth = depth

    def _read_to(self, depth: int) -> bool:
        """Read on to `depth`; gives up, False, when it would take too long."""
        self.restore()
        at, begin = self._depth, time.perf_counter()
        while at < depth:
            n = min(PIECE, depth - at)
            self.prefill(self.ids(n))
            at += n
            used = time.perf_counter() - begin
            if self._spent + used * (depth - self._depth) / (at - self._depth) > PLACING_SECONDS:
                self._spent += used
                return False
        self._spent += time.perf_counter() - begin
        self._snapshot, self.placed = self._save(), "prefill"
        return True

    def restore(self) -> None:
        if self._snapshot is None:
            self._reset()
        else:
            self._load(self._snapshot)

    @abstractmethod
    def _reset(self) -> None: ...

    @abstractmethod
    def _save(self) -> Any: ...

    @abstractmethod
    def _load(self, snapshot: Any) -> None: ...

    @abstractmethod
    def _made_up(self, depth: int) -> Any:
        """A snapshot as if `depth` tokens had been read."""


class BundleEngine(StreamEngine):
    """A bundle in the C runtime, on this machine."""

    def __init__(self, bundle: Path, threads: int | None) -> None:
        with BundleFile(bundle, check_weights=False) as file:
            plan = file.plan
        self.model = load(bundle, threads)
        info = self.model.info
        if not info.takes_tokens:
            self.model.close()
            raise UsageError(f"{bundle} takes named inputs, not tokens", "time it through the Python or the C API")
        super().__init__(str(bundle), BACKENDS[info.backend], info.threads, info.context, info.vocab_size)
        self.gpu = "" if info.backend == "cpu" else info.device
        self.bundle, self.plan = bundle, plan
        self.session = self.model.session()

    def prefill(self, ids: Array) -> int:
        begin = time.perf_counter_ns()
        self.session.prefill(ids)
        return time.perf_counter_ns() - begin

    def decode(self, n: int) -> list[int]:
        """The first token is given, the others are chosen: the loop over them runs in C."""
        (first,) = self.ids(1).tolist()
        begin = time.perf_counter_ns()
        self.session.step(first)
        spent = time.perf_counter_ns() - begin
        _, ns = self.session.generate_timed(n - 1)
        return [spent, *ns.tolist()]

    def choose(self) -> int:
        return self.session.sample()

    def _reset(self) -> None:
        self.session.reset()

    def _save(self) -> bytes:
        return self.session.save()

    def _load(self, snapshot: bytes) -> None:
        self.session.load(snapshot)

    def _made_up(self, depth: int) -> bytes:
        assert self.plan is not None
        return saved_state(self.plan.manifest.model_id, [slot for slot, _ in self.plan.state], depth)

    def read_bandwidth(self, buffer: Array) -> float:
        """A GPU reads its weights, by its own timers: `buffer` is the host's."""
        return self.model.measure_read_bandwidth(None if self.gpu else buffer, 3)

    def weights_bandwidth(self) -> float | None:
        return None if self.gpu else self.model.measure_read_bandwidth(None, 5)

    def close(self) -> None:
        self.model.close()
