"""The hand-made model for a GPU: the plan of handmade.py with groups, the next token, and code of its own.

Slots, model_id and weights are the CPU's, so that a saved state goes from one to the other.
"""

from __future__ import annotations

from runtimes import C_DIR

from .handmade import CHUNKS, C, Parts, V
from .handmade import parts as cpu_parts

SOURCE = C_DIR / "tests" / "handmade_kernels.cl"
OPENCL, CUDA = 1, 2


def parts(backend: int = OPENCL, code: bytes | None = None, kind: int | None = None) -> Parts:
    """The model for one GPU backend; `code` of all kernels, by default the OpenCL source."""
    p = cpu_parts()
    p.code = SOURCE.read_bytes() if code is None else code
    next_at = p.io_bytes
    p.io_bytes += 64
    p.kernels.append([p.name("next"), 2, 0, 0, 0, 0])
    for kernel in p.kernels:
        kernel[2:] = [backend, kind or backend, 0, len(p.code)]
    launches, args, p.launches, p.args = p.launches, p.args, [], []
    logits_at = p.io[2][10]
    for g, tokens in enumerate(CHUNKS):
        gather, leak, logits = (list(launch) for launch in launches[3 * g : 3 * g + 3])
        gather[2:8] = [tokens, 1, 1, C, 1, 1]
        leak[2:8] = [1, 1, 1, C, 1, 1]
        logits[2:8] = [4, 1, 1, V // 4, 1, 1]
        mine = [args[x[8] : x[8] + x[9]] for x in (gather, leak, logits)]
        mine.append([[3, 1, logits_at, 4 * V], [3, 2, next_at, 8]])
        last = [len(p.kernels) - 1, 1, 1, 1, 1, V, 1, 1, 0, 2]
        p.graphs[g][2:4] = [len(p.launches), 4]
        p.io.append([p.name("next"), 3, 1, 4, g, 1, 1, 0, 0, 0, next_at, 8])
        for launch, its_args in zip((gather, leak, logits, last), mine, strict=True):
            launch[8] = len(p.args)
            p.launches.append(launch)
            p.args += its_args
    return p
