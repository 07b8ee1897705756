"""The formulas of `edgeseq list families` are the bytes of the real slots, in all and layer by layer."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from edgeseq.errors import SourceError
from edgeseq.models import families
from edgeseq.models.state_bytes import LAYERS, letters, parsed, per_layer, state_bytes
from edgeseq.models.twin import family_of_config
from tests.models.support import ODD

SHAPES: dict[str, tuple[str, Any]] = {
    **{f"tiny-{name}": (name, record.tiny) for name, record in families().items()},
    **{zoo: (name, config) for name, record in families().items() for zoo, config in record.zoo.items()},
    **{name: (family_of_config(config).name, config) for name, config in ODD.items()},
}
MIXED = {name for name, (_, c) in SHAPES.items() if any(getattr(c, "modal", ()))}  # both sides of the `;`, by layer


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - MIXED))
def test_formulas_are_the_bytes_of_the_slots(name: str) -> None:
    family, config = SHAPES[name]
    record = families()[family]
    model = record.meta_model(config)
    for context in (24, 40, 97):
        slots = model.state_slots(context)
        assert state_bytes(record, config, context) == sum(s.nbytes for s in slots)
    values = letters(record, config, context)
    for side in record.state_formula.split(";")[0].split("="):
        assert parsed(side).value(values) == sum(s.nbytes for s in slots), side


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - MIXED))
def test_layers_have_the_bytes_that_are_told_of_them(name: str) -> None:
    """As many layers of each kind, with as many bytes each; where a letter is many widths, on average."""
    family, config = SHAPES[name]
    record, context = families()[family], 40
    values = letters(record, config, context)
    told = {count: parsed(formula).value(values) for count, formula in per_layer(record.state_formula).items()}
    assert sum(values[count] * each for count, each in told.items()) == state_bytes(record, config, context)
    found: Counter[str] = Counter()
    for slot in record.meta_model(config).state_slots(context):
        layer = re.match(r"(\w+\.)?\d+\.", slot.name)
        found[layer[0] if layer else slot.name] += slot.nbytes
    if len(told) == 1 and len(set(found.values())) == 1:
        assert set(found.values()) == set(told.values())
    if len(told) > 1:
        assert set(found.values()) <= set(told.values()) | {sum(told.values())}


@pytest.mark.parametrize("name", families())
def test_growth_is_what_the_slots_do(name: str) -> None:
    """constant: never; window: not beyond it; linear: as many bytes for each token more."""
    record = families()[name]
    model = record.meta_model(record.tiny)
    sizes = [sum(s.nbytes for s in model.state_slots(context)) for context in (64, 128, 192)]
    kinds = {s.update for s in model.state_slots(128)}
    if record.growth == "linear":
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
    else:
        assert len(set(sizes)) == 1 and "append" not in kinds
        assert ("ring" in kinds) == (record.growth == "window")
    assert record.ops or not kinds


def test_layers_are_taken_apart() -> None:
    assert per_layer("4 L H K V = 8 L d^2 / H") == {"L": "4 H K V"}
    assert per_layer("4 (Lm D (N + k - 1) + 2 La Hk e M)") == {"Lm": "4 D (N + k - 1)", "La": "8 Hk e M"}
    assert per_layer("4 (N W + 2 d)") == {"1": "4 (N W + 2 d)"}
    assert all(LAYERS.fullmatch(letter) for letter in ("L", "Lm", "La", "U"))


def test_formulas_are_read_as_they_are_written() -> None:
    values = {"a": 2.0, "b": 3.0, "c": 5.0}
    for text, wanted in (
        ("2 a b", 12), ("2 (a + b) c", 50), ("a - b - c", -6), ("a - (b - c)", 4), ("a b^2 / 2 c", 45),
        ("a^(1 + a)", 8), ("7", 7),
    ):  # fmt: skip
        assert parsed(text).value(values) == wanted, text
        assert parsed(str(parsed(text))).value(values) == wanted, str(parsed(text))


@pytest.mark.parametrize("text", ["", "2 (a", "a +", "2 $ a", "a)", "* a"])
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="formula of a state"):
        parsed(text)


def test_a_letter_that_nobody_gives_is_named() -> None:
    record: Any = SimpleNamespace(state_formula="4 L zeta", letters=None)
    with pytest.raises(SourceError, match="a letter zeta that its family does not give"):
        state_bytes(record, families()["mamba"].tiny, 8)
