"""Ctrl-C is held until a check, and takes the place of errors that it caused itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal
from edgeseq.compiler.interrupts import held_interrupts
said = []
try:
    with held_interrupts() as check:
        check()
        os.kill(os.getpid(), signal.SIGINT)
        said.append("held")
        {then}
    said.append("done")
except BaseException as error:
    said.append(type(error).__name__)
print(*said, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("check()", "held KeyboardInterrupt True"),
        ("raise RuntimeError('zig was interrupted')", "held KeyboardInterrupt True"),
        ("os.kill(os.getpid(), signal.SIGINT); said.append('never')", "held KeyboardInterrupt True"),
        ("pass", "held KeyboardInterrupt True"),
    ],
)
def test_an_interrupt_waits_for_the_check(then: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(then=then)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == said, done.stderr


def test_the_exit_code_is_ours_wherever_the_signal_arrives(tmp_path: Path) -> None:
    """CPython ends `python -m` by the signal itself once a KeyboardInterrupt has left the `exec` of a string, as
    dataclasses use it."""
    (tmp_path / "interrupted.py").write_text("""
import os, signal
from edgeseq import cli
cli.edgeseq.main = lambda *a, **k: exec("os.kill(os.getpid(), signal.SIGINT)")
cli.main()
""")
    assert subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, check=False).returncode == 130


def test_another_handler_is_held_too_and_never_lost() -> None:
    script = """
import os, signal
from edgeseq.compiler.interrupts import held_interrupts
said = []
signal.signal(signal.SIGINT, lambda number, frame: said.append("handled"))
with held_interrupts() as check:
    os.kill(os.getpid(), signal.SIGINT)
    said.append("held")
print(*said)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["held", "handled"]
