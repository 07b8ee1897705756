"""RecurrentGemma: parity with Hugging Face's whole-sequence forward.

Its class keeps the convolution's and the recurrence's state in its modules and hands out no cache, so decoding with it
is wrong after another sequence, in chunks, and without a cache of the caller's; only the whole sequence is a reference.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeseq.errors import SourceError
from edgeseq.models.recurrent_gemma import FAMILY, RgLru, decay_rate
from edgeseq.models.source import open_source
from edgeseq.verify.tolerances import tolerance
from tests.models.huggingface import assert_greedy_parity, randomise, save
from tests.models.support import ODD, random_model

transformers = pytest.importorskip("transformers")

# fmt: off
CASES: dict[str, dict[str, Any]] = {
    "odd": {"vocab_size": 211, "hidden_size": 36, "num_hidden_layers": 4, "intermediate_size": 62,
            "num_attention_heads": 3, "num_key_value_heads": 1, "lru_width": 42, "attention_window_size": 9,
            "conv1d_width": 3, "logits_soft_cap": 5.0, "rms_norm_eps": 1e-4},
    "all": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 40,
            "num_attention_heads": 2, "attention_window_size": 4, "block_types": ["attention", "recurrent"],
            "attention_bias": True, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25}},
}
# fmt: on


def gemma(fields: dict[str, Any], folder: Path) -> torch.nn.Module:
    reference = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**fields))
    randomise(reference, wide=("linear_x.weight", "linear_out.weight", "conv_1d.weight"))
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.endswith("recurrent_param"):
                p.copy_(torch.linspace(-7.0, 1.0, p.numel()))  # decays from nearly 1 to nearly 0
            elif "norm" in name:
                p.sub_(1.0)  # its norms hold the distance from 1
    return save(reference, folder)


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    reference = gemma(CASES[name], tmp_path)
    count = sum(p.numel() for p in reference.parameters())
    assert_greedy_parity(tmp_path, lambda x: reference(x, use_cache=False).logits, count)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"block_types": ["recurrent", "mamba"]}, "must be recurrent or attention"),
        ({"block_types": "recurrent"}, "block_types is 'recurrent'"),
        ({"num_attention_heads": 5}, "hidden_size 36 cannot be cut into 5 heads"),
        ({"lru_width": 40}, "36 and 40 cannot be cut into 3 heads"),
        ({"logits_soft_cap": 0}, "logits_soft_cap is 0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.1}},
            "of 12 channels",
        ),
        (
            {"intermediate_size": 64},
            r"mlp_block\.gate_proj\.weight has shape \[31, 36\], but config\.json implies \[32",
        ),
        ({"block_types": ["recurrent"]}, r"lacks model\.layers\.2\.temporal_block\.conv_1d"),
    ],
)
def test_what_cannot_be_honoured_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    gemma(CASES["odd"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SourceError, match=sentence):
        open_source(str(tmp_path))


def test_nothing_is_lost_where_the_decay_is_near_one() -> None:
    """sqrt(1 - a^2) of log a down to -1e-6, against float64: 1 - exp(2 log a) in float32 is off by half a per cent."""
    block = RgLru(FAMILY.tiny).eval()
    log_a = -np.logspace(-6, 1, 128)
    with torch.no_grad():
        for gate in (block.input_gate, block.decay_gate):
            gate.zero_()
        block.decay_bias.fill_(40.0)  # r = 1
        block.input_bias.fill_(40.0)
        block.A.copy_(torch.from_numpy(log_a.astype(np.float32)))
        x, found = block.gates(torch.ones(1, 2, 128), torch.tensor([0]))
    assert torch.equal(found[0, 1], block.A)
    exact = np.sqrt(-np.expm1(2.0 * block.A.detach().double().numpy()))
    assert np.abs(x[0, 1].double().numpy() / exact - 1.0).max() < 1e-6
    assert (x[0, 0] == 1.0).all(), "the first token of a sequence is taken as it is"
    naive = np.sqrt(1.0 - np.exp(np.float32(2.0) * block.A.detach().numpy()))
    assert np.abs(naive / exact - 1.0).max() > 5e-3


def test_decay_rates_of_any_stored_parameter_are_finite() -> None:
    found = decay_rate(np.array([-200.0, -1.0, 0.0, 1.0, 200.0], np.float32))
    assert found[1:] == pytest.approx([-8 * np.log1p(np.exp(-1)), -8 * np.log(2), -8 * np.log1p(np.exp(1)), -1600.0])
    assert -1e-30 < found[0] <= 0.0


@torch.no_grad()
def test_only_the_first_token_of_a_sequence_is_special() -> None:
    """The same chunk at position 0 and later differs, whatever the state; at any later position it does not."""
    config = dataclasses.replace(ODD["recurrent-gemma-odd"], pattern=("recurrent",))
    model, tokens = random_model(config), torch.arange(5)[None]
    state = model.initial_state(1, 8)
    first, third, ninth = (model.advance(tokens, torch.tensor([p]), *state)[0] for p in (0, 2, 8))
    assert torch.equal(third, ninth)
    assert (first - third).abs().max() > tolerance("torch", "float32", first)
