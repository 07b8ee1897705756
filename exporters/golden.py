"""`golden.safetensors`: what PyTorch's whole-sequence form says about a fixed input, from the weights as stored.

The weights are mapped from the file just written (float16 and bfloat16 ones widened one by one), so a float32 model of
any size costs pages of the file and the activations of 48 tokens, never a second copy of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgeseq.errors import ExportError
from edgeseq.models.base import SequenceModel
from edgeseq.spec import StepSignature
from exporters.rounding import BLOCK, dequantise

FILE = "golden.safetensors"
LENGTH = 48
SEED = 20240917
TEXT = b"The state of a recurrent model does not grow with time."


def write(directory: Path, model: nn.Module, signature: StepSignature, context: int, byte_level: bool) -> None:
    """Write the golden of `model` (on the meta device) into an export directory that already has its weights.

    Token models: `tokens` int64 [n] and `logits` float32 [n,V], n = 48 or the context if that is shorter; a module of
    the user's own that is no SequenceModel has no whole form and is stepped. Other step models: `input.<name>` and
    `output.<name>` [n,...] from seeded Gaussian inputs. A quantised model has `noise.logits` or `noise.<name>` too,
    float32 [3]: what rounding the inputs of its quantised products to int8, as a device does, changes in PyTorch; the
    largest |difference|, the root mean square, and the share of rows with another largest element.
    """
    quantised = load(model, directory / "weights.safetensors")
    length = min(LENGTH, context) if context else LENGTH
    with torch.no_grad():
        tensors = _said(model, signature, length, byte_level)
        if quantised:
            with RoundedInputs(quantised):
                rounded = _said(model, signature, length, byte_level)
            outputs = [name for name in tensors if name == "logits" or name.startswith("output.")]
            tensors |= {f"noise.{n.removeprefix('output.')}": _noise(tensors[n], rounded[n]) for n in outputs}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ExportError(f"PyTorch computes values in {name} that are not finite", "check the weights")
    (directory / FILE).write_bytes(save(tensors))


def _said(model: nn.Module, signature: StepSignature, length: int, byte_level: bool) -> dict[str, NDArray[Any]]:
    if not any(spec.role == "tokens" for spec in signature.inputs):
        return _steps(model, signature, length)
    tokens = _tokens(length, signature.outputs[0].shape[-1], byte_level)
    logits = _whole(model, tokens) if isinstance(model, SequenceModel) else _stepped(model, signature, tokens)
    return {"tokens": tokens, "logits": logits}


def _noise(exact: NDArray[Any], rounded: NDArray[Any]) -> NDArray[np.float32]:
    n = len(exact)
    difference = np.abs(rounded.astype(np.float64) - exact)
    changed = rounded.reshape(n, -1).argmax(1) != exact.reshape(n, -1).argmax(1)
    return np.array([difference.max(), np.sqrt(np.square(difference).mean()), changed.mean()], np.float32)


class RoundedInputs(TorchFunctionMode):
    """linear() with one of `matrices` sees its input rounded to int8 by blocks of 32, the largest becoming 127.

    A matrix is known by where its memory begins, as tied parameters are several tensors.
    """

    def __init__(self, matrices: Collection[Tensor]) -> None:
        super().__init__()
        self.matrices = {matrix.data_ptr() for matrix in matrices}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear and args[1].data_ptr() in self.matrices:
            args = (rounded_input(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


def rounded_input(x: Tensor) -> Tensor:
    """x [..,K] as the sum of its int8 blocks, float32."""
    width = x.shape[-1]
    parts = nn.functional.pad(x, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    return ((parts * inverse).round() * (largest / 127.0)).flatten(-2)[..., :width]


def load(model: nn.Module, path: Path) -> list[Tensor]:
    """Give a meta model the weights of an export, mapped and widened to the model's own dtypes; tied ones stay tied.

    A quantised matrix becomes what its codes and scales mean; those matrices are returned.
    """
    quantised: set[Tensor] = set()
    values: dict[Tensor, Tensor] = {}
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
                        codes, scales = (file.get_tensor(f"{full}.{part}").numpy() for part in ("codes", "scales"))
                        values[tensor] = torch.from_numpy(dequantise(codes, scales, tensor.shape[1]))
                        quantised.add(tensor)
    for module_name, module in model.named_modules():
        _replace(module._parameters, values, module_name, lambda t: nn.Parameter(t, requires_grad=False))
        _replace(module._buffers, values, module_name, lambda t: t)
    return [values[tensor] for tensor in quantised]


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


def _whole(model: SequenceModel, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    logits = model(torch.from_numpy(tokens)[None])[0]
    return np.ascontiguousarray(logits.to(torch.float32).numpy())


def _stepped(model: nn.Module, signature: StepSignature, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
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
        results = model.advance(*inputs, *state)
        outputs, state = results[: len(signature.outputs)], list(results[len(signature.outputs) :])
        for kind, specs, values in (("input", signature.inputs, inputs), ("output", signature.outputs, outputs)):
            for spec, value in zip(specs, values, strict=True):
                row = value.numpy()
                recorded.setdefault(f"{kind}.{spec.name}", []).append(row[0] if spec.shape[:1] == (1,) else row)
    return {name: np.stack(arrays) for name, arrays in recorded.items()}
