"""A bundle directory appears whole or not at all, and nothing else is ever overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeseq.bundle.directory import is_bundle, new_bundle, write_facts
from edgeseq.bundle.writer import write_plan
from edgeseq.errors import UsageError
from tests.bundle.plans import recurrent_plan


def _make(out: Path, note: str = "") -> None:
    with new_bundle(out) as directory:
        number = write_plan(recurrent_plan(), directory / "model.edgeseq")
        write_facts(recurrent_plan(), number, directory)
        (directory / "note").write_text(note)


def test_made_and_replaced(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "bundle"
    _make(out, "one")
    assert is_bundle(out)
    _make(out, "two")
    assert (out / "note").read_text() == "two"
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]
    facts = json.loads((out / "bundle.json").read_text())
    assert facts["ledger"]["weight_bytes"] == 32 + 48 + 544
    assert facts["memory"]["session"] == 768


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    out = tmp_path / "new" / "bundle"
    with pytest.raises(error), new_bundle(out) as directory:
        (directory / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_keeps_the_old_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    _make(out, "one")
    with pytest.raises(KeyboardInterrupt), new_bundle(out):
        raise KeyboardInterrupt
    assert (out / "note").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_only_bundles_and_empty_directories_are_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter").write_text("years")
    with pytest.raises(UsageError, match="is not a bundle, so it is not overwritten"):
        _make(mine)
    assert (mine / "chapter").read_text() == "years"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="not overwritten"):
        _make(file)
    link = tmp_path / "link"
    link.symlink_to(mine)
    with pytest.raises(UsageError, match="not overwritten"):
        _make(link)
    empty = tmp_path / "empty"
    empty.mkdir()
    _make(empty)
    assert is_bundle(empty)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot (make|write)"):
        _make(tmp_path / "file" / "bundle")
