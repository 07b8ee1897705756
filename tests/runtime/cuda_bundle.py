"""The hand-made model as a CUDA plan, and the fake driver that runs it without a GPU."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

from . import build, handmade
from .handmade import Parts, V, align

HERE = Path(__file__).parent
CUBIN, PTX = 1, 2


def text(kernels: dict[str, int], note: str = "") -> bytes:
    """What the fake driver takes for a module: entries with their parameters, NUL-terminated."""
    entries = (
        f".visible .entry {name}({', '.join(f'.param .u64 p{i}' for i in range(n))})" for name, n in kernels.items()
    )
    return "\n".join([f"// {note}", *entries]).encode() + b"\0"


def cubin(kernels: dict[str, int], note: str = "") -> bytes:
    """The same behind the header of an ELF file without sections."""
    return struct.pack("<5s59x", b"\x7fELF\x02") + text(kernels, note)


def archive(images: list[tuple[int, int, bytes]]) -> bytes:
    """(kind, sm, image) as the compiler writes them."""
    at, records, body = align(16 + 24 * len(images), 16), b"", b""
    for kind, sm, data in images:
        body += bytes(-len(body) % 16)
        records += struct.pack("<IIQQ", kind, sm, at + len(body), len(data))
        body += data
    head = struct.pack("<8sII", b"ESIMAGES", len(images), 0) + records
    return head + bytes(at - len(head)) + body


def code(p: Parts, blob: bytes) -> Parts:
    """Every kernel of the plan in one blob."""
    p.code = blob
    for kernel in p.kernels:
        kernel[2:6] = [2, 2, 0, len(blob)]
    return p


def counts(p: Parts) -> dict[str, int]:
    """Arguments of every kernel by name."""
    return {p.strings[k[0] : p.strings.index(b"\0", k[0])].decode(): k[1] for k in p.kernels}


def parts(narrow: bool = False, threads: dict[str, int] | None = None) -> Parts:
    """The hand-made plan for CUDA: `next` is chosen by a launch of its own. narrow: tokens and next as int32. threads:
    of a block, by kernel, where the kernels are a GPU's."""
    p = handmade.parts()
    chooser = len(p.kernels)
    p.kernels.append([p.name("choose32" if narrow else "choose"), 2, 0, 0, 0, 0])
    if narrow:
        p.kernels[0][0] = p.name("narrow_gather")
    next_at, logits_at, width = p.io_bytes, p.io_bytes - V * 4, 4 if narrow else 8
    p.io_bytes += 64
    launches, args = p.launches, p.args
    p.launches, p.args = [], []
    for g, graph in enumerate(p.graphs):
        first, n = graph[2], graph[3]
        graph[2] = len(p.launches)
        for launch in launches[first : first + n]:
            p.launches.append([*launch[:8], len(p.args), launch[9]])
            p.args += args[launch[8] : launch[8] + launch[9]]
        p.launches.append([chooser, 1, 1, 1, 1, 1, 1, 1, len(p.args), 2])
        p.args += [[3, 1, logits_at, V * 4], [3, 2, next_at, width]]
        graph[3] = n + 1
        p.io.append([p.name("next"), 4 if narrow else 3, 1, 4, g, 1, 1, 0, 0, 0, next_at, width])
    if narrow:
        for io in p.io:
            if io[3] == 1:
                io[1], io[11] = 4, io[11] // 2
    names = list(counts(p))
    for launch in p.launches:
        launch[5] = (threads or {}).get(names[launch[0]], 1)
    return code(p, archive([(CUBIN, 90, cubin(counts(p))), (PTX, 75, text(counts(p)))]))


def bundle(directory: Path, p: Parts, compiler: tuple[str, ...] = ("gcc",)) -> Path:
    """model.edgeseq and a libmodel.so that has no kernels of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.edgeseq").write_bytes(p.build())
    table = directory / "table.c"
    table.write_text(
        "#include <edgeseq.h>\nconst es_kernel_table es_linked_kernels = "
        f"{{(uint32_t)sizeof(es_kernel_table), 0x{p.plan_id:08x}u, 0, 0, 0, 0, 0, 0, 0}};\n"
    )
    objects = build.core(("-O2", "-fPIC", "-DES_WITH_CUDA"), compiler)
    flags = ["-O2", "-fPIC", "-shared", "-ldl"]
    build.compile_c(directory / "libmodel.so", [table, *objects], flags, list(compiler))
    return directory


def library(out: Path) -> Path:
    """The fake driver."""
    flags = ["-std=gnu11", "-g", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra"]
    include = [f"-I{build.C_DIR / 'include'}", f"-I{build.C_DIR / 'tests'}"]
    build.run(["gcc", *flags, *include, "-o", out, HERE / "fake_cuda.c", HERE / "fake_kernels.c"])
    return out


class Fake:
    """The fake driver's own functions, see fake_cuda.c."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        self._lib.fake_cuda_calls.restype = ctypes.c_long
        self._lib.fake_cuda_loaded.restype = ctypes.c_char_p

    def reset(self) -> None:
        self._lib.fake_cuda_reset()

    def set(self, name: str, value: int) -> None:
        assert self._lib.fake_cuda_set(name.encode(), ctypes.c_longlong(value)) == 0

    def fail(self, symbol: str, nth: int, code: int = 1) -> None:
        self._lib.fake_cuda_fail(symbol.encode(), ctypes.c_long(nth), code)

    def calls(self, symbol: str) -> int:
        return int(self._lib.fake_cuda_calls(symbol.encode()))

    @property
    def live(self) -> int:
        return int(self._lib.fake_cuda_live())

    @property
    def loaded(self) -> str:
        """The note of the image that was loaded last."""
        return str(self._lib.fake_cuda_loaded().decode())
