"""GPT-2 checkpoints against `GPT2LMHeadModel`, what is refused, and the positions that end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeseq.errors import SourceError
from edgeseq.models.gpt2 import Gpt2Config, hf_tensors
from edgeseq.models.source import open_source
from exporters import export
from tests.models.huggingface import assert_greedy_parity, randomise, save
from tests.models.support import random_model

transformers = pytest.importorskip("transformers")

# fmt: off
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {"vocab_size": 1009, "n_embd": 66, "n_layer": 3, "n_head": 6, "n_inner": 77, "n_positions": 83},
    "defaults": {"vocab_size": 97, "n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 71,
                 "layer_norm_epsilon": 1e-3},
    "scaled": {"vocab_size": 97, "n_embd": 44, "n_layer": 3, "n_head": 4, "n_positions": 90,
               "activation_function": "relu", "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
               "reorder_and_upcast_attn": True, "tie_word_embeddings": False},
    "erf": {"vocab_size": 97, "n_embd": 28, "n_layer": 1, "n_head": 2, "n_positions": 80,
            "activation_function": "gelu"},
}
# fmt: on


def checkpoint(name: str, folder: Path) -> torch.nn.Module:
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPES[name]))
    randomise(reference)
    with torch.no_grad():
        for n, p in reference.named_parameters():
            if ".ln_" in n and n.endswith("weight"):
                p += 1.0
    return save(reference, folder)


@pytest.mark.parametrize("name", SHAPES)
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    reference = checkpoint(name, tmp_path)
    count = sum(p.numel() for p in reference.parameters())
    assert_greedy_parity(tmp_path, lambda tokens: reference(tokens, use_cache=False).logits, count)


def test_the_layout_of_the_first_checkpoints(tmp_path: Path) -> None:
    """Names without `transformer.`, the causal mask stored as a buffer, and a config with much that is for training."""
    checkpoint("odd", tmp_path)
    want = open_source(str(tmp_path))
    values = {n: want.tensor(n) for n in want.tensor_names()}
    path = tmp_path / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 83, 83) for i in range(3)}
    save_file(tensors | {"h.0.attn.masked_bias": torch.tensor(-1e4)}, path)
    got = open_source(str(tmp_path))
    assert got.tensor_names() == want.tensor_names()
    assert all((got.tensor(n) == v).all() for n, v in values.items())


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"activation_function": "silu"}, ["activation_function", "'silu'", "'gelu_new'"]),
    ({"add_cross_attention": True}, ["add_cross_attention", "True"]),
    ({"n_head": 4}, ["30", "4 heads"]),
    ({"n_positions": 1}, ["n_positions", "from 2"]),
    ({"n_positions": 70}, ["wpe.weight", "[71, 30]", "[70, 30]"]),
    ({"n_inner": 100}, ["c_fc.weight", "[30, 120]", "[30, 100]"]),
    ({"n_layer": 3}, ["lacks", "transformer.h.2", "more"]),
    ({"n_layer": 1}, ["transformer.h.1", "no place"]),
    ({"scale_attn_weights": 2}, ["scale_attn_weights", "true or false"]),
    ({"tie_word_embeddings": False}, ["lacks lm_head.weight"]),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=[next(iter(f)) + str(i) for i, (f, _) in enumerate(REFUSED)])
def test_what_is_refused(fields: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    checkpoint("defaults", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(SourceError) as caught:
        open_source(str(tmp_path))
    assert all(word in caught.value.sentence for word in words), caught.value.sentence
    assert "\n" not in caught.value.sentence


def test_no_sequence_is_longer_than_the_positions(tmp_path: Path) -> None:
    checkpoint("defaults", tmp_path / "model")
    with pytest.raises(SourceError, match="learned 71 positions, so a context of 72 tokens is not possible"):
        export(str(tmp_path / "model"), tmp_path / "export", context=72)
    assert not (tmp_path / "export").exists()
    assert export(str(tmp_path / "model"), tmp_path / "export", chunks=()).context == 71
    assert export(str(tmp_path / "model"), tmp_path / "export", chunks=(), context=20).context == 20


def test_a_stored_name_for_every_tensor() -> None:
    config = Gpt2Config(11, 8, 2, 2, 5, 9, tie=False)
    assert set(hf_tensors(config)) == set(random_model(config).state_dict())
