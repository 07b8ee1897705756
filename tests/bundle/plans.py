"""Small plans for tests: one recurrent, one with caches, every kind of record in them."""

from __future__ import annotations

import random
from dataclasses import replace

from edgeseq.bundle.plan import (
    Plan,
    PlanArg,
    PlanGraph,
    PlanIO,
    PlanKernel,
    PlanLaunch,
    PlanTensor,
)
from edgeseq.spec import GraphFile, Manifest, StateSlot, StepSignature, TensorSpec

MODEL_ID = "00112233445566778899aabbccddeeff"
WIDTH, VOCAB, ROWS = 8, 17, 32


def manifest(state: tuple[StateSlot, ...], context: int = 0) -> Manifest:
    def graph(tokens: int) -> GraphFile:
        inputs = (TensorSpec("tokens", "int64", (1, tokens), "tokens"),)
        outputs = (TensorSpec("logits", "float32", (1, 1, VOCAB), "logits"),)
        file = "step.onnx" if tokens == 1 else f"chunk{tokens}.onnx"
        return GraphFile(file, StepSignature(tokens, inputs, outputs, state))

    return Manifest(
        family="mamba",
        source="zoo:test",
        model_id=MODEL_ID,
        dtype="float32",
        quant="none",
        flavour="onnx",
        context=context,
        vocab_size=VOCAB,
        params=VOCAB * WIDTH,
        tokenizer="bytes",
        graphs=(graph(1), graph(8)),
        config={"d_model": WIDTH},
    )


def weights(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def recurrent_plan() -> Plan:
    """Embedding gather, a state update, a head that only feeds outputs; step and chunk of 8."""
    slots = (
        StateSlot("conv.0", "float32", (1, 3, WIDTH), 0.0, "shift", 1),
        StateSlot("ssm.0", "float32", (1, 4, WIDTH), 0.5),
    )
    table = PlanTensor("embed", "plain", "float32", (VOCAB, WIDTH), VOCAB * WIDTH * 4, lambda: weights(1, 544))
    mix = PlanTensor("mix", "rows16", "uint8", (50,), 50, lambda: weights(2, 50))

    def graph(tokens: int) -> PlanGraph:
        act = tokens * WIDTH * 4
        logits_at = 64 + (tokens * 8 // 64) * 64
        launches = (
            PlanLaunch(
                "gather", (1, 1, 1), (1, 1, 1),
                (PlanArg("io", "r", None, 0, tokens * 8), PlanArg("weights", "r", "embed", 0, 544),
                 PlanArg("arena", "w", None, 0, act)),
                traffic={"weights": tokens * WIDTH * 4},
            ),
            PlanLaunch(
                "scan", (2, 1, 1), (1, 1, 1),
                (PlanArg("arena", "rw", None, 0, act), PlanArg("weights", "r", "mix", 2, 48),
                 PlanArg("state", "rw", None, 0, 96), PlanArg("state", "rw", None, 128, 128)),
            ),
            PlanLaunch(
                "head", (3, 1, 1), (1, 1, 1),
                (PlanArg("arena", "r", None, 0, act), PlanArg("weights", "r", "embed", 0, 544),
                 PlanArg("io", "w", None, logits_at, VOCAB * 4)),
                outputs_only=True,
            ),
        )  # fmt: skip
        io = (
            PlanIO(TensorSpec("tokens", "int64", (1, tokens), "tokens"), "in", 0),
            PlanIO(TensorSpec("logits", "float32", (1, 1, VOCAB), "logits"), "out", logits_at),
        )
        return PlanGraph("step" if tokens == 1 else f"chunk{tokens}", tokens, 256, launches, io)

    return Plan(
        manifest=manifest(slots),
        target={"name": "host", "triple": "x86_64-linux-gnu", "features": ["avx2"]},
        graphs=(graph(1), graph(8)),
        kernels=(PlanKernel("gather", 3), PlanKernel("scan", 4), PlanKernel("head", 3)),
        tensors=(table, mix),
        state=((slots[0], 0), (slots[1], 128)),
        state_bytes=256,
        io_bytes=256,
        tokenizer="bytes",
        meta={"note": "test"},
    )


def cached_plan(update: str = "append") -> Plan:
    """The recurrent plan with its state replaced by a cache of ROWS positions, 32 bytes a row, and no chunk graph."""
    base = recurrent_plan()
    slot = StateSlot("k.0", "float32", (1, 2, ROWS, 4), 0.0, update, 2)  # type: ignore[arg-type]
    gather, scan, head = base.graphs[0].launches
    write = PlanLaunch("scatter", (1, 1, 1), (1, 1, 1), (PlanArg("state", "w", None, 0, slot.nbytes),))
    attend = PlanLaunch(
        "attend", (2, 1, 1), (1, 1, 1), (*scan.args[:2], PlanArg("state", "r", None, 0, slot.nbytes))
    )  # fmt: skip
    step = replace(base.graphs[0], launches=(gather, write, attend, head))
    return replace(
        base,
        manifest=manifest((slot,), ROWS),
        graphs=(step,),
        kernels=(*base.kernels, PlanKernel("scatter", 1), PlanKernel("attend", 3)),
        state=((slot, 0),),
        state_bytes=slot.nbytes,
    )


def gpu_plan() -> Plan:
    """The recurrent plan for OpenCL: the kernels share one source, grids have three dimensions."""
    base = recurrent_plan()
    source = b"__kernel void gather() {} __kernel void head() {}"
    kernels = tuple(PlanKernel(k.name, k.n_args, "opencl", source, "source") for k in base.kernels)
    graphs = tuple(
        replace(g, launches=tuple(replace(launch, grid=(2, 3, 1), block=(32, 1, 1)) for launch in g.launches))
        for g in base.graphs
    )
    return replace(base, kernels=kernels, graphs=graphs)
