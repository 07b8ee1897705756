"""`golden.safetensors`: what PyTorch's whole-sequence form says about a fixed input, from the weights as stored.

It is computed in float64, and once more in float32 to know what that arithmetic loses in this model: many layers carry
a rounding error on, and no engine in float32 can be held to less than PyTorch's own.

The weights are mapped from the file just written (float16 and bfloat16 ones widened one by one, quantised ones made
when they are read), so a float32 or quantised model of any size costs pages of the file, the activations of 48 tokens
and at most one of its matrices in float64, never a second copy of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor, nn

from edgeseq.errors import ExportError
from edgeseq.models.base import SequenceModel
from edgeseq.spec import StepSignature
from exporters.coded import CodedMatrix, coded
from exporters.wide import Wide

FILE = "golden.safetensors"
LENGTH = 48
SEED = 20240917
TEXT = b"The state of a recurrent model does not grow with time."


def write(directory: Path, model: nn.Module, signature: StepSignature, context: int, byte_level: bool) -> None:
    """Write the golden of `model` (on the meta device) into an export directory that already has its weights.

    Token models: `tokens` int64 [n] and `logits` float32 [n,V], n = 48 or the context if that is shorter; a module of
    the user's own that is no SequenceModel has no whole form and is stepped. Other step models: `input.<name>` and
    `output.<name>` [n,...] from seeded Gaussian inputs. For every floating output, float32 [3] (`_difference`):
    `float32.logits` or `float32.<name>`, what float32 changes; of a quantised model `noise.…` too, what rounding the
    inputs of its quantised products to int8, as a device does, changes on top of that. A module of the user's own that
    cannot be run in float64 (it compares dtypes) has a golden in float32 and nothing of the kind.
    """
    matrices = load_coded(model, directory / "weights.safetensors")
    length = min(LENGTH, context) if context else LENGTH

    def said(round_inputs: bool = False) -> dict[str, NDArray[Any]]:
        with coded(matrices, round_inputs):
            return _said(model, signature, length, byte_level)

    with torch.no_grad():
        narrow = said()
        rounded = said(round_inputs=True) if matrices else None
        exact = _wide(said, narrow, isinstance(model, SequenceModel))
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        tensors = {n: array.astype(np.float32) if array.dtype == np.float64 else array for n, array in exact.items()}
    for name in [n for n in tensors if (n == "logits" or n.startswith("output.")) and tensors[n].dtype == np.float32]:
        output = name.removeprefix("output.")
        if exact is not narrow:
            tensors[f"float32.{output}"] = _difference(exact[name], narrow[name])
        if rounded is not None:
            tensors[f"noise.{output}"] = _difference(narrow[name], rounded[name])
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ExportError(f"PyTorch computes values in {name} that are not finite", "check the weights")
    (directory / FILE).write_bytes(save(tensors))


def _wide(said: Callable[[], dict[str, NDArray[Any]]], narrow: dict[str, NDArray[Any]], ours: bool) -> Any:
    """What is said in float64; `narrow` where a module that is not ours does not take that."""
    try:
        with Wide():
            return said()
    except (TypeError, ValueError, RuntimeError):
        if ours:
            raise
        return narrow


def _said(model: nn.Module, signature: StepSignature, length: int, byte_level: bool) -> dict[str, NDArray[Any]]:
    """Token models: tokens int64 and logits. Others: every input and output by its name. Within `Wide` what is float32
    here, `.to(torch.float32)` included, is float64."""
    if not any(spec.role == "tokens" for spec in signature.inputs):
        return _steps(model, signature, length)
    tokens = _tokens(length, signature.outputs[0].shape[-1], byte_level)
    logits = _whole(model, tokens) if isinstance(model, SequenceModel) else _stepped(model, signature, tokens)
    return {"tokens": tokens, "logits": logits}


def _difference(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float32]:
    """The largest |difference|, the root mean square, and the share of rows with another largest element."""
    n = len(one)
    difference = np.abs(other.astype(np.float64) - one)
    changed = other.reshape(n, -1).argmax(1) != one.reshape(n, -1).argmax(1)
    return np.array([difference.max(), np.sqrt(np.square(difference).mean()), changed.mean()], np.float32)


def load(model: nn.Module, path: Path) -> None:
    """Give a meta model the weights of an export, mapped and widened to the model's own dtypes; tied ones stay tied.

    A quantised matrix becomes what its codes and scales mean.
    """
    _load(model, path, whole=True)


def load_coded(model: nn.Module, path: Path) -> dict[int, CodedMatrix]:
    """The same, but a quantised matrix becomes a placeholder; run the model within coded(what this returns)."""
    return _load(model, path, whole=False)


def _load(model: nn.Module, path: Path, whole: bool) -> dict[int, CodedMatrix]:
    values: dict[Tensor, Tensor] = {}
    matrices: dict[int, CodedMatrix] = {}
    with safetensors.safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        for module_name, module in model.named_modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    full = f"{module_name}.{name}" if module_name else name
                    if tensor is None or tensor in values:
                        continue
                    if full in stored:
                        values[tensor] = file.get_tensor(full).to(tensor.dtype)
                    elif f"{full}.codes" in stored:
                        matrix = CodedMatrix(path, full, tensor.shape[1])
                        values[tensor] = matrix.rows() if whole else matrix.placeholder(tensor.shape[0])
                        matrices[values[tensor].data_ptr()] = matrix
    for module_name, module in model.named_modules():
        _replace(module._parameters, values, module_name, lambda t: nn.Parameter(t, requires_grad=False))
        _replace(module._buffers, values, module_name, lambda t: t)
    return matrices


def _replace(
    table: dict[str, Any], values: Mapping[Tensor, Tensor], module_name: str, wrap: Callable[[Tensor], Tensor]
) -> None:
    for name, tensor in table.items():
        if tensor is None or not tensor.is_meta:
            continue
        if tensor not in values:
            raise ExportError(
                f"{module_name}.{name}".lstrip(".") + " has no stored value",
                "a buffer that advance() reads must be in the state_dict or be made of Python numbers",
            )
        table[name] = wrap(values[tensor])


def _tokens(length: int, vocabulary: int, byte_level: bool) -> NDArray[np.int64]:
    if byte_level:
        return np.frombuffer(TEXT[:length], np.uint8).astype(np.int64)
    return np.random.default_rng(SEED).integers(0, vocabulary, length, np.int64)


def _whole(model: SequenceModel, tokens: NDArray[np.int64]) -> NDArray[Any]:
    logits = model(torch.from_numpy(tokens)[None])[0]
    return np.ascontiguousarray(logits.to(torch.float32).numpy())


def _stepped(model: nn.Module, signature: StepSignature, tokens: NDArray[np.int64]) -> NDArray[Any]:
    state, rows = _fresh_state(signature), []
    for position, token in enumerate(tokens):
        inputs = (torch.tensor([[token]]), torch.tensor([position]))
        logits, *state = model.advance(*inputs, *state)
        rows.append(logits.to(torch.float32).numpy().reshape(-1))
    return np.stack(rows)


def _fresh_state(signature: StepSignature) -> list[Tensor]:
    return [torch.full(s.shape, s.init, dtype=getattr(torch, s.dtype)) for s in signature.state]


def _steps(model: nn.Module, signature: StepSignature, length: int) -> dict[str, NDArray]:
    rng = np.random.default_rng(SEED)
    state = _fresh_state(signature)
    recorded: dict[str, list[NDArray]] = {}
    for _ in range(length):
        inputs = [
            torch.from_numpy(rng.standard_normal(s.shape).astype(np.float32)).to(getattr(torch, s.dtype))
            for s in signature.inputs
        ]
        results = model.advance(*(x.clone() for x in inputs), *state)  # a step may write to what it is given
        outputs, state = results[: len(signature.outputs)], list(results[len(signature.outputs) :])
        for kind, specs, values in (("input", signature.inputs, inputs), ("output", signature.outputs, outputs)):
            for spec, value in zip(specs, values, strict=True):
                row = value.numpy().copy()
                recorded.setdefault(f"{kind}.{spec.name}", []).append(row[0] if spec.shape[:1] == (1,) else row)
    return {name: np.stack(arrays) for name, arrays in recorded.items()}
