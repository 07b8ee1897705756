"""GPU kernels: there is one for every CPU kernel, each runs on OpenCL, and CUDA's compiler keeps them in registers.

Every variant against its definition is a matter of the other files' `opencl` parameters, which are slow.
"""

from __future__ import annotations

import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeseq.compiler import gpu, kernels
from edgeseq.compiler.gpu.codegen import GpuKernelSet
from edgeseq.compiler.kernels.attention_merge import AttentionMerge
from edgeseq.compiler.kernels.cached_attention import CachedAttention
from edgeseq.compiler.kernels.causal_conv import CausalConv
from edgeseq.compiler.kernels.expert_order import ExpertOrder
from edgeseq.compiler.kernels.linear_attention import LinearAttention
from edgeseq.compiler.kernels.rms_norm import RmsNorm
from edgeseq.compiler.kernels.selective_scan import SelectiveScan
from edgeseq.compiler.targets import resolve

from . import (
    test_attention,
    test_conv,
    test_expert_kernels,
    test_gated_scan,
    test_kernels,
    test_layer_norm,
    test_linear_attention,
    test_long_conv,
    test_quantised,
    test_scans,
    test_sorting,
    test_wkv4,
    variants,
)
from .library import DeviceLibrary, ref, refs


def _linear_attention(decay: str, erase: str, tokens: int) -> LinearAttention:
    """16 heads of 128 x 128."""
    width, heads = 2048, 16
    rows = {"none": 0, "constant": 0, "head": heads, "key": width}[decay]
    return LinearAttention(
        tokens, heads, 128, 128, heads, heads, width, width, width, decay, erase, rows,  # type: ignore[arg-type]
        {"none": 0, "key": heads, "free": width}[erase], width if erase == "free" else 0, 0.1,
    )  # fmt: skip


FULL_SIZE: list[Any] = [
    *(_linear_attention(decay, erase, t) for decay, erase in test_linear_attention.KINDS for t in (1, 64)),
    *(SelectiveScan(t, 1536, 16, 1536, 1536, 80, 80, 3072, True, True, True) for t in (1, 64)),
    *(CachedAttention(t, 32, 8, 128, 4096, 4096, 1024, 1024, 0.09) for t in (1, 64)),
    CachedAttention(1, 32, 8, 128, 4096, 4096, 1024, 1024, 0.09, parts=16),
    AttentionMerge(32, 128, 16),
    RmsNorm(1, 4096, 4096, 1e-5, True),
    RmsNorm(1, 4096, 4096, 1e-5, True, quant=8),
    CausalConv(1, 3072, 4, 3072, True, True),
]


def test_every_kernel_has_one_for_gpus() -> None:
    mine, all_ = ({m.name for m in pkgutil.iter_modules(p.__path__) if m.name[0] != "_"} for p in (gpu, kernels))
    assert all_ - mine == {"linear_attention_chunk"}, "which the rules choose on CPUs alone"


def _given(test: Callable[..., Any], **values: Any) -> Callable[..., None]:
    """A hypothesis test with fixed values."""
    return lambda library, p: test.hypothesis.inner_test(library, p, **values)  # type: ignore[attr-defined]


LINEAR_ATTENTION = next(p for p in test_linear_attention.VARIANTS if (p.decay, p.erase, p.T) == ("key", "free", 4))
SOME: list[tuple[Callable[..., None], Any]] = [
    (_given(test_kernels.test_linear, seed=0), variants.linears()[2]),
    (_given(test_kernels.test_rms_norm, seed=0, scale=1.0), variants.norms()[2]),
    (_given(test_layer_norm.test_kernel_equals_its_definition, seed=0, shift=-1000.0), test_layer_norm.VARIANTS[1]),
    (_given(test_kernels.test_embed, seed=0), variants.embeds()[2]),
    (_given(test_kernels.test_causal_conv, seed=0), variants.convs()[3]),
    (_given(test_kernels.test_selective_scan, seed=0), variants.scans()[2]),
    (_given(test_kernels.test_glu, seed=0, size=1.0), variants.glus()[2]),
    (_given(test_kernels.test_rotary, seed=0), variants.rotaries()[1]),
    (_given(test_kernels.test_cached_attention, seed=0, where=0.7, size=1.0), variants.attentions()[1]),
    (test_kernels.test_copy, variants.copies()[1]),
    (_given(test_quantised.test_product, seed=0), next(p for p in test_quantised.PRODUCTS if p.isa == "dp4a")),
    (
        _given(test_quantised.test_activations_are_rounded_to_the_nearest_code, seed=0, zeroed=True),
        test_quantised.ROUNDINGS[2],
    ),
    (_given(test_quantised.test_embedding, seed=0), test_quantised.TABLES[3]),
    (_given(test_linear_attention.test_kernel_equals_its_definition, seed=0), LINEAR_ATTENTION),
    (_given(test_wkv4.test_kernel_equals_its_definition, fresh=False, seed=0, spread=1.0), test_wkv4.VARIANTS[3]),
    (test_conv.test_kernel, test_conv.VARIANTS[2]),
    (_given(test_sorting.test_sorted_as_numpy_does_it, seed=0, few=True), test_sorting.SORTS[2]),
    (_given(test_sorting.test_cumulative_equals_its_definition, seed=0), test_sorting.SUMS[1]),
    (lambda library, p: test_scans.test_kernel_equals_its_definition(library, p, 0), test_scans.VARIANTS[3]),
    (lambda library, p: test_scans.test_kernel_equals_its_definition(library, p, 0), test_scans.VARIANTS[8]),
    (lambda library, p: test_gated_scan.test_kernel_equals_the_definition(p, library), test_gated_scan.KERNELS[1]),
    (test_long_conv.test_kernel_equals_its_definition_at_any_position, test_long_conv.VARIANTS[3]),
    (
        lambda library, p: test_expert_kernels.test_kernel_equals_the_definition(p, True, library),
        test_expert_kernels.CASES[5],
    ),
]


@pytest.fixture(scope="module")
def library() -> DeviceLibrary:
    experts = test_expert_kernels.CASES[5]
    return DeviceLibrary(refs([*(p for _, p in SOME), ExpertOrder(experts.T * experts.A, experts.E)]))


@pytest.mark.parametrize(("check", "p"), SOME, ids=[ref(p).op for _, p in SOME])
def test_one_variant_of_each(library: DeviceLibrary, check: Callable[..., None], p: Any) -> None:
    check(library, p)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("oclgrind") is None, reason="oclgrind is not installed")
def test_no_thread_races_another(tmp_path: Path) -> None:
    """Oclgrind interprets the kernels: no race between barriers, no access outside memory."""
    log = tmp_path / "log"
    this = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "one_variant", __file__]
    done = subprocess.run(["oclgrind", "--data-races", "--log", str(log), *this], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()[-2000:]
    assert log.read_text() == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_keeps_every_variant_in_registers(tmp_path: Path) -> None:
    """All variants compile; at sizes of real models nothing goes to local memory."""
    made = GpuKernelSet(resolve("cuda-sm90"))
    modules = (test_attention, test_conv, test_layer_norm, test_linear_attention, test_long_conv, test_scans, test_wkv4)
    every = [p for m in modules for p in getattr(m, "VARIANTS", [])]
    every += [*variants.EVERY, *test_quantised.PRODUCTS, *test_quantised.SOURCES, *test_quantised.TABLES]
    every += [*test_quantised.ROUNDINGS, *test_sorting.SORTS, *test_sorting.SUMS, *test_gated_scan.KERNELS]
    every += [*test_attention.CHUNKS, *test_attention.RING_CHUNKS, *test_attention.PARTS, *test_attention.DRAWN]
    every += [*test_expert_kernels.CASES, ExpertOrder(26, 3)]
    full = {made.add(ref(p), len(p.args)) for p in FULL_SIZE}
    for p in dict.fromkeys(every):
        made.add(ref(p), len(p.args))
    source = tmp_path / "kernels.cu"
    source.write_text(made.source())
    command = ["nvcc", "-cubin", "-arch=sm_90", "--std=c++17", "-O3", "-Xptxas", "-v", "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    found = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame", done.stderr, re.S)
    frames = {name: int(size) for name, size in found}
    assert frames.keys() == made.pointers.keys()
    assert {name: frames[name] for name in full if frames[name]} == {}
