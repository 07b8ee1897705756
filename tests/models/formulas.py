"""The formulas of state bytes that families state, computed: "4 L (D N + 2 d^2) = ..." with values for its letters."""

from __future__ import annotations

import re
from collections.abc import Mapping

TOKEN = re.compile(r"\s*(\d+|[A-Za-z_]\w*|[-+/^()=,])")


def value(formula: str, letters: Mapping[str, float]) -> float:
    """Products are written side by side; where there are several sides of `=`, all must agree."""
    sides = {_Reader(side, letters).all() for side in formula.split("=")}
    assert len(sides) == 1, f"{formula}: its sides are {sides}"
    return sides.pop()


class _Reader:
    def __init__(self, text: str, letters: Mapping[str, float]) -> None:
        self.words, self.at, self.letters = TOKEN.findall(text), 0, letters
        assert "".join(self.words) == re.sub(r"\s", "", text), f"{text}: not a formula"

    def all(self) -> float:
        found = self.sum()
        assert self.at == len(self.words), f"{self.words[self.at :]} left over"
        return found

    def peek(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def take(self) -> str:
        self.at += 1
        return self.words[self.at - 1]

    def sum(self) -> float:
        total = self.product()
        while self.peek() in ("+", "-"):
            total = total + self.product() if self.take() == "+" else total - self.product()
        return total

    def product(self) -> float:
        total = self.power()
        while self.peek() and self.peek() not in "+-),":
            if self.peek() == "/":
                self.take()
                total /= self.power()
            else:
                total *= self.power()
        return total

    def power(self) -> float:
        base = self.atom()
        if self.peek() == "^":
            self.take()
            return base ** self.atom()
        return base

    def atom(self) -> float:
        word = self.take()
        if word == "(":
            inside = self.sum()
            assert self.take() == ")"
            return inside
        if word in ("min", "max"):
            assert self.take() == "("
            parts = [self.sum()]
            while self.peek() == ",":
                self.take()
                parts.append(self.sum())
            assert self.take() == ")"
            return min(parts) if word == "min" else max(parts)
        return float(word) if word.isdigit() else self.letters[word]
