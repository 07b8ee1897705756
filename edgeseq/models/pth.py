"""BlinkDL's layout: one .pth file, no config; names and shapes of its tensors tell version and sizes.

The file is a pickle inside a zip. It is read by `torch.load(weights_only=True, mmap=True)` and nothing else: that
unpickler makes tensors and plain containers and refuses everything that could run code. What comes out is checked
again: a flat dict of names to plain dense tensors that lie whole in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeseq.errors import SourceError
from edgeseq.models import families
from edgeseq.models.base import Array, BareCheckpoint, Family, StoredTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_TENSORS = 1 << 16
SUFFIXES = (".pth",)
HINT = "give a file of tensors as BlinkDL publishes RWKV models, or convert the checkpoint to safetensors"

Shape = tuple[int, ...]
Stored = tuple[str, Shape, Callable[[Array], Array]]


class PthFile:
    """The tensors of one .pth file, mapped, not read. Axes of length 1 are left out of every shape."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {name: tensor.detach().squeeze() for name, tensor in _load(path).items()}

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def reader(self, tensors: Mapping[str, StoredTensor]) -> Callable[[str], Array]:
        """Our tensor name -> contiguous float32, converted; a view of the file where it already is."""

        def read(name: str) -> Array:
            stored = tensors[name]
            array = self.tensors[stored.name].to(torch.float32).numpy().reshape(stored.shape)
            return np.ascontiguousarray(stored.convert(array), dtype=np.float32)

        return read


def _load(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise SourceError(f"{path} is not the zip that torch.save writes", "save it again with torch 1.6 or later")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        raise SourceError(f"{path} is not a file of plain tensors: {_reason(error)}", HINT) from None
    if not isinstance(found, dict) or not 0 < len(found) <= MOST_TENSORS:
        size = f" of {len(found)}" if isinstance(found, Sized) else ""
        raise SourceError(f"{path} holds a {type(found).__name__}{size} where tensors by name are expected", HINT)
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise SourceError(f"{path} has the key {name!r:.80}, which is not a name", HINT)
        if not isinstance(tensor, torch.Tensor):
            raise SourceError(f"{path}: {name!r:.80} is a {type(tensor).__name__}, not a tensor", HINT)
        _check(path, name, tensor)
    return found


def _reason(error: Exception) -> str:
    """The part of torch's message that says what the file holds; the rest of it offers to trust the file."""
    said = str(error)
    asked = re.search(r"GLOBAL ([\w.]+)", said)
    if asked:
        return f"it asks for {asked[1]:.80}, which could run code"
    if "PytorchStreamReader" in said:
        return "its zip is not whole"
    return re.sub(r"\s+", " ", said).strip()[:120] or type(error).__name__


def _check(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Refuse what does not lie in the file as a plain array; a stride of 0 makes terabytes of a few bytes."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in FLOATS:
        kind = f"{tensor.layout} {tensor.dtype}".replace("torch.", "")
        kinds = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise SourceError(f"{path}: {name!r:.80} is a {kind} tensor, but only dense {kinds} are read")
    size = tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or size > path.stat().st_size or size == 0:
        raise SourceError(
            f"{path}: {name!r:.80} does not lie in the file as a plain array of {list(tensor.shape)}", HINT
        )


def open_pth(path: Path) -> tuple[Family, Any, Callable[[str], Array]]:
    """Family, config and a reader by our tensor names; every tensor of the file checked before anything is built."""
    file = PthFile(path)
    shapes = file.shapes()
    known = [(f, f.bare) for f in families().values() if f.bare is not None]
    for record, bare in known:
        if bare.recognise(shapes):
            config = bare.config(shapes)
            return record, config, file.reader(_resolve(path, bare, config, shapes))
    names = ", ".join(f.name for f, _ in known)
    raise SourceError(f"{path} has the tensors of none of {names}; its first is {next(iter(shapes))!r:.80}", HINT)


def _resolve(path: Path, bare: BareCheckpoint, config: Any, shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    tensors = bare.tensors(config)
    wanted = {t.name: tuple(n for n in t.shape if n != 1) for t in tensors.values()}
    missing = sorted(wanted.keys() - shapes.keys())
    if missing:
        raise SourceError(f"{path} lacks {_few(missing)}, which its other tensors imply")
    surplus = sorted(shapes.keys() - wanted.keys() - set(bare.ignored))
    if surplus:
        raise SourceError(f"{path} also holds {_few(surplus)}, which this model has no place for")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise SourceError(
                f"{path}: {name} has shape {list(shapes[name])}, but its other tensors imply {list(shape)}"
            )
    return tensors


def _few(names: list[str]) -> str:
    return f"{names[0]:.80}" if len(names) == 1 else f"{names[0]:.80} and {len(names) - 1} more"


# The layout itself, as far as all versions share it.


def flat(x: Array) -> Array:
    return x.reshape(-1)


def transposed(x: Array) -> Array:
    return np.ascontiguousarray(x.T)


def turned(x: Array) -> Array:
    """Share of the current token -> share of the previous one."""
    return 1.0 - x.reshape(-1)


class Sizes:
    """Sizes of a model from the shapes in its file; what a shape cannot say is a SourceError that names it."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes

    def of(self, name: str, axes: int) -> Shape:
        """The shape of `name`, which must have `axes` axes longer than 1."""
        shape = self.shapes.get(name)
        if shape is None:
            raise SourceError(f"The file lacks {name}, which tells sizes of the model")
        if len(shape) != axes:
            raise SourceError(f"{name} has shape {list(shape)}, but {axes} axes longer than 1 are expected")
        return shape

    @property
    def layers(self) -> int:
        """Numbered blocks, which must be there from 0 without a gap."""
        found = {int(m[1]) for m in map(re.compile(r"blocks\.(\d{1,9})\.").match, self.shapes) if m}
        gap = next(i for i in range(len(found) + 1) if i not in found)
        if gap < len(found):
            raise SourceError(f"The file has tensors of blocks.{max(found)}, but none of blocks.{gap}")
        return gap


def norm(ours: str, theirs: str, width: int) -> dict[str, StoredTensor]:
    """Weight and bias of a layer norm."""
    return {
        ours: StoredTensor(f"{theirs}.weight", (width,)),
        f"{ours}_bias": StoredTensor(f"{theirs}.bias", (width,)),
    }


def square_matrices(width: int, **names: str) -> dict[str, Stored]:
    """x="word" -> our x_proj.weight, stored as word.weight [width,width]."""
    return {f"{x}_proj.weight": (f"{word}.weight", (width, width), lambda w: w) for x, word in names.items()}


def rwkv_tensors(
    c: Any, mixes: Mapping[str, str], receptance: bool, time_mix: Callable[[int], Mapping[str, Stored]]
) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in the file.

    mixes:    our mixing vectors of the channel mixing -> theirs; those called time_mix_* count the current token.
    time_mix: layer -> our names below layers.<i>.att -> (their name below blocks.<i>.att, shape, conversion).
    """
    d, f, v = c.d_model, c.d_ff, c.vocab_size
    found = {"embed.weight": StoredTensor("emb.weight", (v, d))}
    found |= norm("embed_norm", "blocks.0.ln0", d) | norm("norm", "ln_out", d)
    if not c.tie:
        found["head"] = StoredTensor("head.weight", (v, d))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}", f"blocks.{i}"
        found |= norm(f"{ours}.att_norm", f"{theirs}.ln1", d) | norm(f"{ours}.ffn_norm", f"{theirs}.ln2", d)
        for name, stored in mixes.items():
            convert: Callable[[Array], Array] = turned if stored.startswith("time_mix") else flat
            found[f"{ours}.ffn.{name}"] = StoredTensor(f"{theirs}.ffn.{stored}", (d,), convert)
        found[f"{ours}.ffn.k_proj.weight"] = StoredTensor(f"{theirs}.ffn.key.weight", (f, d))
        found[f"{ours}.ffn.v_proj.weight"] = StoredTensor(f"{theirs}.ffn.value.weight", (d, f))
        if receptance:
            found[f"{ours}.ffn.r_proj.weight"] = StoredTensor(f"{theirs}.ffn.receptance.weight", (d, d))
        for name, (stored, shape, convert) in time_mix(i).items():
            found[f"{ours}.att.{name}"] = StoredTensor(f"{theirs}.att.{stored}", shape, convert)
    return found
