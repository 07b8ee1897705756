"""Targets: what code is made for. One file per instruction-set family, found by the first part of a triple.

A device profile names a triple, a core and features; the file `targets/<arch>.py` turns them into a Target.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from devices.profile import load_profile
from edgeseq.errors import CompileError

if TYPE_CHECKING:
    from devices.profile import Gpu, Profile


@dataclass(frozen=True)
class Dot:
    """How a CPU multiplies bytes. name: see kernels/linear_q; signed: 8-bit weights are stored as s8."""

    name: str
    signed: bool
    tile: tuple[int, int]

    def zero(self, bits: int) -> int:
        """The zero point of the stored codes."""
        return 0 if bits == 8 and self.signed else 1 << (bits - 1)


@dataclass(frozen=True)
class Target:
    """What the compiler and the linker need to know.

    llvm:      TVM's target dictionary.
    shared:    zig triple of libmodel.so; static: zig triple of the self-contained device driver.
    features:  instruction sets the kernels use; the runtime refuses a CPU that lacks one.
    gemm_tile: (tokens, groups of 16 rows) whose accumulators fit the vector registers.
    dot:       the byte product and its tile.
    streams:   groups of 16 rows that a GEMV reads in turns: a core that prefetches each stream on its own reads several
               faster than one. ahead: they are asked for before they are needed.
    chains:    sums of 16 rows that a GEMV of floats keeps, which hide the latency of multiply-add.
    gpu:       kernels are for this GPU; `llvm` is None then, and the rest describes the CPU that drives it.
    platform:  "android" where code has to keep to its rules; else empty.
    cores:     threads to run unless the caller says another number; 0 is one per core. pin: cores to pin them to.
    bandwidth: what the device's memory moves by its data sheet, 1e9 bytes per second (0 is unknown), and who says so.
    """

    name: str
    llvm: dict[str, Any] | None = field(hash=False)
    shared: str
    static: str
    features: tuple[str, ...]
    gemm_tile: tuple[int, int]
    dot: Dot
    streams: int = 1
    ahead: bool = False
    chains: int = 8
    gpu: Gpu | None = None
    platform: str = ""
    cores: int = 0
    pin: tuple[int, ...] = ()
    bandwidth: tuple[float, str] = (0.0, "")

    @property
    def backend(self) -> Literal["cpu", "opencl", "cuda"]:
        """What runs the kernels."""
        return self.gpu.backend if self.gpu else "cpu"  # type: ignore[return-value]

    def facts(self) -> dict[str, Any]:
        """For the bundle's metadata."""
        facts: dict[str, Any] = {"name": self.name, "triple": self.shared, "features": list(self.features)}
        if self.llvm:
            facts["cpu"] = self.llvm["mcpu"]
        if self.gpu:
            facts["gpu"] = {k: v for k, v in asdict(self.gpu).items() if v}
        if self.platform:
            facts["platform"] = self.platform
        if self.cores:
            facts["cores"] = self.cores
        if self.pin:
            facts["pin"] = list(self.pin)
        if self.bandwidth[0]:
            facts["peak_bandwidth_gbs"], facts["bandwidth_source"] = self.bandwidth
        return facts


def families() -> list[str]:
    """Instruction-set families that have a file here."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "gpu")


def resolve(name: str) -> Target:
    """The target called `name`: `host`, a device profile, or a profile file. Raises UsageError, CompileError."""
    from . import gpu

    profile = load_profile(name)
    arch = _host_arch() if profile.triple == "auto" else profile.arch
    if arch not in families():
        raise CompileError(f"{name}: no code generator for {arch}", f"known: {', '.join(families())}")
    target: Target = importlib.import_module(f"{__name__}.{arch}").make(profile)
    platform = "android" if profile.triple.endswith("-android") else ""
    bandwidth = (profile.peak_bandwidth_gbs, profile.bandwidth_source)
    target = replace(target, platform=platform, cores=profile.cores, pin=profile.pin, bandwidth=bandwidth)
    return gpu.make(profile, target) if profile.gpu else target


def _host_arch() -> str:
    import platform

    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def cpu_of(profile: Profile) -> str:
    """LLVM's name of the profile's core."""
    from ..tvm_api import get_global_func

    return str(get_global_func("target.llvm_get_system_cpu")()) if profile.cpu == "auto" else profile.cpu


def llvm_features(llvm: dict[str, Any]) -> set[str]:
    """What LLVM will use for this target. Raises CompileError for a core LLVM does not know."""
    from ..tvm_api import TvmTarget, get_global_func

    known = get_global_func("target.llvm_get_cpu_archlist")(TvmTarget({k: v for k, v in llvm.items() if k != "mcpu"}))
    if llvm["mcpu"] not in set(map(str, known)):
        raise CompileError(f"LLVM does not know the core '{llvm['mcpu']}'", "use a name from `llc -mcpu=help`")
    return set(map(str, get_global_func("target.llvm_get_cpu_features")(TvmTarget(llvm))))
