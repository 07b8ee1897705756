"""Embed kits: a bundle with what an app needs to build it in, and nothing of this package.

c        edgeseq.c (the runtime in one file), edgeseq.h, object files of CPU kernels, CMakeLists.txt, an example
android  the same for the NDK, with a Java binding
python   a folder that is a Python package: the library, the model, the ctypes binding

Nothing here compiles anything: the runtime's sources, the bundle and the templates under `runtimes/c/kit` are put
together, written to a temporary name and renamed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeseq.bundle.directory import require_bundle
from edgeseq.bundle.reader import BundleFile
from edgeseq.errors import UsageError
from edgeseq.files import new_directory

from . import android, c, python
from .contents import MARK, Contents

KITS: dict[str, Callable[[Contents, Path], None]] = {"c": c.write, "android": android.write, "python": python.write}


def package(bundle: Path, out: Path, kind: str = "c") -> Path:
    """Write the kit of `kind` for a bundle directory to `out`; returns its path.

    A kit that is there already is replaced, anything else is not. Raises UsageError for what cannot be packaged so, and
    BundleError for a damaged bundle.
    """
    if kind not in KITS:
        raise UsageError(f"there is no kit for {kind!r}", f"known: {', '.join(KITS)}")
    require_bundle(bundle)
    with BundleFile(bundle) as opened:
        contents = Contents(bundle, opened.plan, opened.plan_id)
    with new_directory(out, is_kit, "kit") as folder:
        KITS[kind](contents, folder)
        (folder / MARK).write_text(f"{kind} kit of plan {contents.plan_id:08x}\n")
    return Path(out)


def is_kit(path: Path) -> bool:
    """Whether a directory was written by `package`."""
    return (path / MARK).is_file()
