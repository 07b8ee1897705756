"""Transports run programs and say why when they cannot."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from devices.profile import load_profile
from devices.transports import open_transport
from edgeseq.errors import BundleError, DeviceError


def test_local_runs_and_reports(tmp_path: Path) -> None:
    transport = open_transport(load_profile("host"))
    done = transport.run([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(DeviceError, match="took more than 0.2 seconds"):
        transport.run([sys.executable, "-c", "import time; time.sleep(9)"], timeout=0.2)
    with pytest.raises(DeviceError, match="cannot be run: No such file"):
        transport.run([str(tmp_path / "missing")])
    with pytest.raises(BundleError, match="has no edgeseq-device"):
        transport.push(tmp_path)


def test_driver_failures_carry_its_last_words(tmp_path: Path) -> None:
    driver = tmp_path / "edgeseq-device"
    driver.write_text(
        '#!/bin/sh\n[ "$2" = ok ] && echo "fine $1" && exit 0\necho first >&2; echo no memory >&2; exit 1\n'
    )
    driver.chmod(0o755)
    transport = open_transport(load_profile("host"))
    handle = transport.push(tmp_path)
    assert transport.driver(handle, "ok").stdout == f"fine {tmp_path}/model.edgeseq\n"
    with pytest.raises(DeviceError, match="edgeseq-device on host ended with 1: no memory"):
        transport.driver(handle, "bad")


def test_scratch_files_do_not_outlive_it() -> None:
    with open_transport(load_profile("host")) as transport:
        path = transport.scratch("numbers")
        transport.write(path, b"123")
        assert transport.read(path) == b"123"
        assert transport.run(["cat", path]).stdout == "123"
    assert not Path(path).exists() and not Path(path).parent.exists()
    with pytest.raises(DeviceError, match="cannot be read"):
        transport.read(path)


def test_local_refuses_another_architecture() -> None:
    other = "aarch64" if platform.machine() != "aarch64" else "x86_64"
    profile = replace(load_profile("raspberry-pi-5"), triple=f"{other}-linux-gnu")
    with pytest.raises(DeviceError, match=f"raspberry-pi-5 is {other}, this machine is") as caught:
        open_transport(profile)
    assert f"--device qemu-{other}" in caught.value.hint


def test_a_missing_emulator_is_named() -> None:
    profile = replace(load_profile("qemu-aarch64"), transport_options=(("emulator", "qemu-none"),))
    with pytest.raises(DeviceError, match="qemu-none is not installed"):
        open_transport(profile)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
def test_qemu_runs_foreign_programs(tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text('#include <stdio.h>\nint main(int n, char **a) { printf("%d %s\\n", n, a[1]); return 7; }\n')
    program = tmp_path / "main"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True, capture_output=True)
    done = open_transport(load_profile("qemu-aarch64")).run([str(program), "word"])
    assert (done.returncode, done.stdout) == (7, "2 word\n")
