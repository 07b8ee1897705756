"""A libOpenCL between the runtime and the real one: counts calls and live objects, and fails on demand.

Generated from the functions that runtimes/c/src/es_opencl.h declares, so that it has all of them and no other.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from runtimes import C_DIR

from . import build

HEADER = C_DIR / "src" / "es_opencl.h"
DRIVER = "libOpenCL.so.1"

_HEAD = """
#define _GNU_SOURCE 1
#include "es_opencl.h"
#include <dlfcn.h>
#include <string.h>

static void *find(const char *name)
{
    static void *library;
    if (library == NULL)
        library = dlopen(SHIM_DRIVER, RTLD_NOW);
    return library != NULL ? dlsym(library, name) : NULL;
}

static struct { const char *name; int calls, skip, code; } table[] = {@TABLE@};
static int live, n_over;
static struct { uint32_t what; size_t bytes; char value[64]; } over[8];

/* Counts a call; the error it shall have, or 0. */
static int enter(int i)
{
    table[i].calls++;
    return table[i].code != 0 && table[i].skip-- == 0 ? table[i].code : 0;
}

__attribute__((visibility("default"))) int shim_calls(int i) { return table[i].calls; }
__attribute__((visibility("default"))) int shim_live(void) { return live; }
__attribute__((visibility("default"))) void shim_fail(int i, int skip, int code)
{
    table[i].skip = skip;
    table[i].code = code;
}
__attribute__((visibility("default"))) void shim_info(uint32_t what, size_t bytes, const char *value)
{
    over[n_over].what = what;
    over[n_over].bytes = bytes;
    memcpy(over[n_over++].value, value, bytes);
}
__attribute__((visibility("default"))) void shim_clear(void)
{
    n_over = 0;
    for (int i = 0; i < (int)(sizeof table / sizeof *table); i++)
        table[i].calls = table[i].code = 0;
}

static int device_info(uint32_t what, size_t room, void *value, size_t *bytes)
{
    for (int i = 0; i < n_over; i++)
        if (over[i].what == what && room >= over[i].bytes) {
            memcpy(value, over[i].value, over[i].bytes);
            if (bytes != NULL)
                *bytes = over[i].bytes;
            return 1;
        }
    return 0;
}
"""


def functions() -> list[tuple[str, str, list[str]]]:
    """(result, name without cl, types of the arguments)."""
    text = HEADER.read_text().replace("\\\n", " ")
    text = text[text.index("#define ES_CL_FUNCTIONS(X)") : text.index("typedef struct {\n#define ES_CL_MEMBER")]
    found = re.findall(r"X\(([\w]+),\s+(\w+),\s+\(([^()]*)\)\)", text)
    return [(result, name, [a.strip() for a in arguments.split(",")]) for result, name, arguments in found]


def _function(index: int, result: str, name: str, types: list[str]) -> str:
    declared = ", ".join(f"{t} a{i}" for i, t in enumerate(types))
    given = ", ".join(f"a{i}" for i in range(len(types)))
    last = f"a{len(types) - 1}"
    creates, event = result != "int32_t", name.startswith("Enqueue")
    body = [
        f"    {result} (*real)({', '.join(types)});",
        f'    void *address = find("cl{name}");',
        "    memcpy(&real, &address, sizeof address);",
        f"    int code = enter({index});",
        f"    if (code != 0) {{ *{last} = code; return NULL; }}" if creates else "    if (code != 0) return code;",
    ]
    if name == "GetDeviceInfo":
        body.append("    if (device_info(a1, a2, a3, a4)) return 0;")
    body.append(f"    {result} got = real({given});")
    if creates:
        body.append("    live += got != NULL;")
    elif name.startswith("Release"):
        body.append("    live -= got == 0;")
    elif event:
        body.append(f"    live += got == 0 && {last} != NULL;")
    head = f'__attribute__((visibility("default"))) {result} cl{name}({declared})'
    return "\n".join([head, "{", *body, "    return got;", "}"])


class Shim:
    """The library at `path` once the runtime has opened it (or will): the same process, the same counters."""

    def __init__(self, directory: Path) -> None:
        self.names = [name for _, name, _ in functions()]
        table = ", ".join(f'{{"{name}", 0, 0, 0}}' for name in self.names)
        code = [_HEAD.replace("@TABLE@", table), *(_function(i, *f) for i, f in enumerate(functions()))]
        source = directory / "shim.c"
        source.write_text("\n".join(code))
        self.path = directory / "libshim.so"
        flags = ["-shared", "-fPIC", "-O1", f"-I{C_DIR / 'include'}", f"-I{HEADER.parent}"]
        build.run(["gcc", *flags, f'-DSHIM_DRIVER="{DRIVER}"', "-o", self.path, source, "-ldl"])
        self.library = ctypes.CDLL(str(self.path))

    def clear(self) -> None:
        self.library.shim_clear()

    def fail(self, name: str, code: int, skip: int = 0) -> None:
        """The call of cl`name` after `skip` others returns `code`; one only."""
        self.library.shim_fail(self.names.index(name), skip, code)

    def info(self, what: int, value: int | str, nbytes: int = 8) -> None:
        """clGetDeviceInfo answers `value` to `what`."""
        raw = value.encode() + b"\0" if isinstance(value, str) else value.to_bytes(nbytes, "little")
        self.library.shim_info(what, ctypes.c_size_t(len(raw)), raw)

    def calls(self) -> dict[str, int]:
        """Calls since clear, those that happened."""
        counts = {name: self.library.shim_calls(i) for i, name in enumerate(self.names)}
        return {name: n for name, n in counts.items() if n}

    @property
    def live(self) -> int:
        """Objects made and not released."""
        return int(self.library.shim_live())
