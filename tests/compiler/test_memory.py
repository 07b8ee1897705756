"""The static plan: no two living activations share memory, what feeds outputs only is marked, views take no memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from edgeseq.bundle.plan import align
from edgeseq.compiler.ir import Arg, Call, Storage, Value
from edgeseq.compiler.memory import mark_outputs_only, place, plan_arena

from .graphs import S2, Builder, S, X, Y
from .machine import Program, model_of, port

few = settings(max_examples=60, derandomize=True, deadline=None)


def value(storage: Storage) -> Value:
    return Value(storage.name, "uint8", (storage.nbytes,), storage)


@st.composite
def programs(draw: st.DrawFn) -> list[Call]:
    """Calls that each write one activation and read some earlier ones, weights and a state slot."""
    calls: list[Call] = []
    made: list[Storage] = []
    state, weight = Storage("state", "s", 64), Storage("weight", "w", 64)
    for i in range(draw(st.integers(1, 25))):
        read = draw(st.lists(st.sampled_from(made), max_size=3)) if made else []
        args = [Arg(value(s), "r") for s in dict.fromkeys(read)]
        if draw(st.booleans()):
            args.append(Arg(value(weight), "r"))
        if draw(st.integers(0, 4)) == 0:
            args.append(Arg(value(state), draw(st.sampled_from(["r", "w", "rw"]))))
        if not args or not any(a.access != "r" for a in args) or draw(st.booleans()):
            storage = Storage("arena", f"a{i}", draw(st.integers(1, 5000)))
            made.append(storage)
            args.append(Arg(value(storage), "w"))
        calls.append(Call(f"k{i}", tuple(args)))
    return calls


def lives(calls: list[Call]) -> dict[Storage, tuple[int, int]]:
    """First and last call that touches each activation."""
    found: dict[Storage, tuple[int, int]] = {}
    for i, call in enumerate(calls):
        for arg in call.args:
            if arg.value.storage.kind == "arena":
                found[arg.value.storage] = (found.get(arg.value.storage, (i, i))[0], i)
    return found


def assert_disjoint(calls: list[Call], size: int) -> None:
    found = list(lives(calls).items())
    for i, (a, (a0, a1)) in enumerate(found):
        assert a.offset >= 0 and a.offset % 64 == 0 and a.offset + a.nbytes <= size
        for b, (b0, b1) in found[:i]:
            together = a0 <= b1 and b0 <= a1
            assert not together or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset, (a.name, b.name)


@few
@given(programs())
def test_no_two_living_activations_overlap(calls: list[Call]) -> None:
    size = plan_arena(calls)
    assert_disjoint(calls, size)
    longest = lives(calls)
    peak = max((sum(s.nbytes for s, (a, b) in longest.items() if a <= i <= b) for i in range(len(calls))), default=0)
    assert peak <= size <= sum(align(s.nbytes) for s in longest), "between what must be and no reuse at all"


def test_memory_is_used_again() -> None:
    """A chain needs two buffers, however long."""
    made = [Storage("arena", f"a{i}", 1000) for i in range(10)]
    calls = [Call("k", (Arg(value(a), "r"), Arg(value(b), "w"))) for a, b in pairwise(made)]
    assert plan_arena(calls) == 2 * align(1000)


@few
@given(programs())
def test_a_call_is_skipped_only_if_no_state_depends_on_it(calls: list[Call]) -> None:
    """Against the definition: follow what each state write needs, backwards."""
    mark_outputs_only(calls)
    needed: set[int] = set()
    for i, call in enumerate(calls):
        if any(a.value.storage.kind == "state" and a.access != "r" for a in call.args):
            needed.add(i)
    while True:
        reads = {a.value.storage for i in needed for a in calls[i].args if a.value.storage.kind == "arena"}
        last = max(needed, default=-1)
        more = {
            i
            for i, c in enumerate(calls)
            if i < last and any(a.access != "r" and a.value.storage in reads for a in c.args)
        }
        if more <= needed:
            break
        needed |= more
    assert {i for i, c in enumerate(calls) if not c.outputs_only} == needed


@given(st.lists(st.integers(1, 1000)))
def test_slots_lie_one_after_the_other(sizes: list[int]) -> None:
    storages = [Storage("state", str(i), n) for i, n in enumerate(sizes)]
    end = place(storages)
    at = 0
    for s in storages:
        assert s.offset == at and at % 64 == 0
        at = align(at + s.nbytes)
    assert end == at


@pytest.mark.parametrize("seed", range(3))
def test_a_real_graph(seed: int) -> None:
    from .graphs import at_random

    program = Program(at_random(seed))
    assert_disjoint(program.calls, program.arena)


def test_the_head_is_skipped_while_a_prompt_is_read() -> None:
    """The product that only logits need is marked, the one that the state needs is not."""
    b = Builder()
    h = b.op("Tanh", b.op("MatMul", b.op("Add", "x", "past.s"), b.weight(10, 10), out="hidden"))
    b.op("MatMul", h, b.weight(10, 10), out="y")
    b.op("Add", h, "x", out="present.s")
    program = Program(model_of(b.nodes, [X, S], [Y, S2], b.weights))
    flags = {c.args[-1].value.name: c.outputs_only for c in program.calls}
    assert flags["y"] and not flags["hidden"]


def launches(write, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> Program:  # type: ignore[no-untyped-def]
    b = Builder()
    write(b)
    return Program(model_of(b.nodes, inputs, outputs, b.weights))


T1 = port("x", [1, 1, 40])


def test_views_take_neither_calls_nor_memory() -> None:
    """Split, Slice, Reshape, Unsqueeze, Squeeze, Identity and a Transpose of ones between two products."""

    def write(b: Builder) -> None:
        wide = b.op("MatMul", "x", b.weight(40, 90))
        b.nodes.append(helper.make_node("Split", [wide, b.const([30, 60])], ["left", "right"], axis=2))
        part = b.op("Slice", "right", b.const([10]), b.const([50]), b.const([2]))
        moved = b.op("Transpose", b.op("Unsqueeze", part, b.const([1])), perm=[0, 2, 1, 3])
        flat = b.op("Identity", b.op("Squeeze", b.op("Reshape", moved, b.const([1, 1, 1, 40])), b.const([0])))
        b.op("MatMul", flat, b.weight(40, 40), out="y")
        b.op("MatMul", "left", b.weight(30, 40), out="present.s")

    program = launches(write, [T1, port("past.s", [1, 1, 40])], [port("y", [1, 1, 40]), port("present.s", [1, 1, 40])])
    kernels = [c.kernel.op for c in program.calls]
    assert kernels == ["linear", "linear", "linear", "copy"]
    first, second, third, _ = program.calls
    product = first.args[-1].value.storage
    assert second.args[0].value.storage is product and second.args[0].value.offset == 40
    assert third.args[0].value.storage is product and third.args[0].value.offset == 0


def test_a_view_of_several_rows_keeps_their_distance() -> None:
    def write(b: Builder) -> None:
        wide = b.op("MatMul", "x", b.weight(10, 30))
        part = b.op("Slice", wide, b.const([12]), b.const([22]), b.const([2]))
        b.op("MatMul", part, b.weight(10, 10), out="y")

    program = launches(write, [X], [Y])
    assert [c.kernel.op for c in program.calls] == ["linear", "linear"]
    read = program.calls[1].args[0].value
    assert (read.offset, read.ld, read.shape, read.span) == (12, 30, (1, 3, 10), 70)
    assert program.calls[1].kernel.params.ldx == 30


def test_weights_are_shared_by_name_and_layout() -> None:
    """A table that is embedded and multiplied by (a tied head) is packed once."""

    def write(b: Builder) -> None:
        b.weights["table"] = np.ones((50, 10), np.float32)
        e = b.op("Gather", "table", "i", axis=0)
        b.op("MatMul", e, b.op("Transpose", "table", perm=[1, 0]), out="y")

    program = launches(write, [port("i", [1, 5], "int64")], [port("y", [1, 5, 50])])
    assert [c.kernel.op for c in program.calls] == ["embed", "linear"]
    assert len(program.memory.weights) == 1
