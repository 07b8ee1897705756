"""OpenCL C for phones: halves and sub-groups compile as such, compute the same without them, and halves are exact."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices.profile import Gpu
from edgeseq.compiler.gpu.codegen import GpuKernelSet
from edgeseq.compiler.gpu.source import preamble
from edgeseq.compiler.kernels.expert_linear import ExpertLinear
from edgeseq.compiler.kernels.expert_order import ExpertOrder
from edgeseq.compiler.targets import resolve

from .library import DeviceLibrary, ref, refs
from .test_gpu_kernels import SOME

PHONES = ("snapdragon-8-gen-3", "tensor-g3")
CLANG = next((c for c in ("clang", *(f"clang-{n}" for n in range(21, 13, -1))) if shutil.which(c)), None)
needs_clang = pytest.mark.skipif(CLANG is None, reason="clang is not installed")
EXTENSIONS = {
    "none": "-all",
    "half": "-all,+cl_khr_fp16",
    "all": "-all,+cl_khr_fp16,+cl_khr_subgroups,+__opencl_c_subgroups,+cl_khr_subgroup_shuffle",
}


def _refs() -> list[Any]:
    experts = next(p for _, p in SOME if isinstance(p, ExpertLinear))
    return refs([*(p for _, p in SOME), ExpertOrder(experts.T * experts.A, experts.E)])


@pytest.fixture(scope="module", params=PHONES)
def text(request: pytest.FixtureRequest) -> str:
    made = GpuKernelSet(resolve(request.param))
    for kernel, n_args in _refs():
        made.add(kernel, n_args)
    return made.source()


def _clang(*arguments: object) -> str:
    done = subprocess.run([str(CLANG), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return done.stdout


@needs_clang
@pytest.mark.slow
@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_every_kernel_compiles_with_and_without_the_extensions(text: str, extensions: str, tmp_path: Path) -> None:
    source = tmp_path / "kernels.cl"
    source.write_text(text)
    made = _clang(
        "-x", "cl", "-cl-std=CL3.0", "-target", "spir64", "-Xclang", "-finclude-default-header",
        "-Xclang", f"-cl-ext={EXTENSIONS[extensions]}", "-Werror", "-Wno-ignored-pragmas",
        "-O1", "-S", "-emit-llvm", "-o", "-", source,
    )  # fmt: skip
    assert ("fpext half" in made) == (extensions != "none")
    assert ("sub_group_shuffle_xor" in made) == (extensions == "all")
    assert "dot_4x8packed_ss_int" in made
    assert made.count("reqd_work_group_size") >= text.count("__kernel void")


@needs_clang
@pytest.mark.parametrize("half", [True, False], ids=["half", "integers"])
def test_halves_become_the_floats_that_they_are(half: bool, tmp_path: Path) -> None:
    """All 65536, by this machine's own half arithmetic (F16C) and by integers; NaNs stay NaNs."""
    if half and "f16c" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no half arithmetic")
    gpu = Gpu("opencl", half=half)
    source = tmp_path / "half.cl"
    source.write_text(
        preamble(gpu)
        + """
void convert(__global const ushort* from, __global float* to)
{
    for (uint i = 0; i < 65536; i++)
        to[i] = es_half(from[i]);
}
"""
    )
    object_, shared = tmp_path / "half.o", tmp_path / "half.so"
    extensions = "+cl_khr_fp16" if half else "-cl_khr_fp16"
    _clang(
        "-x", "cl", "-cl-std=CL3.0", "-target", "x86_64-linux-gnu", "-mf16c", "-Xclang", f"-cl-ext={extensions}", "-O2",
        "-fPIC", "-Xclang", "-finclude-default-header", "-c", "-o", object_, source,
    )  # fmt: skip
    code = subprocess.run(["objdump", "-d", str(object_)], capture_output=True, text=True, check=True).stdout
    assert ("vcvtph2ps" in code) == half
    _clang("-shared", "-o", shared, object_)
    bits = np.arange(65536, dtype=np.uint16)
    floats = np.empty(65536, np.float32)
    ctypes.CDLL(str(shared)).convert(ctypes.c_void_p(bits.ctypes.data), ctypes.c_void_p(floats.ctypes.data))
    np.testing.assert_array_equal(floats, bits.view(np.float16).astype(np.float32))


@pytest.fixture(scope="module", params=PHONES)
def library(request: pytest.FixtureRequest) -> DeviceLibrary:
    return DeviceLibrary(_refs(), request.param)


@pytest.mark.slow
@pytest.mark.parametrize(("check", "p"), SOME, ids=[ref(p).op for _, p in SOME])
def test_the_same_text_runs_on_any_device(library: DeviceLibrary, check: Any, p: Any) -> None:
    """PoCL has neither halves nor sub-groups: what would be shuffled goes through local memory.

    tests/e2e/test_opencl_half.py runs this on a driver that has them.
    """
    check(library, p)


def test_the_text_goes_by_the_profile() -> None:
    plain = Gpu("opencl")
    assert "cl_khr_fp16" not in preamble(plain) and "sub_group" not in preamble(plain)
    assert "cl_khr_fp16" in preamble(replace(plain, half=True))
    assert "#define ES_SUBGROUP 16\n" in preamble(replace(plain, subgroup=16))
