"""A device profile: one TOML file in `profiles/`, or a path to one of the user's own.

Keys are checked: an unknown key, a missing key or a value of the wrong kind is refused by name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeseq.errors import DeviceError, UsageError

BACKENDS = ("opencl", "cuda")
FOLDER = Path(__file__).parent / "profiles"
AUTO = "auto"
MAX_BYTES = 1 << 16
CPU_NAME = r"[a-z0-9._-]+"


@dataclass(frozen=True)
class Gpu:
    """What a device's GPU is.

    backend:     "opencl" or "cuda".
    name:        as the vendor calls it.
    sm:          CUDA: compute capabilities to make code for (87 = 8.7); empty asks the local driver.
    threads:     most work-items of a work-group.
    local_bytes: shared (local) memory of a work-group.
    subgroup:    threads that run in lockstep; 0 is unknown, and nothing relies on it.
    half:        arithmetic on 16-bit floats.
    mma:         kernels for tensor cores; CUDA's targets know by themselves, and OpenCL's text computes what they do
                 step by step, which is for tests.
    memory_gb:   memory that the GPU can hold data in, 1e9 bytes; 0 is unknown.
    """

    backend: str
    name: str = ""
    sm: tuple[int, ...] = ()
    threads: int = 256
    local_bytes: int = 16384
    subgroup: int = 0
    half: bool = False
    mma: bool = False
    memory_gb: float = 0.0


@dataclass(frozen=True)
class Cores:
    """Cores of one kind that threads run on. cpu: LLVM's name; clock_ghz: the highest, 1e9 cycles per second."""

    cpu: str
    count: int
    clock_ghz: float


@dataclass(frozen=True)
class Profile:
    """What a device is.

    triple:             "aarch64-linux-gnu"; "auto" is this machine.
    cpu:                LLVM's name of the core ("cortex-a76"); "auto" is this machine's.
    features:           instruction sets the kernels may use beyond what `cpu` implies by default
                        ("neon", "dotprod", "avx512vnni"); a CPU that lacks one is refused when the bundle is loaded.
    cores:              cores to run on; 0 is all.
    pin:                core numbers to pin threads to; empty leaves it to the system.
    peak_bandwidth_gbs: memory bandwidth by the data sheet, 1e9 bytes per second; 0 is unknown.
    bandwidth_source:   where that number comes from.
    transport:          how to reach it: a file of `transports/`.
    transport_options:  what that transport wants to know.
    gpu:                kernels are made for this GPU instead of the CPU.
    clusters:           the `cores`, kind by kind; empty is unknown.
    clock_source:       where their clocks come from.
    """

    name: str
    description: str
    triple: str
    cpu: str
    features: tuple[str, ...] = ()
    cores: int = 0
    pin: tuple[int, ...] = ()
    peak_bandwidth_gbs: float = 0.0
    bandwidth_source: str = ""
    transport: str = "local"
    transport_options: tuple[tuple[str, str], ...] = ()
    gpu: Gpu | None = None
    clusters: tuple[Cores, ...] = ()
    clock_source: str = ""

    @property
    def arch(self) -> str:
        """First part of the triple."""
        return self.triple.partition("-")[0]

    def pool_options(self, threads: int | None = None) -> list[str]:
        """What tells the bundle's driver how many threads to run (None: as many as the profile says), and where."""
        wanted = threads or self.cores
        options = ["--threads", str(wanted)] if wanted else []
        return options + (["--cores", ",".join(map(str, self.pin))] if self.pin else [])


def profile_names() -> list[str]:
    """Names of the profiles that come with edgeseq."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_profile(name: str, others: Iterable[str] = ()) -> Profile:
    """The profile called `name`, or in the TOML file `name`.

    others: names that the caller knows beside the profiles, for the near matches. Raises UsageError for a name that
    nothing has, DeviceError for a malformed file.
    """
    if name in profile_names():
        return parse_profile(FOLDER / f"{name}.toml")
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"there is no device profile {name}", "give the path of a TOML file, or a profile's name")
        return parse_profile(path)
    raise unknown(name, "target or device", {*profile_names(), *others})


def unknown(name: str, what: str, known: Iterable[str]) -> UsageError:
    """The refusal of a name: near matches if there are any, else all that is known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return UsageError(f"there is no {what} called {name!r}", hint)


def parse_profile(path: Path) -> Profile:
    """Read and check one TOML file."""
    if path.stat().st_size > MAX_BYTES:
        raise DeviceError(f"{path} is larger than any device profile")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path} is not TOML: {error}") from None
    return _Parser(path, table).profile()


class _Parser:
    """Takes keys out of the table one by one; what is left is unknown."""

    def __init__(self, path: Path, table: dict[str, Any]) -> None:
        self.path = path
        self.table = table

    def profile(self) -> Profile:
        transport = self._take("transport", dict, {"kind": "local"})
        gpu = self._gpu(self._take("gpu", dict, {}))
        kind = transport.pop("kind", None)
        if not isinstance(kind, str) or any(not isinstance(value, str) for value in transport.values()):
            raise DeviceError(f"{self.path}: [transport] needs a 'kind', and all its values are strings")
        profile = Profile(
            name=self.path.stem,
            description=self._take("description", str),
            triple=self._matching("triple", r"auto|[a-z0-9_]+(-[a-z0-9_]+){1,3}"),
            cpu=self._matching("cpu", CPU_NAME),
            features=tuple(self._items("features", str)),
            cores=self._at_least("cores", int, 0),
            pin=tuple(self._items("pin", int)),
            peak_bandwidth_gbs=float(self._at_least("peak_bandwidth_gbs", (int, float), 0)),
            bandwidth_source=self._take("bandwidth_source", str, ""),
            transport=kind,
            transport_options=tuple(sorted(transport.items())),
            gpu=gpu,
            clusters=tuple(self._cores(one) for one in self._items("core", dict)),
            clock_source=self._take("clock_source", str, ""),
        )
        if self.table:
            raise DeviceError(
                f"{self.path} has the unknown key {min(self.table)!r}", "docs/adding-a-device.md lists the keys"
            )
        if profile.peak_bandwidth_gbs and not profile.bandwidth_source:
            raise DeviceError(f"{self.path} states a bandwidth without saying where it comes from (bandwidth_source)")
        self._check_clusters(profile)
        return profile

    def _cores(self, table: dict[str, Any]) -> Cores:
        """One table [[core]]."""
        sub = _Parser(self.path, table)
        cores = Cores(
            cpu=sub._matching("cpu", CPU_NAME),
            count=sub._at_least("count", int, 1),
            clock_ghz=float(sub._at_least("clock_ghz", (int, float), 0.01)),
        )
        if table:
            raise DeviceError(
                f"{self.path}: [[core]] has the unknown key {min(table)!r}", "docs/adding-a-device.md lists the keys"
            )
        return cores

    def _check_clusters(self, profile: Profile) -> None:
        if not profile.clusters:
            return
        if not profile.clock_source:
            raise DeviceError(f"{self.path} states clocks without saying where they come from (clock_source)")
        counted = sum(cores.count for cores in profile.clusters)
        if counted != profile.cores:
            raise DeviceError(f"{self.path}: the tables [[core]] count {counted} cores, `cores` is {profile.cores}")

    def _gpu(self, table: dict[str, Any]) -> Gpu | None:
        """The table [gpu], if there is one."""
        if not table:
            return None
        sub = _Parser(self.path, table)
        backend = sub._take("backend", str)
        if backend not in BACKENDS:
            raise DeviceError(f"{self.path}: [gpu] backend is {backend!r}", f"known: {', '.join(BACKENDS)}")
        gpu = Gpu(
            backend=backend,
            name=sub._take("name", str, ""),
            sm=tuple(sub._items("sm", int)),
            threads=sub._at_least("threads", int, 32) if "threads" in table else 256,
            local_bytes=sub._at_least("local_bytes", int, 8192) if "local_bytes" in table else 16384,
            subgroup=sub._at_least("subgroup", int, 0),
            half=sub._flag("half"),
            mma=sub._flag("mma"),
            memory_gb=float(sub._at_least("memory_gb", (int, float), 0)),
        )
        if gpu.subgroup & (gpu.subgroup - 1):
            raise DeviceError(f"{self.path}: [gpu] subgroup is {gpu.subgroup}, which is not a power of two")
        if table:
            raise DeviceError(
                f"{self.path}: [gpu] has the unknown key {min(table)!r}", "docs/adding-a-device.md lists the keys"
            )
        return gpu

    def _flag(self, key: str) -> bool:
        value = self.table.pop(key, False)
        if not isinstance(value, bool):
            raise DeviceError(f"{self.path}: {key} is {value!r}, expected true or false")
        return value

    def _take(self, key: str, kind: Any, default: Any = None) -> Any:
        value = self.table.pop(key, default)
        if value is None:
            raise DeviceError(f"{self.path} lacks the key {key!r}", "docs/adding-a-device.md lists the keys")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DeviceError(f"{self.path}: {key} is {value!r}, which is not of the right kind")
        return value

    def _matching(self, key: str, pattern: str) -> str:
        value: str = self._take(key, str)
        if not re.fullmatch(pattern, value):
            raise DeviceError(f"{self.path}: {key} is {value!r}, which does not look like one")
        return value

    def _items(self, key: str, kind: type) -> list[Any]:
        value: list[Any] = self._take(key, list, [])
        if any(not isinstance(item, kind) or isinstance(item, bool) for item in value):
            raise DeviceError(f"{self.path}: {key} holds something that is not of the right kind: {value!r}")
        if any(item < 0 for item in value if isinstance(item, int)):
            raise DeviceError(f"{self.path}: {key} holds a negative number: {value!r}")
        return value

    def _at_least(self, key: str, kind: Any, low: float) -> Any:
        value = self._take(key, kind, low)
        if not value >= low:
            raise DeviceError(f"{self.path}: {key} is {value!r}, expected at least {low}")
        return value
