"""Ctrl-C while TVM works: an exception thrown through its C++ may abort the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """SIGINT reaches its handler only in the function that this yields, at the end, or in place of another error:
    programs that were called get the signal too, and fail. A second SIGINT is not held.

    Where SIGINT is ignored or simply ends the process, and in threads, which may not set a handler, nothing changes.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    held: list[FrameType | None] = []

    def note(number: int, at: FrameType | None) -> None:
        held.append(at)
        signal.signal(signal.SIGINT, handler)

    def check() -> None:
        if held:
            handler(signal.SIGINT, held.pop())

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
    check()
