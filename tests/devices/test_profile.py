"""Profiles: those that ship are sound, malformed ones are refused by name, unknown names get near matches."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.profile import Cores, load_profile, profile_names
from devices.transports import open_transport, transport_kinds
from edgeseq.errors import DeviceError, UsageError

GOOD = 'description = "a board"\ntriple = "aarch64-linux-gnu"\ncpu = "cortex-a55"\n'
CLOCKED = GOOD + 'cores = 2\nclock_source = "its label"\n[[core]]\ncpu = "cortex-a55"\ncount = 2\nclock_ghz = 1.8\n'


def test_the_profiles_that_ship() -> None:
    assert {"host", "raspberry-pi-5", "qemu-aarch64"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name and profile.description
        assert profile.transport in transport_kinds()
    pi = load_profile("raspberry-pi-5")
    assert (pi.arch, pi.cpu, pi.cores, pi.peak_bandwidth_gbs) == ("aarch64", "cortex-a76", 4, 17.1)
    assert "LPDDR4X-4267" in pi.bandwidth_source
    assert pi.clusters == (Cores("cortex-a76", 4, 2.4),) and "2.4 GHz" in pi.clock_source


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(GOOD + 'pin = [4, 5]\n[transport]\nkind = "qemu"\nemulator = "qemu-aarch64-static"\n')
    profile = load_profile(str(path))
    assert (profile.name, profile.pin, profile.transport) == ("my-board", (4, 5), "qemu")
    assert dict(profile.transport_options) == {"emulator": "qemu-aarch64-static"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (GOOD + "cors = 4\n", "unknown key 'cors'"),
        (CLOCKED + "clock = 1\n", "core.. has the unknown key 'clock'"),
        (CLOCKED.replace("cores = 2", "cores = 4"), "count 2 cores, `cores` is 4"),
        (CLOCKED.replace("clock_ghz = 1.8", "clock_ghz = 0"), "clock_ghz is 0"),
        (CLOCKED.replace("clock_source", "#"), "without saying where they come from"),
        (GOOD.replace("cpu", "core"), "lacks the key 'cpu'"),
        (GOOD + 'cores = "four"\n', "cores is 'four'"),
        (GOOD + "cores = true\n", "cores is True"),
        (GOOD + "cores = -1\n", "cores is -1"),
        (GOOD + "peak_bandwidth_gbs = nan\n", "peak_bandwidth_gbs is nan"),
        (GOOD + "peak_bandwidth_gbs = 17\n", "without saying where it comes from"),
        (GOOD + 'pin = ["a"]\n', "pin holds something"),
        (GOOD + "pin = [-1]\n", "pin holds a negative"),
        (GOOD.replace("cortex-a55", "cortex a55; rm"), "does not look like one"),
        (GOOD.replace("aarch64-linux-gnu", "../x"), "does not look like one"),
        (GOOD + "[transport]\nport = 1\n", "needs a 'kind'"),
        (GOOD + '[gpu]\nbackend = "opencl"\nsubgroup = 48\n', "subgroup is 48, which is not a power of two"),
        ("description = ", "is not TOML"),
        (GOOD + "# " + "x" * 70_000, "larger than any device profile"),
    ],
)
def test_malformed(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(DeviceError, match=sentence):
        load_profile(str(path))


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="no target or device called 'raspbery-pi-5'") as caught:
        load_profile("raspbery-pi-5")
    assert caught.value.hint == "did you mean raspberry-pi-5?" and caught.value.exit_code == 2
    with pytest.raises(UsageError) as caught:
        load_profile("zzz")
    assert caught.value.hint.startswith("known: ") and " host, " in caught.value.hint
    with pytest.raises(UsageError) as caught:
        load_profile("cuda-sm97", others=["cuda-sm87"])
    assert "cuda-sm87" in caught.value.hint
    with pytest.raises(UsageError, match="no device profile missing.toml"):
        load_profile("missing.toml")


def test_unknown_transport(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD + '[transport]\nkind = "pigeon"\n')
    with pytest.raises(DeviceError, match="transport 'pigeon', which does not exist"):
        open_transport(load_profile(str(path)))


@pytest.mark.parametrize(
    ("name", "gpu", "rate", "lockstep"),
    [
        ("snapdragon-8-gen-3", "Adreno 750", 9600, 64),
        ("snapdragon-8-elite", "Adreno 830", 10600, 64),
        ("tensor-g3", "Mali-G715", 8533, 16),
        ("dimensity-9300", "Immortalis-G720", 9600, 16),
    ],
)
def test_phones(name: str, gpu: str, rate: int, lockstep: int) -> None:
    """The bandwidth is the cited transfer rate over 64 bits, and the rest is what kernels are made for."""
    profile = load_profile(name)
    assert profile.gpu is not None and profile.triple == "aarch64-linux-android"
    assert (profile.gpu.backend, profile.gpu.name, profile.gpu.subgroup, profile.gpu.half) == (
        "opencl", gpu, lockstep, True,
    )  # fmt: skip
    assert profile.gpu.threads % lockstep == 0
    assert f"{rate}e6 transfers/s" in profile.bandwidth_source
    assert profile.peak_bandwidth_gbs == pytest.approx(rate * 8e-3, rel=1e-3)
