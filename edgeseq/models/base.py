"""What every family shares: the model protocol, the family record, random weights.

A family file `edgeseq/models/<family>.py` holds its glossary, config, module, state slots, checkpoint map and ends in
one constant `FAMILY`. Nothing here knows a family by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.spec import StateSlot, StepSignature, TensorSpec

if TYPE_CHECKING:
    from edgeseq.models.distill import Distilled

Growth = Literal["constant", "window", "linear"]
Array = np.ndarray[Any, np.dtype[Any]]


class SequenceModel(nn.Module):
    """A causal token model in three forms that agree: whole sequence, chunk of T tokens, step (T = 1).

    config:        the family's frozen dataclass; it has at least `vocab_size` and `d_model`.
    uses_position: whether `advance` reads `position`; the exported graph has that input only then.
    longest:       tokens of the longest sequence it can read; None where there is no such limit.
    """

    uses_position: ClassVar[bool] = True
    longest: int | None = None
    config: Any

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B,T] int64 -> logits [B,T,V], from a fresh state, differentiable."""
        raise NotImplementedError

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        """The state of one stream (leading axis 1); `context` is the longest sequence, used by growing states."""
        raise NotImplementedError

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Consume tokens [B,T], of which the first has index position [B] int64.

        Returns logits [B,1,V] of the last token, then the new state in the order of `state_slots`.
        """
        raise NotImplementedError

    def initial_state(self, batch: int, context: int) -> list[Tensor]:
        """A fresh state for `batch` streams."""
        slots = self.state_slots(context)
        return [torch.full((batch, *s.shape[1:]), s.init, dtype=getattr(torch, s.dtype)) for s in slots]

    def parametrize(self) -> None:
        """Rewrite parameters that must stay in a domain while they are trained; undone by `unparametrize`."""

    def unparametrize(self) -> None:
        """Bake the values that `parametrize` rewrote."""


class StepModule(Protocol):
    """A step model with named inputs and outputs, for streams that are not tokens (audio frames, sensor rows).

    advance(*inputs, *state) -> (*outputs, *new_state), one step a call.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def state_slots(self, context: int) -> tuple[StateSlot, ...]: ...

    def advance(self, *args: Tensor) -> tuple[Tensor, ...]: ...


def signature_of(model: nn.Module, tokens: int, context: int) -> StepSignature:
    """Inputs, outputs and state of one call that consumes `tokens` steps.

    A token model need not derive from SequenceModel: `advance`, `state_slots` and `config.vocab_size` suffice, and its
    position counts as used unless it says `uses_position = False`. A model with named inputs has chunks when it has a
    `chunk` method; axis 1 of its inputs and outputs is then the time.
    """
    if not callable(getattr(model, "advance", None)) or not callable(getattr(model, "state_slots", None)):
        raise SourceError(f"{type(model).__name__} lacks advance() or state_slots()")
    if hasattr(model, "inputs") or hasattr(model, "outputs"):
        return _named_signature(model, tokens, context)
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocab, int):
        raise SourceError(f"{type(model).__name__} has neither config.vocab_size nor named inputs and outputs")
    inputs = [TensorSpec("tokens", "int64", (1, tokens), "tokens")]
    if getattr(model, "uses_position", True):
        inputs.append(TensorSpec("position", "int64", (1,), "position"))
    logits = TensorSpec("logits", "float32", (1, 1, vocab), "logits")
    return StepSignature(tokens, tuple(inputs), (logits,), tuple(model.state_slots(context)))


def _named_signature(model: Any, tokens: int, context: int) -> StepSignature:
    for field_name in ("inputs", "outputs"):
        specs = getattr(model, field_name, None)
        if not isinstance(specs, tuple) or not specs or not all(isinstance(s, TensorSpec) for s in specs):
            raise SourceError(f"{type(model).__name__}.{field_name} is not a tuple of TensorSpec")
    state = tuple(model.state_slots(context))
    if tokens == 1:
        return StepSignature(1, model.inputs, model.outputs, state)
    if not callable(getattr(model, "chunk", None)):
        raise SourceError(f"{type(model).__name__} has no chunk(), but a chunk of {tokens} steps was asked for")
    inputs, outputs = (tuple(_longer(s, tokens) for s in specs) for specs in (model.inputs, model.outputs))
    return StepSignature(tokens, inputs, outputs, state)


def _longer(spec: TensorSpec, tokens: int) -> TensorSpec:
    """The spec of `tokens` steps in one call."""
    if len(spec.shape) < 2 or spec.shape[1] != 1:
        raise SourceError(
            f"{spec.name} is {list(spec.shape)} a step, so it has no time axis to hold a chunk",
            "give chunk() inputs and outputs of shape (1, 1, ...): batch, time, and the rest",
        )
    return replace(spec, shape=(spec.shape[0], tokens, *spec.shape[2:]))


@dataclass(frozen=True)
class StoredTensor:
    """Where a model tensor lies in a checkpoint: its name and shape there, and how it becomes ours.

    parts: where the checkpoint lacks `name`, the tensors that are ours when they are laid one below the other.
    restore: the inverse of `convert`, in families whose checkpoint can be written.
    """

    name: str
    shape: tuple[int, ...]
    convert: Callable[[Array], Array] = lambda x: x
    parts: tuple[StoredTensor, ...] = ()
    restore: Callable[[Array], Array] = lambda x: x


@dataclass(frozen=True)
class Checkpoint:
    """How a family reads a Hugging Face directory.

    model_types: values of `model_type` in config.json that this family accepts.
    recognise:   accepts a config.json without `model_type` (other layouts of the same family).
    config:      config.json -> config; raises SourceError naming the field it cannot honour.
    tensors:     config -> {our tensor name: StoredTensor}.
    aliases:     other spellings, tried when a name is absent: (stored name -> alternative name).
    tied:        stored name -> our tensor it repeats when the config ties them; its values are compared.
    ignored:     endings of stored names that are no parameters (buffers old checkpoints carry).
    beside:      how stored names of another model begin that lies in the same files (a head that drafts tokens).
    optional_prefix: how stored names begin in some checkpoints only.
    written:     config -> the config.json of a directory that says the same; None where none is written
                 (`hf_write.py`).
    """

    model_types: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], Any]
    tensors: Callable[[Any], dict[str, StoredTensor]]
    recognise: Callable[[Mapping[str, Any]], bool] = lambda raw: False
    aliases: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=lambda: {"lm_head.weight": "embed.weight"})
    ignored: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    optional_prefix: str = ""
    written: Callable[[Any], dict[str, Any]] | None = None


@dataclass(frozen=True)
class BareCheckpoint:
    """How a family reads a file of tensors that has no config beside it (BlinkDL's .pth).

    Shapes come by stored name, axes of length 1 left out.
    recognise: shapes -> whether the file is of this family.
    config:    shapes -> config; raises SourceError naming the tensor that contradicts.
    tensors:   config -> {our tensor name: StoredTensor}.
    ignored:   stored names that are no parameters.
    """

    recognise: Callable[[Mapping[str, tuple[int, ...]]], bool]
    config: Callable[[Mapping[str, tuple[int, ...]]], Any]
    tensors: Callable[[Any], dict[str, StoredTensor]]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family, found by listing the folder.

    zoo:           public shapes with seeded random weights, by zoo name.
    tiny:          the shape of `zoo:tiny-<name>`, trained and shipped.
    state_formula: bytes of state as a formula in the family's letters (`state_bytes.py`).
    growth:        how the state grows with the sequence.
    ops:           the stateful operators its step uses.
    random_tensor: (config, tensor name, shape, rng) -> float32 weights at scales that keep long runs finite.
    constants:     config -> tensors that follow from the config alone (decays, frequencies), by tensor name.
    bare:          how it reads a file of tensors without a config, where such files exist.
    derive:        (config, tensor name, read) -> what an export computes once from other tensors (the step matrices of
                   a continuous model, the taps of a filter given as a network): every buffer that is no constant.
    distil:        how its long filters become modes, where it has any: (config, read, order, tolerance, progress).
    within:        (config, context) -> the config of a model that is to see at most that many tokens, where that is
                   smaller.
    letters:       (config, context) -> letters of the formula that are no field of the usual name.
    other_checkpoints: further ways in which its tensors are stored, tried after `checkpoint`.
    """

    name: str
    config: type[Any]
    model: Callable[[Any], SequenceModel]
    checkpoint: Checkpoint | None
    zoo: Mapping[str, Any]
    tiny: Any
    state_formula: str
    growth: Growth
    ops: tuple[str, ...]
    random_tensor: Callable[[Any, str, tuple[int, ...], np.random.Generator], Array]
    constants: Callable[[Any], dict[str, Array]] = lambda config: {}
    bare: BareCheckpoint | None = None
    other_checkpoints: tuple[Checkpoint, ...] = ()
    derive: Callable[[Any, str, Callable[[str], Array]], Array] | None = None
    distil: Callable[..., Distilled] | None = None
    within: Callable[[Any, int], Any] | None = None
    letters: Callable[[Any, int], Mapping[str, float]] | None = None

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every way in which it reads a directory."""
        return (() if self.checkpoint is None else (self.checkpoint,)) + self.other_checkpoints

    def derived(self, config: Any) -> tuple[str, ...]:
        """Names of the tensors that `derive` computes."""
        if self.derive is None:
            return ()
        constants = self.constants(config)
        return tuple(name for name, _ in self.meta_model(config).named_buffers() if name not in constants)

    def completed(self, config: Any, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The state_dict of a model: what was drawn, trained or read, with the constants and what is derived."""
        whole = dict(tensors) | self.constants(config)
        for name in self.derived(config):
            assert self.derive is not None
            whole[name] = self.derive(config, name, whole.__getitem__)
        return whole

    def meta_model(self, config: Any) -> SequenceModel:
        """The module with shapes but no storage."""
        with torch.device("meta"):
            return self.model(config).eval()

    def param_count(self, config: Any) -> int:
        """Parameters, tied tensors once, constants not counted."""
        return sum(p.numel() for p in self.meta_model(config).parameters())


def normal(rng: np.random.Generator, shape: Sequence[int], std: float) -> Array:
    """Float32 Gaussian weights."""
    return rng.standard_normal(tuple(shape), dtype=np.float32) * np.float32(std)


def last_logits(x: Tensor, norm: Callable[[Tensor], Tensor], head: Tensor) -> Tensor:
    """Hidden states [B,T,d] -> logits [B,1,V] of the last token."""
    return nn.functional.linear(norm(x[:, -1:]), head)
