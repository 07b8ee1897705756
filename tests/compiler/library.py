"""Kernels of many variants in one shared object, called through ctypes on guarded memory."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseq.compiler.codegen import KernelSet
from edgeseq.compiler.gpu.codegen import GpuKernelSet
from edgeseq.compiler.ir import GenericRef, KernelRef
from edgeseq.compiler.targets import Target, resolve
from runtimes import C_DIR

GUARD = 256
CANARY = 0xA5


def link_shared(objects: Path, out: Path) -> Path:
    """A shared object of one relocatable object, by gcc where there is one, else by zig."""
    compiler = ["gcc"] if shutil.which("gcc") else [sys.executable, "-m", "ziglang", "cc"]
    subprocess.run([*compiler, "-shared", "-o", str(out), str(objects)], check=True, capture_output=True)
    return out


class Guarded:
    """A copy of `array` between two canaries, `shift` bytes off a 64-byte boundary."""

    def __init__(self, array: NDArray, shift: int = 0) -> None:
        room = array.nbytes + 2 * GUARD + 64 + shift
        self.raw = np.full(room, CANARY, np.uint8)
        self.start = GUARD + (-(self.raw.ctypes.data + GUARD)) % 64 + shift
        self.end = self.start + array.nbytes
        self.array: NDArray = self.raw[self.start : self.end].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    def check(self) -> None:
        assert (self.raw[: self.start] == CANARY).all(), "written before the buffer"
        assert (self.raw[self.end :] == CANARY).all(), "written behind the buffer"


class Library:
    """Compiled variants of this machine's kernels; `call` runs the blocks of one in a random order."""

    def __init__(self, folder: Path, refs: Iterable[tuple[KernelRef | GenericRef, int]]) -> None:
        self.kernels = KernelSet(resolve("host"))
        for ref, n_args in refs:
            self.kernels.add(ref, n_args)
        self.kernels.write_object(folder / "kernels.o", folder / "kernels.s")
        self.assembly = (folder / "kernels.s").read_text()
        self.native = ctypes.CDLL(str(link_shared(folder / "kernels.o", folder / "kernels.so")))

    def call(
        self,
        ref: KernelRef | GenericRef,
        arrays: Sequence[NDArray],
        access: str,
        shifts: Sequence[int] = (),
        seed: int = 0,
    ) -> list[NDArray]:
        """Run the kernel on copies of `arrays`; returns the copies of those that `access` ("r", "w", "m") lets change.

        Fails when anything else changes, inputs and the memory around every buffer included.
        """
        name = self.kernels.names[ref]
        shifts = shifts or [0] * len(arrays)
        held = [Guarded(a, s) for a, s in zip(arrays, shifts, strict=True)]
        pointers = [ctypes.c_void_p(h.array.ctypes.data) for h in held]
        blocks = np.random.default_rng(seed).permutation(self.kernels.grids[name])
        function = getattr(self.native, name)
        function.restype = None
        for block in blocks:
            function(*pointers, ctypes.c_int32(int(block)))
        for h, before, how in zip(held, arrays, access, strict=True):
            h.check()
            if how == "r":
                assert h.array.tobytes() == before.tobytes(), "an input was written"
        return [h.array for h, how in zip(held, access, strict=True) if how != "r"]


class InOneBlock(ABC):
    """Calls whose arrays lie in one block of memory that something else than this process works on."""

    kernels: KernelSet

    def call(
        self,
        ref: KernelRef | GenericRef,
        arrays: Sequence[NDArray],
        access: str,
        shifts: Sequence[int] = (),
        seed: int = 0,
    ) -> list[NDArray]:
        """As Library.call."""
        name, block = self.kernels.names[ref], Block(arrays, shifts)
        return block.results(self._run(name, block, seed), access)

    @abstractmethod
    def _run(self, name: str, block: Block, seed: int) -> NDArray:
        """The block's bytes after kernel `name`."""


class DeviceLibrary(InOneBlock):
    """The same for GPU kernels, on the first OpenCL device there is; blocks run in the device's order."""

    def __init__(self, refs: Iterable[tuple[KernelRef | GenericRef, int]], target: str | Target = "opencl") -> None:
        cl = pytest.importorskip("pyopencl", reason="pyopencl is not installed")
        try:
            device = cl.get_platforms()[0].get_devices()[0]
        except (cl.Error, IndexError):
            pytest.skip("there is no OpenCL device")
        self.cl, self.context = cl, cl.Context([device])
        self.queue = cl.CommandQueue(self.context)
        self.kernels = GpuKernelSet(resolve(target) if isinstance(target, str) else target)
        for ref, n_args in refs:
            self.kernels.add(ref, n_args)
        newest = ["-cl-std=CL3.0"] if device.version.startswith("OpenCL 3") else []  # as the runtime does
        program = cl.Program(self.context, self.kernels.source()).build(options=newest)
        self.entries = {name: cl.Kernel(program, name) for name in self.kernels.pointers}

    def _run(self, name: str, block: Block, seed: int) -> NDArray:
        memory = self.cl.Buffer(
            self.context, self.cl.mem_flags.READ_WRITE | self.cl.mem_flags.COPY_HOST_PTR, hostbuf=block.data
        )
        threads = self.kernels.block_threads[name]
        pairs = [x for start in block.starts for x in (memory, np.uint64(start))]
        self.entries[name](self.queue, (self.kernels.grids[name] * threads,), (threads,), *pairs)
        after = np.empty_like(block.data)
        self.cl.enqueue_copy(self.queue, after, memory)
        return after


class Block:
    """Copies of arrays in one block of memory with canaries between them, as something else's memory gets them."""

    def __init__(self, arrays: Sequence[NDArray], shifts: Sequence[int]) -> None:
        self.arrays = arrays
        self.starts: list[int] = []
        at = GUARD
        for array, shift in zip(arrays, shifts or [0] * len(arrays), strict=True):
            at = -(-at // 64) * 64 + shift
            self.starts.append(at)
            at += array.nbytes + GUARD
        self.data = np.full(at, CANARY, np.uint8)
        for array, start in zip(arrays, self.starts, strict=True):
            self.data[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def results(self, after: NDArray, access: str) -> list[NDArray]:
        """What a call may have changed; fails when it changed anything else."""
        writable = np.zeros(len(self.data), bool)
        results = []
        for array, start, how in zip(self.arrays, self.starts, access, strict=True):
            if how != "r":
                end = start + array.nbytes
                writable[start:end] = True
                results.append(after[start:end].copy().view(array.dtype).reshape(array.shape))
        assert (after == self.data)[~writable].all(), "an input or memory around a buffer was written"
        return results


class EmulatedLibrary(InOneBlock):
    """The same for 64-bit ARM: a static program of the kernels, run once for a call by qemu."""

    def __init__(self, folder: Path, refs: Iterable[tuple[KernelRef | GenericRef, int]], target: str) -> None:
        self.qemu = shutil.which("qemu-aarch64-static") or pytest.skip("qemu-user-static is not installed")
        self.kernels = KernelSet(resolve(target))
        for ref, n_args in refs:
            self.kernels.add(ref, n_args)
        self.kernels.write_object(folder / "kernels.o", folder / "kernels.s")
        self.assembly = (folder / "kernels.s").read_text()
        self.kernels.write_table(folder / "table.c", 0)
        self.program = folder / "call"
        command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static", "-O1", "-s"]
        files = [Path(__file__).with_name("call.c"), folder / "table.c", folder / "kernels.o"]
        include = f"-I{C_DIR / 'include'}"
        subprocess.run([*command, include, "-o", str(self.program), *map(str, files)], check=True, capture_output=True)

    def _run(self, name: str, block: Block, seed: int) -> NDArray:
        blocks = np.random.default_rng(seed).permutation(self.kernels.grids[name])
        head = [list(self.kernels.names.values()).index(name), len(block.arrays), len(blocks), len(block.data)]
        words = np.array([*head, *block.starts, *blocks], np.int64)
        text = words.tobytes() + block.data.tobytes()
        done = subprocess.run([self.qemu, str(self.program)], input=text, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return np.frombuffer(done.stdout, np.uint8)


AnyLibrary = Library | DeviceLibrary | EmulatedLibrary
ON = ["cpu", pytest.param("opencl", marks=pytest.mark.slow)]
"""Where kernels are run, as parameters of a fixture that calls `library_on`."""


def library_on(device: str, folder: Path, refs: Iterable[tuple[KernelRef | GenericRef, int]]) -> AnyLibrary:
    """The kernels for this machine's CPU, or for its first OpenCL device."""
    return Library(folder, refs) if device == "cpu" else DeviceLibrary(refs)


def largest_frame(assembly: str) -> int:
    """Bytes of the largest stack frame, from what is subtracted from the stack pointer (x86-64)."""
    return max((int(n) for n in re.findall(r"sub\w*\s+\$(\d+), %rsp", assembly)), default=0)


def refs(params: Iterable[Any]) -> list[tuple[KernelRef, int]]:
    """Kernel references of parameter objects, which name their kernel by the module they come from."""
    return [(ref(p), len(p.args)) for p in params]


def ref(p: Any) -> KernelRef:
    return KernelRef(type(p).__module__.rpartition(".")[2], p)


def unset(*shape: int, dtype: str = "float32") -> NDArray:
    """Memory that a kernel has to write: NaN, or a value no result has."""
    return np.full(shape, np.nan if dtype == "float32" else 99, dtype)
