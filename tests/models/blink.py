"""Checkpoints in BlinkDL's layout, written down name by name apart from the reader: random weights of odd sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

V, D, F, L, H = 67, 48, 84, 3, 3
N = D // H
RANKS = {"w": 8, "a": 6, "v": 5, "g": 10}  # of version 7
MIX_RANK, DECAY_RANK = 4, 7  # of version 6
Shapes = dict[str, tuple[int, ...]]


def _version4(i: int) -> Shapes:
    found: Shapes = {f"att.time_mix_{x}": (1, 1, D) for x in "kvr"}
    found |= {"att.time_decay": (D,), "att.time_first": (D,)}
    return found | {f"att.{x}.weight": (D, D) for x in ("key", "value", "receptance", "output")}


def _version5(i: int) -> Shapes:
    found: Shapes = {f"att.time_mix_{x}": (1, 1, D) for x in "kvrg"}
    found |= {"att.time_decay": (H, N), "att.time_faaaa": (H, N), "att.ln_x.weight": (D,), "att.ln_x.bias": (D,)}
    return found | {f"att.{x}.weight": (D, D) for x in ("key", "value", "receptance", "gate", "output")}


def _version6(i: int) -> Shapes:
    found: Shapes = {f"att.time_maa_{x}": (1, 1, D) for x in "xwkvrg"}
    found |= {"att.time_maa_w1": (D, 5 * MIX_RANK), "att.time_maa_w2": (5, MIX_RANK, D)}
    found |= {"att.time_decay": (1, 1, D), "att.time_decay_w1": (D, DECAY_RANK), "att.time_decay_w2": (DECAY_RANK, D)}
    found |= {"att.time_faaaa": (H, N), "att.ln_x.weight": (D,), "att.ln_x.bias": (D,)}
    return found | {f"att.{x}.weight": (D, D) for x in ("key", "value", "receptance", "gate", "output")}


def _version7(i: int) -> Shapes:
    found: Shapes = {f"att.x_{x}": (1, 1, D) for x in "rwkvag"}
    found |= {f"att.{x}": (1, 1, D) for x in ("k_k", "k_a")} | {"att.r_k": (H, N)}
    for x, rank in RANKS.items():
        found |= {f"att.{x}1": (D, rank), f"att.{x}2": (rank, D)}
        found |= {} if x == "g" else {f"att.{x}0": (1, 1, D)}
    found |= {"att.ln_x.weight": (D,), "att.ln_x.bias": (D,)}
    return found | {f"att.{x}.weight": (D, D) for x in ("key", "value", "receptance", "output")}


def shapes(version: int) -> Shapes:
    """Names and shapes of a whole file."""
    layer = {4: _version4, 5: _version5, 6: _version6, 7: _version7}[version]
    found: Shapes = {"emb.weight": (V, D), "blocks.0.ln0.weight": (D,), "blocks.0.ln0.bias": (D,)}
    for i in range(L):
        names: Shapes = {f"{n}.{p}": (D,) for n in ("ln1", "ln2") for p in ("weight", "bias")}
        names |= layer(i) | {"ffn.key.weight": (F, D), "ffn.value.weight": (D, F)}
        if version < 7:
            mix = "time_maa" if version == 6 else "time_mix"
            names |= {f"ffn.{mix}_{x}": (1, 1, D) for x in "kr"} | {"ffn.receptance.weight": (D, D)}
        else:
            names |= {"ffn.x_k": (1, 1, D)}
        found |= {f"blocks.{i}.{name}": shape for name, shape in names.items()}
    return found | {"ln_out.weight": (D,), "ln_out.bias": (D,), "head.weight": (V, D)}


def checkpoint(version: int) -> dict[str, torch.Tensor]:
    """Float32 weights of numpy's seeded generator: the same on every machine. No default hides an error: every norm,
    bias, decay, mixing vector and low-rank map is random."""
    rng, found = np.random.default_rng(100 + version), {}
    for name, shape in shapes(version).items():
        drawn = rng.standard_normal(shape)
        leaf = name.rsplit(".", 1)[-1]
        if ".ln" in name or name.startswith("ln"):
            drawn = 0.2 * drawn + (1.0 if name.endswith("weight") else 0.0)
        elif "_mix_" in leaf or ("_maa_" in leaf and len(shape) == 3 and shape[0] == 1) or leaf.startswith("x_"):
            drawn = 0.5 + 0.3 * drawn
        elif leaf in ("time_decay", "w0"):
            drawn = -1.0 + 2.0 * drawn
        elif leaf in ("k_k", "k_a"):
            drawn = 1.0 + 0.3 * drawn
        else:
            drawn = drawn * (0.6 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)
        found[name] = torch.from_numpy(drawn.astype(np.float32))
    return found


def tokens(count: int, seed: int = 5) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, V, count)]


def stored(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: t.to(dtype) for name, t in tensors.items()}
