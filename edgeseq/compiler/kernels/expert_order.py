"""The slots of a chunk sorted by expert, so that one pass over an expert's matrix serves all tokens that chose it.

A slot is one choice of one token, number token * A + choice. order[start[e] : start[e+1]] are the slots of expert e in
rising order; slots without an expert (a negative index, or one of E and more) are nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import kernel


@dataclass(frozen=True)
class ExpertOrder:
    """`slots` choices among `experts`."""

    slots: int
    experts: int
    args = ("index", "order", "start")


def build(name: str, p: ExpertOrder) -> Built:
    sizes = {"index": ("int64", p.slots), "order": ("int32", p.slots), "start": ("int32", p.experts + 1)}
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        count = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(count, T.int32(0), [0])
        with T.serial(p.experts) as e:
            T.buffer_store(k["start"], count[0], [e])
            with T.serial(p.slots) as s:
                with T.If(T.Cast("int32", k["index"][s]) == e):
                    with T.Then():
                        T.buffer_store(k["order"], s, [count[0]])
                        T.buffer_store(count, count[0] + 1, [0])
        T.buffer_store(k["start"], count[0], [p.experts])
    return Built(k.func, 1)
