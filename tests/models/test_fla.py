"""Families without a Hugging Face class: checkpoints in flash-linear-attention's layout, and what they define,
once more in numpy, float64, one token at a time, from the stored tensors by their stored names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgeseq.errors import SourceError
from edgeseq.models.linear_transformer import phi
from edgeseq.models.source import Source, open_source
from edgeseq.verify.tolerances import tolerance
from tests.models.huggingface import assert_greedy_parity

Array = np.ndarray
Tensors = dict[str, Array]
OUTER = {"vocab_size": 71, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 37, "norm_eps": 1e-5}
# fmt: off
CONFIGS: dict[str, dict] = {
    "gla": OUTER | {"model_type": "gla", "num_heads": 3, "expand_k": 0.5, "expand_v": 1, "attn_mode": "chunk"},
    "delta_net": OUTER | {"model_type": "delta_net", "num_heads": 3, "expand_k": 1.0, "expand_v": 1.5,
                          "tie_word_embeddings": True},
    "delta_net-gated": OUTER | {"model_type": "delta_net", "num_heads": 2, "use_gate": True, "conv_size": 3,
                                "allow_neg_eigval": True},
    "gated_deltanet": OUTER | {"model_type": "gated_deltanet", "num_heads": 2, "num_v_heads": 4, "head_dim": 6,
                               "expand_v": 1.5},
    "gated_deltanet-open": OUTER | {"model_type": "gated_deltanet", "num_heads": 3, "head_dim": 4, "use_gate": False,
                                    "allow_neg_eigval": True, "conv_size": 2},
    "retnet": OUTER | {"model_type": "retnet", "num_heads": 3, "expand_k": 1.0, "expand_v": 2.0},
}
# fmt: on
names = pytest.mark.parametrize("name", CONFIGS)


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def rms(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def unit(x: Array) -> Array:
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def mixer_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Stored tensors of one mixer below `attn.`, as the library declares them."""
    d, heads, kind = c["hidden_size"], c["num_heads"], c["model_type"]
    if kind == "gated_deltanet":
        v_heads = c.get("num_v_heads") or heads
        keys, head_v = heads * c["head_dim"], int(c["head_dim"] * c.get("expand_v", 2.0))
        values = v_heads * head_v
    else:
        keys, values, v_heads = int(d * c.get("expand_k", 1.0)), int(d * c.get("expand_v", 1.0)), heads
        head_v = values // heads
    if kind == "retnet":
        values, head_v = 2 * d, 2 * d // heads
    shapes = {"q_proj.weight": (keys, d), "k_proj.weight": (keys, d), "v_proj.weight": (values, d)}
    shapes["o_proj.weight"] = (d, values)
    if kind == "retnet":
        return shapes | {"g_proj.weight": (values, d), "g_norm_swish_gate.weight": (head_v,)}
    if kind == "gla":
        rank = {"gk_proj.0.weight": (16, d), "gk_proj.1.weight": (keys, 16), "gk_proj.1.bias": (keys,)}
        return shapes | rank | {"g_proj.weight": (values, d), "g_norm_swish_gate.weight": (head_v,)}
    k = c.get("conv_size", 4)
    shapes |= {f"{p}_conv1d.weight": (n, 1, k) for p, n in (("q", keys), ("k", keys), ("v", values))}
    shapes |= {"b_proj.weight": (v_heads, d), "o_norm.weight": (head_v,)}
    if c.get("use_gate", kind == "gated_deltanet"):
        shapes["g_proj.weight"] = (values, d)
    if kind == "gated_deltanet":
        shapes |= {"a_proj.weight": (v_heads, d), "A_log": (v_heads,), "dt_bias": (v_heads,)}
    return shapes


def checkpoint(name: str, folder: Path, change: dict | None = None) -> Tensors:
    """A directory with random weights; returns them."""
    c, rng = CONFIGS[name], np.random.default_rng(4)
    d, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (v, d), "model.norm.weight": (d,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (v, d)
    for i in range(c["num_hidden_layers"]):
        layer = {"attn_norm.weight": (d,), "mlp_norm.weight": (d,), "mlp.gate_proj.weight": (f, d)}
        layer |= {"mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
        layer |= {f"attn.{n}": s for n, s in mixer_shapes(c).items()}
        shapes |= {f"model.layers.{i}.{n}": s for n, s in layer.items()}
    tensors = {}
    for key, shape in shapes.items():
        drawn = 0.3 * rng.standard_normal(shape)
        if "norm" in key:
            drawn += 1.0
        elif key.endswith("dt_bias"):
            drawn = rng.uniform(-9.0, 0.0, shape)
        elif key.endswith("A_log"):
            drawn = rng.uniform(0.0, 2.0, shape)
        tensors[key] = drawn.astype(np.float32)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(c | (change or {})))
    return tensors


class Definition:
    """One stream of the stored model; `p` are the tensors of a layer below `attn.`, its state S and past q, k, v."""

    def __init__(self, name: str, tensors: Tensors) -> None:
        self.c = CONFIGS[name]
        self.w = {n: t.astype(np.float64) for n, t in tensors.items()}
        self.position = 0
        self.state: list[dict[str, Array]] = [{} for _ in range(self.c["num_hidden_layers"])]
        self.mixer: Callable[..., Array] = {
            "gla": self.gla,
            "delta_net": self.delta,
            "gated_deltanet": self.delta,
            "retnet": self.retention,
        }[self.c["model_type"]]

    def token(self, token: int) -> Array:
        w, x = self.w, self.w["model.embeddings.weight"][token]
        for i, state in enumerate(self.state):
            layer = f"model.layers.{i}."
            p = {n.removeprefix(layer).removesuffix(".weight"): t for n, t in w.items() if n.startswith(layer)}
            attn = {n.removeprefix("attn."): t for n, t in p.items()}
            x = x + attn["o_proj"] @ self.mixer(attn, rms(x, p["attn_norm"]), state)
            h = rms(x, p["mlp_norm"])
            x = x + p["mlp.down_proj"] @ (silu(p["mlp.gate_proj"] @ h) * (p["mlp.up_proj"] @ h))
        self.position += 1
        return w.get("lm_head.weight", w["model.embeddings.weight"]) @ rms(x, w["model.norm.weight"])

    def gla(self, p: Tensors, h: Array, state: dict[str, Array]) -> Array:
        heads = self.c["num_heads"]
        q, k, v = ((p[f"{n}_proj"] @ h).reshape(heads, -1) for n in "qkv")
        gate = p["gk_proj.1"] @ (p["gk_proj.0"] @ h) + p["gk_proj.1.bias"]
        g = np.log(sigmoid(gate)).reshape(heads, -1) / 16
        S = state.get("S", np.zeros((heads, q.shape[1], v.shape[1])))
        state["S"] = S = np.exp(g)[:, :, None] * S + k[:, :, None] * v[:, None]
        o = np.einsum("hk,hkv->hv", q, S) * q.shape[1] ** -0.5
        return (rms(o, p["g_norm_swish_gate"]) * silu(p["g_proj"] @ h).reshape(o.shape)).reshape(-1)

    def rotate(self, x: Array) -> Array:
        """x [H,K]: channels i and i + K/2 turned by position * 10000^(-2i/K)."""
        half = x.shape[1] // 2
        angle = self.position * 10000.0 ** (-np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)

    def retention(self, p: Tensors, h: Array, state: dict[str, Array]) -> Array:
        heads = self.c["num_heads"]
        q, k, v = ((p[f"{n}_proj"] @ h).reshape(heads, -1) for n in "qkv")
        S = state.get("S", np.zeros((heads, q.shape[1], v.shape[1])))
        gamma = (1.0 - 2.0 ** (-5.0 - np.arange(heads)))[:, None, None]
        state["S"] = S = gamma * S + self.rotate(k)[:, :, None] * v[:, None]
        o = np.einsum("hk,hkv->hv", self.rotate(q), S) * q.shape[1] ** -0.5
        return (rms(o, p["g_norm_swish_gate"]) * silu(p["g_proj"] @ h).reshape(o.shape)).reshape(-1)

    def conv(self, p: Tensors, h: Array, state: dict[str, Array], part: str) -> Array:
        weight = p[f"{part}_conv1d"][:, 0]
        past = state.get(part, np.zeros((len(weight), weight.shape[1] - 1)))
        window = np.concatenate([past, (p[f"{part}_proj"] @ h)[:, None]], 1)
        state[part] = window[:, 1:]
        return silu((window * weight).sum(1))

    def delta(self, p: Tensors, h: Array, state: dict[str, Array]) -> Array:
        heads, v_heads = self.c["num_heads"], p["b_proj"].shape[0]
        q, k = (unit(self.conv(p, h, state, n).reshape(heads, -1)).repeat(v_heads // heads, 0) for n in "qk")
        v = self.conv(p, h, state, "v").reshape(v_heads, -1)
        beta = sigmoid(p["b_proj"] @ h) * (2 if self.c.get("allow_neg_eigval") else 1)
        S = state.get("S", np.zeros((v_heads, q.shape[1], v.shape[1])))
        if "A_log" in p:
            S = np.exp(-np.exp(p["A_log"]) * np.log1p(np.exp(p["a_proj"] @ h + p["dt_bias"])))[:, None, None] * S
        state["S"] = S = S + k[:, :, None] * (beta[:, None] * (v - np.einsum("hk,hkv->hv", k, S)))[:, None]
        o = rms(np.einsum("hk,hkv->hv", q, S) * q.shape[1] ** -0.5, p["o_norm"]).reshape(-1)
        return o * silu(p["g_proj"] @ h) if "g_proj" in p else o


@names
def test_the_model_is_the_library_s_definition(name: str, tmp_path: Path) -> None:
    stored = checkpoint(name, tmp_path)

    def reference(tokens: torch.Tensor) -> torch.Tensor:
        stream = Definition(name, stored)
        logits = np.stack([stream.token(t) for t in tokens[0].tolist()])
        return torch.from_numpy(logits.astype(np.float32))[None]

    assert_greedy_parity(tmp_path, reference, sum(t.size for t in stored.values()))


@names
def test_reading_finds_every_tensor(name: str, tmp_path: Path) -> None:
    """Each stored value turns up in the model, but for A, which is stored as its logarithm."""
    stored = checkpoint(name, tmp_path)
    source: Source = open_source(str(tmp_path))
    held = {source.tensor(n).astype(np.float32).tobytes() for n in source.tensor_names()}
    assert {t.tobytes() for n, t in stored.items() if "A_log" not in n} <= held


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gla", {"use_short_conv": True}, "use_short_conv is True"),
        ("gla", {"num_kv_heads": 1}, "num_kv_heads is 1, but must be 3"),
        ("gla", {"attn": {"layers": [1], "num_heads": 2}}, "attn is .* but must be None"),
        ("gla", {"num_heads": 5}, "expand_k makes a width of 12, which 5 heads cannot share"),
        ("gla", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("retnet", {"expand_v": 1.0}, "expand_v is 1.0, but must be 2"),
        ("retnet", {"num_heads": 8}, "no 8 heads of even width"),
        ("delta_net", {"qk_norm": "sum"}, "qk_norm is 'sum'"),
        ("delta_net", {"use_gate": True}, "lacks model.layers.0.attn.g_proj.weight and 1 more"),
        ("delta_net-gated", {"use_gate": False}, "also holds model.layers.0.attn.g_proj.weight and 1 more"),
        ("gated_deltanet", {"num_v_heads": 3}, "3 value heads cannot share 2 key heads"),
        ("gated_deltanet", {"expand_v": 1.3}, "expand_v 1.3 times head_dim 6 is no whole number"),
        ("gated_deltanet", {"head_dim": 8}, "has shape .* but config.json implies"),
    ],
)
def test_what_cannot_be_honoured_is_named(name: str, change: dict, message: str, tmp_path: Path) -> None:
    checkpoint(name, tmp_path, change)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path)).build("meta")


def test_small_features_of_the_linear_transformer_keep_their_digits() -> None:
    """elu(x) + 1 computed as written is 4 % off at x = -14; trained keys go down to e^-18."""
    x = torch.linspace(-18.0, 18.0, 1001, requires_grad=True)
    y, wide = phi(x), x.detach().double()
    torch.testing.assert_close(y.double(), torch.where(wide > 0, wide + 1.0, torch.exp(wide)), rtol=1e-6, atol=0.0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.double(), torch.exp(wide.clamp(max=0.0)), rtol=1e-6, atol=0.0)


def test_the_linear_transformer_is_the_published_definition() -> None:
    """phi = elu + 1, a running sum of keys as normaliser, sine and cosine of the position."""
    from tests.models.support import random_model
    from tests.models.test_matrix_state import ODD

    model = random_model(ODD["linear-transformer"])
    c, w = model.config, {n: t.double().numpy() for n, t in model.state_dict().items()}
    tokens, out, sums = list(range(40)), [], [(0.0, 0.0)] * c.n_layers
    for position, token in enumerate(tokens):
        angle = position * 10000.0 ** (-np.arange(0, c.d_model, 2) / c.d_model)
        x = w["embed.weight"][token] + np.concatenate([np.sin(angle), np.cos(angle)]) / np.sqrt(c.d_model)
        for i in range(c.n_layers):
            p = {n.removeprefix(f"layers.{i}.").removesuffix(".weight"): t for n, t in w.items() if f"layers.{i}." in n}
            h = x / np.sqrt((x**2).mean() + c.eps) * p["norm"]
            q, k, v = ((p[f"mixer.{n}_proj"] @ h).reshape(c.n_heads, -1) for n in "qkv")
            q, k = (np.where(y > 0, y + 1.0, np.exp(y)) for y in (q, k))
            S, z = sums[i]
            sums[i] = S, z = S + k[:, :, None] * v[:, None], z + k
            o = np.einsum("hk,hkv->hv", q, S) / ((q * z).sum(-1, keepdims=True) + c.eps_z)
            x = x + p["mixer.o_proj"] @ o.reshape(-1)
            h = x / np.sqrt((x**2).mean() + c.eps) * p["ff_norm"]
            x = x + p["down_proj"] @ (silu(p["gate_proj"] @ h) * (p["up_proj"] @ h))
        out.append(w.get("head", w["embed.weight"]) @ (x / np.sqrt((x**2).mean() + c.eps) * w["norm"]))
    want = np.stack(out)
    with torch.no_grad():
        got = model(torch.tensor([tokens]))[0].numpy()
    assert np.abs(got - want).max() <= tolerance("torch", "float32", want)
