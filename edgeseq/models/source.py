"""Where a model comes from: a Hugging Face directory, a .pth file, `zoo:NAME`, or `path/file.py:factory`.

zoo:NAME is a public shape with seeded random weights (`zoo:mamba-130m`), a trained tiny model (`zoo:tiny-mamba`), or
the KV-cached attention twin of either (`zoo:mamba-130m-twin`).
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from edgeseq.errors import SourceError, UsageError
from edgeseq.models import families, family, step_families
from edgeseq.models.base import Array, Family
from edgeseq.models.checkpoint import TensorFiles, open_directory, read_tensor
from edgeseq.models.factory import make_module
from edgeseq.models.pth import SUFFIXES, open_pth
from edgeseq.models.step_family import StepFamily
from edgeseq.models.twin import WITHIN, twin

ZOO_WEIGHTS = Path(__file__).parent / "zoo_weights"
Device = Literal["cpu", "meta"]


def seeded_rng(owner: str, tensor: str) -> np.random.Generator:
    """One generator per tensor, so that the order of reading does not matter."""
    digest = hashlib.sha256(f"{owner}/{tensor}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def load_weights(model: nn.Module, tensors: Mapping[str, Array]) -> None:
    """Give every tensor of the model's state_dict its value, without copying; names and shapes must match."""
    model.load_state_dict({n: torch.from_numpy(a) for n, a in tensors.items()}, strict=True, assign=True)


class Source:
    """A model that can be built whole or read tensor by tensor.

    name:      what the user wrote.
    family:    the family's name, "custom" for a module of the user's own.
    config:    the family's config dataclass, None for a custom module without one.
    tokenizer: a tokenizer.json, "bytes" (a token is a byte), or None.
    learned:   False where the weights are drawn at random.
    """

    learned = True

    def __init__(self, name: str, family: str, config: Any, tokenizer: Path | Literal["bytes"] | None) -> None:
        self.name, self.family, self.config, self.tokenizer = name, family, config, tokenizer

    def build(self, device: Device = "cpu") -> nn.Module:
        """The module in eval mode: on cpu with its weights, on meta with shapes only."""
        raise NotImplementedError

    def tensor_names(self) -> tuple[str, ...]:
        """Names in the model's state_dict (parameters and constants), tied tensors once."""
        raise NotImplementedError

    def derived_names(self) -> set[str]:
        """Those of the tensors that are computed from others, at export."""
        return set()

    def tensor(self, name: str) -> Array:
        """One tensor; float32, but for constants of integer type. Read-only: it may be a view of a file."""
        raise NotImplementedError

    def param_count(self) -> int:
        """Parameters, tied ones once, constants not counted."""
        return sum(p.numel() for p in self.build("meta").parameters())


class FamilySource(Source):
    """A family's model whose weights come from `read(name)`."""

    def __init__(
        self,
        name: str,
        record: Family | StepFamily,
        config: Any,
        tokenizer: Path | Literal["bytes"] | None,
        read: Callable[[str, tuple[int, ...]], Array],
    ) -> None:
        super().__init__(name, record.name, config, tokenizer)
        self.record, self._read = record, read

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(t.shape) for n, t in self.record.meta_model(self.config).state_dict().items()}

    @cached_property
    def _constants(self) -> dict[str, Array]:
        return self.record.constants(self.config)

    @cached_property
    def _derived(self) -> tuple[str, ...]:
        return self.record.derived(self.config) if isinstance(self.record, Family) else ()

    def build(self, device: Device = "cpu") -> nn.Module:
        model: nn.Module = self.record.meta_model(self.config)
        if device == "cpu":
            load_weights(model, {name: self.tensor(name) for name in self.tensor_names()})
        return model

    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def derived_names(self) -> set[str]:
        return set(self._derived)

    def tensor(self, name: str) -> Array:
        if name in self._constants:
            return self._constants[name]
        if name in self._derived and isinstance(self.record, Family) and self.record.derive is not None:
            return self.record.derive(self.config, name, self.tensor)
        return self._read(name, self._shapes[name])


class FactorySource(Source):
    """A module made by the user's function."""

    def __init__(self, name: str, module: nn.Module) -> None:
        known = {f.model: f.name for f in records()}
        super().__init__(name, known.get(type(module), "custom"), getattr(module, "config", None), None)
        self.module = module
        self.tokenizer = getattr(module, "tokenizer", None)
        self._tensors: dict[str, torch.Tensor] = {}
        seen = set()
        for tensor_name, value in module.state_dict().items():
            if value.numel() == 0 or value.data_ptr() not in seen:
                self._tensors[tensor_name] = value
            seen.add(value.data_ptr())

    def build(self, device: Device = "cpu") -> nn.Module:
        if device == "cpu":
            return self.module
        # Copied by way of the memo: nothing is allocated and tied tensors stay tied, which .to("meta") breaks.
        # A buffer outside the state_dict keeps its values: nobody could read them from this source.
        shapes = {id(t): t.detach().to("meta") for t in self.module.state_dict(keep_vars=True).values()}
        for p in self.module.parameters():
            shapes[id(p)] = nn.Parameter(shapes[id(p)], requires_grad=p.requires_grad)
        return copy.deepcopy(self.module, shapes)

    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def tensor(self, name: str) -> Array:
        return self._tensors[name].detach().contiguous().numpy()


def open_source(text: str) -> Source:
    """Open a source by what the user wrote. UsageError for an unknown name or path, SourceError for a bad model."""
    if text.startswith("zoo:"):
        return _open_zoo(text.removeprefix("zoo:"))
    module = re.fullmatch(r"(.+\.py):([A-Za-z_][A-Za-z0-9_]*)", text)
    if module:
        return FactorySource(text, make_module(Path(module[1]), module[2]))
    path = Path(text)
    if path.is_dir():
        return _open_directory(path)
    if path.suffix in SUFFIXES and path.is_file():
        return _open_pth(path)
    if path.exists():
        hint = f"write {text}:FUNCTION" if path.suffix == ".py" else "name the directory that holds config.json"
        raise UsageError(f"{text} is a file, not a model source", hint)
    raise UsageError(f"{text} does not exist", "a source is a directory, a .pth file, zoo:NAME or path/file.py:factory")


def _open_directory(directory: Path) -> FamilySource:
    record, config, names, files = open_directory(directory)

    def read(name: str, shape: tuple[int, ...]) -> Array:
        return read_tensor(names[name], files)

    tokenizer = directory / "tokenizer.json"
    return FamilySource(str(directory), record, config, tokenizer if tokenizer.is_file() else None, read)


def _open_pth(path: Path) -> FamilySource:
    record, config, read = open_pth(path)
    return FamilySource(str(path), record, config, None, lambda name, shape: read(name))


def random_source(
    name: str, record: Family | StepFamily, config: Any, tokenizer: Path | Literal["bytes"] | None = None
) -> FamilySource:
    """Weights drawn from the name: the same name gives the same model everywhere.

    What training begins alike for all channels (biases at 0, norms at 1) is spread by a tenth, so that no kernel is
    right by leaving it out.
    """

    def read(tensor: str, shape: tuple[int, ...]) -> Array:
        rng = seeded_rng(name, tensor)
        made = record.random_tensor(config, tensor, shape, rng)
        if not made.size or (made != made.flat[0]).any():
            return made
        spread = 0.1 * rng.standard_normal(shape, np.float32)
        return np.asarray(made * (1 + spread) if made.flat[0] else spread)

    source = FamilySource(name, record, config, tokenizer, read)
    source.learned = False
    return source


def records() -> list[Family | StepFamily]:
    """Families of token models, then those of models with named inputs."""
    return [*families().values(), *step_families().values()]


def within(source: Source, context: int) -> Source:
    """The source of a model that sees at most `context` tokens: itself, unless its family can leave something out."""
    record = families().get(source.family)
    if not isinstance(source, FamilySource) or record is None or record.within is None:
        return source
    config = record.within(source.config, context)
    if config == source.config:
        return source
    shorter = FamilySource(source.name, record, config, source.tokenizer, lambda name, shape: source.tensor(name))
    shorter.learned = source.learned
    return shorter


def zoo_of(record: Family | StepFamily) -> dict[str, Any]:
    """Zoo name -> config of one family: its trained tiny model where the weights are shipped, and its public shapes."""
    trained = {f"tiny-{record.name}": record.tiny} if _tiny_path(record).is_file() else {}
    return trained | dict(record.zoo)


def zoo_names() -> tuple[str, ...]:
    """Every name that `zoo:` takes, twins aside."""
    return tuple(name for record in records() for name in zoo_of(record))


def _open_zoo(name: str) -> FamilySource:
    if name.endswith("-twin"):
        return twin_of(_open_zoo(name.removesuffix("-twin")))
    for record in records():
        if name == f"tiny-{record.name}" and record.tiny is not None:
            return _tiny(record)
        if name in record.zoo:
            return random_source(f"zoo:{name}", record, record.zoo[name])
    raise UsageError(f"The zoo has no {name!r}", f"it has {', '.join(zoo_names())}, and NAME-twin of each")


def _tiny_path(record: Family | StepFamily) -> Path:
    return ZOO_WEIGHTS / f"tiny-{record.name}.safetensors"


def _tiny(record: Family | StepFamily) -> FamilySource:
    path = _tiny_path(record)
    if not path.is_file():
        how = f"train it with 'python -m edgeseq.models.train {record.name}'"
        raise SourceError(f"{path} is missing", how if isinstance(record, Family) else "")
    files = TensorFiles.single(path)

    def read(name: str, shape: tuple[int, ...]) -> Array:
        files.check(name, shape)
        return files.read(name)

    tokenizer: Literal["bytes"] | None = "bytes" if isinstance(record, Family) else None
    return FamilySource(f"zoo:tiny-{record.name}", record, record.tiny, tokenizer, read)


def twin_of(source: Source) -> FamilySource:
    """The matched KV-cached attention model.

    A trained tiny model has the trained tiny transformer as its twin, if that is as large within 2 % (a head that is
    not tied aside, as RWKV has it); every other source has seeded random weights of the size that `twin` finds.
    """
    transformer = family("transformer")
    if source.config is None:
        raise SourceError(f"{source.name} has no config, so its twin's size is unknown")
    config = twin(source.config)
    if source.name.startswith("zoo:tiny-"):
        trained = _tiny(transformer)
        head = 0 if source.config.tie else source.config.vocab_size * source.config.d_model
        if abs(trained.param_count() / (source.param_count() - head) - 1.0) <= WITHIN:
            return trained
    return random_source(f"{source.name}-twin", transformer, config, source.tokenizer)
