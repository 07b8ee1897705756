"""`export`: a model source to an export directory. The stages, in order:

| stage | function | file | artefact |
|---|---|---|---|
| open | edgeseq.models.source.open_source | models/source.py | module on the meta device |
| distill | distilled | distill.py | modes for long filters, distillation.json |
| trace | trace | trace.py | torch's ONNX graph per chunk length |
| tidy | tidy | tidy.py | small graph with readable names |
| quantise | quantise_graph | quantise.py, rounding.py | products and lookups of block-quantised matrices |
| calibrate | moments | calibrate.py | sums over the inputs of each matrix, until the weights are written |
| store | store_as, plan, write | lower.py, weights.py | weights.safetensors |
| save | point_to_file, save | lower.py | step.onnx, chunk<T>.onnx |
| golden | write | golden.py | golden.safetensors |
| declare | Manifest | edgeseq/spec.py | manifest.json |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeseq.errors import ExportError, UsageError
from edgeseq.files import new_directory
from edgeseq.models.base import SequenceModel, signature_of
from edgeseq.models.user import has_chunks
from edgeseq.spec import DType, GraphFile, Manifest, StepSignature
from exporters import distill as distillation
from exporters import golden, lower, weights
from exporters.quantise import Quantised, quantise_graph
from exporters.rounding import BITS, quantise
from exporters.tidy import tidy
from exporters.trace import trace

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from edgeseq.models.source import Source
    from exporters.calibrate import Moments

FLAVOURS = ("onnx", "ort")
QUANTS = ("none", *BITS)
DTYPES: dict[str, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DEFAULT_CHUNKS = (8, 64)
DEFAULT_CONTEXT = 2048
MAX_CONTEXT = 1 << 20
MAX_CHUNK = 4096
DEFAULT_CALIBRATION = 4096
MAX_CALIBRATION = 1 << 20
CALIBRATED_PARAMS = 10**9

Progress = Callable[..., None]


def export(
    source: str | Source,
    out: Path | str,
    *,
    flavour: str = "onnx",
    quant: str = "none",
    chunks: Sequence[int] | None = None,
    context: int | None = None,
    dtype: str = "fp32",
    calibrate: int | None = None,
    distill: int | None = None,
    distill_tolerance: float | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the step graph, the chunk graphs and one copy of the weights of `source` into the directory `out`.

    flavour:  "onnx" (portable) or "ort" (com.microsoft twins where onnxruntime has a faster kernel).
    quant:    "int8" or "int4" rounds the matrices in blocks of 32 (docs/quantisation.md says which); "none" does not.
    chunks:   lengths of the chunk graphs; None means 8 and 64 as far as the context allows.
    context:  longest sequence a growing state can hold; a model whose state does not grow ignores it (manifest: 0).
              None means 2048, or as many tokens as the model has positions for.
    dtype:    storage of the matrices that are not quantised, "fp32", "fp16" or "bf16"; all else, and arithmetic, is
              float32.
    calibrate: tokens the model writes for itself, so that int4 rounding corrects its errors for the inputs they make; 0
              for none; None for 4096 where the weights are learned and at most 1e9. Needs the model in memory.
    distill:  modes that replace each long filter, whose state then no longer grows; a layer of which one channel would
              be wrong by more than `distill_tolerance` (relative, 0.02 by default) keeps its exact filters. What that
              changed is written to distillation.json.
    progress: called as progress(what, done, total); total 0 means that the end is not known.
    Raises UsageError for a wrong request, SourceError and ExportError for a model that cannot be exported. `out`
    appears whole or not at all; an earlier export there is replaced.
    """
    wanted = DEFAULT_CONTEXT if context is None else context
    request = Request.checked(flavour, quant, chunks, wanted, dtype, calibrate, progress)
    from edgeseq.models.source import open_source, within

    if isinstance(source, str):
        source = open_source(source)
    modes = None
    if distill is not None:
        source, modes = distillation.distilled(source, distill, distill_tolerance, request.report)
    elif distill_tolerance is not None:
        raise UsageError("a tolerance of distillation needs an order", "add --distill ORDER")
    model = source.build("meta").eval()
    longest = getattr(model, "longest", None)
    if context is None and longest is not None:
        request = dataclasses.replace(request, context=min(DEFAULT_CONTEXT, longest))
    shorter = within(source, request.context)
    if shorter is not source:
        source, model = shorter, shorter.build("meta").eval()
    signatures = _signatures(model, request)
    with new_directory(Path(out), is_export, "previous export") as directory:
        if modes is not None:
            distillation.save(directory, modes)
        return _write(directory, source, model, signatures, request)


@dataclass(frozen=True)
class Request:
    """The checked options."""

    flavour: str
    quant: str
    chunks: tuple[int, ...] | None
    context: int
    dtype: DType
    calibrate: int | None
    report: Progress

    @staticmethod
    def checked(
        flavour: str,
        quant: str,
        chunks: Sequence[int] | None,
        context: int,
        dtype: str,
        calibrate: int | None,
        progress: Progress | None,
    ) -> Request:
        for what, value, known in (("flavour", flavour, FLAVOURS), ("quant", quant, QUANTS), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise UsageError(f"unknown {what} {value!r}", f"known are {', '.join(known)}")
        if not 1 <= context <= MAX_CONTEXT:
            raise UsageError(f"a context of {context} tokens is not possible", f"give 1 to {MAX_CONTEXT}")
        if chunks is not None:
            for chunk in chunks:
                if not 2 <= chunk <= MAX_CHUNK:
                    raise UsageError(
                        f"a chunk of {chunk} tokens is not possible", f"give 2 to {MAX_CHUNK}; the step is always there"
                    )
            if len(set(chunks)) != len(chunks):
                raise UsageError(f"chunk lengths {', '.join(map(str, chunks))} repeat", "give each length once")
        if calibrate is not None and not 0 <= calibrate <= MAX_CALIBRATION:
            raise UsageError(f"calibration with {calibrate} tokens is not possible", f"give 0 to {MAX_CALIBRATION}")
        if calibrate and quant != "int4":
            raise UsageError(f"calibration changes nothing at --quant {quant}", "it is for --quant int4")
        return Request(
            flavour, quant, None if chunks is None else tuple(sorted(chunks)), context, DTYPES[dtype], calibrate,
            progress or (lambda what, done, total: None),
        )  # fmt: skip


def is_export(directory: Path) -> bool:
    """Whether everything in `directory` is something that an export writes, so that replacing it loses nothing else."""
    names = {path.name for path in directory.iterdir()}
    own = {"manifest.json", "tokenizer.json", weights.FILE, golden.FILE, distillation.FILE}
    return "manifest.json" in names and all(n in own or n == "step.onnx" or _is_chunk(n) for n in names)


def _is_chunk(name: str) -> bool:
    return name.startswith("chunk") and name.endswith(".onnx") and name[5:-5].isdigit()


def _signatures(model: nn.Module, request: Request) -> list[StepSignature]:
    """The step first, then the chunks. `context` is 0 in the manifest when the state does not depend on it."""
    step = signature_of(model, 1, request.context)
    if not has_chunks(model):
        if request.chunks:
            raise UsageError("this model has steps only", "leave out --chunk, or give the module a chunk() method")
        return [step]
    chunks = request.chunks
    if _grows(model, request.context):
        if chunks is not None and max(chunks, default=0) > request.context:
            raise UsageError(
                f"a chunk of {max(chunks)} tokens exceeds the context of {request.context}", "raise --context"
            )
        chunks = tuple(c for c in DEFAULT_CHUNKS if c <= request.context) if chunks is None else chunks
    wanted = getattr(model, "default_chunks", DEFAULT_CHUNKS) if chunks is None else chunks
    return [step, *(signature_of(model, tokens, request.context) for tokens in wanted)]


def _grows(model: Any, context: int) -> bool:
    other = context - 1 if context == getattr(model, "longest", None) else context + 1
    return model.state_slots(context) != model.state_slots(other)


def _write(
    directory: Path, source: Source, model: nn.Module, signatures: list[StepSignature], request: Request
) -> Manifest:
    graphs = []
    quantised: dict[str, Quantised] = {}
    for index, signature in enumerate(signatures):
        request.report("tracing", index, len(signatures))
        graphs.append(_graph(model, signature, request, quantised, source))
    request.report("tracing", len(signatures), len(signatures))
    layout, constants = _layout(source, graphs, quantised)
    with TemporaryDirectory(prefix="moments-", dir=directory) as work:
        moments = _moments(source, model, quantised, request, Path(work))
        digest = _write_weights(directory, layout, _Reader(source, constants, quantised, moments), request)
        del moments
    same_bytes = {q.rows: q.codes for q in quantised.values()}
    files = []
    for graph, signature in zip(graphs, signatures, strict=True):
        file = "step.onnx" if signature.tokens == 1 else f"chunk{signature.tokens}.onnx"
        lower.point_to_file(graph.graph, layout, same_bytes)
        lower.save(graph, directory / file)
        files.append(GraphFile(file, signature))
    request.report("golden outputs", 0, 0)
    context = request.context if _grows(model, request.context) else 0
    params = sum(parameter.numel() for parameter in model.parameters())
    golden.write(directory, model, signatures[0], context, source.tokenizer == "bytes")
    config = _config(source.config)
    slots = [dataclasses.asdict(slot) for slot in signatures[0].state]
    digest.update(json.dumps([config, slots], sort_keys=True).encode())
    manifest = Manifest(
        family=source.family,
        source=_public_name(source.name),
        model_id=digest.hexdigest()[:32],
        dtype=request.dtype,
        quant=request.quant,
        flavour=request.flavour,
        context=context,
        vocab_size=_vocabulary(signatures[0]),
        params=params,
        tokenizer=_tokenizer(source, directory),
        graphs=tuple(files),
        config=config,
    )
    manifest.save(directory)
    return manifest


class _Reader:
    """What the file stores under each name; a matrix is rounded when its codes are asked for, its scales come next."""

    def __init__(
        self, source: Source, constants: dict[str, NDArray[Any]], quantised: dict[str, Quantised], moments: Moments
    ) -> None:
        self.source, self.constants, self.moments = source, constants, moments
        self.codes = {q.codes: q for q in quantised.values()}
        self.scales: dict[str, NDArray[Any]] = {}

    def __call__(self, name: str) -> NDArray[Any]:
        if name in self.constants:
            return self.constants[name]
        if name in self.scales:
            return self.scales.pop(name)
        if name not in self.codes:
            return self.source.tensor(name)
        matrix = self.codes[name]
        values, moments = self.source.tensor(matrix.name), self.moments.get(matrix.name)
        codes, self.scales[matrix.scales] = quantise(matrix.name, values, matrix.bits, moments)
        return codes


def _moments(
    source: Source, model: nn.Module, quantised: dict[str, Quantised], request: Request, folder: Path
) -> Moments:
    """Second moments of the inputs of the 4-bit matrices, where the request or the default wants them."""
    four = [q.name for q in quantised.values() if q.bits == 4]
    able = isinstance(model, SequenceModel)
    tokens = request.calibrate
    if tokens is None:
        params = sum(parameter.numel() for parameter in model.parameters())
        tokens = DEFAULT_CALIBRATION if able and source.learned and params <= CALIBRATED_PARAMS else 0
    if tokens and not able:
        raise UsageError(f"{source.name} has no text to write, so there is nothing to calibrate with", "leave it out")
    if not tokens or not four:
        return {}
    from exporters.calibrate import moments

    real = source.build("cpu").eval()
    assert isinstance(real, SequenceModel)
    return moments(real, four, tokens, folder, lambda done, total: request.report("calibrating", done, total))


def _write_weights(directory: Path, layout: weights.Layout, read: _Reader, request: Request) -> hashlib._Hash:
    written = 0

    def wrote(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        request.report("writing weights", written, layout.nbytes)

    return weights.write(directory / weights.FILE, layout, read, wrote)


def _graph(
    model: nn.Module, signature: StepSignature, request: Request, quantised: dict[str, Quantised], source: Source
) -> ir.Model:
    graph = trace(model, signature, request.flavour)
    tidy(graph, signature)
    if request.quant in BITS:
        quantised |= quantise_graph(graph, BITS[request.quant])
    if request.dtype != "float32":
        kept = source.derived_names()  # the constants of a recurrence: rounding them changes how long it remembers
        lower.store_as(graph.graph, lower.matrices(graph.graph) - kept, request.dtype)
    return graph


def _layout(
    source: Source, graphs: list[ir.Model], quantised: dict[str, Quantised]
) -> tuple[weights.Layout, dict[str, NDArray[Any]]]:
    """One file for all graphs: the source's tensors in its order, then large constants of the code."""
    types: dict[str, tuple[DType, tuple[int, ...]]] = {}
    for graph in graphs:
        for name, stored in lower.stored_types(graph.graph).items():
            if types.setdefault(name, stored) != stored:
                raise ExportError(f"weight {name} is {types[name]} in one graph and {stored} in another")
    names = list(source.tensor_names())
    made = {name for q in quantised.values() for name in (q.codes, q.scales, q.rows)}
    unknown = sorted(types.keys() - set(names) - made)
    if unknown:
        raise ExportError(
            f"the graph reads {unknown[0]}, which the source does not have",
            "a buffer that advance() reads must be in the state_dict or be made of Python numbers",
        )
    constants: dict[str, NDArray[Any]] = {}
    tensors: list[tuple[str, DType, tuple[int, ...]]] = []
    for name in names:
        if name in quantised:
            tensors += [(part, *types[part]) for part in (quantised[name].codes, quantised[name].scales)]
            if name not in types:
                continue
        elif name not in types:  # a weight that only training reads stays with its own type
            array = source.tensor(name)
            types[name] = (str(array.dtype), array.shape)  # type: ignore[assignment]
        tensors.append((name, *types[name]))
    for graph in graphs:
        _lift_constants(graph.graph, constants)
    tensors += [(name, str(array.dtype), array.shape) for name, array in constants.items()]  # type: ignore[misc]
    return weights.plan(tensors), constants


def _lift_constants(graph: ir.Graph, constants: dict[str, NDArray[Any]]) -> None:
    """Large constants become weights; equal ones are stored once for all graphs."""
    for value in lower.large_constants(graph).values():
        assert value.const_value is not None and value.name is not None
        array = np.ascontiguousarray(value.const_value.numpy())
        name = next(
            (n for n, known in constants.items() if known.dtype == array.dtype and np.array_equal(known, array)),
            f"constant.{len(constants)}",
        )
        constants[name] = array
        del graph.initializers[value.name]
        value.name, value.const_value = name, None
        graph.initializers[name] = value


def _config(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else {}


def _vocabulary(signature: StepSignature) -> int:
    return next((spec.shape[-1] for spec in signature.outputs if spec.role == "logits"), 0)


def _public_name(name: str) -> str:
    """The name as the user wrote it, but an absolute path loses its folders: they say something of the machine."""
    return name if name.startswith("zoo:") or not Path(name).is_absolute() else Path(name).name


def _tokenizer(source: Source, directory: Path) -> str:
    if source.tokenizer is None:
        return "none"
    if source.tokenizer == "bytes":
        return "bytes"
    shutil.copyfile(source.tokenizer, directory / "tokenizer.json")
    return "tokenizer.json"
