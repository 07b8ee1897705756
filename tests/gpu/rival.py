"""PyTorch on the same shapes, its step captured in a CUDA graph: what `tests/gpu/run` has to be faster than.

    python3 tests/gpu/rival.py zoo:mamba-130m zoo:mamba-1.4b --dtype fp16        (needs torch, and the checkout)

Weights are random: decode does the same work whatever they are. Matrices, activations and the state are in `dtype`
where autocast leaves them so. The next token is chosen on the GPU, so that nothing waits for the host either. A family
whose step PyTorch does not run in `dtype` says so; fp32 runs all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from edgeseq.models.source import open_source

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REPEATS = 5


def filled(source: str, dtype: torch.dtype) -> torch.nn.Module:
    """The family's module on the GPU: small normals, ones for what scales."""
    model = open_source(source).build("meta").to_empty(device="cuda")
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point():
                value.zero_()
            elif "norm" in name:
                value.fill_(1.0)
            else:
                value.normal_(0.0, 0.02)
    return model.eval().to(dtype)


class Decoder:
    """Tokens, position and state in one place, so that a captured step can be replayed."""

    def __init__(self, model: Any, dtype: torch.dtype, context: int, depth: int) -> None:
        self.model, self.dtype = model, dtype
        self.tokens = torch.ones((1, 1), dtype=torch.int64, device="cuda")
        self.position = torch.full((1,), depth, dtype=torch.int64, device="cuda")
        self.state = [
            t.to("cuda", dtype if t.is_floating_point() else t.dtype) for t in model.initial_state(1, context)
        ]

    def step(self) -> None:
        with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype is not torch.float32):
            logits, *state = self.model.advance(self.tokens, self.position, *self.state)
        for old, new in zip(self.state, state, strict=True):
            old.copy_(new)
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)


def captured(decoder: Decoder) -> Any:
    """A replayable step; the step itself where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            decoder.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph.replay


def rate(run: Any, n: int) -> list[float]:
    """Tokens per second of each repetition."""
    rates = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            run()
        torch.cuda.synchronize()
        rates.append(n / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=0, help="position that decoding starts at")
    options = parser.parse_args()
    for source in options.sources:
        model, dtype = filled(source, DTYPES[options.dtype]), DTYPES[options.dtype]
        row: dict[str, Any] = {"source": source, "dtype": options.dtype, "torch": torch.__version__}
        with torch.inference_mode():
            for name in ("eager", "graph"):
                decoder = Decoder(model, dtype, options.context, options.depth)
                try:
                    run = captured(decoder) if name == "graph" else decoder.step
                    rate(run, 8)
                    row[f"{name}_tokens_per_second"] = round(statistics.median(rate(run, options.tokens)), 1)
                except RuntimeError as error:
                    row[f"{name}_note"] = str(error).splitlines()[0]
                    torch.cuda.synchronize()
        print(json.dumps(row | {"device": torch.cuda.get_device_name()}), flush=True)
        del model, decoder
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
