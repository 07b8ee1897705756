"""Long work draws on a terminal and is silent on a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

CODE = """
from edgeseq.cli.progress import progress
with progress() as show:
    if show:
        show('first', 0, 3)
        show('second', 1, 2)
        show('second', 2, 2)
print('done')
"""


def test_silent_on_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_drawn_on_a_terminal() -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", CODE], stderr=slave, stdout=subprocess.PIPE, env=environment)
    out, _ = process.communicate(timeout=60)
    os.close(slave)
    drawn = b""
    try:
        while piece := os.read(master, 4096):
            drawn += piece
    except OSError:
        pass  # Linux says so when the last writer is gone
    os.close(master)
    text = drawn.decode()
    assert out == b"done\n"
    assert "first" in text and "second" in text and "100%" in text
