"""How often GPU kernels touch memory: states once each way whatever the chunk, weights of a step in 16-byte words."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from edgeseq.compiler.gpu import linear, linear_q
from edgeseq.compiler.gpu.linear import FusedLinear
from edgeseq.compiler.gpu.linear_q import FusedLinearQ
from edgeseq.compiler.gpu.selective_scan import FusedScan
from edgeseq.compiler.kernels.causal_conv import CausalConv
from edgeseq.compiler.kernels.diag_scan import DiagScan
from edgeseq.compiler.kernels.gated_scan import GatedScan
from edgeseq.compiler.kernels.linear import Linear
from edgeseq.compiler.kernels.linear_q import LinearQ
from edgeseq.compiler.kernels.selective_scan import SelectiveScan
from edgeseq.compiler.kernels.wkv4 import Wkv4
from edgeseq.compiler.targets import resolve
from edgeseq.compiler.tvm_api import structural_map, tirx, tvm

from .ptx import loads, made_for, needs_nvcc, nvcc
from .test_gpu_kernels import _linear_attention
from .test_linear_attention import KINDS


class Traffic:
    """Elements that all threads of a launch read from and write to one argument; conditions count as met."""

    def __init__(self, func: Any, argument: int) -> None:
        self.argument = func.params[argument]
        self.buffers: list[Any] = []
        self.read = self.written = 0
        self._statement(func.body, 1)

    def _mine(self, buffer: Any) -> bool:
        return any(buffer.same_as(b) for b in self.buffers)

    def _statement(self, s: Any, times: int) -> None:
        if isinstance(s, tirx.SeqStmt):
            for part in s.seq:
                self._statement(part, times)
        elif isinstance(s, tirx.DeclBuffer) and s.data.same_as(self.argument):
            self.buffers.append(s.buffer)
        elif isinstance(s, tirx.AttrStmt):
            self._statement(s.body, times * int(s.value) if s.attr_key == "thread_extent" else times)
        elif isinstance(s, tirx.For):
            self._statement(s.body, times * int(s.extent))
        elif isinstance(s, tirx.IfThenElse):
            self._expression(s.condition, times)
            for case in filter(None, (s.then_case, s.else_case)):
                self._statement(case, times)
        elif isinstance(s, tirx.BufferStore):
            self.written += times * self._mine(s.buffer)
            for e in (s.value, *s.indices):
                self._expression(e, times)
        elif isinstance(s, tirx.Evaluate | tirx.Bind):
            self._expression(s.value, times)
        else:
            assert isinstance(s, tirx.AllocBuffer | tirx.DeclBuffer), f"{type(s).__name__} is not counted"

    def _expression(self, e: Any, times: int) -> None:
        def load(node: Any) -> Any:
            self.read += times * self._mine(node.source)
            return node

        structural_map(e, [(tvm.ir.expr.TensorLoad, load)])


STATES: list[Any] = [
    *(_linear_attention(decay, erase, t) for decay, erase in KINDS for t in (1, 64)),
    *(SelectiveScan(t, 1536, 16, 1536, 1536, 80, 80, 3072, True, True, True) for t in (1, 64)),
    FusedScan(1, 1536, 16, 1536, 1536, 80, 80, skip=True, dt_bias=True, dt_rank=48, dt_wdtype="float16"),
    *(DiagScan(t, 1024, 32, 1024, skip=True) for t in (1, 64)),
    *(GatedScan(t, 2560, 2560, 2560) for t in (1, 64)),
    *(Wkv4(t, 1024, 1024, 1024) for t in (1, 64)),
    CausalConv(1, 3072, 4, 3072, True, True),  # of a chunk, lines of threads that begin later read its inputs instead
]
ELEMENTS = {
    "LinearAttention": lambda p: p.H * p.K * p.V,
    "SelectiveScan": lambda p: p.D * p.N,
    "FusedScan": lambda p: p.D * p.N,
    "DiagScan": lambda p: 2 * p.N * p.C,
    "GatedScan": lambda p: p.D,
    "Wkv4": lambda p: 3 * p.C,
    "CausalConv": lambda p: (p.k - 1) * p.C,
}


@pytest.mark.parametrize("p", STATES, ids=lambda p: f"{type(p).__name__}-{'-'.join(map(str, vars(p).values()))}"[:80])
def test_a_state_is_read_once_and_written_once(p: Any) -> None:
    op = "selective_scan" if isinstance(p, FusedScan) else type(p).__module__.rpartition(".")[2]
    module = importlib.import_module(f"edgeseq.compiler.gpu.{op}")
    traffic = Traffic(module.build("k", p, resolve("cuda-sm90").gpu).func, p.args.index("past"))
    want = ELEMENTS[type(p).__name__](p)
    assert (traffic.read, traffic.written) == (want, want)


PRODUCTS: list[Any] = [
    *(Linear(1, m, k, k, d) for d in ("float32", "float16", "bfloat16") for m, k in ((5120, 2560), (768, 1536))),
    *(LinearQ(1, m, k, bits, "dp4a") for bits in (8, 4) for m, k in ((5120, 2560), (768, 2048))),
    FusedLinear(1, 5120, 2560, 2560, "float16", glu=True, norm=True, norm_weight=True, eps=1e-5),
    FusedLinearQ(1, 5120, 2560, 4, "dp4a", glu=True, quant=8),
]
GUARDED: list[Any] = [FusedLinear(1, 1984, 768, 768, "float16", glu=True, norm=True, eps=1e-5)]
"""17 sums of 1024 threads meet; its last rows are guarded, which a count of loads does not see."""


def _op(p: Any) -> str:
    return "linear_q" if isinstance(p, LinearQ) else "linear"


@pytest.mark.parametrize("p", PRODUCTS, ids=lambda p: f"{type(p).__name__}-{'-'.join(map(str, vars(p).values()))}"[:60])
def test_a_step_reads_every_weight_once_in_16_byte_words(p: Any) -> None:
    """Scales of int4 and int8 are in words of 8 bytes; the 4 or 8 lanes of a warp that have a block of the same rows
    ask for one together."""
    module = linear_q if isinstance(p, LinearQ) else linear
    func, params = module.build("k", p, resolve("cuda-sm90").gpu).func, module.parameters(p)
    packed = 16 * p.K * p.M // 16 * {"float32": 4, "float16": 2, "bfloat16": 2}[p.wdtype] if _op(p) == "linear" else 0
    packed = packed or p.M * p.K * p.bits // 8
    for argument, (name, dtype, _) in enumerate(params):
        if name in ("w", "wu"):
            assert dtype == "uint32x4" and Traffic(func, argument).read == packed // 16
        elif name in ("ws", "wus"):
            assert dtype == "uint32x2" and Traffic(func, argument).read == p.bits * (p.M * p.K // 32 * 2 // 8)


@needs_nvcc
def test_ptx_has_the_loads_that_the_kernels_ask_for(tmp_path: Path) -> None:
    """As many narrow ones as words of weights have activations, no weight among them."""
    source, names = made_for("cuda-sm87", [(_op(p), p) for p in PRODUCTS + GUARDED])
    nvcc(source, tmp_path, "-cubin", "-arch=sm_87")  # which refuses more than 48 KiB of shared memory
    nvcc(source, tmp_path, "-ptx", "-arch=compute_87")
    text = (tmp_path / "image").read_text()
    for p, name in zip(PRODUCTS + GUARDED, names, strict=True):
        found = loads(text, name)
        wide = found["v4.u32"] + found["v4.f32"]
        assert wide and not {"u16", "u8", "s8", "u64"} & set(found), (name, found)
        if _op(p) == "linear":  # an activation, and its norm's weight, for each word
            assert found["f32"] <= wide * (2 if getattr(p, "norm", False) else 1) and not found["u32"], (name, found)
        else:  # scales beside the words; an activation's scale, offset and codes
            assert found["v2.u32"] == wide and found["f32"] <= wide and found["u32"] <= 3 * wide, (name, found)
