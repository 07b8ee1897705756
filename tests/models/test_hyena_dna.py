"""HyenaDNA's checkpoints: the published model written once more from its formulas, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeseq.errors import SourceError
from edgeseq.models.source import open_source
from edgeseq.verify.tolerances import tolerance
from tests.models.support import run_cut

D, LAYERS, FF, HORIZON, WIDTH, INPUTS, VOCABULARY = 22, 2, 37, 90, 9, 5, 16
CONFIG: dict[str, Any] = {
    "model_type": "hyenadna", "d_model": D, "n_layer": LAYERS, "d_inner": FF, "max_seq_len": HORIZON,
    "filter_order": WIDTH, "emb_dim": INPUTS, "vocab_size": 12, "pad_vocab_size_multiple": 8, "hyena_order": 2,
    "num_inner_mlps": 2, "short_filter_order": 3, "train_freq": True, "use_bias": True, "activation_freq": 10,
    "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False,
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """Names and shapes as published; every value random."""
    shapes: dict[str, tuple[int, ...]] = {"hyena.backbone.embeddings.word_embeddings.weight": (VOCABULARY, D)}
    shapes |= {"hyena.backbone.ln_f.weight": (D,), "hyena.backbone.ln_f.bias": (D,), "lm_head.weight": (VOCABULARY, D)}
    for i in range(LAYERS):
        own: dict[str, tuple[int, ...]] = {
            "mixer.in_proj.weight": (3 * D, D), "mixer.in_proj.bias": (3 * D,), "mixer.out_proj.weight": (D, D),
            "mixer.out_proj.bias": (D,), "mixer.short_filter.weight": (3 * D, 1, 3),
            "mixer.short_filter.bias": (3 * D,), "mixer.filter_fn.bias": (D,),
            "mixer.filter_fn.pos_emb.z": (1, HORIZON, INPUTS), "mixer.filter_fn.pos_emb.t": (1, HORIZON, 1),
            "mixer.filter_fn.implicit_filter.0.weight": (WIDTH, INPUTS),
            "mixer.filter_fn.implicit_filter.0.bias": (WIDTH,), "mixer.filter_fn.implicit_filter.1.freq": (1, WIDTH),
            "mixer.filter_fn.implicit_filter.2.weight": (WIDTH, WIDTH),
            "mixer.filter_fn.implicit_filter.2.bias": (WIDTH,),
            "mixer.filter_fn.implicit_filter.4.weight": (WIDTH, WIDTH),
            "mixer.filter_fn.implicit_filter.4.bias": (WIDTH,),
            "mixer.filter_fn.implicit_filter.6.weight": (D, WIDTH), "mixer.filter_fn.modulation.deltas": (1, 1, D),
            "mlp.fc1.weight": (FF, D), "mlp.fc1.bias": (FF,), "mlp.fc2.weight": (D, FF), "mlp.fc2.bias": (D,),
            "norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
        }  # fmt: skip
        shapes |= {f"hyena.backbone.layers.{i}.{name}": shape for name, shape in own.items()}
    rng = torch.Generator().manual_seed(7)
    made = {name: 0.5 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    for name in made:
        if name.endswith("pos_emb.t"):
            made[name] = torch.linspace(0, 1, HORIZON)[None, :, None]
        elif name.endswith("deltas"):
            made[name] = -15.0 * made[name].abs()
    return made


def reference(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [B,T,V] in float64: tokens [B,T], T at most the horizon."""
    p = {name: x.double() for name, x in w.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), p[f"{name}.weight"], p[f"{name}.bias"], CONFIG["layer_norm_epsilon"])

    x = p["hyena.backbone.embeddings.word_embeddings.weight"][tokens]
    count = tokens.shape[1]
    for i in range(LAYERS):
        here = f"hyena.backbone.layers.{i}"
        linear = {n: (p[f"{here}.{n}.weight"], p[f"{here}.{n}.bias"]) for n in ("mixer.in_proj", "mixer.out_proj")}
        z = F.linear(norm(x, f"{here}.norm1"), *linear["mixer.in_proj"]).transpose(1, 2)
        kernel, bias = p[f"{here}.mixer.short_filter.weight"], p[f"{here}.mixer.short_filter.bias"]
        z = F.conv1d(F.pad(z, (2, 0)), kernel, bias, groups=3 * D)
        first, gate, v = z.split(D, 1)
        filter_ = f"{here}.mixer.filter_fn"
        h, t = p[f"{filter_}.pos_emb.z"][0, :count], p[f"{filter_}.pos_emb.t"][0, :count]
        for at in (0, 2, 4):
            layer = [p[f"{filter_}.implicit_filter.{at}.{part}"] for part in ("weight", "bias")]
            h = torch.sin(p[f"{filter_}.implicit_filter.1.freq"] * F.linear(h, *layer))
        h = F.linear(h, p[f"{filter_}.implicit_filter.6.weight"])
        h = h * (torch.exp(-t * p[f"{filter_}.modulation.deltas"][0].abs()) + 0.05)  # [T,D]
        v = v * gate
        answer = F.conv1d(F.pad(v, (count - 1, 0)), h.flip(0).T[:, None], groups=D)
        v = answer + p[f"{filter_}.bias"][:, None] * v
        x = x + F.linear((v * first).transpose(1, 2), *linear["mixer.out_proj"])
        inner = F.linear(norm(x, f"{here}.norm2"), p[f"{here}.mlp.fc1.weight"], p[f"{here}.mlp.fc1.bias"])
        inner = F.gelu(inner, approximate="tanh")
        x = x + F.linear(inner, p[f"{here}.mlp.fc2.weight"], p[f"{here}.mlp.fc2.bias"])
    return F.linear(norm(x, "hyena.backbone.ln_f"), p["lm_head.weight"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def rewrite(directory: Path, config: dict[str, Any] | None = None, **changes: Tensor | None) -> None:
    """Change fields of the config, and tensors by name (None: leave out)."""
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    kept = {n: t for n, t in (load_file(directory / "model.safetensors") | changes).items() if t is not None}
    save_file(kept, directory / "model.safetensors")


@torch.no_grad()
def test_logits_and_64_greedy_tokens_are_those_of_the_published_model(directory: Path) -> None:
    source = open_source(str(directory))
    assert source.family == "hyena"
    model = source.build().eval()
    tokens = torch.randint(0, 12, (2, 60), generator=torch.Generator().manual_seed(1))
    want = reference(tensors(), tokens)
    assert (model(tokens) - want).abs().max() <= tolerance("torch", "float32", want)
    for last, logits in run_cut(model, tokens, [1, 2, 9, 30, 31], 64).items():
        assert (logits - want[:, last]).abs().max() <= tolerance("torch", "float32", want)

    text, state = tokens[:1, :20].tolist()[0], model.initial_state(1, HORIZON)
    logits, *state = model.advance(torch.tensor([text]), torch.tensor([0]), *state)
    for _ in range(64):
        assert int(logits.argmax()) == int(reference(tensors(), torch.tensor([text]))[0, -1].argmax())
        text.append(int(logits.argmax()))
        logits, *state = model.advance(torch.tensor([text[-1:]]), torch.tensor([len(text) - 1]), *state)
    assert len(set(text[20:])) > 2


def test_the_shared_frequency_may_stand_under_another_name(directory: Path) -> None:
    """A file that keeps shared tensors once may keep the last of the three names."""
    before = open_source(str(directory)).tensor("layers.1.mixer.taps0")
    changes: dict[str, Tensor | None] = {}
    for i in range(LAYERS):
        network = f"hyena.backbone.layers.{i}.mixer.filter_fn.implicit_filter"
        changes |= {f"{network}.5.freq": tensors()[f"{network}.1.freq"], f"{network}.1.freq": None}
    rewrite(directory, **changes)
    np.testing.assert_array_equal(open_source(str(directory)).tensor("layers.1.mixer.taps0"), before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hyena_order", 3, "hyena_order is 3"),
        ("short_filter_order", 4, "short_filter_order is 4"),
        ("num_inner_mlps", 1, "num_inner_mlps is 1"),
        ("train_freq", False, "train_freq is False"),
        ("emb_dim", 4, "emb_dim is 4"),
        ("max_seq_len", 91, r"pos_emb\.z has shape \[1, 90, 5\]"),
        ("d_inner", 38, r"mlp\.fc1\.(weight|bias) has shape"),
        ("vocab_size", 20, r"word_embeddings\.weight has shape"),
    ],
)
def test_what_contradicts_or_is_not_honoured_is_named(directory: Path, field: str, value: Any, message: str) -> None:
    rewrite(directory, {field: value})
    with pytest.raises(SourceError, match=message):
        open_source(str(directory))


def test_missing_and_surplus_tensors_are_named(directory: Path) -> None:
    name = "hyena.backbone.layers.1.mixer.filter_fn.bias"
    rewrite(directory, **{name: None})
    with pytest.raises(SourceError, match=f"lacks {name}"):
        open_source(str(directory))
    rewrite(directory, **{name: torch.zeros(D), "hyena.backbone.extra": torch.zeros(3)})
    with pytest.raises(SourceError, match=r"also holds hyena\.backbone\.extra"):
        open_source(str(directory))
