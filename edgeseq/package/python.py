"""The kit for Python: a folder that is a package, which needs NumPy and no compiler."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import edgeseq

from .contents import Contents

PACKAGE = "edgeseq_model"
MODULES = {
    "runtime.py": "runtime.py",
    "runtime_abi.py": "runtime_abi.py",
    "runtime_types.py": "runtime_types.py",
    "errors.py": "errors.py",
    "bundle/format.py": "format.py",
}
_IMPORTS = (
    (re.compile(r"^from edgeseq import ", re.M), "from . import "),
    (re.compile(r"^from edgeseq\.(?:bundle\.)?(\w+) import ", re.M), r"from .\1 import "),
)


def write(contents: Contents, folder: Path) -> None:
    package = folder / PACKAGE
    package.mkdir()
    contents.write_model(package)
    for name in ("libmodel.so", "bundle.json"):
        shutil.copyfile(contents.file(name), package / name)
    root = Path(edgeseq.__file__).parent
    for source, ours in MODULES.items():
        text = (root / source).read_text()
        for pattern, replacement in _IMPORTS:
            text = pattern.sub(replacement, text)
        (package / ours).write_text(text)
    contents.fill("python/init.py", package / "__init__.py")
    contents.fill("python/example.py", folder / "example.py")
    contents.fill("python/README.md", folder / "README.md")
