"""SparseAttention: numpy, torch and the ONNX body agree under any cut; the draws are fair."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.models.sparse_op import Pattern
from edgeseq.models.sparse_op import sparse_attention as by_torch
from edgeseq.ops import all_ops
from edgeseq.ops.sparse_attention import draw, sparse_attention
from edgeseq.verify.tolerances import tolerance
from tests.ops.one_node import inferred_shapes, model, run

TIMED = ("q", "k", "v")


def inputs_of(
    seed: int, b: int, t: int, kv: int, group: int, d: int, rows: int, position: int
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    widths = {"q": kv * group * d, "k": kv * d, "v": kv * d}
    given = {name: rng.standard_normal((b, t, width)).astype(np.float32) for name, width in widths.items()}
    given |= {name: rng.standard_normal((b, kv, rows, d)).astype(np.float32) for name in ("past_k", "past_v")}
    return given | {"position": position + np.arange(b, dtype=np.int64)}


patterns = st.one_of(
    st.builds(Pattern, st.integers(0, 4), st.integers(1, 7)),
    st.builds(
        lambda prefix, window, block, blocks, seed: Pattern(prefix, window * block, block, blocks, seed),
        *(st.integers(low, high) for low, high in ((0, 4), (1, 3), (1, 3), (1, 3), (0, 99))),
    ),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pattern=patterns, sizes=st.tuples(*(st.integers(1, n) for n in (2, 12, 2, 3, 5))), seed=st.integers(0, 999),
    position=st.sampled_from([0, 1, 7, 40, 1 << 20]), data=st.data(),
)  # fmt: skip
def test_body_schema_torch_and_numpy_agree_under_any_cut(pattern, sizes, seed, position, data) -> None:  # type: ignore[no-untyped-def]
    batch, tokens, kv, group, width = sizes
    inputs = inputs_of(seed, batch, tokens, kv, group, width, pattern.rows, position)
    op = all_ops()["SparseAttention"]
    heads: dict[str, Any] = {"num_heads": kv * group, "num_kv_heads": kv, "scale": 0.4}
    drawn = {n: getattr(pattern, n) for n in ("prefix", "block", "blocks", "seed")}
    wide: dict[str, Any] = {n: x if n == "position" else x.astype(np.float64) for n, x in inputs.items()}
    wanted = sparse_attention(**wide, **heads, **drawn)

    def torches(values: dict[str, np.ndarray]) -> list[np.ndarray]:
        args: list[Any] = [*map(torch.from_numpy, values.values()), *heads.values(), pattern]
        return [x.numpy() for x in by_torch(*args)]

    proto = model(op, inputs, heads | drawn)
    shapes, found = inferred_shapes(proto), torches(inputs)
    for param, onnx_, torch_, reference in zip(op.outputs, run(proto, inputs), found, wanted, strict=True):
        assert onnx_.shape == torch_.shape == reference.shape == shapes[param.name]
        for got in (onnx_, torch_):
            assert np.abs(got - reference).max() <= tolerance("onnx", "float32", reference), param.name
    cut = data.draw(st.integers(1, tokens))
    if cut < tokens:
        _, keys, values = torches({n: x[:, :cut] if n in TIMED else x for n, x in inputs.items()})
        rest = {n: x[:, cut:] if n in TIMED else x for n, x in inputs.items()}
        tail = torches(rest | {"past_k": keys, "past_v": values, "position": inputs["position"] + cut})
        assert np.abs(tail[0] - found[0][:, cut:]).max() <= tolerance("torch", "float32", found[0])
        assert all((a == b).all() for a, b in zip(tail[1:], found[1:], strict=True))


def seen_by_definition(pattern: Pattern, tokens: int) -> np.ndarray:
    """What token t sees of token s, by keys that say which token wrote them."""
    rows, seen = np.full(pattern.rows, -1), np.zeros((tokens, tokens), bool)
    for p in range(tokens):
        u, window = p - pattern.prefix, pattern.window
        row = p if u < 0 else pattern.prefix + u % window
        if pattern.blocks and u >= window:
            place = draw((u - window) // pattern.block, pattern.blocks, pattern.seed)
            if place < pattern.blocks:
                rows[pattern.prefix + window + place * pattern.block + (u - window) % pattern.block] = rows[row]
        rows[row] = p
        seen[p, rows[rows >= 0]] = True
    return seen


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pattern=patterns, tokens=st.integers(1, 60))
def test_the_mask_of_a_whole_sequence_is_what_the_cache_holds(pattern: Pattern, tokens: int) -> None:
    assert (pattern.visible(tokens).numpy() == seen_by_definition(pattern, tokens)).all()


def test_what_a_token_sees_by_hand() -> None:
    """One global token, a window of 2, one place for a block of 1: token 6 sees 0, 5, 6 and one of 1 .. 4."""
    pattern = Pattern(1, 2, 1, 1, seed=3)
    seen = [np.flatnonzero(row).tolist() for row in pattern.visible(8).numpy()]
    assert seen[:4] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    for t in range(4, 8):
        assert {0, t - 1, t} < set(seen[t])
        assert len(seen[t]) == 4
    assert np.flatnonzero(Pattern(2, 3).visible(9).numpy()[8]).tolist() == [0, 1, 6, 7, 8]


def test_every_block_that_left_is_kept_equally_often() -> None:
    """Over many seeds, of 40 blocks that have left each is among the 4 kept with probability 1/10."""
    kept, seeds = np.zeros(40), 4000
    for seed in range(seeds):
        places = draw(np.arange(40), 4, seed)
        for place in range(4):
            kept[np.flatnonzero(places == place)[-1]] += 1
    expected = seeds * 4 / 40
    assert kept.sum() == 4 * seeds
    assert np.abs(kept - expected).max() < 5 * np.sqrt(expected)
    assert ((kept - expected) ** 2 / expected).sum() < 72  # chi-square with 39 degrees of freedom, one in a thousand


def test_draws_stay_exact_where_positions_end() -> None:
    """No product leaves 64 bits: numpy's wrapping integers equal Python's unbounded ones."""
    for j in (0, 1, (1 << 29) - 1, 1 << 29):
        for seed in (0, (1 << 20) - 1):
            assert int(draw(np.int64(j), 3, seed)) == draw(j, 3, seed) == int(draw(torch.tensor(j), 3, seed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"past_v": np.zeros((1, 2, 9, 4), np.float32)}, "N=9|N=10"),
        ({"q": np.zeros((1, 3, 17), np.float32)}, "4 heads of width 4 are not 17"),
        ({"num_heads": 5}, "cannot share"),
        ({"prefix": 9}, "leaves -3 to the window"),
        ({"block": 3}, "leaves 1 to the window, wanted whole blocks of 3"),
        ({"seed": -1}, "out of range"),
    ],
)
def test_contradictions_are_refused(changed: dict, message: str) -> None:
    inputs = inputs_of(0, 1, 3, 2, 2, 4, 10, 0)
    attributes = {"num_heads": 4, "num_kv_heads": 2, "scale": 1.0, "prefix": 2, "block": 2, "blocks": 2, "seed": 1}
    attributes["prefix"], attributes["blocks"] = (3, 2) if "block" in changed else (2, 2)
    inputs |= {n: x for n, x in changed.items() if isinstance(x, np.ndarray)}
    attributes |= {n: x for n, x in changed.items() if not isinstance(x, np.ndarray)}
    with pytest.raises((onnx.shape_inference.InferenceError, onnx.checker.ValidationError), match=message):
        inferred_shapes(model(all_ops()["SparseAttention"], inputs, attributes))


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_torch_operator_declares_its_shapes(tokens: int) -> None:
    inputs = [torch.from_numpy(x) for x in inputs_of(1, 2, tokens, 2, 2, 4, 10, 3).values()]
    args = (*inputs, 4, 2, 0.5, 2, 2, 2, 7)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.edgeseq.sparse_attention.default, args, test_utils=checks)
