"""CUDA C++ to machine code, with no GPU: by nvcc where it is installed, else by NVRTC (`pip install edgeseq[cuda]`).

The archive that a plan carries (little-endian): magic "ESIMAGES", u32 n, u32 0, then n records (u32 kind: 1 cubin,
2 PTX; u32 sm; u64 offset; u64 bytes) and the images, each at a multiple of 16 from the archive's start.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from edgeseq.errors import CompileError

MAGIC = b"ESIMAGES"
CUBIN, PTX = 1, 2
FLAGS = ("--std=c++17",)
HINT = "install NVIDIA's compiler library: pip install edgeseq[cuda]"


def images(source: str, capabilities: tuple[int, ...]) -> bytes:
    """A cubin for each compute capability, and PTX of the lowest, which later GPUs' drivers compile themselves.

    Raises CompileError with the compiler's first words.
    """
    lowest = min(capabilities)
    if shutil.which("nvcc"):
        ptx, cubins = _nvcc(source, lowest, capabilities)
    else:
        nvrtc = _Nvrtc()
        ptx = nvrtc.compile(source, lowest, PTX)
        cubins = [nvrtc.compile(source, sm, CUBIN) for sm in capabilities]
    made = [(CUBIN, sm, cubin) for sm, cubin in zip(capabilities, cubins, strict=True)]
    return archive([*made, (PTX, lowest, ptx.rstrip(b"\0") + b"\0")])


def archive(parts: list[tuple[int, int, bytes]]) -> bytes:
    head = MAGIC + struct.pack("<II", len(parts), 0)
    at = -(-(len(head) + 24 * len(parts)) // 16) * 16
    records, body = b"", b""
    for kind, sm, data in parts:
        records += struct.pack("<IIQQ", kind, sm, at + len(body), len(data))
        body += data + b"\0" * (-len(data) % 16)
    return (head + records).ljust(at, b"\0") + body


def _nvcc(source: str, lowest: int, capabilities: tuple[int, ...]) -> tuple[bytes, list[bytes]]:
    """PTX, and the cubins made of it: C++ is read once, which takes longer than the rest."""

    def run(what: str, *arguments: str) -> bytes:
        out = Path(folder) / "image"
        command = ["nvcc", f"-{what}", *arguments, "-O3", "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            words = [line for line in (done.stderr or done.stdout).splitlines() if "error" in line]
            raise CompileError(f"nvcc failed: {words[0] if words else 'no message'}", "; ".join(words[1:3]))
        return out.read_bytes()

    with tempfile.TemporaryDirectory(prefix="edgeseq-") as folder:
        text, middle = Path(folder) / "kernels.cu", Path(folder) / "kernels.ptx"
        text.write_text(source)
        ptx = run("ptx", f"-arch=compute_{lowest}", *FLAGS, str(text))
        middle.write_bytes(ptx)
        return ptx, [run("cubin", f"-arch=sm_{sm}", str(middle)) for sm in capabilities]


class _Nvrtc:
    """NVIDIA's run-time compiler through ctypes."""

    def __init__(self) -> None:
        path = library()
        if path is None:
            raise CompileError("neither nvcc nor NVRTC is installed", HINT)
        try:
            self.lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise CompileError(f"NVRTC cannot be loaded: {error}", HINT) from None

    def compile(self, source: str, sm: int, kind: int) -> bytes:
        program = ctypes.c_void_p()
        self._check(self.lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
        try:
            arch = f"sm_{sm}" if kind == CUBIN else f"compute_{sm}"
            options = [f"--gpu-architecture={arch}", *FLAGS]
            array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            if self.lib.nvrtcCompileProgram(program, len(options), array):
                log = self._read(program, "ProgramLog").decode(errors="replace")
                words = [line for line in log.splitlines() if "error" in line]
                raise CompileError(f"NVRTC failed: {words[0] if words else log[:200]}", "; ".join(words[1:3]))
            return self._read(program, "CUBIN" if kind == CUBIN else "PTX")
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            raise CompileError(f"NVRTC refused a call (error {status})", HINT)


def library() -> Path | None:
    """NVRTC of the installed wheel, or None."""
    import importlib.util

    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        found = sorted(Path(place).glob("**/libnvrtc.so*"))
        if found:
            return found[0]
    return None
