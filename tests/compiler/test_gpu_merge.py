"""What GPUs do in fewer launches: each merged kernel against float64, and how many launches a layer takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseq.bundle.reader import BundleFile
from edgeseq.compiler.gpu.batch import Batch, Generics
from edgeseq.compiler.gpu.cached_attention import FusedAttention
from edgeseq.compiler.gpu.joined import Joined
from edgeseq.compiler.gpu.linear import FusedLinear
from edgeseq.compiler.gpu.linear_attention import SteppedAttention
from edgeseq.compiler.gpu.linear_q import FusedLinearQ
from edgeseq.compiler.gpu.merge import _may_move, merge
from edgeseq.compiler.gpu.quantize import Quantizes
from edgeseq.compiler.gpu.selective_scan import FusedScan
from edgeseq.compiler.graph import load_graph
from edgeseq.compiler.ir import Arg, Call, GenericRef, KernelRef, Storage, Value
from edgeseq.compiler.kernels.attention_merge import AttentionMerge
from edgeseq.compiler.kernels.cached_attention import CachedAttention
from edgeseq.compiler.kernels.copy import Copy
from edgeseq.compiler.kernels.glu import Glu
from edgeseq.compiler.kernels.linear import Linear
from edgeseq.compiler.kernels.linear_q import LinearQ
from edgeseq.compiler.kernels.rms_norm import RmsNorm
from edgeseq.compiler.kernels.rotary import Rotary
from edgeseq.compiler.kernels.selective_scan import SelectiveScan
from edgeseq.compiler.lowering import Lowering, Memory
from edgeseq.compiler.pack import pack
from edgeseq.compiler.targets import resolve
from edgeseq.manifest import load_manifest
from edgeseq.models import families
from edgeseq.models.mamba import MambaConfig
from edgeseq.models.mamba2 import Mamba2Config
from edgeseq.models.mistral import MistralConfig
from edgeseq.models.source import random_source
from edgeseq.models.transformer import TransformerConfig
from edgeseq.ops import standard
from edgeseq.ops.selective_scan import selective_scan
from edgeseq.ops.sparse_attention import sparse_attention
from edgeseq.verify.tolerances import tolerance
from exporters import export
from tests import bundles

from .library import DeviceLibrary, unset
from .test_attention import sizes
from .test_kernels import Draw
from .test_quantised import empty, rounded, rounded_to, weights

K, EPS = 70, 1e-3
NORMED = [
    FusedLinear(1, m, K, K, wdtype=d, bias=bias, norm=True, norm_weight=weight, eps=EPS)
    for m, d, bias, weight in ((1, "float32", False, True), (40, "float16", True, True), (33, "float32", True, False))
]
GATED = [FusedLinear(1, 35, K, K, glu=True), FusedLinear(1, 16, K, K, glu=True, norm=True, norm_weight=True, eps=EPS)]
CONVOLVED = [
    FusedLinear(1, 50, K, K, conv=4, conv_at=17, conv_C=21, conv_bias=True, conv_silu=True),
    FusedLinear(1, 32, K, K, conv=1, conv_at=0, conv_C=32, norm=True, norm_weight=True, eps=EPS),
    FusedLinear(1, 32, K, K, conv=2, conv_at=16, conv_C=16),
    FusedLinear(1, 50, K, K, bias=True, conv=3, conv_at=5, conv_C=40, conv_bias=True),
]
GATED_Q = [
    FusedLinearQ(1, m, K, bits, "dp4a", glu=True, quant=z)
    for m, bits, z in ((64, 4, None), (64, 8, None), (64, 4, 8), (64, 8, 0), (8, 8, 0), (72, 4, 8), (111, 8, 0))
]
SCANS = [
    FusedScan(1, d, n, d, d, n, n, skip=True, dt_bias=True, dt_rank=r, dt_wdtype=t)
    for d, n, r, t in ((33, 4, 1, "float32"), (64, 16, 7, "float16"), (20, 5, 40, "float32"))
]
SCANS += [
    replace(SCANS[0], norm=True, norm_weight=True, eps=EPS),
    replace(SCANS[1], norm=True, eps=0.3),
    replace(SCANS[2], norm=True, norm_weight=True, eps=EPS, dt_rank=0),
]
STEPPED = [
    SteppedAttention(1, 4, 5, 7, 2, 2, 10, 10, 28, decay="head", scale=0.3, lddt=4, ldz=28),
    SteppedAttention(1, 3, 16, 32, 3, 1, 50, 20, 96, decay="head", dt_min=0.5, dt_max=1.0, skip=False, lddt=9, ldz=100),
    SteppedAttention(11, 2, 40, 20, 1, 2, 40, 90, 45, decay="head", softplus=False, gate=False, lddt=2),
    SteppedAttention(9, 6, 8, 64, 6, 3, 48, 24, 390, decay="head", lddt=7, ldz=400, dt_max=0.7),
]
JOINED = Joined("linear", (FusedLinear(1, 40, K, K, bias=True), FusedLinear(1, 5, 33, 33), FusedLinear(1, 16, K, K)))
JOINED_Q = Joined(
    "linear_q", (LinearQ(1, 40, K, 4, "dp4a"), LinearQ(1, 7, 200, 4, "dp4a"), LinearQ(1, 33, K, 8, "dp4a"))
)
ROTATED = Batch((("rotary", Rotary(1, 4, 32, 128, False)), ("rotary", Rotary(1, 1, 32, 32, False))))
TURNED = [
    FusedAttention(1, 4, 2, 20, 70, 80, 40, 40, 0.2),
    FusedAttention(1, 6, 1, 32, 70, 192, 32, 32, 0.2, ring=True, prefix=3, quant=8, interleaved=True),
    FusedAttention(1, 6, 3, 6, 300, 36, 18, 18, 0.3, parts=3, interleaved=True),
    FusedAttention(1, 6, 1, 10, 15, 60, 10, 10, 0.3, ring=True, prefix=3, block=2, blocks=3, seed=4),
]
ROUNDED = [Quantizes(1, k, k, zero, several=n) for k, zero, n in ((70, 8, 3), (200, 0, 2), (128, 128, 8))]
OPS = {
    Quantizes: "quantize",
    FusedLinear: "linear", FusedLinearQ: "linear_q", FusedScan: "selective_scan", Joined: "joined", Batch: "batch",
    SteppedAttention: "linear_attention", FusedAttention: "cached_attention", AttentionMerge: "attention_merge",
}  # fmt: skip


def ref(p: Any) -> KernelRef:
    return KernelRef(OPS[type(p)], p)


@pytest.fixture(scope="module")
def device() -> DeviceLibrary:
    every = [*NORMED, *GATED, *CONVOLVED, *GATED_Q, *SCANS, *STEPPED, *ROUNDED, JOINED, JOINED_Q, ROTATED, *TURNED]
    merges = [AttentionMerge(p.H, p.d, p.parts) for p in TURNED if p.parts > 1]
    return DeviceLibrary([(ref(p), len(p.args)) for p in [*every, *merges]])


def close(got: NDArray, want: NDArray) -> None:
    assert np.abs(got.reshape(-1) - want.reshape(-1)).max() <= tolerance("runtime", "float32", want)


def stored(w: NDArray, dtype: str) -> tuple[NDArray, NDArray]:
    """As the checkpoint has it, and what it means."""
    kept = w.astype(dtype)
    return kept, kept.astype(np.float64)


class Product:
    """Arguments of one merged product by name, and what its rows are."""

    def __init__(self, p: FusedLinear, d: Draw) -> None:
        self.p, x = p, d.normal(p.K)
        self.args: dict[str, NDArray] = {"x": x, "y": unset(p.M)}
        input_ = x.astype(np.float64)
        if p.norm:
            input_ = input_ / np.sqrt((input_**2).mean() + p.eps)
        if p.norm_weight:
            self.args["norm_w"] = d.normal(p.K)
            input_ = input_ * self.args["norm_w"]
        rows = []
        for name in ("w", "wu") if p.glu else ("w",):
            kept, meant = stored(d.normal(p.M, p.K), p.wdtype)
            self.args[name] = pack("rows16", kept)
            rows.append(meant @ input_)
        self.want = rows[0]
        if p.glu:
            self.want = rows[0] / (1 + np.exp(-rows[0])) * rows[1]
        if p.bias:
            self.args["bias"] = d.normal(p.M)
            self.want = self.want + self.args["bias"]


@pytest.mark.parametrize("p", [*NORMED, *GATED], ids=str)
def test_a_norm_and_a_gate_within_the_product(device: DeviceLibrary, p: FusedLinear) -> None:
    made = Product(p, Draw(1))
    (y,) = device.call(ref(p), [made.args[a] for a in p.args], "".join("w" if a == "y" else "r" for a in p.args))
    close(y, made.want)


@pytest.mark.parametrize("p", CONVOLVED, ids=str)
def test_a_convolution_behind_the_product(device: DeviceLibrary, p: FusedLinear) -> None:
    d = Draw(2)
    made = Product(p, d)
    taps, past = d.normal(p.conv, p.conv_C), d.normal(max(1, p.conv - 1), p.conv_C)
    made.args |= {"conv_w": taps, "past": past, "yc": unset(p.conv_C)}
    full = np.concatenate([past[: p.conv - 1], made.want[None, p.conv_at : p.conv_at + p.conv_C]])
    want = (taps * full).sum(0)
    if p.conv_bias:
        made.args["conv_b"] = d.normal(p.conv_C)
        want = want + made.args["conv_b"]
    want = want / (1 + np.exp(-want)) if p.conv_silu else want
    access = "".join({"y": "w", "yc": "w", "past": "m"}.get(a, "r") for a in p.args)
    out = dict(zip([a for a, how in zip(p.args, access, strict=True) if how != "r"],
                   device.call(ref(p), [made.args[a] for a in p.args], access), strict=True))  # fmt: skip
    close(out["y"], made.want)
    close(out["yc"], want)
    if p.conv > 1:
        close(out["past"], full[1:])


@pytest.mark.parametrize("p", GATED_Q, ids=str)
def test_a_gate_of_quantised_products(device: DeviceLibrary, p: FusedLinearQ) -> None:
    d, zero = Draw(3), 8 if p.bits == 4 else 0
    packed, rows = [], []
    q, scale, offset = rounded(d.normal(1, p.K), zero)
    x = (q * scale.astype(np.float64)[..., None]).reshape(-1)[: p.K]
    for _ in range(2):
        codes, scales, w = weights(d, p.M, p.K, p.bits)
        packed.append(pack("q4x16" if p.bits == 4 else "s8x16", codes, scales))
        rows.append(w @ x)
    want = rows[0] / (1 + np.exp(-rows[0])) * rows[1]
    outputs = [unset(p.M)] if p.quant is None else empty(1, p.M)
    views = [v for w in packed for v in (w, w.view(np.float16))]
    found = device.call(ref(p), [q, scale, offset, *views, *outputs], "r" * 7 + "w" * len(outputs))
    if p.quant is None:
        close(found[0], want)
        return
    rounded_to(found, np.pad(want, (0, found[0].size - p.M)), p.quant)


@pytest.mark.parametrize("p", SCANS, ids=str)
def test_a_scan_with_what_is_small_before_it(device: DeviceLibrary, p: FusedScan) -> None:
    d = Draw(4)
    u, r, skip, bias, past = d.normal(p.D), d.normal(p.dt_rank), d.normal(p.D), d.normal(p.D), d.normal(p.N, p.D)
    kept, meant = stored(0.3 * d.normal(p.D, p.dt_rank), p.dt_wdtype)
    dt = meant @ r if p.dt_rank else d.normal(p.D)
    A = -np.exp(d.normal(p.N, p.D))
    B, C, *weights = (d.normal(p.N) for _ in range(4))
    normed = [x.astype(np.float64) for x in (B, C)]
    if p.norm:
        normed = [x / np.sqrt((x * x).mean() + p.eps) for x in normed]
    if p.norm_weight:
        normed = [x * w for x, w in zip(normed, weights, strict=True)]
    wide = [v.astype(np.float64) for v in (u, A, skip, bias, past)]
    y, present = selective_scan(
        wide[0][None, None],
        dt[None, None],
        wide[1],
        normed[0][None, None],
        normed[1][None, None],
        wide[2],
        None,
        wide[3],
        wide[4][None],
    )
    packed = pack("rows16", kept) if p.dt_rank else kept
    steps = [r, packed.view(np.uint16) if p.dt_wdtype == "float16" else packed] if p.dt_rank else [dt]
    arrays = [u, *steps, *(weights if p.norm_weight else []), A, B, C, skip, bias, past, unset(p.D)]
    state, out = device.call(ref(p), arrays, "r" * (len(arrays) - 2) + "mw")
    close(out, y)
    close(state, present)


@pytest.mark.parametrize("p", ROUNDED, ids=str)
def test_several_vectors_are_rounded_in_one_launch(device: DeviceLibrary, p: Quantizes) -> None:
    d = Draw(6)
    inputs = [d.normal(1, p.K) for _ in range(p.several)]
    arrays = [a for x in inputs for a in (x, *empty(1, p.K))]
    found = device.call(ref(p), arrays, "rwww" * p.several)
    for i, x in enumerate(inputs):
        codes, scales, offsets = rounded(x, p.zero)
        q, scale, offset = found[3 * i : 3 * i + 3]
        assert np.abs(q.reshape(codes.shape).astype(int) - codes).max() <= 1
        np.testing.assert_allclose(scale.reshape(-1), scales.reshape(-1), rtol=1e-6)
        assert np.array_equal(offset.reshape(-1), -p.zero * q.reshape(-1, 32).sum(1, dtype=np.int32))
        assert np.array_equal(offset.reshape(-1) == 0, offsets.reshape(-1) == 0)


def test_what_tvm_derived_says_the_same_in_one_launch(tmp_path: Path) -> None:
    """Mixes of RWKV-7, gates of unequal widths among them: together bit for bit what each is alone."""
    config = replace(families()["rwkv7"].tiny, n_layers=1)
    calls = merged_calls("rwkv7", config, tmp_path, quant="none", dtype="fp32")
    together = [c for c in calls if isinstance(c.kernel, KernelRef) and isinstance(c.kernel.params, Generics)]
    assert max(len(c.kernel.params.parts) for c in together) == 6
    assert any(len({part.threads for part in c.kernel.params.parts}) > 1 for c in together)
    kernels = {k: len(k.func.params) for c in together for k in c.kernel.params.parts}
    library = DeviceLibrary([*kernels.items(), *((c.kernel, len(c.args)) for c in together)])
    for call in together:
        d = Draw(8)
        arrays = [d.normal(a.value.span) if a.access == "r" else unset(a.value.span) for a in call.args]
        modes = "".join(a.access for a in call.args)
        found, alone, at = library.call(call.kernel, arrays, modes), [], 0
        for part in call.kernel.params.parts:
            n = kernels[part]
            alone += library.call(part, arrays[at : at + n], modes[at : at + n])
            at += n
        assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True))


def heads(x: NDArray, n: int, width: int, repeated: int) -> NDArray:
    """Rows of x, perhaps apart, as [T,H*width] in float64, each head as often as its neighbours share it."""
    own = x.astype(np.float64)[:, : n * width].reshape(len(x), n, width)
    return np.repeat(own, repeated, axis=1).reshape(len(x), -1)


@pytest.mark.parametrize("p", STEPPED, ids=str)
def test_a_recurrence_with_its_step_sizes_and_its_gate(device: DeviceLibrary, p: SteppedAttention) -> None:
    d = Draw(8)
    widths = {"q": p.ldq, "k": p.ldk, "v": p.ldv, "dt": p.lddt, "z": p.ldz}
    args = {a: d.normal(p.T, n) for a, n in widths.items() if n}
    args |= {"dt_bias": d.normal(p.H), "A": -np.exp(d.normal(p.H)), "D": d.normal(p.H), "past": d.normal(p.H, p.K, p.V)}
    dt = args["dt"].astype(np.float64)[:, : p.H]
    dt = np.log1p(np.exp(dt + args["dt_bias"])) if p.softplus else dt
    dt = np.clip(dt, p.dt_min or None, p.dt_max)
    v = heads(args["v"], p.H, p.V, 1)
    q, k = heads(args["q"], p.Hq, p.K, p.H // p.Hq), heads(args["k"], p.Hk, p.K, p.H // p.Hk)
    each = np.repeat(dt, p.V, axis=1)
    y, present = standard.linear_attention(
        q[None], k[None], (each * v)[None], args["past"][None].astype(np.float64), (dt * args["A"])[None], None,
        "gated", p.H, p.H, p.scale,
    )  # fmt: skip
    y = y[0] + (np.repeat(args["D"], p.V) * v if p.skip else 0)
    if p.gate:
        z = heads(args["z"], p.H, p.V, 1)
        y = y * z / (1 + np.exp(-z))
    args["o"] = unset(p.T, p.H * p.V)
    access = "".join({"past": "m", "o": "w"}.get(a, "r") for a in p.args)
    state, out = device.call(ref(p), [args[a] for a in p.args], access)
    close(out, y)
    close(state, present)


def test_products_that_share_a_launch(device: DeviceLibrary) -> None:
    d = Draw(5)
    made = [Product(p, d) for p in JOINED.parts]
    arrays = [m.args[a] for m in made for a in m.p.args]
    access = "".join("w" if a == "y" else "r" for m in made for a in m.p.args)
    for m, y in zip(made, device.call(ref(JOINED), arrays, access), strict=True):
        close(y, m.want)


def test_quantised_products_that_share_a_launch(device: DeviceLibrary) -> None:
    d, arrays, wants = Draw(6), [], []
    for p in JOINED_Q.parts:
        q, scale, offset = rounded(d.normal(1, p.K), 8 if p.bits == 4 else 0)
        codes, scales, w = weights(d, p.M, p.K, p.bits)
        packed = pack("q4x16" if p.bits == 4 else "s8x16", codes, scales)
        arrays += [q, scale, offset, packed, packed.view(np.float16), unset(p.M)]
        wants.append(w @ (q * scale.astype(np.float64)[..., None]).reshape(-1)[: p.K])
    for y, want in zip(device.call(ref(JOINED_Q), arrays, "rrrrrw" * 3), wants, strict=True):
        close(y, want)


def test_rotations_that_share_a_launch(device: DeviceLibrary) -> None:
    d = Draw(7)
    angle = d.normal(16)
    c, s = np.cos(angle), np.sin(angle)
    xs = [d.normal(128), d.normal(32)]
    arrays = [a for x in xs for a in (x, c, s, unset(x.size))]
    for x, y in zip(xs, device.call(ref(ROTATED), arrays, "rrrw" * 2), strict=True):
        a, b = np.split(x.reshape(-1, 32).astype(np.float64), 2, axis=1)
        close(y, np.concatenate([a * c - b * s, b * c + a * s], axis=1))


def turned(x: NDArray, cos: NDArray, sin: NDArray, interleaved: bool) -> NDArray:
    """Heads x [H,d] rotated in float64."""
    a, b = (x[:, 0::2], x[:, 1::2]) if interleaved else np.split(x, 2, axis=1)
    parts = [a * cos - b * sin, b * cos + a * sin]
    return np.stack(parts, -1).reshape(x.shape) if interleaved else np.concatenate(parts, 1)


@pytest.mark.parametrize("p", TURNED, ids=sizes)
@pytest.mark.parametrize("position", [0, 1, 9, 14])
def test_an_attention_that_rotates(device: DeviceLibrary, p: FusedAttention, position: int) -> None:
    d = Draw(position)
    angle, (q, k, v) = d.normal(p.d // 2), (d.normal(h, p.d) for h in (p.H, p.Hk, p.Hk))
    cos, sin = np.cos(angle), np.sin(angle)
    past = [d.normal(p.Hk, p.N, p.d) for _ in "kv"]
    at = np.array([position], np.int64)
    given = [turned(x.astype(np.float64), cos, sin, p.interleaved).reshape(1, 1, -1) for x in (q, k)]
    rest = (v.reshape(1, 1, -1).astype(np.float64), past[0][None], past[1][None], at, p.H, p.Hk, p.scale)
    if p.ring:
        want, *present = sparse_attention(*given, *rest, p.prefix, p.block, p.blocks, p.seed)
    else:
        want, *present = standard.cached_attention(*given, *rest)
    outputs = [unset(p.H * p.d)] if p.parts == 1 else [unset(p.H * p.parts * (p.d + 2))]
    outputs = outputs if p.quant is None else empty(1, p.H * p.d)
    arrays = [q, k, v, *past, at, cos, sin, *outputs]
    key, value, *found = device.call(ref(p), arrays, "rrrmmrrr" + "w" * len(outputs))
    for got, expected in zip((key, value), present, strict=True):
        close(got, expected)
    if p.parts > 1:
        found = device.call(ref(AttentionMerge(p.H, p.d, p.parts)), [found[0], unset(p.H, p.d)], "rw")
    if p.quant is None:
        close(found[0], want)
    else:
        rounded_to(found, want, p.quant)


def call(reads: list[Storage], writes: list[Storage]) -> Call:
    def arg(s: Storage, access: Any) -> Arg:
        return Arg(Value(s.name, "float32", (4,), s), access)

    return Call(KernelRef("copy", None), (*(arg(s, "r") for s in reads), *(arg(s, "w") for s in writes)))


def test_a_call_moves_only_past_what_it_does_not_touch() -> None:
    a, b, c, d = (Storage("arena", name, 16) for name in "abcd")
    state = Storage("state", "s", 16)
    free = [call([a], [b]), call([b], [c]), call([a], [d])]
    assert _may_move(free, 0, 2)
    assert not _may_move([call([a], [b]), call([b], [c]), call([c], [d])], 0, 2), "its input is made in between"
    assert not _may_move([call([a], [b]), call([state], [c]), call([a], [state])], 0, 2), "it overwrites what is read"
    assert not _may_move([call([a], [b]), call([a], [state]), call([state], [d])], 0, 2), "it reads what is overwritten"


def reading_a_state(kind: str, written: bool) -> list[Call]:
    """Calls that could become one, the first of which read a slot; written: that somebody overwrites behind them."""
    slot = Value("s", "float32", (16,), Storage("state", "s", 64))
    g, u, y, w, rate = (
        Value(n, "float32", (16,), Storage(k, n, 64))
        for n, k in (("g", "arena"), ("u", "arena"), ("y", "arena"), ("w", "weight"), ("w2", "weight"))
    )

    def made(op: str, params: Any, *values: Value, outputs: int = 1) -> Call:
        last = len(values) - outputs
        return Call(KernelRef(op, params), tuple(Arg(v, "r" if i < last else "w") for i, v in enumerate(values)))

    product = Linear(1, 16, 16, 16)
    write = [made("copy", Copy(16, "float32"), u if kind == "norm" else y, slot)] if written else []
    if kind == "norm":
        return [made("rms_norm", RmsNorm(1, 16, 16, EPS, False), slot, g), *write, made("linear", product, g, w, y)]
    if kind == "gate":
        makers = [made("linear", product, slot, w, g), made("linear", product, slot, rate, u)]
        return [*makers, *write, made("glu", Glu(1, 16, 16, 16), g, u, y)]
    if kind in ("step sizes", "scan norms"):
        scan = SelectiveScan(1, 16, 16, 16, 16, 16, 16)
        others = {a: Value(a, "float32", (16,), Storage("arena", a, 64)) for a in scan.args}
        if kind == "step sizes":
            makers, given = [made("linear", product, slot, w, g)], {"dt": g}
        else:
            norm = RmsNorm(1, 16, 16, EPS, False)
            makers, given = [made("rms_norm", norm, slot, v) for v in (g, u)], {"B": g, "C": u}
        return [*makers, *write, made("selective_scan", scan, *(others | given).values())]
    turn, angles = Rotary(1, 1, 16, 16, False), (w, rate)
    key, value, position = (Value(n, "float32", (16,), Storage("state", n, 64)) for n in ("k", "v", "p"))
    attention = made(
        "cached_attention", CachedAttention(1, 1, 1, 16, 1, 16, 16, 16, 1.0), g, u, w, key, value, position, y
    )
    return [made("rotary", turn, slot, *angles, g), made("rotary", turn, slot, *angles, u), *write, attention]


@pytest.mark.parametrize("kind", ["norm", "gate", "step sizes", "scan norms", "rotations"])
def test_what_reads_a_state_stays_before_who_overwrites_it(kind: str) -> None:
    gpu = resolve("opencl").gpu
    free, bound = reading_a_state(kind, False), reading_a_state(kind, True)
    merge(free, gpu)
    assert len(free) == 1, "nothing is in the way"
    merge(bound, gpu)
    writer = next(i for i, c in enumerate(bound) if any(a.value.name == "s" and a.access == "w" for a in c.args))
    readers = [i for i, c in enumerate(bound) if any(a.value.name == "s" and a.access == "r" for a in c.args)]
    assert readers and max(readers) < writer


@pytest.mark.parametrize(("family", "most"), [("mamba", 4), ("transformer", 6)])
def test_launches_of_a_layer(family: str, most: int) -> None:
    """Norms, convolutions, gates, rotations and step sizes cost no launch of their own."""
    with BundleFile(bundles.bundled(family, "opencl"), check_weights=False) as file:
        plan = file.plan
        counts = Counter(x.kernel for x in plan.step.launches)
    layers = max(counts.values())
    once = sum(n for n in counts.values() if n < layers)
    assert sum(counts.values()) - once <= most * layers, counts


def hybrid(name: str, **fields: Any) -> Any:
    return replace(families()[name].tiny, n_layers=3, **fields)


COUNTED: dict[str, tuple[Any, int, int]] = {
    "mamba": (MambaConfig(61, 64, 3, 128, d_state=4, dt_rank=4), 6, 4),
    "mamba2": (Mamba2Config(61, 64, 3, 4, 32, 16), 6, 3),
    "mamba2 in groups": (Mamba2Config(61, 64, 3, 4, 32, 16, n_groups=2), 8, 5),
    "transformer": (TransformerConfig(61, 64, 3, 4, 2, 32, 128), 7, 5),
    "mistral": (MistralConfig(61, 64, 3, 4, 2, 32, 128, window=16), 7, 5),
    "falcon-mamba": (hybrid("falcon-mamba"), 7, 5),
    "jamba": (hybrid("jamba", attention_at=(0,), experts_at=()), 10, 7),
    "bamba": (hybrid("bamba", attention_at=(0,)), 9, 5),
    "samba": (hybrid("samba", attention_at=(0,)), 9, 6),
    "zamba2": (hybrid("zamba2", shared_at=(0,)), 6, 3),
    "falcon-h1": (hybrid("falcon-h1"), 11, 7),
    "retnet": (hybrid("retnet"), 10, 8),
    "gated-delta-net": (hybrid("gated-delta-net"), 15, 10),
    "rwkv6": (hybrid("rwkv6"), 31, 25),
    "rwkv7": (hybrid("rwkv7"), 25, 20),
    "mixtral": (hybrid("mixtral"), 14, 12),
}
"""A model whose two last layers are alike, and the launches that one of them takes, quantised and not, as in
docs/opencl.md."""
LONG = 1 << 14  # tokens of context, so that an attention is cut into parts


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [("int8", "fp32"), *(pytest.param(*s, marks=pytest.mark.slow) for s in (("int4", "fp32"), ("none", "fp16")))],
)
@pytest.mark.parametrize("name", COUNTED)
def test_launches_of_a_layer_are_those_of_the_page(name: str, quant: str, dtype: str, tmp_path: Path) -> None:
    config, quantised, plain = COUNTED[name]
    made = launches_of_a_layer(name.partition(" ")[0], config, tmp_path, quant=quant, dtype=dtype)
    assert made == (plain if quant == "none" else quantised)


def test_a_launch_takes_no_more_arguments_than_opencl_promises(tmp_path: Path) -> None:
    """Eight sums of twelve inputs each are two launches, not one of 104 pointers."""
    calls = []
    for i in range(8):
        arg = [Arg(Value(f"{i}.{j}", "float32", (4,), Storage("arena", f"{i}.{j}", 16)), "r") for j in range(13)]
        arg[-1] = Arg(arg[-1].value, "w")
        calls.append(Call(GenericRef(f"{i}", "sum", None, 1), tuple(arg)))
    merge(calls, resolve("opencl").gpu)
    assert [len(c.args) for c in calls] == [52, 52]


@pytest.mark.parametrize("d_ff", [128, 136])
def test_at_most_eight_launches_of_a_long_attention(d_ff: int, tmp_path: Path) -> None:
    config = TransformerConfig(61, 64, 3, 4, 2, 32, d_ff)
    assert launches_of_a_layer("transformer", config, tmp_path, quant="int8", context=LONG) == 8


def launches_of_a_layer(family: str, config: Any, tmp_path: Path, **options: Any) -> int:
    """From the calls of the step graph: those of the last of three layers, from the end of the one before."""
    calls = merged_calls(family, config, tmp_path, **options)
    writes = [max((a.value.name for a in c.args if a.access != "r"), key=lambda n: "layers." in n) for c in calls]
    ends = [max(i for i, n in enumerate(writes) if f"layers.{layer}." in n) for layer in range(3)]
    return ends[2] - ends[1]


def merged_calls(family: str, config: Any, tmp_path: Path, context: int = 64, **options: Any) -> list[Call]:
    """Those of the step graph of a random model for `opencl`."""
    source = random_source(f"random-{family}", families()[family], config)
    export(source, tmp_path / "export", context=context, chunks=[], calibrate=0, **options)
    manifest, target = load_manifest(tmp_path / "export"), resolve("opencl")
    lowering = Lowering(load_graph(tmp_path / "export" / manifest.step.file), manifest.step.signature, Memory(), target)
    calls = lowering.run()
    merge(calls, target.gpu)
    return calls
