"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeseq.errors import UsageError


@contextmanager
def new_directory(out: Path, is_ours: Callable[[Path], bool], kind: str) -> Iterator[Path]:
    """Yield an empty directory beside `out` that becomes `out` when the block ends well.

    An existing `out` is replaced only if `is_ours(out)` says that it holds a `kind` ("bundle", "export"), or if it is
    an empty directory. On any exception, KeyboardInterrupt included, nothing is left behind and `out` is as it was.
    Raises UsageError when `out` is in the way or its parent cannot be written.
    """
    out = Path(os.path.abspath(out))
    _check_replaceable(out, is_ours, kind)
    temporary = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    made = _make_parents(out.parent)
    try:
        try:
            temporary.mkdir()
        except OSError as error:
            raise UsageError(f"cannot write {out}: {error.strerror}", "choose another directory with -o") from None
        yield temporary
        _check_replaceable(out, is_ours, kind)
        _replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            _remove_empty(parent)
        raise


def _check_replaceable(out: Path, is_ours: Callable[[Path], bool], kind: str) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not out.is_symlink() and (is_ours(out) or not any(out.iterdir())):
        return
    raise UsageError(f"{out} exists and is not a {kind}, so it is not overwritten", "choose another path with -o")


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; returns those made, innermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {missing[0]}: {error.strerror}", "choose another directory with -o") from None
    return missing


def _replace(temporary: Path, out: Path) -> None:
    if not out.exists():
        os.rename(temporary, out)
        return
    old = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
    os.rename(out, old)
    try:
        os.rename(temporary, out)
    except BaseException:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()
