"""The command line. A command is a file `cmd_<name>.py` holding a click command called `command`.

Command files import click and the standard library at the top and everything else inside the function, so that
`edgeseq --help` is instant and needs neither torch nor tvm.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

from edgeseq import __version__
from edgeseq.errors import EdgeseqError

PREFIX = "cmd_"
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141


@dataclass
class Options:
    """What stands in front of the command's name."""

    debug: bool = False


class Commands(click.Group):
    """Finds commands by listing the files beside this one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = (module.name for module in pkgutil.iter_modules(__path__))
        return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"{__name__}.{PREFIX}{cmd_name}").command
        return command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgeseq")
@click.option("--debug", is_flag=True, help="Show the traceback when something fails.")
@click.pass_obj
def edgeseq(options: Options, debug: bool) -> None:
    """Recurrent sequence models on edge devices: export, compile, verify, run, measure."""
    options.debug = debug


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (sys.argv[1:] if None). Returns the exit code; errors are one sentence and a hint on stderr.

    0 done, 1 the check or the job failed, 2 wrong use, 130 interrupted.
    """
    options = Options()
    try:
        code = edgeseq.main(
            list(sys.argv[1:] if arguments is None else arguments),
            prog_name="edgeseq",
            standalone_mode=False,
            obj=options,
        )
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        return _explain(error)


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is torn down now has no say in how it ended
    sys.exit(code)


class Interrupted(KeyboardInterrupt):
    """CPython ends by the signal, whatever the exit code, once a KeyboardInterrupt itself has left an `exec`."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _explain(error: Exception) -> int:
    """Print what went wrong; returns the exit code."""
    if isinstance(error, EdgeseqError):
        _say(error.sentence, error.hint)
        return error.exit_code
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "edgeseq"
        _say(error.format_message(), f"see '{path} --help'")
        return error.exit_code
    if isinstance(error, click.ClickException):
        _say(error.format_message())
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        _say(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
        return 1
    if isinstance(error, MemoryError):
        _say("not enough memory", "close other programs or choose a smaller model")
        return 1
    first = str(error).partition("\n")[0]
    _say(
        f"a defect in edgeseq stopped this: {type(error).__name__}: {first}",
        "please report it with the output of the same command after 'edgeseq --debug'",
    )
    return 1


def _say(sentence: str, hint: str = "") -> None:
    click.echo(f"edgeseq: {sentence}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
