"""Checkpoints of the flash-linear-attention library: what its model classes have in common around the token mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeseq.errors import SourceError
from edgeseq.models.base import StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader


def outer_config(r: ConfigReader, hidden_ratio: float = 4) -> dict[str, Any]:
    """Fields of a `Stack` config; refuses mixed-in attention layers, grouped keys and activations but swish."""
    r.only("hidden_act", "swish", "silu")
    r.only("attn", None)
    r.only("elementwise_affine", True)
    r.only("num_kv_heads", r.get("num_heads"))
    d_model = r.positive("hidden_size", default=2048)
    wide = int(
        d_model * r.number("hidden_ratio", hidden_ratio) * 2 / 3
    )  # a gated feed-forward of three matrices for one of two
    return {
        "vocab_size": r.positive("vocab_size", default=32000),
        "d_model": d_model,
        "n_layers": r.positive("num_hidden_layers", default=24, most=MOST_LAYERS),
        "d_ff": r.positive("intermediate_size", default=-(-wide // 256) * 256),
        "eps": r.number("norm_eps", 1e-6),
        "tie": r.flag("tie_word_embeddings", False),
    }


def head_widths(r: ConfigReader, d_model: int, heads: int, expand_k: float, expand_v: float) -> tuple[int, int]:
    """(key, value) width of a head, from the expansion factors of the config or these defaults."""
    widths = []
    for field, default in (("expand_k", expand_k), ("expand_v", expand_v)):
        total = int(d_model * r.number(field, default))
        if total % heads or not total:
            raise SourceError(f"config.json: {field} makes a width of {total}, which {heads} heads cannot share")
        widths.append(total // heads)
    return widths[0], widths[1]


def tensors(
    c: Any, mixer: Callable[[str], Mapping[str, StoredTensor]], inside: str = "mixer."
) -> dict[str, StoredTensor]:
    """Our names of a whole model -> theirs; `mixer(prefix)` has those of one mixer below `attn.`, ours `inside`."""
    d, f = c.d_model, c.d_ff
    names = {
        "embed.weight": StoredTensor("model.embeddings.weight", (c.vocab_size, d)),
        "norm": StoredTensor("model.norm.weight", (d,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, d))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names |= {
            f"{ours}norm": StoredTensor(f"{theirs}attn_norm.weight", (d,)),
            f"{ours}ff_norm": StoredTensor(f"{theirs}mlp_norm.weight", (d,)),
            f"{ours}gate_proj.weight": StoredTensor(f"{theirs}mlp.gate_proj.weight", (f, d)),
            f"{ours}up_proj.weight": StoredTensor(f"{theirs}mlp.up_proj.weight", (f, d)),
            f"{ours}down_proj.weight": StoredTensor(f"{theirs}mlp.down_proj.weight", (d, f)),
        }
        names |= {f"{ours}{inside}{name}": stored for name, stored in mixer(f"{theirs}attn.").items()}
    return names


def matrix(name: str, rows: int, columns: int) -> dict[str, StoredTensor]:
    """A projection that is called the same here and there; `name` is its stored name without `.weight`."""
    return {f"{name.rsplit('.', 1)[-1]}.weight": StoredTensor(f"{name}.weight", (rows, columns))}
