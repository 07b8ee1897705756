"""The GPU's meter on a management library made for the test."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgeseq.bench.nvml import GpuMeter, device_index

SOURCE = """
static unsigned long long used = 5000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &used; return index == 1 ? 0 : 2; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj)
{ *mj = *(unsigned long long *)device += 1500; return 0; }
int nvmlDeviceGetClockInfo(void *device, unsigned kind, unsigned *mhz)
{ (void)device; *mhz = kind == 1 ? 1980 : 3201; return 0; }
int nvmlDeviceGetTemperature(void *device, unsigned kind, unsigned *c) { (void)device; (void)kind; (void)c; return 3; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE)
    out = folder / "libnvml.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(out), str(folder / "nvml.c")], check=True)
    return out


def test_energy_is_counted_between_calls(library: Path) -> None:
    meter = GpuMeter(1, str(library))
    assert meter.joules() == 1.5 and meter.joules() == 1.5
    assert meter.clock_mhz() == 1980 and meter.memory_clock_mhz() == 3201
    assert meter.temperature_c() is None  # the driver refuses


@pytest.mark.parametrize(("index", "name"), [(0, ""), (1, "libnothing.so.7"), (1, "libc.so.6")])
def test_without_a_gpu_or_its_library_nothing_is_known(library: Path, index: int, name: str) -> None:
    meter = GpuMeter(index, name or str(library))
    assert meter.joules() is None and meter.clock_mhz() is None and meter.temperature_c() is None


@pytest.mark.parametrize(("chosen", "visible", "index"), [
    ("", "", 0), ("2", "", 2), ("", "3,1", 3), ("1", "3,1", 1), ("0", "GPU-5ae7", 0), ("x", "", 0),
])  # fmt: skip
def test_the_runtime_s_gpu_is_metered(monkeypatch: pytest.MonkeyPatch, chosen: str, visible: str, index: int) -> None:
    monkeypatch.setenv("EDGESEQ_CUDA_DEVICE", chosen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_index() == index
