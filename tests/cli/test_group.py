"""The command line as a whole: instant help, one sentence per error, the right exit codes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import edgeseq.cli as cli
from edgeseq.errors import BundleError, UsageError

HEAVY = {
    "torch",
    "tvm",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tokenizers",
    "transformers",
    "rich",
    "ml_dtypes",
}


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, edgeseq.cli as c\n"
        "context = c.click.Context(c.edgeseq)\n"
        "names = c.edgeseq.list_commands(context)\n"
        "codes = [c.run([name, '--help']) for name in names] + [c.run(['--help'])]\n"
        "print('\\n', sorted({m.partition('.')[0] for m in sys.modules}), codes, file=sys.stderr)"
    )
    done = _python(code)
    loaded, _, codes = done.stderr.strip().rpartition("] [")
    assert set(codes.rstrip("]").split(", ")) == {"0"}
    assert not {name for name in HEAVY if f"'{name}'" in loaded}
    assert "Commands:" in done.stdout


def test_help_is_instant() -> None:
    """In processor time, so that a busy machine does not matter."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert _python("import edgeseq.cli as c; raise SystemExit(c.run(['--help']))").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 0.4


@pytest.mark.parametrize("arguments", [["nonsense"], ["list"], ["list", "planets"], ["--nonsense"]])
def test_wrong_use_is_2_with_a_hint(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("edgeseq: ") and "hint: see 'edgeseq" in err
    assert "Traceback" not in err


def _failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command("fail")
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli.Commands, "get_command", lambda self, ctx, name: fail)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BundleError("it is broken", "mend it"), 1, "edgeseq: it is broken\nhint: mend it\n"),
        (UsageError("no such thing"), 2, "edgeseq: no such thing\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "edgeseq: No such file or directory: x\n"),
        (MemoryError(), 1, "edgeseq: not enough memory\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _failing(monkeypatch, error)
    assert cli.run(["fail"]) == code
    assert capfd.readouterr().err.strip().startswith(text.strip())


def test_a_defect_is_one_sentence_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _failing(monkeypatch, ZeroDivisionError("first line\nsecond line"))
    assert cli.run(["fail"]) == 1
    err = capfd.readouterr().err
    assert "a defect in edgeseq stopped this: ZeroDivisionError: first line\nhint: please report it" in err
    assert "Traceback" not in err and "second line" not in err
    assert cli.run(["--debug", "fail"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        f"{sys.executable} -m edgeseq --help | head -c 1", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_termination_unwinds(tmp_path: Path) -> None:
    code = (
        "import sys, time, click, edgeseq.cli as c\n"
        "from edgeseq.bundle.directory import new_bundle\n"
        "@click.command('wait')\n"
        "def wait():\n"
        f"    with new_bundle({str(tmp_path / 'out')!r}):\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "c.Commands.get_command = lambda self, ctx, name: wait\n"
        "sys.argv = ['edgeseq', 'wait']\n"
        "c.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert os.listdir(tmp_path) == []
