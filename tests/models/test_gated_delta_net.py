"""The Gated DeltaNet mixer against the layer of Hugging Face's Qwen3-Next, read by the map that a hybrid uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeseq.models.gated_delta_net import DeltaConfig, GatedDeltaMixer, qwen_mixer
from edgeseq.verify.tolerances import tolerance
from tests.models.huggingface import randomise

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 1), (2, 6), (3, 3)])
def test_the_layer_of_qwen3_next(key_heads: int, value_heads: int) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = transformers.Qwen3NextConfig(
        hidden_size=20, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads, linear_key_head_dim=5, linear_value_head_dim=7, linear_conv_kernel_dim=3,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    reference = Qwen3NextGatedDeltaNet(config, 0).eval()
    randomise(reference)
    shape = DeltaConfig(20, key_heads, value_heads, 5, 7, d_conv=3, eps=1e-5)
    stored = {n: t.detach().numpy() for n, t in reference.state_dict().items()}
    mixer = GatedDeltaMixer(shape)
    tensors = {}
    for name, t in qwen_mixer(shape, "").items():
        assert stored[t.name].shape == t.shape
        tensors[name] = torch.from_numpy(np.ascontiguousarray(t.convert(stored[t.name])))
    mixer.load_state_dict(tensors, strict=True)

    h = torch.randn(2, 70, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, whole = reference(h), mixer(h)
        state, steps = [torch.zeros(2, *s.shape[1:]) for s in mixer.state_slots()], []
        for piece in h.split([1, 1, 30, 38], 1):
            y, *state = mixer.advance(piece, *state)
            steps.append(y)
    assert want.std() > 1e-2
    for got in (whole, torch.cat(steps, 1)):
        assert (got - want).abs().max() <= tolerance("torch", "float32", want)
