"""Members of a static library (the GNU form of ar, which every tool chain here writes)."""

from __future__ import annotations

from edgeseq.errors import BundleError

MAGIC = b"!<arch>\n"
HEADER = 60


def member(archive: bytes, name: str) -> bytes:
    """The member called `name`. Raises BundleError for something else than an archive, or one without it."""
    if not archive.startswith(MAGIC):
        raise BundleError("libmodel.a is not an archive", "compile the bundle again")
    at, names = len(MAGIC), b""
    while at + HEADER <= len(archive):
        header = archive[at : at + HEADER]
        size = header[48:58].strip()
        if header[58:] != b"`\n" or not size.isdigit() or at + HEADER + int(size) > len(archive):
            break
        data = archive[at + HEADER : at + HEADER + int(size)]
        own = header[:16].rstrip()
        if own == b"//":
            names = data
        elif _named(own, names) == name:
            return data
        at += HEADER + int(size) + int(size) % 2
    raise BundleError(f"libmodel.a has no {name}", "compile the bundle again")


def _named(own: bytes, names: bytes) -> str:
    """A short name ends in a slash; of a long one, the header has its place in the table of names."""
    if own[:1] == b"/" and own[1:].isdigit():
        own = names[int(own[1:]) :].split(b"\n", 1)[0]
    return own.rstrip(b"/").decode("ascii", "replace")
