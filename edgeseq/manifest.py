"""`manifest.json` -> `Manifest`. The file may come from anybody: every field is checked before it is used."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

from edgeseq.errors import BundleError, UsageError
from edgeseq.spec import (
    DTYPE_BYTES,
    MANIFEST_VERSION,
    GraphFile,
    Manifest,
    Role,
    StateSlot,
    StepSignature,
    TensorSpec,
    Update,
)

MAX_BYTES = 16 << 20
MAX_ELEMENTS = 1 << 48
FLOAT32_MAX = 3.4028234663852886e38


def load_manifest(directory: Path) -> Manifest:
    """Read `directory/manifest.json`. UsageError if there is none, BundleError if it is malformed."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise UsageError(
            f"{directory} is not an export directory: it has no manifest.json", "make one with 'edgeseq export'"
        )
    if path.stat().st_size > MAX_BYTES:
        raise BundleError(f"{path} is larger than any manifest", "export the model again")
    return parse_manifest(parse_json(path.read_bytes(), str(path)), str(path))


def parse_json(data: bytes, where: str) -> Any:
    """JSON from an untrusted file."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not JSON: {error}", "export the model again") from None


def parse_manifest(value: Any, where: str = "manifest") -> Manifest:
    """Check a decoded manifest field by field; `where` names the file in the sentence."""
    fields = _Fields(value, where)
    version = fields.integer("version", 0, 1 << 31)
    if version != MANIFEST_VERSION:
        raise BundleError(
            f"{where} has version {version}, this edgeseq reads version {MANIFEST_VERSION}", "export the model again"
        )
    model_id = fields.text("model_id")
    if not re.fullmatch(r"[0-9a-f]{32}", model_id):
        raise BundleError(f"{where}: model_id {model_id!r} is not 32 hex digits")
    manifest = Manifest(
        family=fields.text("family"),
        source=fields.text("source"),
        model_id=model_id,
        dtype=fields.choice("dtype", tuple(DTYPE_BYTES)),
        quant=fields.text("quant"),
        flavour=fields.text("flavour"),
        context=fields.integer("context", 0, (1 << 32) - 1),
        vocab_size=fields.integer("vocab_size", 0, (1 << 31) - 1),
        params=fields.integer("params", 0, 1 << 60),
        tokenizer=fields.choice("tokenizer", ("bytes", "tokenizer.json", "none")),
        graphs=tuple(_graph(g, f"{where}: graphs[{i}]") for i, g in enumerate(fields.items("graphs"))),
        config=fields.mapping("config"),
        version=version,
    )
    if sum(g.signature.tokens == 1 for g in manifest.graphs) != 1:
        raise BundleError(f"{where} must declare exactly one graph with tokens = 1, the step")
    return manifest


def _graph(value: Any, where: str) -> GraphFile:
    fields = _Fields(value, where)
    file = fields.text("file")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", file):
        raise BundleError(f"{where}: file {file!r} is not a plain file name")
    signature = _Fields(fields.mapping("signature"), where)
    return GraphFile(
        file,
        StepSignature(
            signature.integer("tokens", 1, 1 << 20),
            tuple(_tensor(t, f"{where}: inputs[{i}]") for i, t in enumerate(signature.items("inputs"))),
            tuple(_tensor(t, f"{where}: outputs[{i}]") for i, t in enumerate(signature.items("outputs"))),
            tuple(_slot(s, f"{where}: state[{i}]") for i, s in enumerate(signature.items("state"))),
        ),
    )


def _tensor(value: Any, where: str) -> TensorSpec:
    fields = _Fields(value, where)
    return TensorSpec(
        fields.text("name"),
        fields.choice("dtype", tuple(DTYPE_BYTES)),  # type: ignore[arg-type]
        fields.shape("shape"),
        fields.choice("role", get_args(Role)),  # type: ignore[arg-type]
    )


def _slot(value: Any, where: str) -> StateSlot:
    fields = _Fields(value, where)
    shape = fields.shape("shape")
    update = fields.choice("update", get_args(Update))
    axis = None if fields.value.get("axis") is None else fields.integer("axis", 0, len(shape) - 1)
    if (axis is None) != (update == "overwrite"):
        raise BundleError(f"{where}: update {update!r} with axis {axis} (only 'overwrite' has no axis)")
    return StateSlot(
        fields.text("name"),
        fields.choice("dtype", tuple(DTYPE_BYTES)),  # type: ignore[arg-type]
        shape,
        fields.number("init"),
        update,  # type: ignore[arg-type]
        axis,
    )


class _Fields:
    """A JSON object whose fields are read with their type and range checked."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise BundleError(f"{where} is not a JSON object")
        self.value = value
        self.where = where

    def _refuse(self, key: str, wanted: str) -> BundleError:
        got = repr(self.value[key]) if key in self.value else "missing"
        return BundleError(f"{self.where}: {key} is {got[:80]}, expected {wanted}")

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str) or "\0" in value:
            raise self._refuse(key, "a string")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.value.get(key)
        if not isinstance(value, str) or value not in allowed:
            raise self._refuse(key, f"one of {', '.join(allowed)}")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.value.get(key)
        if type(value) is not int or not low <= value <= high:
            raise self._refuse(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        value: Any = self.value.get(key)
        if type(value) not in (int, float) or not (abs(value) <= FLOAT32_MAX or abs(value) == math.inf):
            raise self._refuse(key, "a float32 number")
        return float(value)

    def items(self, key: str) -> list[Any]:
        value = self.value.get(key)
        if not isinstance(value, list):
            raise self._refuse(key, "a list")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.value.get(key)
        if not isinstance(value, dict):
            raise self._refuse(key, "an object")
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        dims = self.items(key)
        elements = 1
        for dim in dims:
            if type(dim) is not int or not 1 <= dim <= MAX_ELEMENTS:
                raise self._refuse(key, "a list of positive integers")
            elements *= dim
        if elements > MAX_ELEMENTS or len(dims) > 8:
            raise self._refuse(key, f"at most 8 dimensions and {MAX_ELEMENTS} elements")
        return tuple(dims)
