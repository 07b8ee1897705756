"""Timing: every repetition runs all contenders in turn, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgeseq.bench.cases import Case
from edgeseq.bench.engines import Engine, Placed
from edgeseq.bench.machine import EnergyMeter
from edgeseq.bench.nvml import GpuMeter
from edgeseq.verify.report import Array

LEAST, MOST, LEAST_NS = 5, 30, 200_000_000
WARM_PROMPT, WARM_TOKENS = 64, 4
SETTLE_SECONDS = 0.02
"""Rest before a repetition when there are several contenders: the threads of the one before stop spinning."""

Progress = Callable[[str, int, int], None]


class Meter(Protocol):
    """What the processor that does the work says of itself; None for what it does not."""

    def joules(self) -> float | None: ...

    def clock_mhz(self) -> float | None: ...

    def temperature_c(self) -> float | None: ...


@dataclass
class Samples:
    """What was measured of one test: one entry per repetition, nanoseconds and bytes per second.

    token_ns: of every token of every repetition, where the engine tells them apart. read_bw: of a buffer larger than
    the cache, with the engine's own threads, between the repetitions. weights_bw: of its weights, which may lie in a
    cache.
    """

    placed: Placed = "fresh"
    total_ns: list[int] = field(default_factory=list)
    token_ns: list[int] = field(default_factory=list)
    first_token_ns: list[int] = field(default_factory=list)
    read_bw: list[float] = field(default_factory=list)
    weights_bw: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    clock_mhz: float | None = None
    temperature_c: float | None = None


def measure(
    engines: Sequence[Engine], cases: Sequence[Case], repetitions: int | None, buffer: Array, progress: Progress
) -> Iterator[tuple[Case, Engine, Samples]]:
    """Run every test on every engine, `repetitions` times (see `enough`). Yields test by test, in the order of
    `cases`, the engines in turn."""
    meters: list[Meter] = [GpuMeter() if engine.backend == "CUDA" else EnergyMeter() for engine in engines]
    for index, case in enumerate(cases):
        progress("timing", index, len(cases))
        samples = [Samples() for _ in engines]
        for engine, record in zip(engines, samples, strict=True):
            engine.place(case.n_depth)
            record.placed = engine.placed
            _warm(engine, case)
        while not enough(samples, repetitions):
            for engine, record, meter in zip(engines, samples, meters, strict=True):
                _repeat(engine, case, record, meter, buffer, settle=len(engines) > 1)
        yield from ((case, engine, record) for engine, record in zip(engines, samples, strict=True))
    progress("timing", len(cases), len(cases))


def enough(samples: Sequence[Samples], repetitions: int | None) -> bool:
    """Whether to stop: after `repetitions`; if None, after 5, or, for tests so short that a hiccup of the system would
    decide, once every contender was timed for 0.2 seconds, and at 30 at the latest."""
    done = min(len(s.total_ns) for s in samples)
    if repetitions is not None:
        return done >= repetitions
    return done >= LEAST and (done >= MOST or min(sum(s.total_ns) for s in samples) >= LEAST_NS)


def _warm(engine: Engine, case: Case) -> None:
    engine.restore()
    if case.n_prompt:
        engine.prefill(engine.ids(min(case.n_prompt, WARM_PROMPT)))
    else:
        engine.decode(min(case.n_gen, WARM_TOKENS))


def _repeat(engine: Engine, case: Case, record: Samples, meter: Meter, buffer: Array, settle: bool) -> None:
    engine.restore()
    if settle:
        time.sleep(SETTLE_SECONDS)
    ids = engine.ids(case.n_prompt)
    meter.joules()
    if case.n_prompt:
        total = engine.prefill(ids)
        begin = time.perf_counter_ns()
        if engine.choose() is not None:
            record.first_token_ns.append(total + time.perf_counter_ns() - begin)
    else:
        tokens = engine.decode(case.n_gen)
        total = sum(tokens)
        record.token_ns += tokens if len(tokens) == case.n_gen else []
    record.total_ns.append(total)
    joules = meter.joules()
    if joules is not None:
        record.joules.append(joules)
    record.clock_mhz, record.temperature_c = meter.clock_mhz(), meter.temperature_c()
    if len(record.read_bw) >= LEAST:
        return
    for rate, rates in (
        (engine.read_bandwidth(buffer), record.read_bw),
        (engine.weights_bandwidth(), record.weights_bw),
    ):
        if rate is not None:
            rates.append(rate)
