"""The kit for C and C++ programs."""

from __future__ import annotations

from pathlib import Path

from .contents import Contents


def write(contents: Contents, folder: Path) -> None:
    contents.write_source(folder)
    contents.write_model(folder)
    objects = contents.write_objects(folder)
    contents.fill("c/main.c", folder / "main.c")
    contents.fill("c/CMakeLists.txt", folder / "CMakeLists.txt", OBJECTS=" ".join(objects))
    contents.fill("c/README.md", folder / "README.md", OBJECTS="".join(f" {o}" for o in objects))
