"""Hyena (Poli et al. 2023, arXiv 2302.10866) with exact long convolutions, or with some of them distilled to modes.

Glossary
  B  batch                 T  tokens             M  rows of a history (the context)
  L  layers                d  model width        o  order; a layer has o - 1 long filters
  R  taps of a long filter, its horizon          k  taps of the short convolution
  W  width of the filter's network               E  its input: time and (E - 1) / 2 sine and cosine pairs
  F  width of the gated feed-forward             N  modes of a distilled filter

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]:
  z    = causal_conv(W_in h + b_in)              [B,T,(o+1) d], k taps with bias, no activation
  x_0 .. x_(o-1), v = split(z)
  for i = o-1 .. 1, j = o-1-i:  v = v * x_i;  v_t = sum_(s<R) h_j[s] v_(t-s) + D_j v_t
  x    = x + W_out(v * x_0) + b_out
  h    = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
The filters are a function of time, evaluated at t = 0 .. R-1 with u = t / (R-1):
  h[t] = W_4 sin(f W_3' sin(f W_2' sin(f W_1'(e)))) exp(-u |delta|),  W' with bias,  f one frequency per unit
  e    = [u, cos(w_b 2 pi t / R), -sin(w_b 2 pi t / R)],  w_b from 1e-4 to (E-1)/2 - 1 in equal steps
  delta per channel from ln(100)/1.5 to ln(100)/0.3 in equal steps
which an export does once, in double: a device reads R taps and never runs that network.
HyenaDNA (Nguyen et al. 2023, arXiv 2306.15794) is the same with layer norms, a feed-forward W_down gelu(W_up h + b) + b
(GELU by tanh), e and delta learned, and exp(-u |delta|) + 0.05. `layout` says which one it is.

State of a layer: conv [1,k-1,(o+1) d] and history.j [1,M,d] for each filter, which holds every v that entered it:
exact, and linear in the context, half of the keys and values of attention at order 2. A step costs min(position + 1, R)
multiply-adds per channel and filter and reads as many rows of history and filter. Inputs older than R tokens have no
effect: the filter was never trained there.

A layer whose config.modal is N > 0 has instead, as in LaughingHyena (Massaroli et al. 2023, arXiv 2310.18780),
h_j[t] = Re sum_n c_n a_n^t with N poles per channel: state modes.j [1,N,2,d], whatever the context; distill.py fits
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.models import distill, parallel, scan_op, state_space
from edgeseq.models import functional as ops
from edgeseq.models.base import Array, Checkpoint, Family, last_logits
from edgeseq.models.distill import Distilled, LayerReport
from edgeseq.models.hyena_dna import config_from_hf, hf_tensors
from edgeseq.models.hyena_filter import HyenaConfig, ImplicitFilter, parts_of, taps, timed
from edgeseq.models.stack import Mixer, Stack
from edgeseq.models.stack import random_tensor as stack_tensor
from edgeseq.spec import StateSlot


class HyenaMixer(Mixer):
    """Projection, short convolution and the recurrence of gates and long filters; `modes` 0 means exact filters."""

    def __init__(self, c: HyenaConfig, modes: int) -> None:
        super().__init__()
        self.c, self.modes = c, modes
        wide, filters = (c.order + 1) * c.d_model, range(c.order - 1)
        self.in_proj = nn.Linear(c.d_model, wide)
        self.conv_weight = nn.Parameter(torch.empty(wide, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(wide))
        self.skips = nn.ParameterList(torch.empty(c.d_model) for _ in filters)
        self.out_proj = nn.Linear(c.d_model, c.d_model)
        if modes:
            self.poles = nn.ParameterList(torch.empty(modes, 2, c.d_model) for _ in filters)
            self.residues = nn.ParameterList(torch.empty(modes, 2, c.d_model) for _ in filters)
            return
        self.filter = ImplicitFilter(c)
        for j in filters:
            self.register_buffer(f"taps{j}", torch.empty(c.kept, c.d_model))

    def kernels(self, tokens: int) -> Sequence[Tensor]:
        """The response [d,tokens'] of every filter, at most `tokens` long."""
        if self.modes:
            pairs = zip(self.poles, self.residues, strict=True)
            return [state_space.modal_kernel(poles, residues, tokens) for poles, residues in pairs]
        parts = dict(self.filter.named_parameters())
        return list(taps(self.c, min(tokens, self.c.kept), *(parts[name] for name in parts_of(self.c))).transpose(1, 2))

    def forward(self, h: Tensor) -> Tensor:
        z = parallel.causal_conv_parallel(self.in_proj(h), self.conv_weight, self.conv_bias)
        first, *gates, v = z.chunk(self.c.order + 1, -1)
        for gate, kernel, skip in zip(reversed(gates), self.kernels(h.shape[1]), self.skips, strict=True):
            v = v * gate
            v = state_space.fft_conv(v, kernel.to(h.dtype)) + skip * v
        return self.out_proj(v * first)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """As in `Mixer`, with position [B] before the state."""
        position, conv, *past = state
        z, conv = ops.causal_conv(self.in_proj(h), self.conv_weight, self.conv_bias, conv, silu=False)
        first, *gates, v = z.chunk(self.c.order + 1, -1)
        present = []
        for j, gate in enumerate(reversed(gates)):
            v = v * gate
            if self.modes:
                v, new = scan_op.diag_scan(v, self.poles[j], self.residues[j], self.skips[j], past[j])
            else:
                v, new = scan_op.long_conv(v, getattr(self, f"taps{j}"), self.skips[j], past[j], position)
            present.append(new)
        return self.out_proj(v * first), conv, *present

    def slots(self, context: int) -> tuple[StateSlot, ...]:
        """State of one stream of at most `context` tokens."""
        c = self.c
        conv = StateSlot("conv", "float32", (1, c.d_conv - 1, (c.order + 1) * c.d_model), 0.0, "shift", 1)
        if self.modes:
            made = [StateSlot(f"modes.{j}", "float32", (1, self.modes, 2, c.d_model)) for j in range(c.order - 1)]
        else:
            shape = (1, context, c.d_model)
            made = [StateSlot(f"history.{j}", "float32", shape, 0.0, "append", 1) for j in range(c.order - 1)]
        return (conv, *made)


class DnaLayer(nn.Module):
    """HyenaDNA's residual layer: layer norms, and a feed-forward without a gate."""

    def __init__(self, c: HyenaConfig, modes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c.d_model, c.eps)
        self.mixer = HyenaMixer(c, modes)
        self.ff_norm = nn.LayerNorm(c.d_model, c.eps)
        self.up_proj = nn.Linear(c.d_model, c.d_ff)
        self.down_proj = nn.Linear(c.d_ff, c.d_model)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(nn.functional.gelu(self.up_proj(self.ff_norm(x)), approximate="tanh"))

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x + self.mixer(self.norm(x)))

    def advance(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, *new = self.mixer.advance(self.norm(x), *state)
        return self.feed_forward(x + y), *new


class Hyena(Stack):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`. A position is read by exact layers."""

    def __init__(self, config: HyenaConfig) -> None:
        modes = iter(config.modes)
        super().__init__(config, lambda c: HyenaMixer(c, next(modes)))
        self.uses_position = 0 in config.modes  # type: ignore[misc]
        if config.layout == "hyenadna":
            self.layers = nn.ModuleList(DnaLayer(config, modes) for modes in config.modes)
            del self.norm
            self.norm = nn.LayerNorm(config.d_model, config.eps)

    def normed(self, x: Tensor, norm: Callable[..., Tensor]) -> Tensor:
        """What the head reads; norm: of the paper's layout."""
        return self.norm(x) if self.config.layout == "hyenadna" else norm(x, self.norm, self.config.eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.linear(self.normed(x, ops.rms_norm_parallel), self.head_weight())

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return tuple(
            replace(slot, name=f"layers.{i}.{slot.name}")
            for i, layer in enumerate(self.layers)
            for slot in layer.mixer.slots(context)
        )

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new, each = self.embed(tokens), [], self.config.order
        for i, layer in enumerate(self.layers):
            x, *present = layer.advance(x, position, *state[i * each : (i + 1) * each])
            new += present
        return (last_logits(x, lambda h: self.normed(h, ops.rms_norm), self.head_weight()), *new)


def derive(c: HyenaConfig, name: str, read: Callable[[str], Array]) -> Array:
    """The taps [R,d] of one filter from the network behind it."""
    mixer, leaf = name.rsplit(".", 1)
    parts = [read(f"{mixer}.filter.{part}") for part in parts_of(c)]
    (found,) = state_space.numpy_of(lambda *x: (taps(c, c.kept, *x),), *parts)
    return np.ascontiguousarray(found[int(leaf.removeprefix("taps"))])


def distil(
    c: HyenaConfig, read: Callable[[str], Array], order: int, tolerance: float, progress: Callable[[int, int], None]
) -> Distilled:
    """Fit `order` modes to every exact filter; a layer of which one channel's error exceeds `tolerance` stays exact.

    read: tensors of the exact model by name. progress: called with the layers done and their number.
    """
    modes, layers = list(c.modes), []
    tensors: dict[str, Array] = {}
    for i in range(c.n_layers):
        progress(i, c.n_layers)
        if modes[i]:
            continue
        mixer = f"layers.{i}.mixer"
        fits = [distill.fit(derive(c, f"{mixer}.taps{j}", read), order) for j in range(c.order - 1)]
        error = max(float(f.error.max()) for f in fits)
        modes[i] = order if error <= tolerance else 0
        median = max(float(np.median(f.error)) for f in fits)
        layers.append(LayerReport(i, modes[i], error, median, max(float(f.beyond.max()) for f in fits)))
        if modes[i]:
            for j, f in enumerate(fits):
                skip = read(f"{mixer}.skips.{j}").astype(np.float64) + f.rest
                tensors |= {f"{mixer}.poles.{j}": f.poles, f"{mixer}.residues.{j}": f.residues}
                tensors[f"{mixer}.skips.{j}"] = skip.astype(np.float32)
    progress(c.n_layers, c.n_layers)
    return Distilled(replace(c, modal=tuple(modes) if any(modes) else ()), tensors, tuple(layers), order, tolerance)


def within(c: HyenaConfig, context: int) -> HyenaConfig:
    """The same model for sequences of at most `context` tokens: taps that reach further back are never read."""
    return replace(c, reach=context) if context < c.kept and 0 in c.modes else c


def random_tensor(c: HyenaConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Published first values: sines of one frequency over layers uniform in +-1/sqrt(fan in); skips Gaussian.

    Poles and residues of a distilled layer, where none were fitted, are slow modes as S4D has them.
    """
    _, _, inner = name.partition(".filter.")
    leaf = name.rsplit(".", 1)[-1]
    if inner in ("time", "delta"):
        made = timed(c, torch.arange(c.horizon, dtype=torch.float64)[:, None] / max(c.horizon - 1, 1))
        return made[inner == "delta"].float().numpy()
    if inner == "frequency":
        return np.full(shape, c.frequency, np.float32)
    if inner:
        fan_in = {"first": 1 + 2 * c.filter_bands}.get(inner.split(".")[0], c.filter_width)
        return rng.uniform(-(fan_in**-0.5), fan_in**-0.5, shape).astype(np.float32)
    if ".skips." in name:
        return rng.standard_normal(shape, np.float32)
    if ".poles." in name:
        z = np.exp(-np.exp(state_space.random_log_dt(shape[::2], rng)) + 1j * rng.uniform(0, 3, shape[::2]))
        return np.stack([z.real, z.imag], 1).astype(np.float32)
    if leaf == "conv_weight" or ".residues." in name:
        return rng.uniform(-(shape[1] ** -0.5), shape[1] ** -0.5, shape).astype(np.float32)
    if c.layout == "hyenadna" and leaf == "bias" and len(shape) == 1:
        return np.zeros(shape, np.float32)
    return stack_tensor(c, name, shape, rng)


FAMILY = Family(
    name="hyena",
    config=HyenaConfig,
    model=Hyena,
    checkpoint=Checkpoint(
        model_types=("hyenadna",),
        config=config_from_hf,
        tensors=hf_tensors,
        ignored=(".pos_emb.t", ".implicit_filter.3.freq", ".implicit_filter.5.freq"),
    ),
    # The paper's 153M (appendix A): 18 layers of 864; a gated feed-forward of 1152 weighs what its 1728 do.
    zoo={"hyena-153m": HyenaConfig(50257, 864, 18, 1152, 2048)},
    tiny=HyenaConfig(256, 128, 4, 216, 256, frequency=1.0),
    state_formula="4 L d ((o-1) T + (k-1)(o+1)); 4 L d ((o-1) 2 N + (k-1)(o+1)) distilled",
    growth="linear",
    ops=("causal_conv", "long_conv", "diag_scan"),
    random_tensor=random_tensor,
    derive=derive,
    distil=distil,
    within=within,
)
