"""PyTorch in float64 on a float32 model: what the golden says, so that only the other side's rounding counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}
GATHERS = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")


class Wide(TorchDispatchMode):
    """Every operator sees its float32 tensors and dtypes as float64, and makes nothing else.

    Weights are widened as they are used, one at a time; a view stays a view, and a lookup widens what it found.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.is_view:
            return function(*args, **kwargs)
        if function._schema.name in GATHERS:
            return tree_map(_widened, function(*args, **kwargs))
        if function._schema.is_mutable and getattr(args[0], "dtype", None) in WIDER:
            raise TypeError(f"{function} would change a tensor of {args[0].dtype} that was made outside of float64")
        made = function(*tree_map(_widened, args), **tree_map(_widened, kwargs))
        return made if function._schema.is_mutable else tree_map(_widened, made)


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor) and x.dtype in WIDER:
        return x.to(WIDER[x.dtype])
    return WIDER.get(x, x) if isinstance(x, torch.dtype) else x
