"""PyTorch on a quantised export: products and lookups of matrices that the weights file holds as codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgeseq.models.experts_op import expert_linear, expert_linear_parallel
from exporters.rounding import BLOCK, dequantise


class CodedMatrix:
    """One matrix [M,K] of `path`, dequantised whole or by rows when it is asked for."""

    def __init__(self, path: Path, name: str, k: int) -> None:
        self.path, self.name, self.k = path, name, k

    def rows(self, ids: Tensor | None = None) -> Tensor:
        """float32 [M,K], or the rows of `ids` as [*ids.shape,K]."""
        with safetensors.safe_open(self.path, framework="pt") as file:
            codes, scales = (file.get_tensor(f"{self.name}.{part}").numpy() for part in ("codes", "scales"))
        if ids is None:
            return torch.from_numpy(dequantise(codes, scales, self.k))
        which = ids.reshape(-1).numpy()
        found = dequantise(np.ascontiguousarray(codes[which]), np.ascontiguousarray(scales[which]), self.k)
        return torch.from_numpy(found).reshape(*ids.shape, self.k)

    def placeholder(self, m: int) -> Tensor:
        """Stands for the matrix in a module: its shape in one element, NaN wherever anything but `Coded` reads it."""
        return torch.full((1,), float("nan")).expand(m, self.k)


class Coded(TorchFunctionMode):
    """Products and lookups of placeholders see the matrices they stand for, one at a time.

    matrices: by the address of the placeholder, as tied parameters are several tensors over one memory.
    round_inputs: a product with such a matrix sees its input rounded to int8 by blocks of 32, as a device does.
    """

    def __init__(self, matrices: Mapping[int, CodedMatrix], round_inputs: bool = False) -> None:
        super().__init__()
        self.matrices, self.round_inputs = matrices, round_inputs

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear and args[1].data_ptr() in self.matrices:
            x = rounded_input(args[0]) if self.round_inputs else args[0]
            args = (x, self.matrices[args[1].data_ptr()].rows(), *args[2:])
        elif function in (expert_linear, expert_linear_parallel) and args[2].data_ptr() in self.matrices:
            return self._experts(function, *args)
        elif function is nn.functional.embedding and args[1].data_ptr() in self.matrices:
            return self.matrices[args[1].data_ptr()].rows(args[0])
        return function(*args, **(kwargs or {}))

    def _experts(
        self, function: Callable[..., Any], x: Tensor, index: Tensor, w: Tensor, count: int, *gates: Any
    ) -> Any:
        """The product with the experts that some token chose, renumbered; no other is dequantised."""
        chosen = index.unique()
        chosen = chosen[chosen >= 0] if bool((chosen >= 0).any()) else chosen.new_zeros(1)
        rows = w.shape[0] // count
        matrices = self.matrices[w.data_ptr()].rows(chosen[:, None] * rows + torch.arange(rows))
        index = torch.where(index < 0, index, torch.searchsorted(chosen, index))
        x = rounded_input(x) if self.round_inputs else x
        return function(x, index, matrices.flatten(0, 1), len(chosen), *gates)


def rounded_input(x: Tensor) -> Tensor:
    """x [..,K] as its int8 blocks mean it, float32: the largest of a block becomes 127."""
    width = x.shape[-1]
    parts = nn.functional.pad(x, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    return ((parts * inverse).round() * (largest / 127.0)).flatten(-2)[..., :width]
