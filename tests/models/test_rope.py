"""Rotary frequencies against the functions of transformers; whole models that stretch them, rotate a part of a head,
or norm it (LLaMA, Qwen 2 and 3, Phi-3); and lengths beyond which a model would be another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeseq.errors import SourceError
from edgeseq.models.hf import ConfigReader
from edgeseq.models.rope import RopeConfig, any_rope_from_hf, channel_order, rope_from_hf
from edgeseq.models.source import open_source
from exporters import export
from tests.models.huggingface import assert_greedy_parity, randomise, save

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

# fmt: off
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 6.0, "original_max_position_embeddings": 300}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 900},
    "yarn": YARN,
    "yarn-given": YARN | {"attention_factor": 1.7, "beta_fast": 20, "beta_slow": 2},
    "yarn-magnitudes": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
    "yarn-narrow": YARN | {"original_max_position_embeddings": 40, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 2e3},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 700,
                 "short_factor": [1.0 + 0.1 * i for i in range(12)], "long_factor": [9.0] * 12},
    "longrope-given": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 700,
                       "factor": 1.5, "short_factor": [2.0] * 12, "long_factor": [9.0] * 12},
}
# fmt: on


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    config = transformers.LlamaConfig(
        hidden_size=96, num_attention_heads=4, max_position_embeddings=1800, rope_parameters=dict(ROPES[name])
    )
    theirs, factor = rope_utils.ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](config)
    rope, _ = any_rope_from_hf(ConfigReader(config.to_dict()), 24)
    np.testing.assert_allclose(rope.radians(24), theirs.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
def test_the_older_spelling_says_the_same(name: str) -> None:
    fields = dict(ROPES[name])
    new = any_rope_from_hf(ConfigReader({"max_position_embeddings": 1800, "rope_parameters": dict(fields)}), 24)
    old = {"rope_theta": fields.pop("rope_theta", None), "max_position_embeddings": 1800}
    fields["type"] = fields.pop("rope_type")
    assert any_rope_from_hf(ConfigReader(old | {"rope_scaling": fields}), 24) == new


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"rope_type": "proportional"}, ["rope_type", "'proportional'", "'longrope'"]),
    (YARN | {"beta_fast": 1}, ["beta_slow 1.0 is not below beta_fast 1.0"]),
    (YARN | {"factor": -2}, ["rope_parameters.factor", "-2"]),
    (YARN | {"truncate": 1}, ["truncate", "true or false"]),
    (YARN | {"rope_theta": 1}, ["rope_theta of 1.0"]),
    (ROPES["longrope"] | {"short_factor": [1.0] * 11}, ["short_factor", "12 positive numbers"]),
    (ROPES["longrope"] | {"short_factor": [1.0] * 11 + [0]}, ["short_factor", "12 positive numbers"]),
    (ROPES["longrope"] | {"short_factor": None}, ["short_factor", "12 positive numbers"]),
    ({"partial_rotary_factor": 0.3}, ["7 of 24 channels"]),
    ({"partial_rotary_factor": 1.5}, ["36 of 24 channels"]),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_what_is_refused(fields: dict[str, Any], words: list[str]) -> None:
    raw = {"max_position_embeddings": 1800, "rope_parameters": fields}
    with pytest.raises(SourceError) as caught:
        any_rope_from_hf(ConfigReader(raw), 24)
    assert all(word in caught.value.sentence for word in words), caught.value.sentence


def test_a_family_without_an_attention_factor_is_given_none() -> None:
    assert rope_from_hf(ConfigReader({"rope_parameters": ROPES["linear"]})) == RopeConfig(500.0, "linear", 3.0)
    for fields in (YARN, ROPES["dynamic"], ROPES["longrope"], {"partial_rotary_factor": 0.5}):
        with pytest.raises(SourceError, match=r"rope_type|partial_rotary_factor"):
            rope_from_hf(ConfigReader({"max_position_embeddings": 1800, "rope_parameters": fields}))


def test_channels_of_a_partly_rotated_head_keep_their_partners() -> None:
    """Pairs (0,3) (1,4) (2,5) of ten channels become (0,5) (1,6) (2,7); the other four stand."""
    order = channel_order(10, 6)
    assert sorted(order.tolist()) == list(range(10))
    assert [(order[i], order[i + 5]) for i in range(3)] == [(0, 3), (1, 4), (2, 5)]


# fmt: off
SMALL = {"vocab_size": 97, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
         "num_key_value_heads": 3, "max_position_embeddings": 90, "pad_token_id": None}
SHORT = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.3, 1.9], "long_factor": [9.0] * 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-yarn": ("Llama", SMALL | {"rope_parameters": YARN | {"original_max_position_embeddings": 15}}),
    "llama-dynamic": ("Llama", SMALL | {"rope_parameters": ROPES["dynamic"]}),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "qwen2-window": ("Qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 80, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-biased": ("Qwen3", SMALL | {"head_dim": 14, "attention_bias": True,
                                       "rope_parameters": YARN | {"original_max_position_embeddings": 15}}),
    "phi3": ("Phi3", SMALL | {"num_key_value_heads": 1, "sliding_window": 75}),
    "phi3-part": ("Phi3", SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                       "partial_rotary_factor": 0.5}}),
    "phi3-long": ("Phi3", SMALL | {"max_position_embeddings": 400, "original_max_position_embeddings": 80,
                                   "rope_parameters": SHORT | {"partial_rotary_factor": 0.5}}),
}
# fmt: on


def checkpoint(name: str, folder: Path) -> torch.nn.Module:
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    reference = getattr(transformers, f"{kind}ForCausalLM")(config)
    randomise(reference)
    return save(reference, folder)


QUICK = ("llama-yarn", "qwen2", "qwen3-biased", "phi3-long")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    reference = checkpoint(name, tmp_path)
    count = sum(p.numel() for p in reference.parameters())
    assert_greedy_parity(tmp_path, lambda tokens: reference(tokens, use_cache=False).logits, count)


@pytest.mark.parametrize(
    ("name", "longest"), [("llama-dynamic", 90), ("qwen2-window", 80), ("phi3", 75), ("phi3-long", 80), ("qwen2", None)]
)
def test_no_sequence_is_longer_than_the_frequencies_or_the_window_hold(
    name: str, longest: int | None, tmp_path: Path
) -> None:
    checkpoint(name, tmp_path / "model")
    model = open_source(str(tmp_path / "model")).build("meta")
    assert model.longest == longest
    if longest is not None:
        with pytest.raises(SourceError, match=f"Beyond {longest} tokens .* context of {longest + 1} is not possible"):
            export(str(tmp_path / "model"), tmp_path / "export", context=longest + 1)
        assert export(str(tmp_path / "model"), tmp_path / "export", chunks=()).context == longest


def test_the_limit_is_where_transformers_changes(tmp_path: Path) -> None:
    """Their logits of one prefix are others within a longer sequence: it could not be streamed beyond the limit."""
    reference = checkpoint("phi3-long", tmp_path)
    tokens = torch.arange(81)[None] % 97
    with torch.no_grad():
        within, beyond = (reference(tokens[:, :n], use_cache=False).logits[0, 40] for n in (80, 81))
    assert (within - beyond).abs().max() > 1e-3


def test_a_ring_has_no_limit_and_takes_no_such_frequencies(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**SMALL, sliding_window=9, rope_parameters=ROPES["dynamic"])
    save(transformers.MistralForCausalLM(config), tmp_path)
    with pytest.raises(SourceError, match="hold for 90 tokens only, but a ring of the last 9 has no end"):
        open_source(str(tmp_path))


def test_fields_of_one_kind_of_checkpoint_are_not_read_in_another(tmp_path: Path) -> None:
    checkpoint("phi3-part", tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"rope_parameters": YARN}))
    with pytest.raises(SourceError, match="rope_type is 'yarn', but must be 'default' or 'longrope'"):
        open_source(str(tmp_path))
    path.write_text(json.dumps(raw | {"model_type": "llama"}))
    with pytest.raises(SourceError, match="partial_rotary_factor"):
        open_source(str(tmp_path))
