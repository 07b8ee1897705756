"""Exports of small random models, made once per test session, and a session over all ways to cut a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edgeseq.manifest import load_manifest
from edgeseq.models import families
from edgeseq.models.mamba import MambaConfig
from edgeseq.models.retnet import RetNetConfig
from edgeseq.models.source import Source, random_source
from edgeseq.models.transformer import TransformerConfig
from edgeseq.models.twin import family_of_config
from edgeseq.verify.golden import load_golden
from exporters.ort_check import OrtModel

CONFIGS = {
    "mamba": MambaConfig(97, 24, 2, 40, d_state=5, d_conv=3, dt_rank=3, conv_bias=False, tie=False),
    "retnet": RetNetConfig(101, 24, 2, 3, 28),
    "transformer": TransformerConfig(89, 24, 2, 6, 3, 10, 36, attention_bias=True),
}
AGAIN = {"qwen3-next": ", drawn again"}  # weights that do not happen to amplify rounding
QUANTISABLE = {  # wide enough to be: an odd number of blocks, rows off every multiple, a last block that is padded
    "mamba": MambaConfig(97, 96, 2, 160, d_state=5, d_conv=3, dt_rank=64),
    "retnet": RetNetConfig(101, 96, 2, 3, 100),
    "transformer": TransformerConfig(89, 96, 2, 6, 3, 10, 100, attention_bias=True),
}


def source(family: str) -> Source:
    config = CONFIGS.get(family, families()[family].tiny)
    draw = AGAIN.get(family, "")
    return random_source(f"{family} of odd size{draw}", family_of_config(config), config)


def quantised_source(family: str) -> Source:
    config = QUANTISABLE[family]
    return random_source(f"{family} of quantisable size", family_of_config(config), config)


def golden(directory: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    tensors = load_file(directory / "golden.safetensors")
    return tensors["tokens"], tensors["logits"]


def worst(directory: Path, cuts: Sequence[int]) -> float:
    """Greatest difference from the golden logits over the bound, at the end of each piece; below 1 is equal."""
    said = load_golden(directory, load_manifest(directory).step.signature)
    tokens, logits = said.tokens, said.logits
    assert tokens is not None and logits is not None
    session, end, found = OrtModel(directory, threads=1).session(), 0, 0.0
    for size in cuts:
        ours = session.prefill(tokens[end : end + size])
        end += size
        limit = said.bound("onnx", logits[end - 1])
        found = max(found, float(np.abs(ours - logits[end - 1]).max()) / limit)
    assert end == len(tokens)
    return found
