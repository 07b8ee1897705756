"""Instructions that a 64-bit ARM program executes, by qemu's log of translated blocks.

    python scripts/count_arm.py --per 8 -- bundle/edgeseq-device bundle/model.edgeseq run --tokens 5 -n 9 --threads 1 \\
        -- bundle/edgeseq-device bundle/model.edgeseq run --tokens 5 -n 1 --threads 1

prints the count of each command and, of two, their difference over --per: the instructions of a token, loading left
out. --within leaves out code that no token runs, such as what packs weights at load, whose log would be long. One
thread: the log of several is one text. Needs qemu-aarch64-static; a few minutes for a small model.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from typing import IO

INSTRUCTION = re.compile(rb"0x([0-9a-f]+):")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per", type=int, default=1)
    parser.add_argument("--cpu", default="max")
    parser.add_argument("--within", metavar="START..END,…", help="count code at these addresses alone")
    own, *commands = _split(sys.argv[1:])
    args = parser.parse_args(own)
    counts = [count(command, args.cpu, args.within) for command in commands]
    for command, n in zip(commands, counts, strict=True):
        print(f"{n} {' '.join(command)}")
    if len(counts) == 2:
        print(f"{(counts[0] - counts[1]) / args.per:.0f} each of {args.per}")
    return 0


def _split(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def count(command: list[str], cpu: str, within: str | None = None) -> int:
    options = ["-cpu", cpu, "-d", "in_asm,exec,nochain", *(["-dfilter", within] if within else [])]
    with subprocess.Popen(
        ["qemu-aarch64-static", *options, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=1 << 20
    ) as running:
        assert running.stderr
        total = _read(running.stderr)
    if running.returncode:
        sys.exit(f"{command[0]} ended with {running.returncode}")
    return total


def _read(log: IO[bytes]) -> int:
    """A block's text comes once, when it is translated; a line for every time it runs."""
    sizes: dict[bytes, int] = {}
    total, first = 0, b""
    for line in log:
        if line.startswith(b"Trace"):
            total += sizes[line.split(b"/", 2)[1].lstrip(b"0")]
        elif line.startswith(b"IN:"):
            first = b""
        elif found := INSTRUCTION.match(line):
            first = first or found[1].lstrip(b"0")
            sizes[first] = (int(found[1], 16) - int(first, 16)) // 4 + 1
    return total


if __name__ == "__main__":
    sys.exit(main())
