"""Modules that users write: `step`, sometimes `chunk`, state as a tuple."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeseq.spec import StateSlot, TensorSpec


class Fusion(nn.Module):
    """Two sensors of different rank and type in, two results out; a counter and a matrix as state."""

    inputs = (TensorSpec("gyro", "float32", (3,)), TensorSpec("mode", "int64", (1, 2)))
    outputs = (TensorSpec("pose", "float32", (2, 4)), TensorSpec("count", "int64", (1,)))
    state = (StateSlot("memory", "float32", (2, 4), 0.5), StateSlot("n", "int64", (1,)))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mix = nn.Linear(3, 4)

    def step(self, gyro: Tensor, mode: Tensor, memory: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        moved = torch.tanh(self.mix(gyro)) * (1 + mode.reshape(2, 1))
        memory = 0.9 * memory + 0.1 * moved
        return memory - moved, n + 1, memory, n + 1


class Counter(nn.Module):
    """One output that is no tuple beside no state: the least that is a step."""

    inputs = (TensorSpec("x", "float32", (1, 4)),)
    outputs = (TensorSpec("y", "float32", (1, 4)),)
    state = ()

    def step(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1


@dataclass
class Config:
    vocab_size: int = 40


class Letters(nn.Module):
    """A token model with `step` alone: a GRU over letters."""

    config = Config()
    state = [StateSlot("h", "float32", (1, 24))]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.cell, self.head = nn.Embedding(40, 16), nn.GRUCell(16, 24), nn.Linear(24, 40)

    def step(self, tokens: Tensor, position: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(self.embed(tokens[:, 0]), h)
        return self.head(h)[:, None], h


class LettersInChunks(Letters):
    def chunk(self, tokens: Tensor, position: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        logits = None
        for t in range(tokens.shape[1]):
            logits, h = self.step(tokens[:, t : t + 1], position + t, h)
        assert logits is not None
        return logits, h


class NoState(Letters):
    state = None


class NoAxis(Counter):
    """chunk() where no axis is the time."""

    inputs = (TensorSpec("x", "float32", (1, 4)),)

    def chunk(self, x: Tensor) -> Tensor:
        return self.step(x)


class Fading(nn.Module):
    """A wide state that halves at every step."""

    inputs = (TensorSpec("x", "float32", (1, 1, 1 << 15)),)
    outputs = (TensorSpec("y", "float32", (1, 1, 1 << 15)),)
    state = (StateSlot("past", "float32", (1, 1 << 15)),)

    def step(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        now = 0.5 * past + x[:, 0]
        return now[:, None], now


class Rough(nn.Module):
    """Writes into tensors that it makes and into its input."""

    inputs = (TensorSpec("x", "float32", (1, 1, 4)),)
    outputs = (TensorSpec("y", "float32", (1, 1, 4)),)
    state = (StateSlot("past", "float32", (1, 4)),)

    def step(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.zeros(1, 4)
        y[:, 1:] = 0.3 * past[:, :3] + torch.tensor(0.1)
        now = x.mul_(0.7)[:, 0] + y
        return now[:, None], now


class Strict(Counter):
    """Compares the dtypes of its tensors, as torch's recurrent layers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layer = nn.Linear(4, 4)

    def step(self, x: Tensor) -> Tensor:
        if (hidden := 0.5 * x).dtype != self.layer.weight.dtype:
            raise ValueError("dtypes differ")
        return self.layer(hidden)


class Layers(nn.Module):
    """torch's own recurrent layers, frames in: LSTM with a projection, GRU, RNN without biases; also in chunks."""

    inputs = (TensorSpec("frame", "float32", (1, 1, 20)),)
    outputs = (TensorSpec("y", "float32", (1, 1, 6)),)
    state = (
        StateSlot("h", "float32", (2, 1, 24)),
        StateSlot("c", "float32", (2, 1, 40)),
        StateSlot("g", "float32", (1, 1, 20)),
        StateSlot("r", "float32", (1, 1, 6), 0.5),
    )

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lstm = nn.LSTM(20, 40, num_layers=2, batch_first=True, proj_size=24)
        self.gru = nn.GRU(24, 20, batch_first=True)
        self.rnn = nn.RNN(20, 6, batch_first=True, bias=False)

    def step(self, frame: Tensor, h: Tensor, c: Tensor, g: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        y, (h, c) = self.lstm(frame, (h, c))
        y, g = self.gru(y, g)
        y, r = self.rnn(y, r)
        return y, h, c, g, r

    chunk = step


class BothWays(nn.Module):
    """A window of frames read in both directions, time first; what comes back is the window's end."""

    inputs = (TensorSpec("window", "float32", (5, 1, 12)),)
    outputs = (TensorSpec("y", "float32", (5, 1, 16)),)
    state = (StateSlot("h", "float32", (4, 1, 8)),)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.gru = nn.GRU(12, 8, num_layers=2, bidirectional=True)

    def step(self, window: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        y, h = self.gru(window, h)
        return y, h


class WideLayers(nn.Module):
    """Matrices wide enough to be quantised in all that torch calls them by, a plain product included."""

    inputs = (TensorSpec("frame", "float32", (1, 1, 64)),)
    outputs = (TensorSpec("y", "float32", (1, 1, 6)),)
    state = (
        StateSlot("h", "float32", (1, 1, 64)),
        StateSlot("c", "float32", (1, 1, 72)),
        *(StateSlot(name, "float32", (1, 1, 64)) for name in ("g", "r")),
        *(StateSlot(name, "float32", (1, 64)) for name in ("s", "t", "u", "v")),
    )

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.lstm = nn.LSTM(64, 72, batch_first=True, proj_size=64)
        self.gru, self.rnn = nn.GRU(64, 64, batch_first=True), nn.RNN(64, 64, batch_first=True, nonlinearity="relu")
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(64, 64), nn.GRUCell(64, 64), nn.RNNCell(64, 64)
        self.square = nn.Parameter(torch.randn(64, 64) / 8)
        self.out = nn.Linear(64, 6)

    def step(
        self, frame: Tensor, h: Tensor, c: Tensor, g: Tensor, r: Tensor, s: Tensor, t: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        y, (h, c) = self.lstm(frame, (h, c))
        y, g = self.gru(4 * y, g)
        y, r = self.rnn(4 * y, r)
        s, t = self.lstm_cell(y[:, 0], (s, t))
        u = self.gru_cell(s, u)
        v = self.rnn_cell(u, v)
        return self.out(v @ self.square.T)[:, None], h, c, g, r, s, t, u, v


class Bessel(Counter):
    def step(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


fusion, counter, letters, letters_in_chunks, no_state, no_axis, fading, rough, strict, layers, both_ways = (
    Fusion,
    Counter,
    Letters,
    LettersInChunks,
    NoState,
    NoAxis,
    Fading,
    Rough,
    Strict,
    Layers,
    BothWays,
)
wide_layers, bessel = WideLayers, Bessel
