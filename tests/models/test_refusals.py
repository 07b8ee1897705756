"""What a checkpoint directory may get wrong, each refused in one sentence that names it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeseq.errors import EdgeseqError, SourceError, UsageError
from edgeseq.models.mamba import MambaConfig, hf_tensors
from edgeseq.models.source import open_source
from edgeseq.models.transformer import TransformerConfig
from edgeseq.models.transformer import hf_tensors as llama_tensors

MAMBA = {
    "model_type": "mamba",
    "vocab_size": 11,
    "hidden_size": 6,
    "state_size": 2,
    "num_hidden_layers": 1,
    "conv_kernel": 3,
    "time_step_rank": 2,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")


def tensors_of(stored: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {t.name: torch.full(t.shape, 0.5) for t in stored.values()}


@pytest.fixture
def mamba(tmp_path: Path) -> Path:
    write(tmp_path, MAMBA, tensors_of(hf_tensors(MambaConfig(11, 6, 1, 12, 2, 3, 2))))
    return tmp_path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write(tmp_path, LLAMA, tensors_of(llama_tensors(TransformerConfig(11, 8, 1, 4, 2, 2, 5, tie=False))))
    return tmp_path


def refusal(folder: Path, kind: type[EdgeseqError] = SourceError) -> str:
    with pytest.raises(kind) as caught:
        open_source(str(folder))
    assert "\n" not in caught.value.sentence
    return str(caught.value)


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_untouched_directories_open(mamba: Path) -> None:
    assert asdict(open_source(str(mamba)).config)["d_inner"] == 12


def test_the_untouched_llama_opens(llama: Path) -> None:
    assert open_source(str(llama)).param_count() == 11 * 8 * 2 + 8 + 2 * 8 + 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 5


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", "t5", ["'t5'", "mamba", "llama"]),
        ("model_type", ["mamba"], ["['mamba']", "that can be loaded are", "llama"]),
        ("hidden_act", "gelu", ["hidden_act", "'gelu'", "'silu'"]),
        ("hidden_size", None, ["lacks hidden_size"]),
        ("hidden_size", -6, ["hidden_size", "-6"]),
        ("hidden_size", True, ["hidden_size", "True"]),
        ("hidden_size", 1 << 40, ["hidden_size"]),
        ("hidden_size", "6", ["hidden_size", "'6'"]),
        ("num_hidden_layers", 1 << 30, ["num_hidden_layers", "4096"]),
        ("conv_kernel", 1, ["conv_kernel", "from 2"]),
        ("state_size", 3, ["x_proj.weight", "[6, 12]", "[8, 12]"]),
        ("time_step_rank", "many", ["time_step_rank", "'many'"]),
        ("intermediate_size", 13, ["in_proj.weight", "[24, 6]", "[26, 6]"]),
        ("use_bias", True, ["lacks", "in_proj.bias"]),
        ("use_bias", "no", ["use_bias", "'no'", "true or false"]),
        ("use_conv_bias", False, ["conv1d.bias", "no place"]),
        ("tie_word_embeddings", False, ["lacks lm_head.weight"]),
        ("layer_norm_epsilon", 0, ["layer_norm_epsilon"]),
        ("layer_norm_epsilon", float("nan"), ["layer_norm_epsilon"]),
        ("expand", 1e300, ["intermediate_size", "2147483647"]),
        ("num_hidden_layers", 2, ["lacks backbone.layers.1", "9 more"]),
        ("quantization_config", {"bits": 4}, ["quantised"]),
    ],
)
def test_mamba_config(mamba: Path, field: str, value: Any, words: list[str]) -> None:
    configure(mamba, **{field: value})
    sentence = refusal(mamba)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_act", "gelu", ["hidden_act"]),
        ("num_key_value_heads", 3, ["4 query heads", "3 key/value heads"]),
        ("num_key_value_heads", 4, ["k_proj.weight", "[4, 8]", "[8, 8]"]),
        ("head_dim", 3, ["width of 3 is odd"]),
        ("num_attention_heads", 16, ["head_dim", "0"]),
        ("rope_parameters", {"rope_type": "axial"}, ["rope_parameters.rope_type", "'axial'", "'llama3'", "'yarn'"]),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, ["lacks max_position_embeddings"]),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, ["lacks max_position_embeddings"]),
        ("rope_parameters", {"rope_type": "linear"}, ["lacks rope_parameters.factor"]),
        ("rope_parameters", "linear", ["rope_parameters", "no object"]),
        (
            "rope_parameters",
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            ["low_freq_factor 4.0 is not below"],
        ),
        ("partial_rotary_factor", 0.5, ["partial_rotary_factor", "0.5"]),
        ("attention_bias", True, ["lacks", "self_attn"]),
        ("mlp_bias", True, ["lacks", "mlp"]),
        ("tie_word_embeddings", True, []),
    ],
)
def test_llama_config(llama: Path, field: str, value: Any, words: list[str]) -> None:
    if field == "tie_word_embeddings":
        rewrite(llama, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
        words = ["ties lm_head.weight", "differ"]
    configure(llama, **{field: value})
    sentence = refusal(llama)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sliding_window", None, ["sliding_window", "null"]),
        ("sliding_window", 0, ["sliding_window", "0", "whole number"]),
        ("attention_bias", True, ["attention_bias", "True"]),
        ("num_key_value_heads", None, ["4 query heads", "8 key/value heads"]),
    ],
)
def test_mistral_config(llama: Path, field: str, value: Any, words: list[str]) -> None:
    configure(llama, model_type="mistral", sliding_window=3)
    assert open_source(str(llama)).family == "mistral"
    configure(llama, **{field: value})
    sentence = refusal(llama)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, ["ssm_cfg.layer", "'Mamba3'"]),
        ({"rms_norm": False}, ["rms_norm", "False"]),
        ({"attn_layer_idx": [3]}, ["attn_layer_idx"]),
        ({"d_intermediate": 64}, ["d_intermediate", "64"]),
        ({"ssm_cfg": []}, []),
    ],
)
def test_state_spaces_config(mamba: Path, raw: dict[str, Any], words: list[str]) -> None:
    base = {"d_model": 6, "n_layer": 1, "vocab_size": 11, "ssm_cfg": {}, "pad_vocab_size_multiple": 1}
    (mamba / "config.json").write_text(json.dumps(base | raw))
    sentence = refusal(mamba)
    assert all(word in sentence for word in words), sentence


def test_missing_surplus_and_misshapen_tensors(mamba: Path) -> None:
    rewrite(mamba, lambda t: t.pop("backbone.layers.0.mixer.D"))
    assert "lacks backbone.layers.0.mixer.D" in refusal(mamba)
    rewrite(mamba, lambda t: t.update({"backbone.layers.0.mixer.D": torch.ones(13)}))
    assert "mixer.D has shape [13]" in refusal(mamba)
    rewrite(mamba, lambda t: t.update({"backbone.layers.0.mixer.D": torch.ones(12), "extra": torch.ones(2)}))
    assert "also holds extra" in refusal(mamba)


def test_a_type_that_is_no_float(mamba: Path) -> None:
    rewrite(mamba, lambda t: t.update({"backbone.norm_f.weight": torch.ones(6, dtype=torch.int8)}))
    assert "norm_f.weight is stored as I8" in refusal(mamba)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_refused_unread(mamba: Path, name: str) -> None:
    marker = mamba / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    (mamba / "model.safetensors").unlink()
    (mamba / name).write_bytes(pickle.dumps(Bomb()))
    sentence = refusal(mamba)
    assert name in sentence
    assert "pickle" in sentence
    assert not marker.exists()


def test_no_weights_at_all(mamba: Path) -> None:
    (mamba / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(mamba)


def test_several_files_without_an_index(mamba: Path) -> None:
    (mamba / "model.safetensors").rename(mamba / "a.safetensors")
    save_file({"x": torch.ones(1)}, mamba / "b.safetensors")
    assert "2 safetensors files" in refusal(mamba)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "..", 3, ""])
def test_a_shard_name_cannot_leave_the_directory(mamba: Path, shard: Any) -> None:
    save_file({"x": torch.ones(1)}, mamba.parent / "x.safetensors")
    (mamba / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    assert "not a plain .safetensors file name" in refusal(mamba)


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ({"weight_map": {"x": "gone.safetensors"}}, "gone.safetensors is named by the index"),
        ({"weight_map": {"x": "model.safetensors"}}, "lacks the tensor x"),
        ({"weight_map": {}}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "not a JSON object"),
    ],
)
def test_a_wrong_index(mamba: Path, index: Any, word: str) -> None:
    (mamba / "model.safetensors.index.json").write_text(json.dumps(index))
    assert word in refusal(mamba)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(mamba: Path, keep: float) -> None:
    path = mamba / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    assert "not a whole safetensors file" in refusal(mamba)


@pytest.mark.parametrize(("text", "word"), [("{", "not JSON"), ("[1]", "not a JSON object"), ("[" * 10**5, "not JSON")])
def test_a_config_that_is_no_object(mamba: Path, text: str, word: str) -> None:
    (mamba / "config.json").write_text(text)
    assert word in refusal(mamba)


def test_wrong_requests(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path, UsageError)
    assert "does not exist" in refusal(tmp_path / "absent", UsageError)
    (tmp_path / "weights.gguf").write_bytes(b"x")
    assert "is a file" in refusal(tmp_path / "weights.gguf", UsageError)
    with pytest.raises(UsageError, match="tiny-mamba"):
        open_source("zoo:nothing")


def test_reading_a_tensor_never_changes_the_file(mamba: Path) -> None:
    before = (mamba / "model.safetensors").read_bytes()
    source = open_source(str(mamba))
    for name in source.tensor_names():
        array = source.tensor(name)
        assert array.dtype == np.float32
    model = source.build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert (mamba / "model.safetensors").read_bytes() == before
