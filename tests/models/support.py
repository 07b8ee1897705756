"""Random models of odd sizes, and the state copied through bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgeseq.models import families
from edgeseq.models.base import SequenceModel
from edgeseq.models.bigbird import BigBirdConfig
from edgeseq.models.delta_net import DeltaNetConfig
from edgeseq.models.expert_choice import ExpertChoiceConfig
from edgeseq.models.falcon_mamba import FalconMambaConfig
from edgeseq.models.gated_delta_net import GatedDeltaNetConfig
from edgeseq.models.gla import GLAConfig
from edgeseq.models.gpt2 import Gpt2Config
from edgeseq.models.gss import GssConfig
from edgeseq.models.hyena import HyenaConfig
from edgeseq.models.linear_transformer import LinearTransformerConfig
from edgeseq.models.liquid_s4 import LiquidS4Config
from edgeseq.models.longformer import LongformerConfig
from edgeseq.models.mamba import MambaConfig
from edgeseq.models.mamba2 import Mamba2Config
from edgeseq.models.mistral import MistralConfig
from edgeseq.models.mixtral import MixtralConfig
from edgeseq.models.mlstm import MLSTMConfig
from edgeseq.models.recurrent_gemma import RecurrentGemmaConfig
from edgeseq.models.retnet import RetNetConfig
from edgeseq.models.rwkv4 import Rwkv4Config
from edgeseq.models.rwkv5 import Rwkv5Config
from edgeseq.models.rwkv6 import Rwkv6Config
from edgeseq.models.rwkv7 import Rwkv7Config
from edgeseq.models.s4 import S4Config
from edgeseq.models.s4d import S4dConfig
from edgeseq.models.source import load_weights
from edgeseq.models.transformer import RopeConfig, TransformerConfig
from edgeseq.models.twin import family_of_config
from tests.models.hybrid_shapes import HYBRIDS

CONTEXT = 40
LLAMA3 = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 16)
YARN = RopeConfig(5e4, "yarn", 3.0, original_context=20, attention_factor=1.4, share=0.6)
ODD = {
    "delta-net-odd": DeltaNetConfig(53, 26, 2, 3, 5, 7, 20),
    "gated-delta-net-odd": GatedDeltaNetConfig(53, 26, 2, 2, 6, 5, 7, 20, d_conv=3, double_beta=True, tie=False),
    "gla-odd": GLAConfig(53, 26, 2, 3, 9, 11, 20, gate_rank=3),
    "linear-transformer-odd": LinearTransformerConfig(53, 26, 2, 3, 5, 7, 20, tie=False),
    "mamba2-odd": Mamba2Config(53, 26, 2, 6, 5, 7, n_groups=3, d_conv=3),
    "bigbird-odd": BigBirdConfig(59, 30, 2, 6, 2, 10, 36, block=2, n_global=2, n_window=2, n_random=2, seed=5),
    "longformer-odd": LongformerConfig(59, 30, 2, 9, 3, 10, 36, rope=LLAMA3, n_global=3, windows=(5, 7)),
    "gpt2-odd": Gpt2Config(59, 30, 2, 3, 37, 130, 1e-3, "gelu", scale_by_layer=True, tie=False),
    "falcon-mamba-odd": FalconMambaConfig(61, 24, 2, 44, d_state=5, d_conv=3, dt_rank=3, tie=False, mixer_eps=1e-3),
    "mamba-odd": MambaConfig(61, 24, 2, 44, d_state=5, d_conv=3, dt_rank=3, proj_bias=True, conv_bias=False, tie=False),
    "mistral-odd": MistralConfig(59, 30, 2, 9, 3, 10, 36, attention_bias=True, rope=LLAMA3, window=5),
    "expert-choice-odd": ExpertChoiceConfig(61, 30, 2, 3, 3, 10, 21, n_experts=5, top_k=3, capacity=1.5),
    "mixtral-odd": MixtralConfig(59, 30, 2, 9, 3, 10, 21, rope=LLAMA3, n_experts=5, top_k=3),
    "mixtral-window": MixtralConfig(59, 30, 2, 9, 3, 10, 36, tie=False, n_experts=7, top_k=1, window=5),
    "mlstm-odd": MLSTMConfig(53, 36, 2, 3, 5, 7, 28, eps=1e-4),  # as the tiny one
    "recurrent-gemma-odd": RecurrentGemmaConfig(59, 36, 4, 3, 1, 42, 31, 7, 3, turned=4, cap=5.0, tie=False),
    "retnet-odd": RetNetConfig(53, 36, 2, 3, 28, tie=False),
    "rwkv4-odd": Rwkv4Config(61, 24, 3, 20, 40),
    "rwkv5-odd": Rwkv5Config(61, 24, 3, 3, 40, tie=True),
    "rwkv6-odd": Rwkv6Config(61, 24, 3, 3, 40, r_mix=5, r_decay=7),
    "rwkv7-odd": Rwkv7Config(61, 24, 3, 3, 40, 5, 7, 4, 6),
    "gss-odd": GssConfig(61, 22, 2, 37, 13, 5, tie=False),
    "hyena-odd": HyenaConfig(53, 22, 2, 19, 29, order=3, d_conv=4, filter_width=11, filter_bands=3, tie=False),
    "hyena-dna": HyenaConfig(61, 18, 2, 25, 50, filter_width=7, eps=1e-3, tie=False, layout="hyenadna"),
    "hyena-mixed": HyenaConfig(53, 22, 3, 19, 60, filter_width=11, filter_bands=1, modal=(3, 0, 2)),
    "liquid-s4-odd": LiquidS4Config(53, 23, 2, 3, 18, degree=4, tie=False),
    "s4-odd": S4Config(61, 22, 2, 5, 0, tie=False),
    "s4d-odd": S4dConfig(61, 22, 2, 5, 30, "inv", tie=False),
    "s4d-bilinear": S4dConfig(53, 35, 2, 1, 0, discretisation="bilinear"),
    "transformer-gqa": TransformerConfig(59, 30, 2, 9, 3, 10, 36, attention_bias=True, mlp_bias=True, rope=LLAMA3),
    "transformer-yarn": TransformerConfig(59, 30, 2, 6, 3, 14, 36, output_bias=True, rope=YARN, qk_norm=True),
}
ODD |= HYBRIDS
CONFIGS = ODD | {f"{name}-tiny": record.tiny for name, record in families().items()}


def random_model(config: object, seed: int = 0) -> SequenceModel:
    """Every parameter random, so that no default (zero bias, unit norm, equal decays) hides an error."""
    family, rng = family_of_config(config), np.random.default_rng(seed)
    model, made = family.meta_model(config), {*family.constants(config), *family.derived(config)}
    tensors = {}
    for name, shape in ((n, tuple(t.shape)) for n, t in model.state_dict().items()):
        drawn = 0.15 * rng.standard_normal(shape)
        if name.startswith("shared.") and len(shape) == 2:
            drawn *= 0.3  # wide, used twice and without a residual around it: larger ones amplify rounding
        if name.endswith(("norm", "norm.weight")):
            drawn = 1.0 + drawn
        elif name.endswith(".A"):
            drawn = -np.exp(0.5 + 3.0 * drawn)
        elif name.endswith(("time_decay", "decay_up.bias", "up.w.bias")):
            drawn = rng.uniform(-6.0, 2.0, shape)
        elif name.endswith("threshold"):
            drawn = rng.uniform(0.05, 0.41, shape)
        elif name.endswith("i_gate.bias"):
            drawn = rng.uniform(-6.0, -2.0, shape)
        elif name.endswith("dt_bias"):
            drawn = rng.uniform(-9.0, 0.0, shape)
        elif name.endswith("log_dt"):
            drawn = rng.uniform(-4.0, -1.0, shape)
        elif name.endswith("A_imag"):
            drawn = 20.0 * drawn
        elif ".poles." in name:
            drawn = drawn / (0.3 + np.abs(drawn).max())
        elif name.endswith((".B", ".C", ".P")) or ".filter." in name or ".skips." in name:
            drawn = 4.0 * drawn
        if name not in made:
            tensors[name] = drawn.astype(np.float32)
    load_weights(model, family.completed(config, tensors))
    return model


def through_bytes(state: list[Tensor]) -> list[Tensor]:
    """Save and load a state as a host would: raw bytes, shape and dtype."""
    saved = [(t.numpy().tobytes(), tuple(t.shape), t.numpy().dtype) for t in state]
    return [torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy()) for data, shape, dtype in saved]


@torch.no_grad()
def run_cut(model: SequenceModel, tokens: Tensor, cuts: list[int], context: int = CONTEXT) -> dict[int, Tensor]:
    """Logits [B,V] by index of the last token of each piece, with the state saved and loaded between pieces."""
    kind = next(model.parameters()).dtype
    state = [t.to(kind) if t.is_floating_point() else t for t in model.initial_state(tokens.shape[0], context)]
    found: dict[int, Tensor] = {}
    start = 0
    for end in [*cuts, tokens.shape[1]]:
        if end <= start:
            continue
        position = torch.full((tokens.shape[0],), start)
        logits, *state = model.advance(tokens[:, start:end], position, *through_bytes(state))
        found[end - 1], start = logits[:, 0], end
    return found
