"""PyTorch on a quantised export: products and lookups of matrices that the weights file holds as codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from edgeseq.errors import ExportError
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
        """Stands for the matrix in a module: its shape in one row, NaN wherever it is read outside `coded`."""
        return torch.full((self.k,), float("nan")).expand(m, self.k)


INPUT = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::mv": 1, "aten::addmv": 2}
"""Products that torch's layers end in, by schema, and which argument is the input of the matrix."""


@contextmanager
def coded(matrices: Mapping[int, CodedMatrix], round_inputs: bool = False) -> Iterator[None]:
    """Products and lookups of placeholders see the matrices they stand for, one at a time.

    matrices: by the address of the placeholder, as tied parameters are several tensors over one memory.
    round_inputs: a product with such a matrix sees its input rounded to int8 by blocks of 32, as a device does.
    """
    # oneDNN would take a whole LSTM as one operator, with products that nobody sees
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        with _Experts(matrices, round_inputs), _Matrices(matrices, round_inputs):
            yield


class _Matrices(TorchDispatchMode):
    """Sees the operators that linear(), matmul() and torch's recurrent layers come down to."""

    def __init__(self, matrices: Mapping[int, CodedMatrix], round_inputs: bool) -> None:
        super().__init__()
        self.matrices, self.round_inputs = matrices, round_inputs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.is_view or not any(map(self._is_coded, args)):
            return function(*args, **kwargs)
        schema = function._schema.name
        if schema == "aten::embedding":
            return self.matrices[args[0].data_ptr()].rows(args[1])
        args = [self._whole(x) if self._is_coded(x) else x for x in args]
        if self.round_inputs and schema in INPUT:
            args[INPUT[schema]] = rounded_input(args[INPUT[schema]])
        return function(*args, **kwargs)

    def _is_coded(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.data_ptr() in self.matrices

    def _whole(self, x: Tensor) -> Tensor:
        """The matrix that a placeholder stands for, transposed or for every item of a batch where the view is."""
        matrix = self.matrices[x.data_ptr()].rows()
        if x.stride()[-2:] == (1, 0):
            matrix = matrix.T
        if x.ndim >= 2 and x.shape[-2:] == matrix.shape:
            return matrix.expand(x.shape)
        raise ExportError(
            f"a quantised matrix {list(matrix.shape)} is read as {list(x.shape)}",
            "export without --quant, or multiply with the whole matrix",
        )


class _Experts(TorchFunctionMode):
    """Sees the products with the matrices of experts whole, to read the chosen ones alone."""

    def __init__(self, matrices: Mapping[int, CodedMatrix], round_inputs: bool) -> None:
        super().__init__()
        self.matrices, self.round_inputs = matrices, round_inputs

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (expert_linear, expert_linear_parallel) and args[2].data_ptr() in self.matrices:
            return self._experts(function, *args)
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
