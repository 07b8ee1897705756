"""What is measured, in llama-bench's words: ppN reads a prompt of N tokens, tgN generates N, at a depth of D tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgeseq.errors import UsageError

PROMPT = (512,)
GENERATE = (128,)
GENERATE_AT_DEPTHS = (64,)


@dataclass(frozen=True)
class Case:
    """One test: `n_prompt` tokens at once, or `n_gen` tokens one by one, from position `n_depth`. One of both is 0."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def tokens(self) -> int:
        return self.n_prompt or self.n_gen

    @property
    def name(self) -> str:
        test = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{test} @ d{self.n_depth}" if self.n_depth else test


def make_cases(
    prompts: Sequence[int] | None, generate: Sequence[int] | None, depths: Sequence[int] | None, context: Sequence[int]
) -> list[Case]:
    """The tests, by rising depth. `context` asks for generation at those depths and stands instead of `depths`.

    What is None takes llama-bench's default (pp512, tg128, depth 0); with `context` that is tg64 alone. A 0 asks for
    nothing. Raises UsageError when nothing is left.
    """
    if context and depths is not None:
        raise UsageError("--context and -d exclude each other", "both name depths: give one of them")
    if prompts is None:
        prompts = () if context else PROMPT
    if generate is None:
        generate = GENERATE_AT_DEPTHS if context else GENERATE
    cases = [
        case
        for depth in sorted(set(context or depths or (0,)))
        for case in (*(Case(n, 0, depth) for n in prompts if n), *(Case(0, n, depth) for n in generate if n))
    ]
    if not cases:
        raise UsageError("there is nothing to measure", "give -p or -n a number other than 0")
    return list(dict.fromkeys(cases))


def check_context(cases: Iterable[Case], name: str, context: int) -> None:
    """UsageError for the first test that does not fit into a bounded context."""
    for case in cases:
        if context and case.n_depth + case.tokens > context:
            raise UsageError(
                f"{case.name} needs a context of {case.n_depth + case.tokens}, {name} has {context}",
                "measure less deep, or export the model with a larger --context",
            )
