"""Bytes per token against a count by hand from the model's shape, rates and spreads against arithmetic, and where two
lines cross."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeseq.bench.cases import Case
from edgeseq.bench.crossover import Measured, crossover_rows, measured_crossover
from edgeseq.bench.measure import LEAST, MOST, Samples, enough
from edgeseq.bench.rows import Subject, make_row
from edgeseq.bench.traffic import traffic, working_set
from edgeseq.bundle.ledger import ledger
from edgeseq.bundle.plan import Plan
from edgeseq.bundle.reader import BundleFile
from tests import bundles
from tests.bundle.plans import cached_plan, recurrent_plan


def plan_of(name: str) -> Plan:
    with BundleFile(bundles.bundled(name), check_weights=False) as file:
        return file.plan


def test_mamba_by_hand() -> None:
    """One token reads every matrix once, one row of the embedding, and reads and writes each state once."""
    c = bundles.CONFIGS["mamba"]
    L, d, D, N, k, R, V = c.n_layers, c.d_model, c.d_inner, c.d_state, c.d_conv, c.dt_rank, c.vocab_size
    padded = -(-V // 16) * 16  # the head is packed in groups of 16 rows
    layer = d * 2 * D + D * (R + 2 * N) + R * D + D * d + D * k + D + D + N * D + D + d
    counted = traffic(plan_of("mamba"), Case(0, 8, 100))
    assert counted.state_bytes_rw == 2 * 4 * L * D * (N + k - 1)
    assert counted.kv_bytes_read == 0
    exact = 4 * (L * layer + d + V * d + d)
    assert exact <= counted.weight_bytes <= exact + 4 * (padded - V + L * 16) * D


def test_a_cache_by_hand() -> None:
    """At depth p the token reads p + 1 rows of every cache and writes one."""
    c = bundles.CONFIGS["transformer"]
    row = 2 * c.n_layers * c.n_kv_heads * c.head_dim * 4
    plan = plan_of("transformer")
    assert traffic(plan, Case(0, 1, 0)).kv_bytes_read == row
    assert traffic(plan, Case(0, 5, 100)).kv_bytes_read == row * 103  # depths 100 to 104
    assert traffic(plan, Case(0, 5, 100)).state_bytes_rw == row


def test_a_prompt_reads_its_weights_once_per_call() -> None:
    """37 tokens are two chunks of 16, one of 4 and a step; what feeds the logits runs in the last call alone."""
    plan = plan_of("mamba")
    by_size = {graph.tokens: ledger(plan, graph) for graph in plan.graphs}
    skipped = {
        graph.tokens: sum(a.nbytes for x in graph.launches if x.outputs_only for a in x.args if a.space == "weights")
        for graph in plan.graphs
    }
    c = bundles.CONFIGS["mamba"]
    assert all(nbytes >= 4 * c.vocab_size * c.d_model for nbytes in skipped.values())  # the head at least
    whole = 2 * by_size[16].weight_bytes + by_size[4].weight_bytes + by_size[1].weight_bytes
    wanted = whole - 2 * skipped[16] - skipped[4]
    assert traffic(plan, Case(37, 0, 0)).weight_bytes == round(wanted / 37)
    assert traffic(plan, Case(16, 0, 0)).weight_bytes == round(by_size[16].weight_bytes / 16)


def test_what_a_step_touches() -> None:
    plan = cached_plan()
    counted = ledger(plan)
    touched = working_set(plan, Case(0, 4, 6))
    assert touched == counted.weight_bytes + counted.state_bytes_rw // 2 + counted.kv_bytes_read(9)


def subject(plan: Plan, cache: int) -> Subject:
    return Subject("m", "CPU", 2, "host", "a CPU", cache, plan, plan.manifest.model_id, True, 1e-6, 1e-5, 4096)


def test_rates_and_spreads() -> None:
    samples = Samples("prefill", [10_000_000, 20_000_000, 40_000_000], [10_000_000] * 99 + [30_000_000])
    samples.read_bw, samples.weights_bw = [2e9, 4e9, 6e9], [50e9]
    row = make_row(subject(recurrent_plan(), 0), Case(0, 10, 5), samples)
    assert row["samples_ts"] == [1000, 500, 250]
    assert (row["avg_ts"], row["median_ts"]) == (pytest.approx(1750 / 3), 500)
    assert row["stddev_ts"] == pytest.approx(381.881, rel=1e-4)  # of a sample: n - 1
    assert (row["avg_ns"], row["stddev_ns"]) == (23_333_333, 15_275_252)
    assert (row["p50_ms"], row["p99_ms"]) == (10, pytest.approx(10.2))
    counted = row["bytes_per_token"]
    assert counted == sum(row[k] for k in ("weight_bytes", "state_bytes_rw", "kv_bytes_read", "activation_bytes"))
    assert (row["roof"], row["read_bw_gbs"]) == ("memory", 4)
    assert row["achieved_gbs"] == pytest.approx(counted * 500 / 1e9)
    assert row["roof_fraction"] == pytest.approx(counted * 500 / 4e9)
    assert row["bound_ts"] == pytest.approx(4e9 / counted)
    assert row["test"] == "tg10 @ d5" and row["depth_by"] == "prefill"


def test_what_fits_the_cache_has_the_caches_roof() -> None:
    samples = Samples("fresh", [1_000_000], [1_000_000], read_bw=[4e9], weights_bw=[50e9])
    row = make_row(subject(recurrent_plan(), 1 << 20), Case(0, 1, 0), samples)
    assert row["roof"] == "cache" and row["read_bw_gbs"] == 4
    assert row["roof_fraction"] == pytest.approx(row["bytes_per_token"] * 1000 / 50e9)
    assert row["stddev_ts"] == 0


@pytest.mark.parametrize(
    "recurrent, cached, found",
    [
        ({0: 10, 8: 10, 16: 10}, {0: 20, 8: 20, 16: 5}, Measured(11, "interpolated")),
        ({0: 10, 8: 10, 16: 10}, {0: 20, 8: 10, 16: 5}, Measured(8, "interpolated")),
        ({0: 10, 8: 10, 16: 10}, {0: 20, 8: 5, 16: 20}, Measured(None, "not reached")),
        ({4: 10, 8: 10}, {4: 9, 8: 8}, Measured(4, "at most")),
        ({4: 10, 8: 10}, {16: 9}, Measured(None, "not reached")),
    ],
)
def test_where_measured_rates_cross(recurrent: dict[int, float], cached: dict[int, float], found: Measured) -> None:
    """The first by hand: time per token 0.1 against 0.05 + 0.15 (d - 8) / 8, so d = 8 + 8 / 3."""
    assert measured_crossover(recurrent, cached) == found


def test_a_crossover_row() -> None:
    plans = {"a": recurrent_plan(), "b": cached_plan()}
    rates = {("a", 0): 10.0, ("a", 8): 10.0, ("b", 0): 20.0, ("b", 8): 5.0}
    rows = [
        {"test": f"tg4 @ d{d}", "model_filename": m, "n_gen": 4, "n_depth": d, "n_threads": 2, "median_ts": rate,
         "read_bw_gbs": 8.0} for (m, d), rate in rates.items()
    ]  # fmt: skip
    (row,) = crossover_rows(rows, plans)
    assert (row["test"], row["model_filename"], row["rival_filename"]) == ("crossover", "a", "b")
    assert (row["measured_depth"], row["measured_is"]) == (3, "interpolated")  # 0.05 / 0.15 of the way to 8
    a, b = ledger(plans["a"]), ledger(plans["b"])
    first = next((d for d in range(100) if a.bytes_per_token(d) <= b.bytes_per_token(d)), None)
    assert row["predicted_depth"] == first
    if first is not None:
        assert row["predicted_ts"] == pytest.approx(8e9 / a.bytes_per_token(first))
    assert crossover_rows([r for r in rows if r["model_filename"] == "a"], plans) == []


def test_the_crossover_of_two_models_with_caches() -> None:
    """A hybrid beside a model that reads twice the cache: it is the one that comes to be the faster."""
    hybrid = cached_plan()
    twice = [replace(graph, launches=graph.launches * 2) for graph in hybrid.graphs]
    plans = {"more": replace(hybrid, graphs=tuple(twice)), "less": hybrid}
    rows = [
        {"test": "tg4", "model_filename": m, "n_gen": 4, "n_depth": d, "n_threads": 2, "median_ts": 9.0,
         "read_bw_gbs": 8.0} for m in plans for d in (0, 8)
    ]  # fmt: skip
    (row,) = crossover_rows(rows, plans)
    assert (row["model_filename"], row["rival_filename"], row["predicted_depth"]) == ("less", "more", 0)


def test_short_tests_are_repeated_more() -> None:
    def after(n: int, ns: int, asked: int | None = None) -> bool:
        return enough([Samples(total_ns=[ns] * n), Samples(total_ns=[ns * 2] * n)], asked)

    assert not after(LEAST - 1, 10**9) and after(LEAST, 10**9)
    assert not after(LEAST, 10**6) and not after(MOST - 1, 10**6) and after(MOST, 10**6)
    assert not after(2, 10**9, asked=3) and after(3, 1, asked=3)
