"""Progress of long work: a bar on a terminal, nothing on a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[..., None]


@contextmanager
def progress() -> Iterator[Progress | None]:
    """Yield progress(what, done, total=1) that draws on stderr, or None where stderr is no terminal.

    total = 0 means that the end is not known: the line then only says what is being done.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: float, total: float = 1) -> None:
            if what not in tasks:
                for before in bars.tasks:  # stages follow one another
                    bars.update(before.id, completed=before.total, total=before.total)
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield show
