"""Where everything lies: offsets in the state block, the io block and each graph's arena."""

from __future__ import annotations

from collections.abc import Iterable

from edgeseq.bundle.plan import align

from .ir import Call, Storage


def place(storages: Iterable[Storage]) -> int:
    """Lay storages one after the other, aligned; returns the size of the block."""
    end = 0
    for s in storages:
        s.offset = end
        end = align(end + s.nbytes)
    return end


def plan_arena(calls: list[Call]) -> int:
    """Give every activation an offset such that no two living ones overlap; returns the arena's size.

    An activation lives from the first call that touches it to the last. Large ones choose first, each the lowest
    free gap.
    """
    lives: dict[Storage, tuple[int, int]] = {}
    for i, call in enumerate(calls):
        for arg in call.args:
            if arg.value.storage.kind == "arena":
                first, _ = lives.get(arg.value.storage, (i, i))
                lives[arg.value.storage] = (first, i)
    placed: list[Storage] = []
    for s in sorted(lives, key=lambda s: (-s.nbytes, lives[s], s.name)):
        start, end = lives[s]
        busy = sorted((o.offset, o.offset + o.nbytes) for o in placed if lives[o][0] <= end and start <= lives[o][1])
        offset = 0
        for low, high in busy:
            if offset + s.nbytes <= low:
                break
            offset = max(offset, align(high))
        s.offset = offset
        placed.append(s)
    return max((align(s.offset + s.nbytes) for s in placed), default=0)


def mark_outputs_only(calls: list[Call]) -> None:
    """Flag calls that no state depends on."""
    feeding: set[Storage] = set()
    for call in reversed(calls):
        written = [a.value.storage for a in call.args if a.access != "r"]
        call.outputs_only = not any(s.kind == "state" or s in feeding for s in written)
        if not call.outputs_only:
            feeding |= {a.value.storage for a in call.args if a.value.storage.kind == "arena"}
