"""scripts/count_arm.py adds up qemu's log: every run of a block counts its instructions."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "count_arm.py"
LOG = b"""----------------
IN: main
0x00401000:  d2800000  movz x0, #0
0x00401004:  91000400  add x0, x0, #1

Trace 0: 0x7f0000000100 [0000000000000000/0000000000401000/00000001/00000200] main
IN:
0x00401008:  14000001  b #0x40100c

Trace 0: 0x7f0000000200 [0000000000000000/0000000000401008/00000001/00000200]
a word of the program's own
Trace 0: 0x7f0000000100 [0000000000000000/0000000000401000/00000001/00000200] main
"""


def test_blocks_count_as_often_as_they_run() -> None:
    spec = importlib.util.spec_from_file_location("count_arm", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._read(io.BytesIO(LOG)) == 2 + 1 + 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
def test_a_loop_on_the_emulator(tmp_path: Path) -> None:
    """1000 turns of two instructions more."""
    source = tmp_path / "loop.c"
    source.write_text(
        "#include <stdlib.h>\nint main(int n, char **a) { long i = atol(a[1]);"
        ' __asm__ volatile("1: subs %0, %0, #1\\n b.ne 1b" : "+r"(i)); return (int)i * n; }'
    )
    program = str(tmp_path / "loop")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static", "-O1"]
    subprocess.run([*zig, "-o", program, str(source)], check=True, capture_output=True)
    command = [sys.executable, str(SCRIPT), "--per", "1000", "--", program, "2000", "--", program, "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("2 each of 1000\n"), done.stdout + done.stderr
    command = [sys.executable, str(SCRIPT), "--within", "0x0..0x1", "--", program, "9"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=600).stdout.startswith("0 ")
