"""The same rows from the bundle's own driver, run on a device: it times itself and prints its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devices.profile import Profile
from devices.transports import Transport, open_transport
from edgeseq.bench.cases import Case
from edgeseq.bench.machine import MIB
from edgeseq.bench.measure import Progress, Samples
from edgeseq.bundle.plan import Plan
from edgeseq.bundle.reader import BundleFile
from edgeseq.errors import DeviceError

TIMEOUT = 3600.0
BUFFER = 256 * MIB


@dataclass
class OnDevice:
    """A bundle on a device, and what its driver said."""

    bundle: Path
    plan: Plan
    handle: str
    threads: int = 0
    peak_rss_bytes: int = 0
    samples: dict[Case, Samples] = field(default_factory=dict)


def measure_on_device(
    bundles: Sequence[Path],
    cases: Sequence[Case],
    repetitions: int,
    profile: Profile,
    threads: int | None,
    progress: Progress,
    buffer: int = BUFFER,
) -> list[OnDevice]:
    """Run the tests on the device. Several bundles take turns, one repetition each; a single one runs them at once."""
    rounds = repetitions if len(bundles) > 1 else 1
    each = repetitions if rounds == 1 else 1
    with open_transport(profile) as transport:
        found = [OnDevice(path, _plan(path), transport.push(path)) for path in bundles]
        for i in range(rounds):
            for subject in found:
                progress(profile.name, i, rounds)
                for case_set in _calls(cases):
                    _run(transport, subject, case_set, each, profile.pool_options(threads), buffer)
        for subject in found:
            subject.peak_rss_bytes = _peak_rss(transport, subject, profile.pool_options(threads))
        progress(profile.name, rounds, rounds)
    return found


def peak_rss_bytes(bundle: Path, profile: Profile, threads: int | None) -> int:
    """Peak resident bytes of a process that reads one full chunk and makes two tokens with one stream."""
    with open_transport(profile) as transport:
        subject = OnDevice(bundle, _plan(bundle), transport.push(bundle))
        return _peak_rss(transport, subject, profile.pool_options(threads))


def _peak_rss(transport: Transport, subject: OnDevice, options: list[str]) -> int:
    """The driver's bench keeps a second stream, so this asks its run."""
    context, longest = subject.plan.manifest.context, max(g.tokens for g in subject.plan.graphs)
    read = min(longest, max(1, context - 2)) if context else longest
    made = min(2, context - read) if context else 2
    ids = ",".join(["0"] * read)
    said = transport.driver(subject.handle, "run", "--tokens", ids, "-n", str(made), *options, timeout=TIMEOUT).stdout
    return int(_object(said, transport.profile.name, "peak_rss_bytes")["peak_rss_bytes"])


def _plan(bundle: Path) -> Plan:
    with BundleFile(bundle, check_weights=False) as file:
        return file.plan


def _calls(cases: Sequence[Case]) -> list[list[Case]]:
    """One call of the driver runs every -p and every -n at every -d: group by depth so that it runs what is asked."""
    depths = sorted({c.n_depth for c in cases})
    by_depth = {d: [c for c in cases if c.n_depth == d] for d in depths}
    same = {tuple((c.n_prompt, c.n_gen) for c in group) for group in by_depth.values()}
    return [list(cases)] if len(same) == 1 else list(by_depth.values())


def _run(
    transport: Transport, subject: OnDevice, cases: Sequence[Case], repetitions: int, options: list[str], buffer: int
) -> None:
    arguments = ["bench", "-r", str(repetitions), "--bytes", str(buffer)]
    lists = {
        "-p": sorted({c.n_prompt for c in cases if c.n_prompt}),
        "-n": sorted({c.n_gen for c in cases if c.n_gen}),
        "-d": sorted({c.n_depth for c in cases}),
    }
    for name, values in lists.items():
        if values:
            arguments += [name, ",".join(map(str, values))]
    done = transport.driver(subject.handle, *arguments, *options, timeout=TIMEOUT)
    rate = 0.0
    for line in done.stdout.splitlines():
        said = _object(line, transport.profile.name)
        try:
            if said["test"] == "machine":
                subject.threads, rate = int(said["n_threads"]), float(said["read_bw"])
            elif said["test"] != "memory":
                _add(subject, said)
        except (KeyError, TypeError, ValueError):
            raise _nonsense(line, transport.profile.name) from None
    for case in cases:
        if case not in subject.samples:
            raise DeviceError(f"the driver on {transport.profile.name} did not measure {case.name}")
        subject.samples[case].read_bw.append(rate)


def _object(line: str, device: str, key: str = "test") -> dict[str, Any]:
    """One JSON object of the driver, which has `key`."""
    try:
        said = json.loads(line)
        if key not in said:
            raise ValueError
    except (ValueError, TypeError):
        raise _nonsense(line, device) from None
    found: dict[str, Any] = said
    return found


def _nonsense(line: str, device: str) -> DeviceError:
    return DeviceError(f"the driver on {device} said something that is no measurement: {line[:80]!r}")


def _add(subject: OnDevice, said: dict[str, Any]) -> None:
    case = Case(int(said["n_prompt"]), int(said["n_gen"]), int(said["n_depth"]))
    record = subject.samples.setdefault(case, Samples(placed="prefill" if case.n_depth else "fresh"))
    record.total_ns += [int(ns) for ns in said["samples_ns"]]
    record.token_ns += [int(ns) for ns in said.get("token_ns", ())]
    if case.n_prompt:
        record.first_token_ns = list(record.total_ns)
