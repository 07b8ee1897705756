"""mLSTM against Hugging Face's xLSTM and against the recurrence of the paper without its stabiliser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeseq.errors import SourceError
from edgeseq.models.mlstm import MLSTMConfig, peaks, peaks_parallel
from edgeseq.models.source import open_source
from edgeseq.verify.tolerances import tolerance
from tests.models.huggingface import assert_greedy_parity, save
from tests.models.support import ODD, random_model

transformers = pytest.importorskip("transformers")
# Hugging Face's whole forward runs for any width; only its cache wants multiples of 64.
FIELDS: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 60, "num_hidden_layers": 2, "num_heads": 3, "qk_dim_factor": 0.35,
    "v_dim_factor": 1.15, "ffn_proj_factor": 1.3, "ffn_round_up_to_multiple_of": 7, "chunk_size": 16,
    "gate_soft_cap": 9.0, "output_logit_soft_cap": 11.0, "norm_eps": 1e-5, "eps": 1e-5,
    "autocast_kernel_dtype": "float32",
}  # fmt: skip


def reference(folder: Path, gate: float = 0.15, bias: float = 0.0, seed: int = 2, **fields: Any) -> torch.nn.Module:
    """Every parameter random.

    Where a normaliser is above its floor, o is a quotient of two sums that may both nearly cancel: the function itself
    jumps there, so that two float32 programs differ by more than rounding. `bias` keeps input gates, and it, low.
    """
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**FIELDS | fields))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = gate if "gate_preact" in name and "ogate" not in name else 0.15
            p.copy_(wide * torch.randn(p.shape, generator=rng) + (1.0 if "norm" in name else 0.0))
            p += bias if name.endswith("igate_preact.bias") else 0.0
    return save(model, folder)


@pytest.mark.parametrize(
    ("gate", "bias", "fields"), [(0.15, 0.0, {}), (0.4, -3.0, {"hidden_size": 40, "num_heads": 2})]
)
def test_64_greedy_tokens_and_their_logits(gate: float, bias: float, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(tmp_path, gate, bias, **fields)
    parameters = sum(p.numel() for p in theirs.parameters())
    assert_greedy_parity(tmp_path, lambda tokens: theirs(tokens, use_cache=False).logits, parameters)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_wide_gates_agree_in_double(seed: int, tmp_path: Path) -> None:
    """Gates from end to end of their caps, where float32 cannot tell; theirs holds its state in float32 even so."""
    theirs = reference(tmp_path, 1.0, 0.0, seed, norm_reduction_force_float32=False).double()
    ours = open_source(str(tmp_path)).build().double()
    tokens = torch.randint(0, 211, (2, 71), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found, wanted = ours(tokens), theirs(tokens, use_cache=False).logits
    assert (found - wanted).abs().max() <= tolerance("torch", "float32", wanted)


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, i: np.ndarray, f: np.ndarray) -> np.ndarray:
    """C = e^f C + e^i k (x) v in float64 with no stabiliser: [T,H,.] -> [T,H,V] (paper, equations 19 to 27)."""
    T, H, K = q.shape
    C, n, out = np.zeros((H, K, v.shape[-1])), np.zeros((H, K)), []
    for t in range(T):
        keep, write = np.exp(f[t])[:, None], np.exp(i[t])[:, None]
        C = keep[..., None] * C + (write * k[t])[..., None] * v[t][:, None]
        n = keep * n + write * k[t]
        read = q[t] * K**-0.5
        norm = np.maximum(np.abs((read * n).sum(-1, keepdims=True)), 1.0)
        out.append(np.einsum("hk,hkv->hv", read, C) / norm)
    return np.stack(out)


def test_the_mixer_is_the_recurrence_of_the_paper() -> None:
    mixer, c = random_model(ODD["mlstm-odd"]).layers[0].mixer.double(), ODD["mlstm-odd"]
    h = torch.randn(1, 30, c.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        i, f = mixer.gates(h)
        parts = (p(h)[0].unflatten(-1, (c.n_heads, -1)).numpy() for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        o = torch.from_numpy(plain(*parts, i[0].numpy(), f[0].numpy()))
        normed = torch.nn.functional.layer_norm(o, o.shape[-1:], eps=c.eps).flatten(1) * mixer.head_norm
        wanted = mixer.o_proj(torch.sigmoid(mixer.g_proj(h[0])) * normed)
        assert (mixer(h)[0] - wanted).abs().max() < 1e-4  # the epsilon of the normaliser, which the paper lacks


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_unrolled_peak_is_the_running_one(scale: float) -> None:
    rng = torch.Generator().manual_seed(6)
    i, f = scale * torch.randn(2, 50, 3, generator=rng), -scale * torch.rand(2, 50, 3, generator=rng)
    m, steps = torch.zeros(2, 3), []
    for t in range(50):
        m = torch.maximum(f[:, t] + m, i[:, t])
        steps.append(m)
    wanted = torch.stack(steps, 1)
    cut = peaks(i[:, :20], f[:, :20], torch.zeros(2, 3))
    for found in (peaks_parallel(i, f), torch.cat([cut, peaks(i[:, 20:], f[:, 20:], cut[:, -1])], 1)):
        assert (found - wanted).abs().max() <= 1e-5 * scale * 50


def test_exponents_far_beyond_float32_stay_finite() -> None:
    """Input gates of 2000 would be e^2000: only differences are exponentiated."""
    c = MLSTMConfig(61, 24, 1, 2, 5, 7, 16, gate_cap=4000.0)
    model = random_model(c)
    with torch.no_grad():
        model.layers[0].mixer.i_gate.weight.mul_(4000.0)
        model.layers[0].mixer.f_gate.weight.mul_(300.0)
        tokens = torch.arange(40)[None]
        whole, state, rows = model(tokens), model.initial_state(1, 0), []
        for t in range(40):
            logits, *state = model.advance(tokens[:, t : t + 1], torch.tensor([t]), *state)
            rows.append(logits[:, 0])
    assert torch.isfinite(whole).all() and state[1].abs().max() > 300
    assert (torch.stack(rows, 1) - whole).abs().max() <= 100 * tolerance("torch", "float32", whole)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("use_bias", True, "use_bias is True, but must be False"),
        ("weight_mode", "fused", "weight_mode is 'fused', but must be 'single'"),
        ("num_heads", 7, "qk_dim_factor makes a width of 21, which 7 heads cannot share|v_dim_factor makes a width"),
        ("num_blocks", 9, "num_blocks is 9, but must be 2"),
        ("gate_soft_cap", -1.0, "gate_soft_cap is -1.0, but must be a positive number"),
        ("vocab_size", 210, r"backbone\.embeddings\.weight .*211"),
    ],
)
def test_what_cannot_be_honoured_is_named(field: str, value: Any, sentence: str, tmp_path: Path) -> None:
    reference(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(SourceError, match=sentence):
        open_source(str(tmp_path)).build()
