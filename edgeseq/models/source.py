"""Open a model source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from edgeseq.models.base import Array, SequenceModel

ZOO_WEIGHTS = Path(__file__).parent / "zoo_weights"


def seeded_rng(owner: str, tensor: str) -> np.random.Generator:
    """One generator per tensor, so that the order of reading does not matter."""
    digest = hashlib.sha256(f"{owner}/{tensor}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def load_weights(model: SequenceModel, tensors: Mapping[str, Array]) -> None:
    """Give every tensor of the model's state_dict its value, without copying; names and shapes must match."""
    model.load_state_dict({n: torch.from_numpy(a) for n, a in tensors.items()}, strict=True, assign=True)
