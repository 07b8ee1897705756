"""Option types that several commands share."""

from __future__ import annotations

import click


class Ints(click.ParamType):
    """Comma-separated integers, as a tuple. `k` and `M` mean 1024 and 1024 squared where `suffix` allows them."""

    name = "N,N,…"

    def __init__(self, low: int = 0, suffix: bool = False) -> None:
        self.low = low
        self.suffix = suffix

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._one(part.strip(), param, ctx) for part in value.split(","))

    def _one(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        scale = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower(), 1) if self.suffix else 1
        digits = text if scale == 1 else text[:-1]
        if not (digits.isascii() and digits.isdigit()):
            self.fail(f"{text!r} is not a whole number.", param, ctx)
        number = int(digits) * scale
        if not self.low <= number < 1 << 31:
            self.fail(f"{text} is not in the range {self.low} to {(1 << 31) - 1}.", param, ctx)
        return number


class Named(click.ParamType):
    """NAME=TEXT, as the pair. The name may itself hold '='; the text may not."""

    name = "NAME=…"

    def convert(
        self, value: str | tuple[str, str], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, text = value.rpartition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not NAME=VALUE.", param, ctx)
        return name, text
