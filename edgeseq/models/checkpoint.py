"""Hugging Face directories: config.json and *.safetensors, checked before anything is built; never pickle.

Tensors are read one at a time through the file's memory map, so a model larger than memory can be opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from edgeseq.errors import SourceError, UsageError
from edgeseq.models import families
from edgeseq.models.base import Array, Checkpoint, Family, StoredTensor

MAX_JSON_BYTES = 64 << 20
FLOATS = ("F32", "F16", "BF16", "F64")
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file nobody vouches for."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise SourceError(f"{path} is larger than any configuration")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object")
    return value


class TensorFiles:
    """The tensors of a directory by name, whatever the number of files."""

    def __init__(self) -> None:
        self._handles: dict[Path, Any] = {}
        self._file: dict[str, Path] = {}

    @classmethod
    def single(cls, path: Path) -> TensorFiles:
        """The tensors of one file."""
        files = cls()
        files._file = dict.fromkeys(files._open(path).keys(), path)
        return files

    @classmethod
    def directory(cls, directory: Path) -> TensorFiles:
        """The tensors of the one file, or of the shards that the index names."""
        index = directory / "model.safetensors.index.json"
        if not index.is_file():
            return cls.single(_only_file(directory))
        files = cls()
        files._open_index(directory, index)
        return files

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise SourceError(f"{path} is not a whole safetensors file: {error}", "fetch it again") from None
        return self._handles[path]

    def _open_index(self, directory: Path, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(f"{index} has no weight_map")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", shard):
                raise SourceError(f"{index} names the shard {shard!r:.80}, which is not a plain .safetensors file name")
            path = directory / shard
            if not path.is_file():
                raise SourceError(f"{path} is named by the index but does not exist", "fetch the missing shard")
            if name not in self._open(path).keys():  # noqa: SIM118  (a handle is not a mapping)
                raise SourceError(f"{path} lacks the tensor {name}, which the index places there")
            self._file[name] = path

    def names(self) -> Iterable[str]:
        return self._file.keys()

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor whose stored shape or type is not what the config implies."""
        piece = self._open(self._file[name]).get_slice(name)
        if tuple(piece.get_shape()) != shape:
            raise SourceError(f"{name} has shape {piece.get_shape()}, but config.json implies {list(shape)}")
        if piece.get_dtype() not in FLOATS:
            raise SourceError(f"{name} is stored as {piece.get_dtype()}, but only {', '.join(FLOATS)} can be read")

    def read(self, name: str) -> Array:
        """One tensor as float32; a view of the file where it already is."""
        tensor = self._open(self._file[name]).get_tensor(name)
        return np.ascontiguousarray(tensor.to(torch.float32).numpy())


def _only_file(directory: Path) -> Path:
    found = sorted(directory.glob("*.safetensors"))
    if len(found) > 1:
        found = [path for path in found if path.name == "model.safetensors"] or found
    if len(found) > 1:
        raise SourceError(f"{directory} holds {len(found)} safetensors files but no model.safetensors.index.json")
    if found:
        return found[0]
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise SourceError(
            f"{directory} has its weights only in {pickles[0]}, a pickle, which can run code when it is loaded",
            "convert it to safetensors",
        )
    raise SourceError(f"{directory} has no *.safetensors file")


def family_of(raw: Mapping[str, Any], where: Path) -> tuple[Family, Checkpoint]:
    """The family that reads this config.json."""
    known = [(f, c) for f in families().values() for c in f.checkpoints]
    model_type = raw.get("model_type")
    for candidate, checkpoint in known:
        if model_type in checkpoint.model_types or (model_type is None and checkpoint.recognise(raw)):
            return candidate, checkpoint
    types = ", ".join(t for _, c in known for t in c.model_types)
    said = "no model_type" if model_type is None else f"model_type {model_type!r:.60}"
    raise SourceError(f"{where} has {said}, but the families that can be loaded are {types}")


def resolve(checkpoint: Checkpoint, config: Any, files: TensorFiles) -> dict[str, StoredTensor]:
    """Match every tensor of the model to one in the files; missing, surplus or misshapen ones are refused by name."""
    present, resolved = set(files.names()), {}
    for ours, stored in checkpoint.tensors(config).items():
        resolved[ours] = _located(checkpoint, stored, present)
    pieces = [piece for tensor in resolved.values() for piece in tensor.parts or (tensor,)]
    missing = sorted(t.name for t in pieces if t.name not in present)
    if missing:
        raise SourceError(f"The checkpoint lacks {_few(missing)}, which config.json implies")
    surplus = present - {t.name for t in pieces}
    for name, ours in checkpoint.tied.items():
        if name in surplus and ours in resolved:
            surplus.remove(name)
            files.check(name, resolved[ours].shape)
            if not np.array_equal(files.read(name), files.read(resolved[ours].name)):
                raise SourceError(f"config.json ties {name} to {resolved[ours].name}, but their values differ")
    aside = {name for name in surplus if name.endswith(checkpoint.ignored) or name.startswith(checkpoint.beside)}
    unknown = sorted(surplus - aside)
    if unknown:
        raise SourceError(f"The checkpoint also holds {_few(unknown)}, which this model has no place for")
    for tensor in pieces:
        files.check(tensor.name, tensor.shape)
    return resolved


def _located(checkpoint: Checkpoint, stored: StoredTensor, present: Set[str]) -> StoredTensor:
    """The tensor under the name it has in these files, without parts, or its parts under theirs."""
    name = stored.name
    if name not in present:
        name = checkpoint.aliases.get(name, name)
    short = name.removeprefix(checkpoint.optional_prefix)
    name = short if name not in present and short in present else name
    if name not in present and stored.parts:
        return replace(stored, parts=tuple(_located(checkpoint, part, present) for part in stored.parts))
    return replace(stored, name=name, parts=())


def read_tensor(stored: StoredTensor, files: TensorFiles) -> Array:
    """One tensor of the model, from what `resolve` found."""
    if stored.parts:
        return np.concatenate([read_tensor(part, files) for part in stored.parts])
    return np.ascontiguousarray(stored.convert(files.read(stored.name)))


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def open_directory(directory: Path) -> tuple[Family, Any, dict[str, StoredTensor], TensorFiles]:
    """Family, config, tensor map and tensors of a checkpoint directory, all checked."""
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(f"{directory} has no config.json", "name a Hugging Face checkpoint directory")
    raw = read_json(path)
    found, checkpoint = family_of(raw, path)
    if raw.get("quantization_config") is not None:
        raise SourceError(f"{path} describes a quantised checkpoint", "export from the unquantised one with --quant")
    config = checkpoint.config(raw)
    files = TensorFiles.directory(directory)
    return found, config, resolve(checkpoint, config, files), files
