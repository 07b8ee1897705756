"""HyenaDNA's checkpoints: `model_type` "hyenadna", as LongSafari publishes weights beside the code that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeseq.errors import SourceError
from edgeseq.models.base import StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.hyena_filter import HyenaConfig

MOST_TAPS = 1 << 21


def config_from_hf(raw: Mapping[str, Any]) -> HyenaConfig:
    """config.json of `HyenaDNAForCausalLM`, as LongSafari publishes its code and weights beside each other."""
    r = ConfigReader(raw)
    for name, value in (("hyena_order", 2), ("short_filter_order", 3), ("num_inner_mlps", 2), ("train_freq", True)):
        r.only(name, value)
    d, multiple = r.positive("d_model", default=256), r.positive("pad_vocab_size_multiple", default=8)
    inputs = r.positive("emb_dim", default=3, least=3)
    if inputs % 2 == 0:
        raise SourceError(f"config.json: emb_dim is {inputs}, but must be odd: time, and sines and cosines in pairs")
    return HyenaConfig(
        vocab_size=-(-r.positive("vocab_size", default=12) // multiple) * multiple,
        d_model=d,
        n_layers=r.positive("n_layer", default=12, most=MOST_LAYERS),
        d_ff=r.positive("d_inner", default=4 * d),
        horizon=r.positive("max_seq_len", default=1024, most=MOST_TAPS),
        filter_width=r.positive("filter_order", default=64),
        filter_bands=inputs // 2,
        eps=r.number("layer_norm_epsilon", 1e-5),
        tie=r.flag("tie_word_embeddings", True),
        layout="hyenadna",
    )


def hf_tensors(c: HyenaConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `HyenaDNAForCausalLM`; the sines of a filter share one frequency tensor."""
    d, width, inputs = c.d_model, c.filter_width, 1 + 2 * c.filter_bands
    names = {"embed.weight": StoredTensor("hyena.backbone.embeddings.word_embeddings.weight", (c.vocab_size, d))}
    for part in ("weight", "bias"):
        names[f"norm.{part}"] = StoredTensor(f"hyena.backbone.ln_f.{part}", (d,))
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, d))
    linears = {"mixer.in_proj": (3 * d, d), "mixer.out_proj": (d, d), "mlp.fc1": (c.d_ff, d), "mlp.fc2": (d, c.d_ff)}
    ours = {"mlp.fc1": "up_proj", "mlp.fc2": "down_proj"}
    for i in range(c.n_layers):
        here, there = f"layers.{i}", f"hyena.backbone.layers.{i}"
        filter_, network = f"{here}.mixer.filter", f"{there}.mixer.filter_fn.implicit_filter"
        for name, (rows, columns) in linears.items():
            names[f"{here}.{ours.get(name, name)}.weight"] = StoredTensor(f"{there}.{name}.weight", (rows, columns))
            names[f"{here}.{ours.get(name, name)}.bias"] = StoredTensor(f"{there}.{name}.bias", (rows,))
        for name, stored in (("norm", "norm1"), ("ff_norm", "norm2")):
            for part in ("weight", "bias"):
                names[f"{here}.{name}.{part}"] = StoredTensor(f"{there}.{stored}.{part}", (d,))
        for at, (name, columns) in enumerate((("first", inputs), ("second", width), ("third", width))):
            names[f"{filter_}.{name}.weight"] = StoredTensor(f"{network}.{2 * at}.weight", (width, columns))
            names[f"{filter_}.{name}.bias"] = StoredTensor(f"{network}.{2 * at}.bias", (width,))
        other = StoredTensor(f"{network}.5.freq", (1, width))
        names |= {
            f"{filter_}.last.weight": StoredTensor(f"{network}.6.weight", (d, width)),
            f"{filter_}.frequency": StoredTensor(f"{network}.1.freq", (1, width), lambda x: x[0], (other,)),
            f"{filter_}.time": StoredTensor(
                f"{there}.mixer.filter_fn.pos_emb.z", (1, c.horizon, inputs), lambda x: x[0]
            ),
            f"{filter_}.delta": StoredTensor(
                f"{there}.mixer.filter_fn.modulation.deltas", (1, 1, d), lambda x: x[0, 0]
            ),
            f"{here}.mixer.skips.0": StoredTensor(f"{there}.mixer.filter_fn.bias", (d,)),
            f"{here}.mixer.conv_weight": StoredTensor(
                f"{there}.mixer.short_filter.weight", (3 * d, 1, 3), lambda x: x[:, 0]
            ),
            f"{here}.mixer.conv_bias": StoredTensor(f"{there}.mixer.short_filter.bias", (3 * d,)),
        }
    return names
