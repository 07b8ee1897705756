"""The families with a matrix state, at odd sizes: step = chunk = whole, whatever the chunk of the parallel form."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.models import functional as ops
from edgeseq.models.base import SequenceModel
from edgeseq.models.delta_net import DeltaNetConfig
from edgeseq.models.gated_delta_net import GatedDeltaNetConfig
from edgeseq.models.gla import GLAConfig
from edgeseq.models.linear_transformer import LinearTransformerConfig
from edgeseq.models.mamba2 import Mamba2Config
from edgeseq.models.matrix_state import linear_attention_parallel
from tests.models.support import random_model, run_cut
from tests.models.test_forms import assert_equal

# fmt: off
ODD = {
    "mamba2-groups": Mamba2Config(61, 24, 2, 6, 5, d_state=7, n_groups=3, d_conv=3, dt_min=1e-3, dt_max=0.2,
                                  proj_bias=True, conv_bias=False, tie=False),
    "mamba2-norm-first": Mamba2Config(61, 20, 2, 4, 10, d_state=3, n_groups=2, norm="norm_first"),
    "mamba2-no-norm": Mamba2Config(61, 20, 2, 4, 10, d_state=16, norm="none"),
    "linear-transformer": LinearTransformerConfig(53, 18, 2, 3, 5, 7, 20, tie=False),
    "gla": GLAConfig(53, 20, 2, 3, 5, 7, 20, gate_rank=3, gate_divisor=2.0, tie=False),
    "delta-net": DeltaNetConfig(53, 20, 2, 3, 5, 7, 20, tie=False),
    "delta-net-gated": DeltaNetConfig(53, 20, 2, 3, 5, 7, 20, d_conv=2, gate=True, double_beta=True),
    "gated-delta-net": GatedDeltaNetConfig(53, 20, 2, 2, 6, 5, 7, 20, d_conv=3, tie=False),
    "gated-delta-net-open": GatedDeltaNetConfig(53, 20, 2, 3, 3, 5, 7, 20, gate=False, double_beta=True),
}
# fmt: on
TOKENS = 37
names = pytest.mark.parametrize("name", ODD)


@functools.cache
def case(name: str) -> tuple[SequenceModel, torch.Tensor, torch.Tensor]:
    model = random_model(ODD[name])
    tokens = torch.randint(0, model.config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model, tokens, model(tokens)


@names
@settings(max_examples=4, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, TOKENS - 1), max_size=8).map(sorted))
def test_any_cut_equals_the_whole_sequence(name: str, cuts: list[int]) -> None:
    model, tokens, whole = case(name)
    assert whole.std(-1).min() > 1e-2
    for last, logits in run_cut(model, tokens, cuts).items():
        assert_equal(logits, whole[:, last])


@names
def test_steps_equal_the_whole_sequence(name: str) -> None:
    model, tokens, whole = case(name)
    found = run_cut(model, tokens, list(range(1, TOKENS)))
    assert_equal(torch.stack([found[t] for t in range(TOKENS)], 1), whole)


@names
def test_rows_are_independent_and_no_token_sees_a_later_one(name: str) -> None:
    model, tokens, whole = case(name)
    other = tokens.clone()
    other[1, 11] = (other[1, 11] + 1) % model.config.vocab_size
    with torch.no_grad():
        logits = model(other)
    assert_equal(logits[0], whole[0])
    assert_equal(logits[1, :11], whole[1, :11])
    assert (logits[1, 11:] - whole[1, 11:]).abs().amax(-1).min() > 1e-4
    assert_equal(run_cut(model, other, [5, 6, 20])[TOKENS - 1], logits[:, -1])


RULES = [("linear", None), *product(("gated", "gated_delta"), ("head", "key")), ("delta", None)]


def operands(rule: str, decay: str | None, tokens: int, heads: tuple[int, int, int], k: int, v: int):  # type: ignore[no-untyped-def]
    """q, k, v, decay, beta in float64; keys of unit length, as the delta rules ask."""
    rng = torch.Generator().manual_seed(tokens + k)
    h, h_q, h_k = heads

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(2, tokens, *shape, generator=rng, dtype=torch.float64)

    keys = draw(h_k, k)
    return (
        draw(h_q * k),
        (keys / keys.norm(dim=-1, keepdim=True)).flatten(2),
        draw(h * v),
        -draw(h * (k if decay == "key" else 1)).abs() if decay else None,
        torch.sigmoid(draw(h)) * 2 if "delta" in rule else None,
    )


@pytest.mark.parametrize(("rule", "decay"), RULES)
@pytest.mark.parametrize(("tokens", "chunk"), [(1, None), (13, 5), (13, None), (130, None), (40, 40)])
def test_chunkwise_equals_the_definition(rule: str, decay: str | None, tokens: int, chunk: int | None) -> None:
    q, k, v, g, beta = operands(rule, decay, tokens, (4, 2, 4), 6, 5)
    past = q.new_zeros(2, 4, 6, 5)
    want, _ = ops.linear_attention(q, k, v, past, g, beta, rule, 2, 4, 0.7)
    got = linear_attention_parallel(q, k, v, 4, g, beta, rule, 2, 4, 0.7, chunk)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rule", "decay"), RULES)
def test_gradients_of_the_chunkwise_form(rule: str, decay: str | None) -> None:
    given = operands(rule, decay, 5, (2, 1, 2), 2, 2)
    present = [x for x in given if x is not None]

    def form(*args: torch.Tensor) -> torch.Tensor:
        rest = list(args)
        q, k, v = rest[:3]
        g = rest[3] if decay else None
        beta = rest[-1] if "delta" in rule else None
        return linear_attention_parallel(q, k, v, 2, g, beta, rule, 1, 2, 0.7, chunk=3)

    assert torch.autograd.gradcheck(form, [x.clone().requires_grad_() for x in present])


@pytest.mark.parametrize("decay", ["head", "key"])
def test_fast_decays_neither_overflow_nor_lose_the_gradient(decay: str) -> None:
    """A cumulative decay of e^-4000 within a chunk: only differences of logs may be exponentiated."""
    q, k, v, g, _ = operands("gated", decay, 64, (2, 2, 2), 4, 3)
    g = (60.0 * g).float().requires_grad_()
    o = linear_attention_parallel(q.float(), k.float(), v.float(), 2, g, None, "gated", 2, 2)
    o.sum().backward()
    assert torch.isfinite(o).all()
    assert torch.isfinite(g.grad).all()


@pytest.mark.parametrize(
    ("rule", "decay", "beta"), [("gated", False, False), ("linear", True, False), ("delta", False, False)]
)
def test_a_rule_without_its_operands_is_refused(rule: str, decay: bool, beta: bool) -> None:
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=f"rule '{rule}'"):
        ops.linear_attention(x, x, x, x[..., None], x if decay else None, x if beta else None, rule, 1, 1)
