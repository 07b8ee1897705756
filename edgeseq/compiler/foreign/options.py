"""What a user says about somebody else's ONNX file: which tensors are state, which shapes and values are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeseq.errors import UsageError


@dataclass(frozen=True)
class ImportOptions:
    """How to read a stateful ONNX file.

    states: texts "NAME_IN:NAME_OUT" (or several, separated by commas): what leaves as NAME_OUT comes back as NAME_IN.
    shapes: static shape of an input, by name.
    dims:   value of a symbolic dimension, by its name in the file.
    values: inputs that never change, as text ("16000" or "1,2,3"); they become constants.
    roles:  inputs and outputs that make a token model of the file: name -> "tokens", "position" or "logits".
    """

    states: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


def state_pairs(texts: tuple[str, ...], inputs: list[str], outputs: list[str]) -> list[tuple[str, str]]:
    """The (input, output) pairs that `texts` name. A name may itself hold colons and commas.

    Raises UsageError for a name that the file lacks or that is used twice.
    """
    pairs: list[tuple[str, str]] = []
    for text in texts:
        pieces = text.split(",")
        while pieces:
            count, pair = _first_pair(pieces, inputs, outputs)
            pairs.append(pair)
            pieces = pieces[count:]
    for side, names in (("input", [p[0] for p in pairs]), ("output", [p[1] for p in pairs])):
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"--state uses the {side} {name!r} twice", "each state is one input and one output")
    return pairs


def _first_pair(pieces: list[str], inputs: list[str], outputs: list[str]) -> tuple[int, tuple[str, str]]:
    """How many pieces make the first pair, and the pair."""
    for count in range(1, len(pieces) + 1):
        text = ",".join(pieces[:count])
        for at, letter in enumerate(text):
            if letter == ":" and text[:at] in inputs and text[at + 1 :] in outputs:
                return count, (text[:at], text[at + 1 :])
    left, colon, right = pieces[0].partition(":")
    if not (left and colon and right):
        raise UsageError(f"--state {pieces[0]!r} is not NAME_IN:NAME_OUT", "write --state h:h_out,c:c_out")
    if left not in inputs:
        raise UsageError(f"--state names the input {left!r}, which the file does not have", _known("inputs", inputs))
    raise UsageError(f"--state names the output {right!r}, which the file does not have", _known("outputs", outputs))


def known_names(side: str, names: list[str]) -> str:
    """A hint that lists inputs or outputs."""
    return _known(f"{side}s", names)


def _known(what: str, names: list[str]) -> str:
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"its {what} are {listed}" if names else f"it has no {what}"


def known_inputs(names: list[str]) -> str:
    """A hint that lists inputs."""
    return _known("inputs", names)
