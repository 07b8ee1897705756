"""`bench`: verify, measure, count, compare.

| stage | function | file |
|---|---|---|
| tests | make_cases, check_context | cases.py |
| verify | runtime_stages, device_stages | edgeseq/verify |
| contenders | BundleEngine, open_rivals | engines.py, against.py |
| time | measure; measure_on_device | measure.py; device.py |
| count | traffic | traffic.py |
| rows | make_row | rows.py |
| compare | crossover_rows, ratio_rows | crossover.py, against.py |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from devices.profile import Profile, load_profile
from devices.transports import open_transport
from edgeseq.bench import machine
from edgeseq.bench.against import open_rivals, program_of, ratio_rows
from edgeseq.bench.cases import Case, check_context, make_cases
from edgeseq.bench.crossover import crossover_rows
from edgeseq.bench.device import measure_on_device, peak_rss_bytes
from edgeseq.bench.engines import BACKENDS, BundleEngine, Engine, Rival
from edgeseq.bench.measure import LEAST, Progress, measure
from edgeseq.bench.profiling import profile_rows
from edgeseq.bench.rows import Row, Subject, make_row
from edgeseq.bundle.directory import require_bundle
from edgeseq.bundle.plan import Plan
from edgeseq.bundle.reader import BundleFile
from edgeseq.errors import EdgeseqError, UsageError
from edgeseq.manifest import load_manifest
from edgeseq.verify.report import Report, Stage


@dataclass(frozen=True)
class Request:
    """What to measure.

    prompts, generate, depths, context: see cases.make_cases.
    threads:     pools to open, () = one with a thread per core.
    repetitions: None repeats short tests more often, see measure.enough.
    device:      a profile's name, None for this machine through the binding.
    against:     rivals; they find the weights in `export`, or in the file `gguf`, which the program `llama_bench` runs
                 (None: the one on PATH).
    profile:     also time every launch of a step, here.
    """

    bundles: tuple[Path, ...]
    prompts: tuple[int, ...] | None = None
    generate: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    context: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    repetitions: int | None = None
    device: str | None = None
    against: tuple[str, ...] = ()
    export: Path | None = None
    gguf: Path | None = None
    llama_bench: Path | None = None
    profile: bool = False

    def cases(self) -> list[Case]:
        return make_cases(self.prompts, self.generate, self.depths, self.context)


@dataclass
class Result:
    """rows: one object per test and contender, then ratios and crossovers. reports: the checks made before timing."""

    rows: list[Row] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)

    @property
    def tests(self) -> list[Row]:
        return [row for row in self.rows if "median_ts" in row]


def bench(request: Request, progress: Callable[..., None] | None = None) -> Result:
    """Measure. Nothing is timed that does not agree with its golden first.

    Raises UsageError for a request that cannot work (before anything runs), EdgeseqError when a check fails.
    """
    report: Progress = progress or (lambda what, done, total: None)
    cases = request.cases()
    profile = load_profile(request.device) if request.device is not None else None
    result = Result(plans=_plans(request, cases))
    if profile is None:
        _here(request, cases, result, report)
    else:
        _on_device(request, profile, cases, result, report)
    result.rows += ratio_rows(result.tests)
    if request.context:
        result.rows += crossover_rows(result.tests, result.plans)
    return result


def _plans(request: Request, cases: Sequence[Case]) -> dict[str, Plan]:
    """Open everything that was named, and refuse what cannot be measured, before anything is timed."""
    program_of(request.against, request.export, request.gguf, request.llama_bench)
    if request.against and request.device is not None:
        raise UsageError("--against runs here, --device elsewhere", "give one of them")
    if request.device is not None and len(request.threads) > 1:
        raise UsageError("on a device one number of threads is measured at a time", "give -t one number")
    if request.device is not None and request.profile:
        raise UsageError("--profile times the launches of this machine", "leave out --device")
    plans: dict[str, Plan] = {}
    for path in request.bundles:
        if str(path) in plans:
            raise UsageError(f"{path} was given twice", "name each bundle once")
        with BundleFile(require_bundle(path), check_weights=False) as file:
            plans[str(path)] = file.plan
        check_context(cases, str(path), file.plan.manifest.context)
        if len(request.threads) > 1 and file.plan.backend != "cpu":
            raise UsageError(f"{path} runs on a GPU, where threads do not apply", "leave out -t")
    if request.export is not None:
        manifest = load_manifest(request.export)
        if manifest.model_id not in {plan.manifest.model_id for plan in plans.values()}:
            raise UsageError(
                f"{request.export} is the export of none of these bundles", "give the one they were made of"
            )
    return plans


def _here(request: Request, cases: Sequence[Case], result: Result, progress: Progress) -> None:
    progress("verify", 0, len(request.bundles))
    for i, path in enumerate(request.bundles):
        result.reports.append(_verified(path, result.plans[str(path)], None))
        progress("verify", i + 1, len(request.bundles))
    cache, load_average = machine.cache_bytes(), machine.load_average()
    buffer = machine.read_buffer(cache)
    with _engines(request, list(result.plans.values())) as engines:
        subjects = {
            id(e): _subject(e, result, cache, load_average, memory_of(e) if isinstance(e, BundleEngine) else None)
            for e in engines
        }
        for case, engine, samples in measure(engines, cases, request.repetitions, buffer, progress):
            result.rows.append(make_row(subjects[id(engine)], case, samples))
        for engine in engines:
            if request.profile and isinstance(engine, BundleEngine):
                result.rows += profile_rows(engine)


@contextmanager
def _engines(request: Request, plans: Sequence[Plan]) -> Iterator[list[Engine]]:
    """Bundles, then rivals, for each number of threads."""
    program = program_of(request.against, request.export, request.gguf, request.llama_bench)
    with ExitStack() as stack:
        engines: list[Engine] = []
        for threads in request.threads or (None,):
            for path in request.bundles:
                engines.append(BundleEngine(path, threads))
                stack.callback(engines[-1].close)
            engines += open_rivals(request.against, request.export, program, plans, engines[-1].threads)
        yield engines


def _subject(engine: Engine, result: Result, cache: int, load_average: float | None, peak_rss: int | None) -> Subject:
    if isinstance(engine, Rival):
        report = Report(engine.name, engine.backend, engine.source, engine.model_id, "", tuple(engine.verified()))
        result.reports.append(_passed(report))
    else:
        report = next(r for r in result.reports if r.path == engine.name)
    cache = 0 if engine.gpu else cache
    return _with_check(report, engine.name, engine.backend, engine.threads, "host", machine.cpu_name(), cache,
                       engine.plan, peak_rss, load_average, engine.gpu,
                       engine.columns if isinstance(engine, Rival) else {})  # fmt: skip


def _with_check(
    report: Report, name: str, backend: str, threads: int, device: str, cpu: str, cache: int, plan: Plan | None,
    peak_rss: int | None, load_average: float | None, gpu: str = "", columns: Mapping[str, Any] = MappingProxyType({}),
) -> Subject:  # fmt: skip
    worst = report.worst
    return Subject(
        name, backend, threads, device, cpu, cache, plan, report.model_id, report.ok if report.stages else None,
        worst.worst if worst else None, worst.tolerance if worst else None, peak_rss, load_average, gpu, columns,
    )  # fmt: skip


def _verified(path: Path, plan: Plan, device: Profile | None) -> Report:
    """Checksum and every form against the golden, here or on the device. A bundle without a golden has no stages."""
    from edgeseq.verify.device import device_stages
    from edgeseq.verify.golden import FILE
    from edgeseq.verify.runtime import runtime_stages

    stages: Sequence[Stage] = ()
    if (path / FILE).is_file():
        stages = runtime_stages(path, thorough=False) if device is None else device_stages(path, device)
    manifest = plan.manifest
    name = device.name if device else ""
    return _passed(Report(str(path), "bundle", manifest.source, manifest.model_id, name, tuple(stages)))


def _passed(report: Report) -> Report:
    """The report, if it is good: what computes something else is not timed."""
    for stage in report.stages:
        if not stage.ok:
            detail = stage.note or f"differs by {stage.worst:.3g} at {stage.where}, {stage.tolerance:.3g} is allowed"
            raise EdgeseqError(
                f"{report.path} is not timed, because it fails a check: {stage.name}: {detail}",
                "'edgeseq verify' shows all stages",
            )
    return report


def memory_of(engine: BundleEngine) -> int | None:
    """Peak resident bytes of a process of its own that runs the bundle's driver; None where that cannot run."""
    try:
        return peak_rss_bytes(engine.bundle, load_profile("host"), engine.threads)
    except (EdgeseqError, ValueError):
        return None


def _on_device(request: Request, profile: Profile, cases: Sequence[Case], result: Result, progress: Progress) -> None:
    with open_transport(profile):  # a device that is out of reach is refused before anything else
        pass
    for path in request.bundles:
        result.reports.append(_verified(path, result.plans[str(path)], profile))
    threads = request.threads[0] if request.threads else None
    found = measure_on_device(request.bundles, cases, request.repetitions or LEAST, profile, threads, progress)
    for case in cases:
        for on, report in zip(found, result.reports, strict=True):
            gpu = "" if on.plan.backend == "cpu" else profile.description
            subject = _with_check(report, str(on.bundle), BACKENDS[on.plan.backend], on.threads, profile.name,
                                  profile.description, 0, on.plan, on.peak_rss_bytes, None, gpu)  # fmt: skip
            result.rows.append(make_row(subject, case, on.samples[case]))
