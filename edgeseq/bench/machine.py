"""Facts about this machine: what it is, its cache, its clock, its energy counter. What cannot be read is None."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import numpy as np

from edgeseq.verify.report import Array

SYS = Path("/sys")
PROC = Path("/proc")
MIB = 1 << 20
DEFAULT_CACHE = 32 * MIB
LEAST_BUFFER = 256 * MIB


def cpu_name() -> str:
    """The CPU by its own name, or the board's, or the architecture."""
    for path, pattern in (
        (PROC / "cpuinfo", r"^(?:model name|Model)\s*:\s*(.+)$"),
        (PROC / "device-tree/model", r"^(.+)$"),
    ):
        found = re.search(pattern, _text(path), re.MULTILINE)
        if found:
            return found[1].strip("\0 ")
    return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """The largest data cache; 32 MiB where the system does not say."""
    sizes = [0]
    for index in SYS.glob("devices/system/cpu/cpu0/cache/index*"):
        found = re.fullmatch(r"(\d+)([KMG]?)", _text(index / "size").strip())
        if found and _text(index / "type").strip() != "Instruction":
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes) or DEFAULT_CACHE


def read_buffer(cache: int) -> Array:
    """Memory well larger than the cache, every page of it touched, at most a quarter of what is free."""
    free = re.search(r"MemAvailable:\s*(\d+) kB", _text(PROC / "meminfo"))
    limit = int(free[1]) * 1024 // 4 if free else LEAST_BUFFER
    return np.ones(max(MIB, min(max(LEAST_BUFFER, 4 * cache), limit)), np.uint8)


def load_average() -> float | None:
    """Processes that wanted to run in the last minute: figures taken beside others are worth less."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def clock_mhz() -> float | None:
    """Mean clock of the cores now."""
    clocks = [_number(p) for p in SYS.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    known = [c for c in clocks if c is not None]
    return round(sum(known) / len(known) / 1000, 1) if known else None


def temperature_c() -> float | None:
    """The hottest thermal zone now."""
    known = [t for p in SYS.glob("class/thermal/thermal_zone*/temp") if (t := _number(p)) is not None]
    return max(known) / 1000 if known else None


class EnergyMeter:
    """Joules used by the processor packages (Intel's and AMD's RAPL) since the last call of `joules`."""

    def __init__(self) -> None:
        zones = sorted(SYS.glob("class/powercap/*/energy_uj"))
        self._zones = [z for z in zones if z.parent.name.count(":") == 1]
        self._last = [_number(z) for z in self._zones]

    def joules(self) -> float | None:
        before, self._last = self._last, [_number(z) for z in self._zones]
        total = 0.0
        for zone, old, new in zip(self._zones, before, self._last, strict=True):
            if old is None or new is None:
                return None
            total += new - old if new >= old else new - old + (_number(zone.parent / "max_energy_range_uj") or 0)
        return total / 1e6 if self._zones else None

    def clock_mhz(self) -> float | None:
        return clock_mhz()

    def temperature_c(self) -> float | None:
        return temperature_c()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
