"""A plan that would not read back is refused before a byte is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeseq.bundle.plan import Plan, PlanKernel
from edgeseq.bundle.writer import write_plan
from edgeseq.errors import BundleError
from edgeseq.spec import StateSlot
from tests.bundle.plans import recurrent_plan


def _launch(index: int = 0, **changes: Any) -> Plan:
    plan = recurrent_plan()
    step = plan.graphs[0]
    launches = list(step.launches)
    launches[index] = replace(launches[index], **changes)
    return replace(plan, graphs=(replace(step, launches=tuple(launches)), plan.graphs[1]))


def _arg(index: int, which: int, **changes: Any) -> Plan:
    args = list(recurrent_plan().graphs[0].launches[index].args)
    args[which] = replace(args[which], **changes)
    return _launch(index, args=tuple(args))


def _tensor(**changes: Any) -> Plan:
    plan = recurrent_plan()
    return replace(plan, tensors=(plan.tensors[0], replace(plan.tensors[1], **changes)))


def _slots(*state: tuple[StateSlot, int]) -> Plan:
    return replace(recurrent_plan(), state=state)


def _graph(**changes: Any) -> Plan:
    plan = recurrent_plan()
    return replace(plan, graphs=(plan.graphs[0], replace(plan.graphs[1], **changes)))


def _io(**changes: Any) -> Plan:
    plan = recurrent_plan()
    entry = plan.graphs[1].io[1]
    return _graph(io=(plan.graphs[1].io[0], replace(entry, **changes)))


OTHER_KERNELS = recurrent_plan().kernels[1:]
SLOT = StateSlot("ssm.0", "float32", (1, 4, 8))
CASES: dict[str, tuple[Plan, str]] = {
    "unknown kernel": (_launch(kernel="missing"), "launches the kernel 'missing', which the plan lacks"),
    "empty grid": (_launch(grid=(0, 1, 1)), "over the grid"),
    "huge grid": (_launch(grid=((1 << 31), 1, 1)), "over the grid"),
    "CPU kernel in two dimensions": (_launch(grid=(2, 2, 1)), "launches the CPU kernel"),
    "too few arguments": (_launch(args=()), "0 arguments, the kernel takes 3"),
    "unknown traffic": (_launch(traffic={"weight": 1}), "malformed traffic"),
    "negative traffic": (_launch(traffic={"weights": -1}), "malformed traffic"),
    "unknown tensor": (_arg(0, 1, tensor="missing"), "names the tensor 'missing'"),
    "past the tensor": (_arg(1, 1, offset=40), "outside any one tensor|which has"),
    "write to weights": (_arg(1, 1, access="w"), "writes to weights"),
    "past the arena": (_arg(0, 2, nbytes=257), "257 bytes at 0 of arena, which has 256"),
    "past the state": (_arg(1, 3, offset=192), "of state, which has 256"),
    "past the io": (_arg(2, 2, offset=192), "of io, which has 256"),
    "empty argument": (_arg(0, 2, nbytes=0), "passes 0 bytes"),
    "unknown space": (_arg(0, 2, space="stack"), "space 'stack' is not one of"),
    "unknown access": (_arg(0, 2, access="x"), "access 'x' is not one of"),
    "tensor of rank 5": (_tensor(shape=(1, 1, 1, 1, 50)), "rank 5"),
    "tensor of no bytes": (_tensor(nbytes=0, shape=(50,)), "takes 0 bytes"),
    "tensor of unknown dtype": (_tensor(dtype="int4"), "dtype 'int4' is not one of"),
    "two tensors of one name": (_tensor(name="embed"), "two tensors are called 'embed'"),
    "nameless tensor": (_tensor(name=""), "names the tensor 'mix'|has no name"),
    "NUL in a name": (_tensor(layout="a\0b"), "holds a NUL"),
    "slots that overlap": (_slots((SLOT, 0), (replace(SLOT, name="b"), 64)), "'ssm.0' and 'b' overlap"),
    "slot off its alignment": (_slots((SLOT, 4)), "not a multiple of 64"),
    "slot past the state": (_slots((SLOT, 192)), "takes 128 bytes at 192"),
    "slot with an axis it must not have": (_slots((replace(SLOT, axis=1), 0)), "axis 1 with update 'overwrite'"),
    "slot without its axis": (_slots((replace(SLOT, update="append"), 0)), "axis -1 with update 'append'"),
    "slot with an axis past its rank": (_slots((replace(SLOT, update="ring", axis=3), 0)), "axis 3"),
    "slot that starts as NaN": (_slots((replace(SLOT, init=float("nan")), 0)), "NaN"),
    "two slots of one name": (_slots((SLOT, 0), (SLOT, 128)), "two state slots"),
    "no step": (replace(recurrent_plan(), graphs=recurrent_plan().graphs[1:]), "consume .8. tokens"),
    "two graphs of one size": (_graph(tokens=1), "consume .1, 1. tokens"),
    "two graphs of one name": (_graph(name="step"), "traffic|two graphs"),
    "output past the io block": (_io(offset=256), "takes 68 bytes at 256"),
    "output off its alignment": (_io(offset=72), "not a multiple of 64"),
    "unknown direction": (_io(direction="inout"), "direction 'inout'"),
    "CPU kernel with code": (
        replace(recurrent_plan(), kernels=(PlanKernel("gather", 3, "cpu", b"x", "binary"), *OTHER_KERNELS)),
        "kernel 'gather' for cpu has 1 bytes of binary code",
    ),
    "GPU kernel without code": (
        replace(recurrent_plan(), kernels=(PlanKernel("gather", 3, "opencl"), *OTHER_KERNELS)),
        "kernel 'gather' for opencl has 0 bytes",
    ),
    "model id": (
        replace(recurrent_plan(), manifest=replace(recurrent_plan().manifest, model_id="xyz")),
        "model_id 'xyz' is not 32 hex digits",
    ),
    "tokenizer": (replace(recurrent_plan(), tokenizer="bpe"), "tokenizer 'bpe' is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_bad_plan_is_refused(name: str, tmp_path: Path) -> None:
    plan, sentence = CASES[name]
    with pytest.raises(BundleError, match=sentence):
        write_plan(plan, tmp_path / "model.edgeseq")
    assert list(tmp_path.iterdir()) == []
