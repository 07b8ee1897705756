"""Rounding to 8 and 4 bits: nearest codes, float16 scales, the bytes as defined, and what known inputs are worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgeseq.errors import ExportError
from exporters import rounding
from exporters.rounding import BLOCK, dequantise, quantise


def unpacked(codes: NDArray, bits: int) -> NDArray:
    """Codes [M,blocks,32] from what the file holds."""
    return codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], BLOCK)


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    weight=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 70)),
        elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
    )
)
def test_rounding_is_to_the_nearest_code_of_a_float16_scale(weight: NDArray, bits: int) -> None:
    codes, scales = quantise("w", weight, bits)
    m, k = weight.shape
    n = -(-k // BLOCK)
    assert codes.shape == (m, n, 4 * bits) and codes.dtype == np.uint8
    assert scales.shape == (m, n) and scales.dtype == np.float32
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
    zero = 1 << (bits - 1)
    assert (unpacked(codes, bits).reshape(m, -1)[:, k:] == zero).all(), "padding is zero"
    step = np.repeat(np.abs(scales), BLOCK, axis=1)[:, :k]
    inside = np.abs(weight) <= step * (zero - 1)
    difference = np.abs(dequantise(codes, scales, k) - weight)
    assert (difference <= 0.5001 * step + 1e-7)[inside].all()
    if bits == 8:  # the largest of a block is 127 steps, but for the rounding of the scale
        assert (difference <= 0.57 * step + 1e-5).all()


def test_the_bytes_of_a_block_by_hand() -> None:
    """What MatMulNBits is defined to read: two 4-bit codes a byte, the first low, 8 standing for zero."""
    weight = np.zeros((1, BLOCK), np.float32)
    weight[0, :4] = [-8, 1, 7, -3]
    codes, scales = quantise("w", weight, 4)
    assert scales.tolist() == [[1.0]]
    assert codes[0, 0].tolist() == [0 | 9 << 4, 15 | 5 << 4, *[0x88] * 14]
    codes, scales = quantise("w", weight * -1, 4)
    assert scales.tolist() == [[-1.0]], "the extreme takes the longer side of -8..7, whatever its sign"
    assert codes[0, 0].tolist() == [0 | 9 << 4, 15 | 5 << 4, *[0x88] * 14]
    weight[0, 0] = 127
    codes, scales = quantise("w", weight, 8)
    assert scales.tolist() == [[1.0]]
    assert codes[0, 0].tolist() == [255, 129, 135, 125, *[128] * 28]


def test_the_searched_scale_is_no_worse_than_the_plain_one() -> None:
    weight = np.random.default_rng(0).standard_t(3, (50, 96)).astype(np.float32)
    blocks = weight.reshape(50, 3, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scale = (extreme / -8).astype(np.float16).astype(np.float32)
    plain = np.square(np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks).sum(-1)
    ours = np.square(dequantise(*quantise("w", weight, 4), 96).reshape(blocks.shape) - blocks).sum(-1)
    assert (ours <= plain * 1.00001).all() and ours.sum() < 0.93 * plain.sum()


def test_known_inputs_lower_the_error_of_the_product() -> None:
    """Correlated inputs, a width that is no multiple of 32, more rows than are rounded at once."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((70, 100)).astype(np.float32)
    inputs = (rng.standard_normal((400, 12)) @ rng.standard_normal((12, 100))).astype(np.float32)
    moments = inputs.T @ inputs

    def error(codes: NDArray, scales: NDArray) -> float:
        return float(np.square(inputs @ (dequantise(codes, scales, 100) - weight).T).mean())

    assert error(*quantise("w", weight, 4, moments)) < 0.2 * error(*quantise("w", weight, 4))
    assert np.array_equal(quantise("w", weight, 8, moments)[0], quantise("w", weight, 8)[0])


def test_inputs_that_never_occur_and_too_few_of_them_are_no_trouble() -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((5, 64)).astype(np.float32)
    for inputs in (np.zeros((3, 64), np.float32), np.eye(64, dtype=np.float32)[:2]):
        codes, scales = quantise("w", weight, 4, inputs.T @ inputs)
        assert np.abs(dequantise(codes, scales, 64) - weight).max() < 1


@pytest.mark.parametrize("with_moments", [False, True])
def test_rows_do_not_depend_on_how_many_are_rounded_at_once(
    monkeypatch: pytest.MonkeyPatch, with_moments: bool
) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((40, 96)).astype(np.float32)
    moments = np.cov(rng.standard_normal((96, 200))).astype(np.float32) if with_moments else None
    whole = quantise("w", weight, 4, moments)
    monkeypatch.setattr(rounding, "AT_ONCE", 7 * 96)
    assert all(map(np.array_equal, whole, quantise("w", weight, 4, moments)))


@pytest.mark.parametrize("bits", [8, 4])
def test_values_too_small_for_a_scale_become_zero(bits: int) -> None:
    codes, scales = quantise("w", np.full((1, 64), 1e-9, np.float32), bits)
    assert not dequantise(codes, scales, 64).any() and np.isfinite(scales).all()


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "w has values that are not finite"), (np.inf, "not finite"), (1e7, "too large")]
)
def test_values_that_cannot_be_rounded_are_refused(value: float, words: str) -> None:
    weight = np.ones((3, 64), np.float32)
    weight[2, 5] = value
    with pytest.raises(ExportError, match=words):
        quantise("w", weight, 4)
