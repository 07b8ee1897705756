"""What a model says about itself, and how to sample from it: the plain values of `edgeseq.runtime`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeseq import runtime_abi as abi


@dataclass(frozen=True)
class Tensor:
    """An input, an output or a state slot. bfloat16 arrays travel as uint16 bit patterns."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    role: str = "data"
    graph: int = 0
    is_output: bool = False
    update: str = "overwrite"
    axis: int | None = None


@dataclass(frozen=True)
class Graph:
    """One compiled graph: consumes exactly `tokens` steps a run."""

    name: str
    tokens: int
    n_launches: int
    arena_bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """Facts of an open model. All sizes in bytes; `context` 0 means unbounded; `session_bytes` is what one stream
    takes of the host's memory, whatever its length.

    backend: what runs the kernels; device: vendor, device and driver in a line; device_session_bytes: memory of one
    stream on a GPU, 0 on the CPU."""

    model_id: str
    vocab_size: int
    context: int
    takes_tokens: bool
    tokenizer: Literal["none", "bytes"]
    threads: int
    file_bytes: int
    weight_bytes: int
    state_bytes: int
    io_bytes: int
    arena_bytes: int
    session_bytes: int
    graphs: tuple[Graph, ...]
    slots: tuple[Tensor, ...]
    io: tuple[Tensor, ...]
    backend: str = "cpu"
    device: str = ""
    device_session_bytes: int = 0


@dataclass(frozen=True)
class Sampling:
    """How to pick a token, applied in this order: repetition_penalty (over the last `window` ids), temperature
    (0 = greedy), top_k (0 = all), top_p (1 = all), min_p (0 = all). The same seed gives the same tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    window: int = 64
    seed: int = 0

    def to_c(self) -> abi.Sampler:
        return abi.Sampler(
            top_k=self.top_k, temperature=self.temperature, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, seed=self.seed & (2**64 - 1),
        )  # fmt: skip


GREEDY = Sampling()
