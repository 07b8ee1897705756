"""The text behind the tiny models: the glosses of WordNet 3.0 as lines `word: definition; "example"`.

Debian's `wordnet-base` installs the data files; their licence is shipped beside the weights.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from edgeseq.errors import UsageError

PARTS = ("noun", "verb", "adj", "adv")
HELD_OUT_SHARE = 50
_MARKER = re.compile(r"\((a|p|ip)\)$")  # syntactic marker of an adjective


def gloss_lines(folder: Path) -> list[bytes]:
    """One line per synset, newline included, in file order, identical lines once.

    folder: holds data.noun, data.verb, data.adj, data.adv in WordNet's database format. UsageError when one lacks.
    """
    lines: dict[bytes, None] = {}
    for part in PARTS:
        path = folder / f"data.{part}"
        if not path.is_file():
            raise UsageError(f"{path} does not exist", "install Debian's wordnet-base or name another --data folder")
        for row in path.read_text("ascii", "replace").splitlines():
            if row.startswith("  "):  # the licence on top of each file
                continue
            fields, gloss = row.split(" | ", 1)
            word = _MARKER.sub("", fields.split(" ")[4]).replace("_", " ")
            lines[f"{word}: {gloss.strip()}\n".encode()] = None
    return list(lines)


def split(lines: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """(training, held-out): a line is held out when its CRC-32 is a multiple of 50."""
    held = [line for line in lines if zlib.crc32(line) % HELD_OUT_SHARE == 0]
    return [line for line in lines if zlib.crc32(line) % HELD_OUT_SHARE], held
