"""Bytes per token are what the plan says, to the byte; the crossover is where the two lines really meet."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from edgeseq.bundle.ledger import Ledger, crossover_depth, launch_traffic, ledger, memory_need, state_bytes_at
from tests.bundle.plans import ROWS, VOCAB, WIDTH, cached_plan, recurrent_plan


def test_recurrent_step() -> None:
    counted = ledger(recurrent_plan())
    assert counted.weight_bytes == WIDTH * 4 + 48 + VOCAB * WIDTH * 4  # one embedding row, the mix, the head
    assert counted.state_bytes_rw == 2 * (96 + 128)
    assert counted.activation_bytes == (8 + 32) + 2 * 32 + (32 + VOCAB * 4)
    assert counted.kv == ()
    assert counted.bytes_per_token(0) == counted.bytes_per_token(1_000_000)


def test_a_chunk_reads_its_weights_once() -> None:
    plan = recurrent_plan()
    chunk, step = ledger(plan, plan.graphs[1]), ledger(plan)
    assert chunk.weight_bytes - step.weight_bytes == 7 * WIDTH * 4  # eight embedding rows instead of one
    assert chunk.state_bytes_rw == step.state_bytes_rw


def test_a_cache_is_read_row_by_row() -> None:
    counted = ledger(cached_plan())
    row = 2 * 4 * 4
    assert counted.state_bytes_rw == row
    assert [counted.kv_bytes_read(depth) for depth in (0, 1, 99)] == [row, 2 * row, 100 * row]
    assert counted.bytes_per_token(9) - counted.bytes_per_token(4) == 5 * row


def test_a_ring_stops_growing() -> None:
    counted = ledger(cached_plan("ring"))
    assert counted.kv_bytes_read(ROWS - 1) == counted.kv_bytes_read(10 * ROWS) == ROWS * 2 * 4 * 4
    assert counted.kv_bytes_read(ROWS - 2) < counted.kv_bytes_read(ROWS - 1)


def test_what_a_launch_states_beats_what_its_arguments_suggest() -> None:
    plan = recurrent_plan()
    gather = plan.step.launches[0]
    assert launch_traffic(plan, plan.step, gather)["weights"] == WIDTH * 4
    assert launch_traffic(plan, plan.step, replace(gather, traffic={}))["weights"] == 544


def test_bound_is_bandwidth_over_bytes() -> None:
    counted = Ledger(600, 300, 100)
    assert counted.bound_tok_s(1.0) == pytest.approx(1e9 / 1000)


def test_crossover_against_every_depth() -> None:
    generator = random.Random(3)
    found = 0
    for _ in range(300):
        a, b = (
            Ledger(
                generator.randrange(200),
                generator.randrange(50),
                0,
                tuple(
                    (generator.randrange(1, 5), generator.choice([0, 10, 40])) for _ in range(generator.randrange(3))
                ),
            )
            for _ in "ab"
        )
        expected = next((d for d in range(400) if a.bytes_per_token(d) <= b.bytes_per_token(d)), None)
        got = crossover_depth(a, b)
        assert got == expected or (expected is None and got is not None and got >= 400), (a, b)
        found += expected is not None and expected > 0
        assert crossover_depth(a, b, 30) == (expected if expected is not None and expected <= 30 else None)
    assert found > 20


def test_memory() -> None:
    need = memory_need(recurrent_plan())
    assert need == {"weights": 576 + 64, "state": 256, "io": 256, "arena": 256, "session": 768}
    assert state_bytes_at(recurrent_plan(), 10**6) == state_bytes_at(recurrent_plan(), 1) == 256
    assert state_bytes_at(cached_plan(), 64) == 64 * 2 * 4 * 4
    assert state_bytes_at(cached_plan("ring"), 64) == ROWS * 2 * 4 * 4
