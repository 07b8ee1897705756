"""Real exports and bundles of small random models, made once per process and removed with it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from edgeseq.models import families
from edgeseq.models.mamba import MambaConfig
from edgeseq.models.retnet import RetNetConfig
from edgeseq.models.source import Source, open_source, random_source
from edgeseq.models.transformer import TransformerConfig
from exporters import export

CONTEXT = 160
CHUNKS = (4, 16)
CONFIGS = {
    "mamba": MambaConfig(61, 32, 2, 64, d_state=4, dt_rank=4),
    "retnet": RetNetConfig(53, 36, 2, 3, 28),
    "transformer": TransformerConfig(61, 32, 2, 4, 2, 8, 48),
}
FILTER = """
import torch
from edgeseq.spec import StateSlot, TensorSpec

class Filter(torch.nn.Module):
    inputs = (TensorSpec("frame", "float32", (1, 4)),)
    outputs = (TensorSpec("level", "float32", (1, 3)),)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(4, 3)

    def state_slots(self, context):
        return (StateSlot("mean", "float32", (1, 4)),)

    def advance(self, frame, mean):
        mean = 0.9 * mean + 0.1 * frame
        return self.head(mean), mean

factory = Filter
"""


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="edgeseq-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def exported(name: str) -> Path:
    """The export of a random model: a name of CONFIGS, or "filter", whose steps are named inputs."""
    out = folder() / f"{name}.export"
    if name == "filter":
        (folder() / "filter.py").write_text(FILTER)
        export(open_source(f"{folder() / 'filter.py'}:factory"), out)
    else:
        export(random_model(name), out, context=CONTEXT, chunks=CHUNKS)
    return out


def random_model(name: str) -> Source:
    return random_source(f"random-{name}", families()[name], CONFIGS[name])


@cache
def bundled(name: str, target: str = "host") -> Path:
    """The bundle of that export for `target`."""
    from edgeseq.compiler import compile_export  # loads TVM

    out = folder() / f"{name}.{target}"
    compile_export(exported(name), target, out)
    return out
