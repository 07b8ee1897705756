"""The slots of a chunk sorted by expert, so that one pass over an expert's matrix serves all tokens that chose it.

A slot is one choice of one token, number token * A + choice. order[start[e] : start[e+1]] are the slots of expert e in
rising order; slots without an expert (a negative index, or one of E and more) are nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import Expr, Kernel, kernel


@dataclass(frozen=True)
class ExpertOrder:
    """`slots` choices among `experts`."""

    slots: int
    experts: int
    args = ("index", "order", "start")


def build(name: str, p: ExpertOrder) -> Built:
    sizes = {"index": ("int64", p.slots), "order": ("int32", p.slots), "start": ("int32", p.experts + 1)}
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        start = k["start"]
        with T.serial(p.experts + 1) as e:
            T.buffer_store(start, T.int32(0), [e])
        _for_each(k, p, lambda s, e: T.buffer_store(start, start[e + 1] + 1, [e + 1]))  # counts, one place on
        with T.serial(p.experts) as e:
            T.buffer_store(start, start[e + 1] + start[e], [e + 1])

        def put(s: Expr, e: Expr) -> None:
            T.buffer_store(k["order"], s, [start[e]])
            T.buffer_store(start, start[e] + 1, [e])

        _for_each(k, p, put)  # every start has become the end of its expert
        with T.serial(p.experts) as i:
            T.buffer_store(start, start[p.experts - 1 - i], [p.experts - i])
        T.buffer_store(start, T.int32(0), [0])
    return Built(k.func, 1)


def _for_each(k: Kernel, p: ExpertOrder, body: Callable[[Expr, Expr], None]) -> None:
    """body(slot, expert) for every slot that has one."""
    with T.serial(p.slots) as s:
        expert = T.Cast("int32", k["index"][s])
        with T.If(T.And(expert >= 0, expert < p.experts)):
            with T.Then():
                body(s, expert)
