"""A manifest reads back as it was written; a damaged one is refused by the field's name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeseq.errors import BundleError, UsageError
from edgeseq.spec import Manifest, StateSlot
from tests.bundle.plans import manifest

SLOTS = (
    StateSlot("conv.0", "float16", (1, 3, 8), 0.0, "shift", 1),
    StateSlot("max.0", "float32", (1, 4), -math.inf),
    StateSlot("k.0", "bfloat16", (1, 2, 32, 4), 0.0, "append", 2),
)


def test_round_trip(tmp_path: Path) -> None:
    made = replace(manifest(SLOTS, 32), config={"d_model": 8, "name": "ü"})
    made.save(tmp_path)
    assert Manifest.load(tmp_path) == made


def test_a_missing_manifest_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not an export directory: it has no manifest\.json"):
        Manifest.load(tmp_path)


def _set(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def _graph(*path: Any, value: Any) -> Callable[[Any], None]:
    return _set("graphs", 0, "signature", *path, value=value)


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "version": (_set("version", value=2), "has version 2, this edgeseq reads version 1"),
    "no version": (lambda d: d.pop("version"), "version is missing, expected an integer"),
    "model id": (_set("model_id", value="ABC"), "model_id 'ABC' is not 32 hex digits"),
    "dtype": (_set("dtype", value="float64"), "dtype is 'float64', expected one of float32"),
    "dtype that cannot be looked up": (_set("dtype", value=["float32"]), "dtype is"),
    "negative context": (_set("context", value=-1), "context is -1"),
    "boolean context": (_set("context", value=True), "context is True"),
    "huge vocabulary": (_set("vocab_size", value=1 << 40), "vocab_size is"),
    "tokenizer path": (_set("tokenizer", value="../../etc/passwd"), "tokenizer is"),
    "no graphs": (_set("graphs", value=[]), "exactly one graph with tokens = 1"),
    "two steps": (lambda d: d["graphs"].append(d["graphs"][0]), "exactly one graph with tokens = 1"),
    "graph is text": (_set("graphs", 0, value="step.onnx"), "is not a JSON object"),
    "absolute file": (_set("graphs", 0, "file", value="/etc/passwd"), "is not a plain file name"),
    "file above": (_set("graphs", 0, "file", value=".."), "is not a plain file name"),
    "no tokens": (_graph("tokens", value=0), "tokens is 0"),
    "shape of zeros": (_graph("state", 0, "shape", value=[1, 0, 8]), "shape is"),
    "shape of floats": (_graph("state", 0, "shape", value=[1, 3.0, 8]), "shape is"),
    "endless shape": (_graph("state", 0, "shape", value=[1 << 40, 1 << 40]), "elements"),
    "rank": (_graph("state", 0, "shape", value=[1] * 9), "at most 8 dimensions"),
    "update": (_graph("state", 0, "update", value="forget"), "update is 'forget'"),
    "axis": (_graph("state", 0, "axis", value=3), "axis is 3, expected an integer from 0 to 2"),
    "axis missing": (_graph("state", 0, "axis", value=None), "update 'shift' with axis None"),
    "axis where none belongs": (_graph("state", 1, "axis", value=0), "update 'overwrite' with axis 0"),
    "init as text": (_graph("state", 0, "init", value="0"), "init is '0'"),
    "init is not a number": (_graph("state", 0, "init", value=math.nan), "init is nan"),
    "init beyond float32": (_graph("state", 0, "init", value=1e300), "init is 1e"),
    "init beyond any float": (_graph("state", 0, "init", value=10**400), "init is 1000"),
    "role": (_graph("inputs", 0, "role", value="poison"), "role is 'poison'"),
    "NUL in a name": (_graph("inputs", 0, "name", value="a\0b"), "name is"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, tmp_path: Path) -> None:
    change, sentence = DAMAGE[name]
    document = json.loads(manifest(SLOTS, 32).to_json())
    change(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=sentence):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b'{"version": ' + b"9" * 5000 + b"}"])
def test_not_a_manifest(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError):
        Manifest.load(tmp_path)
