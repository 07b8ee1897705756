"""Facts of a machine are read from files that may say anything or be absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeseq.bench import machine


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "SYS", tmp_path / "sys")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_nothing_readable(tree: Path) -> None:
    assert machine.cache_bytes() == machine.DEFAULT_CACHE
    assert machine.clock_mhz() is None and machine.temperature_c() is None
    assert machine.EnergyMeter().joules() is None
    assert machine.cpu_name()


def test_the_largest_data_cache(tree: Path) -> None:
    for i, (size, kind) in enumerate([("48K", "Data"), ("64M", "Instruction"), ("2M", "Unified"), ("junk", "Unified")]):
        put(tree / f"sys/devices/system/cpu/cpu0/cache/index{i}/size", size + "\n")
        put(tree / f"sys/devices/system/cpu/cpu0/cache/index{i}/type", kind + "\n")
    assert machine.cache_bytes() == 2 << 20


def test_clock_and_temperature(tree: Path) -> None:
    put(tree / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "2000000\n")
    put(tree / "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", "1000000\n")
    put(tree / "sys/class/thermal/thermal_zone0/temp", "41000\n")
    put(tree / "sys/class/thermal/thermal_zone1/temp", "broken\n")
    assert machine.clock_mhz() == 1500 and machine.temperature_c() == 41


def test_energy_counts_packages_and_survives_a_wrap(tree: Path) -> None:
    zone = tree / "sys/class/powercap/intel-rapl:0"
    put(zone / "energy_uj", "9000000")
    put(zone / "max_energy_range_uj", "10000000")
    put(tree / "sys/class/powercap/intel-rapl:0:1/energy_uj", "5")  # a part of the package, counted with it
    meter = machine.EnergyMeter()
    (zone / "energy_uj").write_text("9500000")
    assert meter.joules() == pytest.approx(0.5)
    (zone / "energy_uj").write_text("1500000")
    assert meter.joules() == pytest.approx(2.0)
    (zone / "energy_uj").unlink()
    assert meter.joules() is None


def test_the_buffer_outgrows_the_cache_and_leaves_memory(tree: Path) -> None:
    put(tree / "proc/meminfo", "MemTotal: 999 kB\nMemAvailable:    8192 kB\n")
    buffer = machine.read_buffer(1 << 20)
    assert buffer.nbytes == 2 << 20 and buffer.all()


def test_names_of_machines(tree: Path) -> None:
    put(tree / "proc/cpuinfo", "processor : 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert machine.cpu_name() == "Some CPU @ 2 GHz"
    put(tree / "proc/cpuinfo", "processor : 0\nBogoMIPS: 1\n")
    put(tree / "proc/device-tree/model", "Some Board 5\0")
    assert machine.cpu_name() == "Some Board 5"
