"""A streaming noise suppressor written in PyTorch: frames of a microphone in, cleaned frames out.

    edgeseq export docs/examples/denoiser.py:factory -o denoiser
    edgeseq compile denoiser --target host -o denoiser.bundle

Spectral subtraction with decision-directed Wiener gains (Ephraim and Malah 1984) and the noise followed by its slow
minimum (Martin 2001). F samples a frame (16 kHz: 256 samples are 16 ms), N = 2 F samples a window, K = F + 1 bins.
Nothing is trained: the two matrices are the Fourier transform and its inverse, which become ordinary packed weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgeseq.spec import StateSlot, TensorSpec

F = 256
N = 2 * F
K = F + 1


class Denoiser(nn.Module):
    """frame [1,1,F] -> clean [1,1,F], one frame later, and gain [1,1,K] of every bin."""

    inputs = (TensorSpec("frame", "float32", (1, 1, F)),)
    outputs = (TensorSpec("clean", "float32", (1, 1, F)), TensorSpec("gain", "float32", (1, 1, K)))
    state = (
        StateSlot("before", "float32", (1, F)),  # the frame before, for the first half of the window
        StateSlot("tail", "float32", (1, F)),  # what the window before adds to this frame
        StateSlot("power", "float32", (1, K), 1.0),  # smoothed power of each bin
        StateSlot("noise", "float32", (1, K), 1.0),  # its slow minimum
        StateSlot("speech", "float32", (1, K)),  # power kept at the frame before
    )

    def __init__(self, rise: float = 1.004, smooth: float = 0.8, trust: float = 0.9, floor: float = 0.1) -> None:
        """rise: how fast the noise may grow a frame; trust: weight of the last frame's gain; floor: least gain."""
        super().__init__()
        self.rise, self.smooth, self.trust, self.floor = rise, smooth, trust, floor
        angle = 2 * math.pi / N * torch.outer(torch.arange(K).double(), torch.arange(N).double())
        window = torch.hann_window(N, periodic=True, dtype=torch.float64).sqrt()
        turn = torch.cat([angle.cos(), -angle.sin()]) * window  # [2K,N]
        share = torch.full((K, 1), 2.0 / N, dtype=torch.float64)
        share[0] = share[-1] = 1.0 / N
        back = turn * torch.cat([share, share])  # the inverse is the transpose, bins 1..K-2 twice
        self.register_buffer("analysis", turn.float())
        self.register_buffer("synthesis", back.float().T.contiguous())  # [N,2K]

    def step(
        self, frame: Tensor, before: Tensor, tail: Tensor, power: Tensor, noise: Tensor, speech: Tensor
    ) -> tuple[Tensor, ...]:
        x = frame[:, 0]
        spectrum = nn.functional.linear(torch.cat([before, x], 1), self.analysis)
        real, imaginary = spectrum[:, :K], spectrum[:, K:]
        now = real * real + imaginary * imaginary
        power = self.smooth * power + (1 - self.smooth) * now
        noise = torch.minimum(power, noise * self.rise).clamp_min(1e-12)
        heard = torch.relu(now / (2.0 * noise) - 1.0)
        ratio = self.trust * speech / noise + (1 - self.trust) * heard
        gain = (ratio / (1.0 + ratio)).clamp_min(self.floor)
        cleaned = nn.functional.linear(torch.cat([real * gain, imaginary * gain], 1), self.synthesis)
        clean = tail + cleaned[:, :F]
        return clean[:, None], gain[:, None], x, cleaned[:, F:], power, noise, gain * gain * now

    def chunk(self, frames: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """frames [1,T,F]: the same, T frames a call."""
        clean, gain = [], []
        for t in range(frames.shape[1]):
            y, g, *state = self.step(frames[:, t : t + 1], *state)  # type: ignore[assignment]
            clean.append(y)
            gain.append(g)
        return torch.cat(clean, 1), torch.cat(gain, 1), *state


def factory() -> nn.Module:
    return Denoiser()
