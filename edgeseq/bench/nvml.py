"""What an NVIDIA GPU's management library tells: energy, clock, temperature. What cannot be read is None.

Through ctypes rather than in the C runtime: only measuring needs it, and a runtime on a device should open no library
that it can do without. Standard library alone, so that `tests/gpu/run` can use it.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_uint, c_ulonglong, c_void_p

LIBRARY = "libnvidia-ml.so.1"
_CELSIUS, _SM_CLOCK, _MEMORY_CLOCK = 0, 1, 2


class GpuMeter:
    """One GPU. Its numbers count all processes on it, so a measurement wants the GPU for itself."""

    def __init__(self, index: int | None = None, library: str = LIBRARY) -> None:
        """index: NVML's, which orders by PCI address (CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID); None: the one that
        the runtime takes, see `device_index`."""
        self._lib: ctypes.CDLL | None = None
        self._device = c_void_p()
        try:
            lib = ctypes.CDLL(library)
            if lib.nvmlInit_v2() != 0:
                return
            chosen = device_index() if index is None else index
            if lib.nvmlDeviceGetHandleByIndex_v2(c_uint(chosen), byref(self._device)) == 0:
                self._lib = lib
        except (OSError, AttributeError):
            return
        self._last = self._energy()

    def joules(self) -> float | None:
        """Energy of the GPU since the last call, or since the meter was made."""
        before, self._last = getattr(self, "_last", None), self._energy()
        if before is None or self._last is None or self._last < before:
            return None
        return (self._last - before) / 1e3

    def temperature_c(self) -> float | None:
        return self._number("nvmlDeviceGetTemperature", _CELSIUS)

    def clock_mhz(self) -> float | None:
        """Of the multiprocessors, now."""
        return self._number("nvmlDeviceGetClockInfo", _SM_CLOCK)

    def memory_clock_mhz(self) -> float | None:
        return self._number("nvmlDeviceGetClockInfo", _MEMORY_CLOCK)

    def _energy(self) -> int | None:
        """Millijoules since the driver was loaded."""
        value = c_ulonglong()
        try:
            if self._lib is None or self._lib.nvmlDeviceGetTotalEnergyConsumption(self._device, byref(value)) != 0:
                return None
        except AttributeError:
            return None
        return value.value

    def _number(self, function: str, what: int) -> float | None:
        value = c_uint()
        try:
            if self._lib is None or getattr(self._lib, function)(self._device, c_uint(what), byref(value)) != 0:
                return None
        except AttributeError:
            return None
        return float(value.value)


def device_index() -> int:
    """NVML's index of the GPU that the runtime takes: EDGESEQ_CUDA_DEVICE among CUDA_VISIBLE_DEVICES."""
    chosen = os.environ.get("EDGESEQ_CUDA_DEVICE", "")
    index = int(chosen) if chosen.isdecimal() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if index < len(visible) and visible[index].strip().isdecimal():
        return int(visible[index])
    return index
