"""What the matrices of a model see: second moments of their inputs over text that the model writes for itself.

Sampled text serves 4-bit rounding as well as real text does and needs no data (docs/quantisation.md has the figures).
Every stream begins with another random token and goes on by sampling, so that states are those of real use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from edgeseq.models.base import SequenceModel
from edgeseq.models.experts_op import expert_linear

STREAMS = 32
ROWS = 256  # inputs gathered before one product adds them up
SEED = 20240917
SMALL = 10_000_000  # parameters below which a step is shorter than handing half of it to another thread

Moments = Mapping[str, NDArray[np.float32]]


def moments(
    model: SequenceModel, names: Collection[str], tokens: int, folder: Path, progress: Callable[[int, int], None]
) -> Moments:
    """Sum of x x^T, float32 [K,K], of the inputs x of each parameter in `names` that linear() multiplies with, or
    expert_linear() for any of its experts.

    model: on the cpu with its weights. tokens: how many the model writes, in streams side by side. The sums are files
    in `folder`, mapped; matrices with the same input share one. Parameters that nothing reads that way are left out.
    """
    small = sum(p.numel() for p in model.parameters()) < SMALL
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    try:
        return _write_text(model, _Recorder(model, names, folder), -(-tokens // STREAMS), progress)
    finally:
        torch.set_num_threads(threads)


def _write_text(model: SequenceModel, record: _Recorder, steps: int, progress: Callable[[int, int], None]) -> Moments:
    generator = torch.Generator().manual_seed(SEED)
    state = model.initial_state(STREAMS, steps)
    token = torch.randint(0, model.config.vocab_size, (STREAMS, 1), generator=generator)
    with torch.no_grad(), record:
        for step in range(steps):
            progress(step, steps)
            logits, *state = model.advance(token, torch.full((STREAMS,), step), *state)
            record.end_of_step()
            token = torch.multinomial(logits[:, -1].float().softmax(-1), 1, generator=generator)
    progress(steps, steps)
    return record.finish()


MATRIX_ARGUMENT = {linear: 1, expert_linear: 2}
"""Products and which of their arguments is the matrix; the experts of one layer share their inputs."""


class _Recorder(TorchFunctionMode):
    """Sees every call of a product and adds up the inputs by matrix."""

    def __init__(self, model: torch.nn.Module, names: Collection[str], folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.names = {id(p): name for name, p in model.named_parameters() if name in names}
        self.sum_of: dict[str, int] = {}
        self.sums: list[NDArray[np.float32]] = []
        self.pending: list[list[Tensor]] = []
        self.seen: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in MATRIX_ARGUMENT and id(args[MATRIX_ARGUMENT[function]]) in self.names:
            self._add(self.names[id(args[MATRIX_ARGUMENT[function]])], args[0])
        return function(*args, **(kwargs or {}))

    def _add(self, name: str, x: Tensor) -> None:
        index = self.seen[id(x)][1] if id(x) in self.seen else self.sum_of.get(name)
        if index is None:
            index = len(self.sums)
            size = x.shape[-1]
            self.sums.append(np.memmap(self.folder / f"{index}.f32", np.float32, "w+", shape=(size, size)))
            self.pending.append([])
        known = self.sum_of.setdefault(name, index)
        if id(x) not in self.seen:
            self.seen[id(x)] = (x, known)  # holds x, so that no other tensor of this step gets its id
            self.pending[known].append(x.detach().reshape(-1, x.shape[-1]).float())

    def end_of_step(self) -> None:
        self.seen.clear()
        for index, rows in enumerate(self.pending):
            if sum(map(len, rows)) >= ROWS:
                self._flush(index)

    def _flush(self, index: int) -> None:
        if self.pending[index]:
            x = torch.cat(self.pending[index])
            torch.from_numpy(self.sums[index]).addmm_(x.T, x)
            self.pending[index].clear()

    def finish(self) -> Moments:
        for index in range(len(self.sums)):
            self._flush(index)
        return {name: self.sums[index] for name, index in self.sum_of.items()}
