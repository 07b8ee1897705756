"""PyTorch as a rival, on the weights of an export: eager, or with the step compiled by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from edgeseq.bench.rivals import StreamRival, rival_columns
from edgeseq.bench.synthetic import slot_values
from edgeseq.errors import BundleError, EdgeseqError, UsageError
from edgeseq.manifest import load_manifest
from edgeseq.spec import Manifest


class TorchEngine(StreamRival):
    """Eager PyTorch: the chunk form for prompts, whole, and the step form for tokens. Arithmetic is fp32, and so are
    the weights, whatever their storage in the export."""

    backend = "torch"

    def __init__(self, directory: Path, threads: int) -> None:
        import torch

        manifest = load_manifest(directory)
        columns = rival_columns(manifest, f"torch {torch.__version__}", "fp32")
        super().__init__(self.backend, directory, manifest, threads, columns)
        torch.set_num_threads(threads)
        self.model = rebuilt(directory, manifest)
        self._reset()

    def _reset(self) -> None:
        from edgeseq.verify.torch_live import TorchStream

        self.stream = TorchStream(self.model, self.manifest.context or 1)

    def _save(self) -> tuple[int, list[Any]]:
        return self.stream.position, [t.clone() for t in self.stream.state]

    def _load(self, snapshot: tuple[int, list[Any]]) -> None:
        self.stream.position, self.stream.state = snapshot[0], [t.clone() for t in snapshot[1]]

    def _made_up(self, depth: int) -> tuple[int, list[Any]]:
        import torch

        slots = self.model.state_slots(self.manifest.context or 1)
        return depth, [torch.from_numpy(slot_values(slot)) for slot in slots]


class CompiledTorchEngine(TorchEngine):
    """The same with the step compiled; prompts stay eager, for unrolled they would take minutes to compile."""

    backend = "torch-compile"

    def __init__(self, directory: Path, threads: int) -> None:
        check_compiler()
        super().__init__(directory, threads)
        self.model = CompiledStep(self.model)
        self._reset()


class CompiledStep:
    """A model whose `advance` is compiled for one token; the first such call compiles."""

    def __init__(self, model: Any) -> None:
        import torch

        self.model, self.state_slots = model, model.state_slots
        self._step = torch.compile(model.advance, fullgraph=True, dynamic=False, backend=_inductor)

    def advance(self, tokens: Any, position: Any, *state: Any) -> Any:
        if tokens.shape[1] > 1:
            return self.model.advance(tokens, position, *state)
        return self._step(tokens, position, *state)


def _inductor(graph: Any, inputs: Any) -> Any:
    """torch.compile's default backend, which sees into our operators."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    return compile_fx(graph, inputs, decompositions={**select_decomp_table(), **_bodies()})


def _bodies() -> dict[Any, Callable[..., Any]]:
    """What our operators consist of. Those that look at the position stay whole: what they do depends on its value."""
    from torch._library.custom_ops import OPDEFS

    return {
        op._opoverload: op._init_fn
        for name, op in OPDEFS.items()
        if name.startswith("edgeseq::") and "position" not in {a.name for a in op._opoverload._schema.arguments}
    }


def check_compiler() -> None:
    """EdgeseqError where PyTorch finds no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise EdgeseqError(
            "torch.compile needs a C++ compiler, and there is none", "install g++ (apt-get install g++) or set CXX"
        ) from None


def rebuilt(directory: Path, manifest: Manifest) -> Any:
    """The family's module with the weights of the export. UsageError for a module of the user's own."""
    from edgeseq.models import families
    from exporters.golden import load

    record = families().get(manifest.family)
    if record is None:
        raise UsageError(
            f"{directory} was exported from a module that is no family of edgeseq, so PyTorch cannot run it from there",
            "time it in its own program, or use --against onnxruntime",
        )
    try:
        model = record.meta_model(_config(record.config, manifest.config))
    except (TypeError, ValueError) as error:
        raise BundleError(f"{directory}: the config is none of {manifest.family}: {error}") from None
    load(model, directory / "weights.safetensors")
    return model.eval()


def _config(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A config from its JSON form; a config within it is one too, and lists are tuples."""
    hints = get_type_hints(kind)

    def value(name: str, raw: Any) -> Any:
        if isinstance(raw, Mapping) and is_dataclass(hints.get(name)):
            return _config(hints[name], raw)
        return tuple(raw) if isinstance(raw, list) else raw

    return kind(**{name: value(name, raw) for name, raw in values.items()})
