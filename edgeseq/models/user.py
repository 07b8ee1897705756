"""A user's module as a step model: `step` and `chunk`, named inputs and outputs, state as a tuple of slots.

    class Gate(torch.nn.Module):
        inputs = (TensorSpec("frame", "float32", (1, 160)),)
        outputs = (TensorSpec("speech", "float32", (1, 1)),)
        state = (StateSlot("h", "float32", (1, 64)),)

        def step(self, frame, h):
            return speech, h

Tokens instead: no `inputs` and `outputs`, a `config.vocab_size`, and step(tokens [1,1], position [1], *state) ->
(logits [1,1,V], *state). `chunk`, with the same arguments for T steps at once, makes chunk graphs: axis 1 of every
named input and output is then the time. A module with `advance` and `state_slots` follows the protocol already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.spec import StateSlot


class _Stepping:
    """Gives `advance` and `state_slots` to a class that has `step`, `chunk` and `state`."""

    def advance(self, *args: Tensor) -> tuple[Tensor, ...]:
        chunk = getattr(self, "chunk", None)
        call = self.step if chunk is None or args[0].shape[1] == 1 else chunk  # type: ignore[attr-defined]
        made = call(*args)
        return made if isinstance(made, tuple) else tuple(made) if isinstance(made, list) else (made,)

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return tuple(self.state)  # type: ignore[attr-defined]


def follow_protocol(module: nn.Module) -> nn.Module:
    """`module` itself with `advance` and `state_slots`, where its class has `step` instead.

    The object and its state_dict stay; only its class gets a subclass. Raises SourceError when a part is missing.
    """
    if callable(getattr(module, "advance", None)) or not callable(getattr(module, "step", None)):
        return module
    name = type(module).__name__
    own: dict[str, Any] = {}
    if callable(getattr(module, "state_slots", None)):
        own["state_slots"] = type(module).state_slots
    else:
        state = getattr(module, "state", None)
        if not isinstance(state, tuple | list) or not all(isinstance(s, StateSlot) for s in state):
            raise SourceError(f"{name}.state is not a tuple of StateSlot", "list what comes back at the next step")
    module.__class__ = type(name, (_Stepping, type(module)), own)
    return module


def has_chunks(model: Any) -> bool:
    """Whether one call may consume several steps.

    Token models may unless they have nothing but `step`; others may when they have `chunk`.
    """
    if callable(getattr(model, "chunk", None)):
        return True
    return not isinstance(model, _Stepping) and not hasattr(model, "inputs")
