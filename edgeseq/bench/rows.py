"""A row: one test of one contender as one JSON object, under llama-bench's field names with ours beside them.

docs/performance.md says what each field means.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from edgeseq import __version__
from edgeseq.bench.cases import Case
from edgeseq.bench.measure import Samples
from edgeseq.bench.traffic import traffic, working_set
from edgeseq.bundle.plan import Plan
from edgeseq.spec import Manifest

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """Who was measured, and where.

    model_id: names weights and state layout, so that only what computes the same is compared.
    verified: True after a check against the golden passed, None where there was nothing to check against.
    worst, tolerance: of the stage of that check that came nearest to its bound.
    peak_rss_bytes: of a process that ran the bundle's driver alone; None for a rival.
    cache_bytes: of the device's last data cache, 0 where it is not known.
    gpu: the GPU that a bundle runs on, in a line; empty on the CPU.
    columns: what a rival says of itself in llama-bench's columns.
    """

    name: str
    backend: str
    threads: int
    device: str
    cpu: str
    cache_bytes: int
    plan: Plan | None
    model_id: str
    verified: bool | None
    worst: float | None = None
    tolerance: float | None = None
    peak_rss_bytes: int | None = None
    load_average: float | None = None
    gpu: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def make_row(subject: Subject, case: Case, samples: Samples) -> Row:
    """The row of one test. Rates are tokens per second, times milliseconds or nanoseconds as their names say."""
    rates = [case.tokens * 1e9 / ns for ns in samples.total_ns]
    return {
        "test": case.name,
        **_model(subject),
        **subject.columns,
        "n_threads": subject.threads,
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.n_depth,
        "test_time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(fmean(samples.total_ns)),
        "stddev_ns": round(_spread(samples.total_ns)),
        "avg_ts": fmean(rates),
        "stddev_ts": _spread(rates),
        "samples_ns": samples.total_ns,
        "samples_ts": rates,
        "median_ts": median(rates),
        "depth_by": samples.placed,
        "ttft_ms": median(samples.first_token_ns) / 1e6 if samples.first_token_ns else None,
        "p50_ms": _percentile(samples.token_ns, 50),
        "p99_ms": _percentile(samples.token_ns, 99),
        **_bytes(subject, case, samples, median(rates)),
        "joules_per_token": median(samples.joules) / case.tokens if samples.joules else None,
        "clock_mhz": samples.clock_mhz,
        "temperature_c": samples.temperature_c,
        "load_avg": subject.load_average,
        "peak_rss_bytes": subject.peak_rss_bytes,
        "verified": subject.verified,
        "verified_worst": subject.worst,
        "verified_tolerance": subject.tolerance,
    }


def _model(subject: Subject) -> Row:
    """llama-bench's columns about the build, the machine and the model. On a GPU all layers are, which it calls 99."""
    plan = subject.plan
    chunk = max((g.tokens for g in plan.graphs), default=1) if plan else None
    kind = plan.manifest.dtype if plan else None
    return {
        "build_commit": f"edgeseq {__version__}",
        "build_number": 0,
        "cpu_info": subject.cpu,
        "gpu_info": subject.gpu,
        "backends": subject.backend,
        "device": subject.device,
        "model_filename": subject.name,
        "model_id": subject.model_id,
        "model_type": model_type(plan.manifest, storage(plan.manifest)) if plan else subject.backend,
        "model_size": sum(t.nbytes for t in plan.tensors) if plan else None,
        "model_n_params": plan.manifest.params if plan else None,
        "n_batch": chunk,
        "n_ubatch": chunk,
        "type_k": kind,
        "type_v": kind,
        "n_gpu_layers": 99 if subject.gpu else 0,
        "use_mmap": plan is not None,
    }


def model_type(manifest: Manifest, stored: str) -> str:
    """A model in a few words."""
    return f"{manifest.source} {manifest.family} {stored}"


def storage(manifest: Manifest) -> str:
    """How the matrices are stored."""
    return manifest.dtype if manifest.quant == "none" else manifest.quant


def _bytes(subject: Subject, case: Case, samples: Samples, rate: float) -> Row:
    """The ledger, the measured roof, and how near the one came to the other. None for a rival."""
    roof = median(samples.read_bw) if samples.read_bw else None
    inner = median(samples.weights_bw) if samples.weights_bw else None
    if subject.plan is None:
        names = ("bytes_per_token", "weight_bytes", "state_bytes_rw", "kv_bytes_read", "activation_bytes")
        more = ("read_bw_gbs", "weights_bw_gbs", "roof", "achieved_gbs", "weights_gbs", "roof_fraction", "bound_ts")
        return dict.fromkeys((*names, *more, "state_bytes"))
    counted = traffic(subject.plan, case)
    cached = inner is not None and working_set(subject.plan, case) <= subject.cache_bytes
    bound = inner if cached else roof
    return {
        "bytes_per_token": counted.bytes_per_token,
        **asdict(counted),
        "read_bw_gbs": roof and roof / 1e9,
        "weights_bw_gbs": inner and inner / 1e9,
        "roof": "cache" if cached else "memory",
        "achieved_gbs": counted.bytes_per_token * rate / 1e9,
        "weights_gbs": counted.weight_bytes * rate / 1e9,
        "roof_fraction": counted.bytes_per_token * rate / bound if bound else None,
        "bound_ts": bound / counted.bytes_per_token if bound else None,
        "state_bytes": subject.plan.state_bytes,
    }


def _spread(values: Sequence[float]) -> float:
    """Sample standard deviation, 0 for a single value, as llama-bench has it."""
    return stdev(values) if len(values) > 1 else 0.0


def _percentile(ns: Sequence[int], percent: float) -> float | None:
    return float(np.percentile(ns, percent)) / 1e6 if ns else None
