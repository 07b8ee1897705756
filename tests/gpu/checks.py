"""What a GPU bundle has to do, compared with the golden and with what the CPU runtime did where it was compiled.

Each check takes a Case and returns a note for the table, or raises Wrong (or Refused) with a sentence.
"""

from __future__ import annotations

import json
import random
import struct
import threading
from array import array
from pathlib import Path
from typing import Any

from runtime import Model, Refused, Session

Rows = list["array[float]"]


class Wrong(Exception):
    """A comparison failed."""


class Case:
    """A bundle with its golden and what is expected of it; see prepare.py for the files."""

    def __init__(self, folder: Path, model: Model) -> None:
        self.folder, self.model = folder, model
        self.expect: dict[str, Any] = json.loads((folder / "expect.json").read_text())
        golden = read_safetensors(folder / "gpu" / "golden.safetensors")
        self.tokens: list[int] = golden["tokens"].tolist()
        values = golden["logits"]
        width = len(values) // len(self.tokens)
        self.logits: Rows = [values[i : i + width] for i in range(0, len(values), width)]
        self.bound: float = self.expect["bound"]

    def started(self) -> Session:
        """A session that has consumed the prompt."""
        session = self.model.session()
        session.prefill(self.expect["prompt"])
        return session


def read_safetensors(path: Path) -> dict[str, Any]:
    """float32 and int64 tensors as flat arrays."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    made = {}
    for name, fact in header.items():
        if name != "__metadata__" and fact["dtype"] in ("F32", "I64"):
            begin, end = fact["data_offsets"]
            made[name] = array("f" if fact["dtype"] == "F32" else "q", data[8 + size + begin : 8 + size + end])
    return made


def difference(got: array[float], wanted: array[float]) -> float:
    """The largest absolute difference; not a number counts as infinite."""
    if len(got) != len(wanted):
        raise Wrong(f"{len(got)} logits instead of {len(wanted)}")
    most = max((abs(a - b) for a, b in zip(got, wanted)), default=0.0)
    return most if all(a == a for a in got) else float("inf")


def within(got: array[float], wanted: array[float], bound: float, where: str) -> float:
    off = difference(got, wanted)
    if not off <= bound:
        raise Wrong(f"{where}: logits differ by {off:.3g}, allowed {bound:.3g}")
    return off


def likeliest(row: array[float]) -> int:
    return row.index(max(row))


def same(got: array[float], wanted: array[float], where: str) -> None:
    if got.tobytes() != wanted.tobytes():
        raise Wrong(f"{where}: logits differ by {difference(got, wanted):.3g}, expected the same bits")


def weights(case: Case) -> str:
    case.model.check_weights()
    return f"{case.model.info.weight_bytes / 1e6:.1f} MB"


def steps(case: Case) -> str:
    """Every golden token by itself."""
    session = case.model.session()
    rows = zip(case.tokens, case.logits)
    worst = max(within(session.step(t), row, case.bound, f"step {i}") for i, (t, row) in enumerate(rows))
    session.close()
    return f"{worst:.2g} of {case.bound:.2g}"


def chunks(case: Case) -> str:
    """The golden at once and in random pieces."""
    n, worst, chance = len(case.tokens), 0.0, random.Random(7)
    plans = [[n], *([[chance.choice([1, 2, 3, 5, 8, 9, 17]) for _ in range(n)] for _ in range(3)])]
    for plan in plans:
        session, at = case.model.session(), 0
        for piece in plan:
            if at < n:
                got = session.prefill(case.tokens[at : at + piece])
                at = min(n, at + piece)
                worst = max(worst, within(got, case.logits[at - 1], case.bound, f"prefill to {at}"))
        session.close()
    return f"{worst:.2g} of {case.bound:.2g}"


def greedy(case: Case) -> str:
    """The tokens that the CPU runtime chose, by steps and in one call without a round trip. Where the CPU's best two
    are nearer to each other than twice the bound, either is right."""
    wanted, margins = case.expect["tokens"], case.expect["margins"]
    ties = [i for i, margin in enumerate(margins) if margin <= 2 * case.bound]
    session = case.started()
    begin = session.fork()
    row = session.logits()
    for i, token in enumerate(wanted):
        if likeliest(row) != token and i not in ties:
            raise Wrong(f"token {i} is {likeliest(row)}, the CPU chose {token} by {margins[i]:.3g}")
        row = session.step(token)
    sure = ties[0] if ties else len(wanted)
    made, _ = begin.generate(len(wanted))
    if made[:sure] != wanted[:sure]:
        i = next(i for i in range(sure) if made[i] != wanted[i])
        raise Wrong(f"greedy token {i} is {made[i]}, the CPU chose {wanted[i]} by {margins[i]:.3g}")
    if not ties:
        same(begin.logits(), row, "after the greedy tokens, steps and the call in one")
    session.close()
    begin.close()
    return f"{len(wanted)} tokens" + (f", {len(ties)} ties" if ties else "")


def state(case: Case) -> str:
    """A state of the CPU runtime resumes here, one of here resumes in another session and on the CPU."""
    expect = case.expect
    session = case.model.session()
    session.load((case.folder / "cpu.state").read_bytes())
    if session.position != len(expect["prompt"]):
        raise Wrong(f"the CPU's state stands at {session.position}")
    own = case.started()
    token = expect["tokens"][0]
    off = within(session.step(token), own.fork().step(token), 2 * case.bound, "resumed from the CPU's state")
    saved = own.save()
    other = case.model.session()
    other.load(saved)
    same(other.step(token), own.step(token), "resumed from an own state")
    note = f"{off:.2g}"
    host = case.folder / "host"
    if host.is_dir():
        cpu = Model(host)
        back = cpu.session()
        back.load(saved)
        off = within(back.step(token), own.logits(), 2 * case.bound, "resumed on the CPU")
        note += f", back {off:.2g}"
        back.close()
        cpu.close()
    return note


def fork(case: Case) -> str:
    """A fork goes on by itself; a reset stream is a fresh one."""
    session = case.started()
    twin = session.fork()
    same(twin.logits(), session.logits(), "forked")
    first = [session.step(t) for t in case.tokens[:5]]
    for a, b in zip(first, [twin.step(t) for t in case.tokens[:5]]):
        same(b, a, "forked and stepped")
    session.reset()
    fresh = case.model.session()
    same(session.step(case.tokens[0]), fresh.step(case.tokens[0]), "reset")
    for each in (session, twin, fresh):
        each.close()
    return "same bits"


def sessions(case: Case, n: int = 4) -> str:
    """Several sessions in threads say what one says alone."""
    count = min(32, len(case.expect["tokens"]))  # as many as the context has room for
    alone, _ = case.started().generate(count)
    found: list[Any] = [None] * n

    def work(i: int) -> None:
        try:
            session = case.started()
            found[i] = session.generate(count)[0] if i % 2 else [session_step(session) for _ in range(count)]
            session.close()
        except Refused as error:
            found[i] = str(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for i, made in enumerate(found):
        if made != alone:
            raise Wrong(f"session {i} of {n} in threads: {made}, alone {alone}")
    return f"{n} threads"


def session_step(session: Session) -> int:
    """The likeliest token, consumed."""
    token = likeliest(session.logits())
    session.step(token)
    return token


CHECKS = {
    "weights": weights, "steps": steps, "chunks": chunks, "greedy": greedy, "state": state, "fork": fork,
    "sessions": sessions,
}  # fmt: skip
