"""How fast a bundle is on this machine's GPU, beside what its memory gives in the same run."""

from __future__ import annotations

import struct
import time
import zlib
from typing import Any

from runtime import Model, Refused, abi

from edgeseq.bench.nvml import GpuMeter

WARM, REPEATS = 64, 3
APPEND = 3  # update of a slot


def measure(model: Model, facts: dict[str, Any], n: int, depths: list[int]) -> dict[str, Any]:
    """facts: `bytes_per_token` and `prompt` where they are known. n: greedy tokens of one measurement; the median
    of REPEATS counts. depths: positions to decode at, as far as the context goes. What cannot be measured is left
    out."""
    made: dict[str, Any] = {"device": model.device.text.decode(), "weight_bytes": model.info.weight_bytes}
    made |= _memory(model)
    made |= _decode(model, facts, n, made.get("read_bandwidth"))
    made |= _prefill(model)
    made |= _profile(model)
    if depths:
        made["at_depth"] = {depth: _at_depth(model, depth, n) for depth in depths if _reachable(model, depth)}
    return made


def _reachable(model: Model, depth: int) -> bool:
    return not model.info.context or depth + WARM + 8 <= model.info.context


def _at_depth(model: Model, depth: int, n: int) -> float:
    """Tokens per second from position `depth` on, with a made-up state."""
    room = model.info.context - depth if model.info.context else 1 << 40
    session, rates = model.session(), []
    n = max(1, min(n, (room - WARM - 1) // REPEATS))
    session.load(made_up_state(model, depth))
    session.step(1)
    session.generate(min(WARM, max(1, room - REPEATS * n - 1)))
    for _ in range(REPEATS):
        start = time.perf_counter()
        session.generate(n)
        rates.append(n / (time.perf_counter() - start))
    session.close()
    return round(sorted(rates)[REPEATS // 2], 1)


def made_up_state(model: Model, position: int) -> bytearray:
    """A saved state of zeros at a position (docs/bundle-format.md): decode does the same work whatever it holds."""
    slots = [model.slot(i) for i in range(model.info.n_slots)]
    size = sum(_saved_bytes(slot, position) for slot in slots)
    state = bytearray(48 + size)
    struct.pack_into("<16sQQ", state, 16, bytes(model.info.model_id), position, size)
    struct.pack_into("<8sII", state, 0, b"ESSTATE\0", 1, zlib.crc32(memoryview(state)[16:]))
    return state


def _saved_bytes(slot: abi.TensorInfo, position: int) -> int:
    """A cache that grows is saved as far as it is filled."""
    if slot.update != APPEND:
        return int(slot.bytes)
    rows = int(slot.dims[slot.axis])
    return int(slot.bytes) // rows * min(position, rows)


def _memory(model: Model) -> dict[str, Any]:
    made: dict[str, Any] = {}
    try:
        made["read_bandwidth"] = model.measure_read()
        made["launch_ns"] = round(model.measure_launch(), 1)
    except Refused as error:
        made["memory_note"] = str(error)
    return made


def _decode(model: Model, facts: dict[str, Any], n: int, bandwidth: float | None) -> dict[str, Any]:
    session = model.session()
    session.prefill(facts.get("prompt") or [1])
    room = model.info.context - session.position if model.info.context else 1 << 40
    n = max(1, min(n, (room - 16) // (REPEATS + 3)))
    session.generate(min(WARM, n))
    meter, rates, joules = GpuMeter(), [], 0.0
    for _ in range(REPEATS):
        meter.joules()
        start = time.perf_counter()
        session.generate(n)
        rates.append(n / (time.perf_counter() - start))
        joules += meter.joules() or 0.0
    rate = sorted(rates)[REPEATS // 2]
    _, ns = session.generate(n, timed=True)
    made: dict[str, Any] = {
        "tokens": n,
        "tokens_per_second": round(rate, 1),
        "spread": round((max(rates) - min(rates)) / rate, 4),
        "event_us_median": round(sorted(ns)[len(ns) // 2] / 1e3, 2),
    }
    if joules > 0:
        made["joules_per_token"] = round(joules / (REPEATS * n), 6)
    for name in ("temperature_c", "clock_mhz", "memory_clock_mhz"):
        if (value := getattr(meter, name)()) is not None:
            made[name] = value
    moved = facts.get("bytes_per_token")
    if moved:
        made["bytes_per_token"] = moved
        made["achieved_bandwidth"] = rate * moved
        if bandwidth:
            made["fraction_of_read"] = round(rate * moved / bandwidth, 4)
    start = time.perf_counter()
    for _ in range(min(n, 64)):
        session.step(1)
    made["steps_per_second"] = round(min(n, 64) / (time.perf_counter() - start), 1)
    session.close()
    return made


def _prefill(model: Model) -> dict[str, Any]:
    tokens = model.graph(model.info.n_graphs - 1).tokens
    if tokens < 2:
        return {}
    total = tokens * 8
    if model.info.context:
        total = min(total, model.info.context // tokens * tokens)
    best = 0.0
    for _ in range(REPEATS):
        session = model.session()
        session.prefill([1] * tokens)
        session.reset()
        start = time.perf_counter()
        session.prefill([1 + i % 7 for i in range(total)])
        best = max(best, total / (time.perf_counter() - start))
        session.close()
    return {"prefill_chunk": tokens, "prefill_tokens_per_second": round(best, 1)}


def _profile(model: Model) -> dict[str, Any]:
    session = model.session()
    session.prefill([1])
    session.profile()
    runs = sorted((session.profile() for _ in range(5)), key=sum)
    ns = runs[len(runs) // 2]
    session.close()
    return {"launches": len(ns), "launches_us": round(sum(ns) / 1e3, 2), "profile_ns": ns}
