"""RWKV a second time, in numpy float64, one token at a time and straight from BlinkDL's tensors: the papers' formulas
(arXiv 2305.13048 for version 4, 2404.05892 for 5 and 6, 2503.14456 for 7) in the order in which they are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]
Weights = Mapping[str, Row]


def layer_norm(x: Row, weight: Row, bias: Row, eps: float = 1e-5) -> Row:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def sigmoid(x: Row) -> Row:
    return 1.0 / (1.0 + np.exp(-x))


def head_norm(x: Row, w: Weights, heads: int) -> Row:
    each = x.reshape(heads, -1)
    mean, var = each.mean(1, keepdims=True), each.var(1, keepdims=True)
    return ((each - mean) / np.sqrt(var + 64e-5)).reshape(-1) * w["ln_x.weight"] + w["ln_x.bias"]


class Layer:
    """Weights of a layer's time or channel mixing by their short names, vectors flat; the state is in `memory`."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.w = {n.removeprefix(prefix): x for n, x in weights.items() if n.startswith(prefix)}
        self.w = {n: x.reshape(-1) if x.ndim == 3 and x.shape[:2] == (1, 1) else x for n, x in self.w.items()}
        self.previous: Row | None = None
        self.memory: dict[str, Row] = {}

    def before(self, x: Row) -> Row:
        last = np.zeros_like(x) if self.previous is None else self.previous
        self.previous = x
        return last


def time_mix_4(layer: Layer, x: Row, first: dict[str, Row]) -> Row:
    """Equation 16 without any stabiliser: float64 has the range for the weights drawn here."""
    w, last = layer.w, layer.before(x)
    r, k, v = (w[f"{n}.weight"] @ (x * w[f"time_mix_{z}"] + last * (1 - w[f"time_mix_{z}"]))
               for n, z in (("receptance", "r"), ("key", "k"), ("value", "v")))  # fmt: skip
    num, den = layer.memory.get("num", 0 * k), layer.memory.get("den", 0 * k)
    own = np.exp(w["time_first"] + k)
    wkv = (num + own * v) / (den + own)
    decay = np.exp(-np.exp(w["time_decay"]))
    layer.memory = {"num": decay * num + np.exp(k) * v, "den": decay * den + np.exp(k)}
    return w["output.weight"] @ (sigmoid(r) * wkv)


def _eagle_finch(layer: Layer, r: Row, k: Row, v: Row, g: Row, decay: Row) -> Row:
    """What 5 and 6 share: S is keys by values; the output reads it before it decays."""
    w = layer.w
    heads, width = w["time_faaaa"].shape
    r, k, v, decay = (z.reshape(heads, width) for z in (r, k, v, decay))
    S = layer.memory.get("S", np.zeros((heads, width, width)))
    kv = k[:, :, None] * v[:, None, :]
    out = np.einsum("hi,hij->hj", r, S + w["time_faaaa"][:, :, None] * kv)
    layer.memory["S"] = decay[:, :, None] * S + kv
    return w["output.weight"] @ (head_norm(out.reshape(-1), w, heads) * g * sigmoid(g))


def time_mix_5(layer: Layer, x: Row, first: dict[str, Row]) -> Row:
    w, last = layer.w, layer.before(x)
    r, k, v, g = (w[f"{n}.weight"] @ (x * w[f"time_mix_{z}"] + last * (1 - w[f"time_mix_{z}"]))
                  for n, z in (("receptance", "r"), ("key", "k"), ("value", "v"), ("gate", "g")))  # fmt: skip
    return _eagle_finch(layer, r, k, v, g, np.exp(-np.exp(w["time_decay"])))


def time_mix_6(layer: Layer, x: Row, first: dict[str, Row]) -> Row:
    w, last = layer.w, layer.before(x)
    change = last - x
    m = np.tanh((x + change * w["time_maa_x"]) @ w["time_maa_w1"]).reshape(5, -1)
    mixed = {z: x + change * (w[f"time_maa_{z}"] + m[i] @ w["time_maa_w2"][i]) for i, z in enumerate("wkvrg")}
    r, k, v, g = (
        w[f"{n}.weight"] @ mixed[z] for n, z in (("receptance", "r"), ("key", "k"), ("value", "v"), ("gate", "g"))
    )
    decay = w["time_decay"] + np.tanh(mixed["w"] @ w["time_decay_w1"]) @ w["time_decay_w2"]
    return _eagle_finch(layer, r, k, v, g, np.exp(-np.exp(decay)))


def time_mix_7(layer: Layer, x: Row, first: dict[str, Row]) -> Row:
    """Equations 3 to 15; S is values by keys here, as printed. `first` is empty in layer 0, which leaves v there."""
    w, last = layer.w, layer.before(x)
    heads, width = w["r_k"].shape
    xr, xw, xk, xv, xa, xg = (x + (last - x) * w[f"x_{z}"] for z in "rwkvag")
    r, k, v = w["receptance.weight"] @ xr, w["key.weight"] @ xk, w["value.weight"] @ xv
    decay = np.exp(-np.exp(-0.5) * sigmoid(w["w0"] + np.tanh(xw @ w["w1"]) @ w["w2"]))
    rate = sigmoid(w["a0"] + xa @ w["a1"] @ w["a2"])
    g = sigmoid(xg @ w["g1"]) @ w["g2"]
    removed = (k * w["k_k"]).reshape(heads, width)
    removed = removed / np.maximum(np.linalg.norm(removed, axis=1, keepdims=True), 1e-12)
    k = k * (1 + (rate - 1) * w["k_a"])
    if first:
        v = v + (first["v"] - v) * sigmoid(w["v0"] + xv @ w["v1"] @ w["v2"])
    else:
        first["v"] = v
    rh, kh, vh, dh, ah = (z.reshape(heads, width) for z in (r, k, v, decay, rate))
    S = layer.memory.get("S", np.zeros((heads, width, width)))
    S = S @ (np.einsum("hi,ij->hij", dh, np.eye(width)) - removed[:, :, None] * (ah * removed)[:, None, :])
    S = S + vh[:, :, None] * kh[:, None, :]
    layer.memory["S"] = S
    out = head_norm(np.einsum("hvk,hk->hv", S, rh).reshape(-1), w, heads)
    own = (rh * kh * w["r_k"]).sum(1, keepdims=True) * vh
    return w["output.weight"] @ ((out + own.reshape(-1)) * g)


def channel_mix(layer: Layer, x: Row, version: int) -> Row:
    w, last = layer.w, layer.before(x)
    if version == 7:
        return w["value.weight"] @ np.maximum(w["key.weight"] @ (x + (last - x) * w["x_k"]), 0) ** 2
    if version == 6:
        xk, xr = (x + (last - x) * w[f"time_maa_{z}"] for z in "kr")
    else:
        xk, xr = (x * w[f"time_mix_{z}"] + last * (1 - w[f"time_mix_{z}"]) for z in "kr")
    return sigmoid(w["receptance.weight"] @ xr) * (w["value.weight"] @ np.maximum(w["key.weight"] @ xk, 0) ** 2)


def logits(version: int, weights: Weights, tokens: Sequence[int]) -> Row:
    """[T,V] of a whole file of version 4, 5 (5.2), 6 or 7, from a fresh state."""
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    count = 1 + max(int(n.split(".")[1]) for n in w if n.startswith("blocks."))
    mixers = [(Layer(w, f"blocks.{i}.att."), Layer(w, f"blocks.{i}.ffn.")) for i in range(count)]
    time_mix = {4: time_mix_4, 5: time_mix_5, 6: time_mix_6, 7: time_mix_7}[version]
    rows = []
    for token in tokens:
        x = layer_norm(w["emb.weight"][token], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"])
        first: dict[str, Row] = {}
        for i, (time, channel) in enumerate(mixers):
            x = x + time_mix(time, layer_norm(x, w[f"blocks.{i}.ln1.weight"], w[f"blocks.{i}.ln1.bias"]), first)
            x = x + channel_mix(channel, layer_norm(x, w[f"blocks.{i}.ln2.weight"], w[f"blocks.{i}.ln2.bias"]), version)
        rows.append(w["head.weight"] @ layer_norm(x, w["ln_out.weight"], w["ln_out.bias"]))
    return np.stack(rows)
