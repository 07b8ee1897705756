"""One ONNX graph to kernel calls in order: rules claim what they know, TVM fuses the rest, views cost nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from hashlib import sha256

from edgeseq.errors import CompileError
from edgeseq.spec import DTYPE_BYTES, StepSignature

from . import generic
from .graph import Graph, Node, Weight
from .ir import Arg, Call, GenericRef, KernelRef, Storage, Value
from .kernels._quantise import BLOCK, blocks
from .kernels.copy import Copy
from .kernels.quantize import Quantize
from .pack import packed_shape
from .rules import Claim, rules_by_op
from .targets import Target
from .tvm_api import structural_hash
from .views import VIEW_OPS, view_of

QUANTISED_PRODUCTS = ("com.microsoft.MatMulNBits", "ai.edgeseq.ExpertLinearNBits")


class Memory:
    """Storages that every graph of a model shares: weights by origin and layout, state slots, inputs and outputs."""

    def __init__(self) -> None:
        self.weights: dict[tuple[Hashable, str], Storage] = {}
        self.sources: dict[Storage, tuple[Weight, ...]] = {}
        self.state: dict[str, Storage] = {}
        self.io: dict[str, Storage] = {}

    def weight(self, layout: str, *sources: Weight) -> Storage:
        """The packed form of one tensor (or of codes and scales); the same bytes of a file are packed once."""
        first = sources[0]
        origin: Hashable = (first.file, first.offset)
        if first.array is not None:  # graphs may give one name to different constants
            origin = (first.dtype, first.shape, sha256(first.array.tobytes()).digest())
        if (origin, layout) not in self.weights:
            nbytes = math.prod(packed_shape(layout, first.shape)) * DTYPE_BYTES[first.dtype]
            storage = Storage("weight", first.name, nbytes, layout)
            self.weights[(origin, layout)] = storage
            self.sources[storage] = sources
        return self.weights[(origin, layout)]

    def slot(self, name: str, nbytes: int) -> Storage:
        return self.state.setdefault(name, Storage("state", name, nbytes))

    def port(self, name: str, nbytes: int) -> Storage:
        storage = self.io.setdefault(name, Storage("io", name, nbytes))
        storage.nbytes = max(storage.nbytes, nbytes)
        return storage


def check_signature(graph: Graph, signature: StepSignature) -> None:
    """CompileError unless the graph has what the manifest declares; an input it has no use for may be missing."""
    past = {f"past.{s.name}": (s.dtype, s.shape) for s in signature.state}
    present = {f"present.{s.name}": (s.dtype, s.shape) for s in signature.state}
    inputs = past | {s.name: (s.dtype, s.shape) for s in signature.inputs}
    outputs = present | {s.name: (s.dtype, s.shape) for s in signature.outputs}
    hint = "export the model again"
    for name in graph.inputs:
        if name not in inputs:
            raise CompileError(f"{graph.label}: the manifest does not declare its input {name}", hint)
    for name in outputs:
        if name not in graph.outputs:
            raise CompileError(f"{graph.label}: it does not return {name}, which the manifest declares", hint)
    for name, declared in (inputs | outputs).items():
        if name in graph.types and graph.types[name] != declared:
            (dtype, shape), (its_dtype, its_shape) = declared, graph.types[name]
            raise CompileError(
                f"{graph.label}: {name} is {its_dtype} {list(its_shape)}, the manifest says {dtype} {list(shape)}", hint
            )


class Lowering:
    """The working state for one graph; `calls` is the result. The methods below are what rules use."""

    def __init__(self, graph: Graph, signature: StepSignature, memory: Memory, target: Target) -> None:
        self.graph, self.signature, self.memory, self.target = graph, signature, memory, target
        self.calls: list[Call] = []
        self.arena: list[Storage] = []
        self.taken: set[Node] = set()
        self._values: dict[str, Value] = {}
        self._kept: dict[str, None] = {}
        self._quantized: dict[tuple[str, int], tuple[Value, Value, Value]] = {}
        self._made: dict[Hashable, tuple[Value, ...]] = {}
        self._ports = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
        check_signature(graph, signature)
        for name in graph.inputs:
            self._define_input(name)

    # what rules read

    def value(self, name: str) -> Value:
        """The tensor `name`, through views where it has no memory of its own."""
        if name not in self._values:
            if name in self.graph.weights:
                return self.weight(name, "plain")
            node = self.graph.producer[name]
            window = self._window(name)
            if window is None:
                raise CompileError(f"{self.graph.label}: {name} ({node.op}) is read before it is computed")
            self._values[name] = window
        return self._values[name]

    def rows(self, name: str) -> Value:
        """`name` as [rows, last axis], rows possibly apart."""
        return self.value(name)

    def dense(self, name: str) -> Value:
        """`name`, contiguous."""
        value = self.value(name)
        if not value.contiguous:
            raise CompileError(f"{self.graph.label}: {name} is not contiguous where a kernel needs it to be")
        return value

    def weight(self, name: str, layout: str) -> Value:
        source = self.graph.weights[name]
        return Value(name, source.dtype, source.shape, self.memory.weight(layout, source))

    def columns(self, name: str) -> Value:
        """A weight [..., C] packed columns16, the axes before the last taken as one."""
        source = self.graph.weights[name]
        flat = replace(source, shape=(math.prod(source.shape[:-1]), source.shape[-1]))
        return Value(name, source.dtype, source.shape, self.memory.weight("columns16", flat))

    def weight_q(self, codes: str, scales: str, shape: tuple[int, int], bits: int, signed: bool) -> Value:
        """Block-quantised codes [M, K/32, 4*bits] and their scales [M, K/32] as one packed weight of M x K."""
        blocks = -(-shape[1] // 32)
        c, s = self.graph.weights[codes], self.graph.weights[scales]
        c = replace(c, shape=(shape[0], blocks, 4 * bits))
        s = replace(s, shape=(shape[0], blocks))
        storage = self.memory.weight("s8x16" if signed and bits == 8 else f"q{bits}x16", c, s)
        return Value(codes, "uint8", (storage.nbytes,), storage)

    def expert_weight(self, name: str, experts: int) -> Value:
        """The matrices of experts that lie one below the other, packed expert after expert."""
        source = self.graph.weights[name]
        rows, k = source.shape
        apart = replace(source, shape=(experts, rows // experts, k))
        return Value(name, source.dtype, source.shape, self.memory.weight("experts.rows16", apart))

    def expert_weight_q(self, codes: str, scales: str, experts: int, bits: int, signed: bool) -> Value:
        """The same of block-quantised codes [E*M, K/32, 4*bits] and scales [E*M, K/32]."""
        c, s = self.graph.weights[codes], self.graph.weights[scales]
        rows, blocks, _ = c.shape
        c = replace(c, shape=(experts, rows // experts, blocks, 4 * bits))
        s = replace(s, shape=(experts, rows // experts, blocks))
        storage = self.memory.weight("experts.s8x16" if signed and bits == 8 else f"experts.q{bits}x16", c, s)
        return Value(codes, "uint8", (storage.nbytes,), storage)

    def once(self, key: Hashable, make: Callable[[], tuple[Value, ...]]) -> tuple[Value, ...]:
        """What `make` gives, which emits its calls the first time this graph asks for `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def quantized(self, name: str, zero: int) -> tuple[Value, Value, Value]:
        """`name` as int8 blocks, their scales and offsets; computed once for all products that read it.

        The kernel that made `name` writes them itself where it can.
        """
        if (name, zero) not in self._quantized:
            x = self.rows(name)
            n = blocks(x.cols)
            q = self.scratch(f"{name}.q", "int8", (x.rows, n * BLOCK))
            scale, offset = (self.scratch(f"{name}.{s}", d, (x.rows, n)) for s, d in (("s", "float32"), ("o", "int32")))
            outputs = (Arg(q, "w"), Arg(scale, "w"), Arg(offset, "w"))
            if not self._quantise_at_source(x, zero, outputs):
                self.call(KernelRef("quantize", Quantize(x.rows, x.cols, x.ld, zero)), Arg(x, "r"), *outputs)
            self._quantized[(name, zero)] = (q, scale, offset)
        return self._quantized[(name, zero)]

    def _quantise_at_source(self, x: Value, zero: int, outputs: tuple[Arg, ...]) -> bool:
        """Let the call that writes x write its blocks too; x itself goes when only quantised products read it."""
        maker = next((c for c in reversed(self.calls) if any(a.value is x and a.access == "w" for a in c.args)), None)
        if maker is None or not isinstance(maker.kernel, KernelRef) or x.cols % (2 * BLOCK):
            return False
        op, params = maker.kernel.op, maker.kernel.params
        only = all(n.op in QUANTISED_PRODUCTS for n in self.graph.consumers[x.name])
        if getattr(params, "quant", 0) is not None or not getattr(params, "quantises", True):
            return False
        if op != "causal_conv" and not only:
            return False
        kept = maker.args if op == "causal_conv" else tuple(a for a in maker.args if a.value is not x)
        maker.kernel = KernelRef(op, replace(params, quant=zero))
        maker.args = (*kept, *outputs)
        return True

    def owns_state(self, past: str, present: str, nodes: tuple[Node, ...]) -> bool:
        """Whether `nodes` may update slot `past` in place and leave it as `present`.

        Where others read `past` too, they get a copy made before the first call.
        """
        is_slot = past.startswith("past.") and present == "present." + past.removeprefix("past.")
        if is_slot and not self._read_only_by(past, nodes):
            self._kept[past] = None
        return is_slot

    def _read_only_by(self, name: str, nodes: tuple[Node, ...]) -> bool:
        """Whether `name`, and every window of it, is read by `nodes` alone."""
        return name not in self.graph.outputs and all(
            n in nodes or (n.op in VIEW_OPS and all(self._read_only_by(o, nodes) for o in n.outputs))
            for n in self.graph.consumers.get(name, [])
        )

    def state(self, past: str, present: str) -> Value:
        dtype, shape = self.graph.types[past]
        self._values[present] = Value(past, dtype, shape, self.memory.state[past.removeprefix("past.")])
        return self._values[present]

    def result(self, name: str) -> Value:
        """Memory for the output `name`."""
        dtype, shape = self.graph.types[name]
        spec = self._ports.get(name)
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if spec is not None and name in self.graph.outputs:
            storage = self.memory.port(name, spec.nbytes)
        else:
            storage = Storage("arena", name, nbytes)
            self.arena.append(storage)
        self._values[name] = Value(name, dtype, shape, storage)
        return self._values[name]

    def call(self, kernel: KernelRef | GenericRef, *args: Arg, **traffic: int) -> None:
        """Append one launch; `traffic` states bytes moved where the sizes of the arguments mislead."""
        self.calls.append(Call(kernel, args, traffic=traffic))

    # the pass itself

    def run(self) -> list[Call]:
        claims = self._claim()
        for past in self._kept:
            self._values[past] = self._copied(self._values[past])
        last = {
            claim.nodes[-1] if len(claim.nodes) == 1 else max(claim.nodes, key=lambda n: n.index): claim
            for claim in claims
        }
        claimed = {n for claim in claims for n in claim.nodes}
        wanted = self._wanted(claims, claimed)
        group: list[Node] = []
        for node in self.graph.nodes:
            if node in last:
                claim = last[node]
                if self._depends(claim, group):
                    group = self._flush(group, wanted)
                claim.emit()
            elif (node not in claimed and node in wanted and node.op not in VIEW_OPS) or (
                node not in claimed and node in wanted and not self._is_view(node, group)
            ):
                group.append(node)
        self._flush(group, wanted)
        self._settle_outputs()
        return self.calls

    def _claim(self) -> list[Claim]:
        table = rules_by_op()
        taken = self.taken
        claims = []
        for node in self.graph.nodes:
            for rule in table.get(node.op, ()) if node not in taken else ():
                claim = rule.match(self, node)
                if claim is not None and not taken & set(claim.nodes):
                    claims.append(claim)
                    taken |= set(claim.nodes)
                    break
        return claims

    def _wanted(self, claims: list[Claim], claimed: set[Node]) -> set[Node]:
        """Unclaimed nodes that something reads."""
        needs = {name for claim in claims for name in claim.needs} | set(self.graph.outputs)
        wanted: set[Node] = set()
        for node in reversed(self.graph.nodes):
            if node not in claimed and needs & set(node.outputs):
                wanted.add(node)
                needs |= set(node.inputs)
        return wanted

    def _origin(self, name: str) -> Node | None:
        """The node that computes `name`, looking through views."""
        node = self.graph.producer.get(name)
        while node is not None and node.op in VIEW_OPS and node.inputs[0] in self.graph.producer:
            node = self.graph.producer[node.inputs[0]]
        return node

    def _depends(self, claim: Claim, group: list[Node]) -> bool:
        """A claim waits for the group when it reads from it, or overwrites state the group still reads."""
        members = set(group)
        for name in claim.needs:
            node = self.graph.producer.get(name)
            while node is not None:
                if node in members:
                    return True
                node = self.graph.producer.get(node.inputs[0]) if node.op in VIEW_OPS else None
        return any(i.startswith("past.") for n in group for i in n.inputs)

    def _is_view(self, node: Node, group: list[Node]) -> bool:
        """Whether a VIEW_OPS node really moves nothing, as far as is known while its input may still be pending."""
        origin = self.graph.producer.get(node.inputs[0])
        members = set(group)
        while origin is not None and origin not in members and origin.op in VIEW_OPS:
            origin = self.graph.producer.get(origin.inputs[0])
        if origin is not None and origin in members:
            return False  # part of the group: TVM fuses it
        return all(
            self._window(o) is not None for o in node.outputs if self.graph.consumers.get(o) or o in self.graph.outputs
        )

    def _window(self, name: str) -> Value | None:
        """`name` as a window of what it is a view of, or None."""
        if name in self._values:
            return self._values[name]
        if name in self.graph.weights:
            return self.weight(name, "plain")
        node = self.graph.producer.get(name)
        if node is None or node.op not in VIEW_OPS:
            return None
        base = self._window(node.inputs[0])
        return None if base is None else view_of(self.graph, node, name, base)

    def _flush(self, group: list[Node], wanted: set[Node]) -> list[Node]:
        """Compile the pending nodes and append their calls."""
        if not group:
            return []
        group = self._with_strided_views(group)
        produced = [o for n in group for o in n.outputs if o]
        members = set(group)
        outputs = [
            o for o in produced
            if o not in self._values
            and (o in self.graph.outputs or any(n not in members for n in self.graph.consumers.get(o, [])))
        ]  # fmt: skip
        fused = generic.fuse(self.graph, sorted(group, key=lambda n: n.index), outputs, self.target.gpu is not None)
        holders = {alias: name for name, alias in fused.aliases.items()}
        local: dict[str, Value] = {}
        for name, array in fused.constants.items():
            unique = f"{self.graph.label}.{group[0].outputs[0]}.{name}"
            source = Weight(unique, str(array.dtype), array.shape or (1,), None, 0, array)
            local[name] = Value(unique, source.dtype, source.shape, self.memory.weight("plain", source))
        for call in fused.calls:
            args = [Arg(local[i] if i in local else self.dense(i), "r") for i in call.inputs]
            for out in call.outputs:
                again = out in local  # several parts of one function may write parts of one tensor
                if not again:
                    local[out] = self._intermediate(out, holders, fused.intermediates[out])
                args.append(Arg(local[out], "rw" if again else "w"))
            key = f"{structural_hash(call.func) & 0xFFFFFFFFFFFFFFFF:016x}"
            self.call(GenericRef(key, call.label, call.func, call.grid, call.threads), *args)
        for name, alias in fused.aliases.items():
            if name not in self._values:
                self._values[name] = local[alias] if alias in local else self.value(alias)
        return []

    def _intermediate(self, out: str, holders: dict[str, str], kind: tuple[str, tuple[int, ...]]) -> Value:
        if out in holders:
            return self.result(holders[out])
        return self.scratch(out, *kind)

    def scratch(self, name: str, dtype: str, shape: tuple[int, ...]) -> Value:
        """Memory of the call alone, for what is no tensor of the graph."""
        storage = Storage("arena", name, math.prod(shape) * DTYPE_BYTES[dtype])
        self.arena.append(storage)
        return Value(name, dtype, shape, storage)

    def _with_strided_views(self, group: list[Node]) -> list[Node]:
        """Pull in views whose result is not contiguous, and views of the group's own results."""
        members = dict.fromkeys(group)
        queue = list(group)
        while queue:
            for name in queue.pop().inputs:
                node = self.graph.producer.get(name) if name else None
                if node is None or node in members or node.op not in VIEW_OPS:
                    continue
                window = self._window(name)  # its own memory, where it has any
                if window is None or not window.contiguous:
                    members[node] = None
                    queue.append(node)
        return list(members)

    def _settle_outputs(self) -> None:
        """Bring every output to its place; copies are needed only where no kernel could write there."""
        for name in self.graph.outputs:
            if not self.value(name).contiguous:
                del self._values[name]
                self._flush([self.graph.producer[name]], set())
        moves = [(n, self.value(n), self._home(n)) for n in self.graph.outputs]
        moves = [(n, v, home) for n, v, home in moves if v.storage is not home]
        replaced = {home for _, _, home in moves}
        kept = [self._copied(v) if v.storage in replaced else v for _, v, _ in moves]  # read before it is overwritten
        for (name, _, home), value in zip(moves, kept, strict=True):
            self._copy(value, Value(name, value.dtype, value.shape, home))

    def _home(self, name: str) -> Storage:
        """Where the output `name` has to end."""
        if name.startswith("present."):
            return self.memory.state[name.removeprefix("present.")]
        return self.memory.port(name, self._ports[name].nbytes)

    def _copied(self, value: Value) -> Value:
        """A copy of `value` in scratch memory, made at this point of the calls."""
        copy = self.scratch(f"{value.name}.copy", value.dtype, value.shape)
        self._copy(value, copy)
        return copy

    def _copy(self, source: Value, target: Value) -> None:
        self.call(KernelRef("copy", Copy(math.prod(source.shape), source.dtype)), Arg(source, "r"), Arg(target, "w"))

    def _define_input(self, name: str) -> None:
        dtype, shape = self.graph.types[name]
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if name.startswith("past."):
            storage = self.memory.slot(name.removeprefix("past."), nbytes)
        else:
            storage = self.memory.port(name, nbytes)
        self._values[name] = Value(name, dtype, shape, storage)
