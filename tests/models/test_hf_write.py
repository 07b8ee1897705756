"""What is written for Hugging Face reads back as the same model, there and here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeseq.errors import SourceError, UsageError
from edgeseq.models import family, hf_write
from edgeseq.models.hf_write import write_hf
from edgeseq.models.mamba import MambaConfig
from edgeseq.models.mamba2 import Mamba2Config
from edgeseq.models.source import open_source, random_source
from edgeseq.verify.tolerances import tolerance
from tests import bundles

transformers = pytest.importorskip("transformers")
CONFIGS: dict[str, tuple[str, Any]] = {
    "mamba": ("mamba", MambaConfig(61, 32, 2, 64, d_state=4, dt_rank=4)),
    "mamba-biased": ("mamba", MambaConfig(61, 24, 3, 72, 5, 3, 2, 1e-3, proj_bias=True, conv_bias=False, tie=False)),
    "mamba2": ("mamba2", Mamba2Config(61, 32, 2, 4, 16, 8)),
    "mamba2-clamped": ("mamba2", Mamba2Config(61, 32, 2, 6, 16, 8, 3, 3, 0.01, 0.2, eps=1e-3, tie=False)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_same_model_there_and_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_write, "SHARD_BYTES", 20000)  # several shards
    kind, config = CONFIGS[name]
    source = random_source(name, family(kind), config)
    write_hf(source, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    again = open_source(str(tmp_path / "hf"))
    assert again.config == config
    for tensor in source.tensor_names():
        assert np.allclose(again.tensor(tensor), source.tensor(tensor), rtol=hf_write.LOSS, atol=0), tensor
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        said, wanted = theirs(tokens, use_cache=False).logits, source.build()(tokens)
    assert (said - wanted).abs().max() <= tolerance("torch", "float32", wanted)


def test_a_tokenizer_goes_along_and_nothing_foreign_is_overwritten(tmp_path: Path) -> None:
    source = random_source("with-tokenizer", family("mamba"), CONFIGS["mamba"][1], tmp_path / "words.json")
    (tmp_path / "words.json").write_text("{}")
    for _ in range(2):
        write_hf(source, tmp_path / "hf")
        assert open_source(str(tmp_path / "hf")).tokenizer == tmp_path / "hf" / "tokenizer.json"
    (tmp_path / "hf" / hf_write.INDEX).unlink()
    with pytest.raises(UsageError, match="is not overwritten"):
        write_hf(source, tmp_path / "hf")


def test_what_a_config_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="retnet, which is not written"):
        write_hf(bundles.random_model("retnet"), tmp_path / "hf")
    first = random_source("x", family("mamba2"), Mamba2Config(61, 32, 2, 4, 16, 8, norm="norm_first"))
    uneven = random_source("x", family("mamba"), MambaConfig(61, 32, 2, 48))
    for source in (first, uneven):
        with pytest.raises(SourceError, match="cannot say"):
            write_hf(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["hf_write", "zoo:tiny-mamba", str(tmp_path / "hf")])
    assert hf_write.main() == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "mamba"
    monkeypatch.setattr("sys.argv", ["hf_write", "zoo:nothing", str(tmp_path / "other")])
    assert hf_write.main() == 2 and "The zoo has no" in capsys.readouterr().err
