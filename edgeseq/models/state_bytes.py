"""The formulas in which families state the bytes of their state: what they are for a config, and for one layer.

A formula is sums and products of whole numbers and letters: `4 (Lm (D N + 2 d^2) + 2 La Hk e M)`. Several sides of `=`
are the same number; what follows a `;` is another form of the model.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

from edgeseq.errors import SourceError

if TYPE_CHECKING:
    from edgeseq.models.base import Family

TOKEN = re.compile(r"\s*(\d+|[A-Za-z_]\w*|[-+/^()])")
LAYERS = re.compile(r"L[a-z]*|U")
OPERATIONS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": operator.pow,
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """A number or letter, or `kind` ("+", "-", "*", "/", "^") of other terms."""

    kind: str
    parts: tuple[Any, ...]

    def value(self, letters: Mapping[str, float]) -> float:
        if self.kind == "number":
            return float(self.parts[0])
        if self.kind == "letter":
            if self.parts[0] not in letters:
                raise SourceError(f"the formula of a state has a letter {self.parts[0]} that its family does not give")
            return letters[self.parts[0]]
        total, *rest = (part.value(letters) for part in self.parts)
        for x in rest:
            total = OPERATIONS[self.kind](total, x)
        return total

    def __str__(self) -> str:
        if self.kind in ("number", "letter"):
            return str(self.parts[0])
        if self.kind == "*":
            return " ".join(f"({p})" if p.kind in "+-" else str(p) for p in self.parts)
        sign = "^" if self.kind == "^" else f" {self.kind} "
        first, *rest = self.parts
        tight = self.kind not in "+-"
        return sign.join(
            [f"({first})" if tight and first.kind in "+-" else str(first)]
            + [f"({p})" if p.kind in "+-" and (tight or self.kind == "-") else str(p) for p in rest]
        )


def parsed(formula: str) -> Term:
    """The first side of `formula`; SourceError where it is none."""
    side = re.split("[;=]", formula)[0]
    words = TOKEN.findall(side)
    if "".join(words) != re.sub(r"\s", "", side):
        raise SourceError(f"{formula!r} is no formula of a state")
    reader = _Reader(words)
    term = reader.sum()
    if reader.peek():
        raise SourceError(f"{formula!r} is no formula of a state")
    return term


class _Reader:
    """Recursive descent; products are written side by side."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.at = words, 0

    def peek(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def take(self) -> str:
        self.at += 1
        return self.words[self.at - 1] if self.at <= len(self.words) else ""

    def sum(self) -> Term:
        term = self.product()
        while self.peek() and self.peek() in "+-":
            kind = self.take()
            other = self.product()
            parts = (*term.parts, other) if term.kind == kind == "+" else (term, other)
            term = Term(kind, parts)
        return term

    def product(self) -> Term:
        parts = [self.power()]
        while self.peek() and self.peek() not in "+-)":
            if self.peek() == "/":
                self.take()
                whole = Term("*", tuple(parts)) if len(parts) > 1 else parts[0]
                parts = [Term("/", (whole, self.power()))]
            else:
                parts.append(self.power())
        return Term("*", tuple(parts)) if len(parts) > 1 else parts[0]

    def power(self) -> Term:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take()
        return Term("^", (base, self.atom()))

    def atom(self) -> Term:
        word = self.take()
        if word == "(":
            inside = self.sum()
            if self.take() != ")":
                raise SourceError("a parenthesis of the formula of a state is never closed")
            return inside
        if not word or not word[0].isalnum():
            raise SourceError(f"the formula of a state has {word or 'nothing'!r} where a letter is expected")
        return Term("number" if word.isdigit() else "letter", (word,))


def per_layer(formula: str) -> dict[str, str]:
    """How many layers (a letter) -> the bytes of one of them; {"1": formula} for a model that has no layers."""
    return {count: str(term) for count, term in _shares(parsed(formula))}


def _shares(term: Term, factor: int = 1) -> Iterator[tuple[str, Term]]:
    parts = term.parts if term.kind == "*" else (term,)
    numbers = [int(p.parts[0]) for p in parts if p.kind == "number"]
    counts = [p for p in parts if p.kind == "letter" and LAYERS.fullmatch(p.parts[0])]
    rest = [p for p in parts if p.kind != "number" and p not in counts[:1]]
    for n in numbers:
        factor *= n
    inner = [p for p in rest if p.kind == "+" and _counted(p)]
    if not counts and len(rest) == 1 and inner:
        for part in inner[0].parts:
            yield from _shares(part, factor)
        return
    left = ([Term("number", (str(factor),))] if factor != 1 or not rest else []) + rest
    count = counts[0].parts[0] if counts else "1"
    yield count, Term("*", tuple(left)) if len(left) > 1 else left[0]


def _counted(term: Term) -> bool:
    """Whether a letter of `term` counts layers."""
    if term.kind == "letter":
        return LAYERS.fullmatch(term.parts[0]) is not None
    return term.kind != "number" and any(_counted(p) for p in term.parts)


# letter -> names of config fields that have its value, the first found counts
FIELDS: dict[str, tuple[str, ...]] = {
    "L": ("n_layers",), "d": ("d_model",), "H": ("n_heads", "n_value_heads", "d_inner"), "Hk": ("n_kv_heads",),
    "Hv": ("n_value_heads",), "e": ("head_dim",), "K": ("d_key",), "V": ("d_value",), "D": ("d_inner", "d_lru"),
    "N": ("d_state",), "k": ("d_conv",), "G": ("n_groups", "n_key_heads", "n_global"), "W": ("window",),
    "A": ("d_att",), "M": ("degree",), "o": ("order",), "g": ("n_global",), "w": ("n_window",), "r": ("n_random",),
    "b": ("block",),
}  # fmt: skip
ATTENTION = ("Hk", "e", "W")  # looked for in `attention`, the others in `mamba` and `delta_net`


def letters(record: Family, config: Any, context: int) -> dict[str, float]:
    """The letters of `record.state_formula` for `config`: fields of the usual names, then what the family says itself.

    A field counts wherever it stands, those of the mixers within a config after its own.
    """

    def parts(*names: str) -> list[Any]:
        return [c for c in (config, *(getattr(config, n, None) for n in names)) if is_dataclass(c)]

    attending, recurrent = parts("attention"), parts("mamba", "delta_net")
    found: dict[str, float] = {"M": _field(attending, "window") or context, "T": context}
    for letter, names in FIELDS.items():
        value = _field(attending if letter in ATTENTION else recurrent, *names)
        if value is not None:
            found[letter] = value
    for letter, made in DERIVED.items():
        other = made(recurrent)
        if other is not None:
            found.setdefault(letter, other)
    where, pattern = getattr(config, "attention_at", None), getattr(config, "pattern", None)
    if where is None and isinstance(pattern, tuple):
        where = [i for i in range(config.n_layers) if pattern[i % len(pattern)] == "attention"]
    if where is not None:
        found |= {"La": len(where), "Lm": config.n_layers - len(where), "Lr": config.n_layers - len(where)}
    return found | dict(record.letters(config, context) if record.letters is not None else {})


def _field(parts: list[Any], *names: str) -> int | None:
    """The first of `names` that is a number in one of `parts`."""
    return next((getattr(c, n) for c in parts for n in names if isinstance(getattr(c, n, None), int)), None)


def _inner(levels: list[Any]) -> float | None:
    """Heads times their width, of the state-space mixer."""
    of = next((c for c in levels if hasattr(c, "d_state") and hasattr(c, "head_dim")), None)
    return None if of is None else of.n_heads * of.head_dim


def _head(levels: list[Any]) -> float | None:
    """Width of a head where the config has their number alone."""
    heads = getattr(levels[0], "n_heads", None)
    return levels[0].d_model / heads if heads else None


def _count(name: str) -> Callable[[list[Any]], float | None]:
    return lambda levels: len(getattr(levels[0], name)) if hasattr(levels[0], name) else None


def _mean_window(levels: list[Any]) -> float | None:
    windows = getattr(levels[0], "windows", None)
    return sum(windows) / len(windows) if windows else None


DERIVED: dict[str, Callable[[list[Any]], float | None]] = {
    "D": _inner, "N": _head, "U": _count("shared_at"), "W": _mean_window,
}  # fmt: skip


def state_bytes(record: Family, config: Any, context: int) -> float:
    """What `record.state_formula` says for `config`."""
    return parsed(record.state_formula).value(letters(record, config, context))
