"""Every family on OpenCL: what PyTorch says, the tokens of the CPU, and what Oclgrind finds in its kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeseq.models
from edgeseq.compiler import compile_export
from edgeseq.models import families
from edgeseq.models.moe import MoeConfig
from edgeseq.models.source import Source, open_source, random_source
from edgeseq.models.twin import family_of_config
from edgeseq.runtime import Session, load
from edgeseq.verify.golden import Golden, load_golden
from edgeseq.verify.runtime import bundle_manifest, runtime_stages
from edgeseq.verify.tolerances import ROUNDING_CHOICES
from exporters import export
from tests.bundles import folder
from tests.every import EVERY, STEP_MODELS, chunks, rotated
from tests.models.support import ODD
from tests.runtime.build import opencl_missing
from tests.runtime.test_opencl import OCLGRIND, oclgrind

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(opencl_missing()), reason=opencl_missing() or "there"),
]

STORAGES = ("fp32:none", "fp32:int8", "fp16:none", "fp16:int4", "bf16:none")
FEWEST: dict[str, dict[str, Any]] = {
    "bamba": {"n_layers": 2, "attention_at": (1,)},
    "granite-hybrid": {"n_layers": 2, "attention_at": (1,)},
    "jamba": {"n_layers": 3, "attention_at": (2,), "experts_at": (1,)},
    "longformer": {"n_layers": 2, "windows": (16, 64)},
    # every expert is chosen: with random weights a router's choice hangs on the rounding, on every device
    "qwen3-next": {"n_layers": 2, "attention_at": (1,), "experts": MoeConfig(2, 2, 56, d_shared=32, shared_gate=True)},
    "recurrent-gemma": {"n_layers": 2, "pattern": ("recurrent", "attention")},
    "rwkv7": {"n_layers": 2},
    "samba": {"n_layers": 2, "attention_at": (1,)},
    "zamba2": {"n_layers": 2, "shared_at": (1,)},
}
"""Layers of a tiny model that are enough for one of each kind; of the others one is."""
SMALL: dict[str, Any] = {family_of_config(config).name: config for config in reversed(ODD.values())}
SMALL["gpt2"] = replace(SMALL["gpt2"], n_positions=128)
SMALL["gated-delta-net"] = replace(
    SMALL["gated-delta-net"], eps=1e-2
)  # a small one would amplify rounding in narrow heads
CASES = [
    (name, storage)
    for i, name in enumerate(sorted(families().keys() | STEP_MODELS.keys()))
    for storage in rotated(i, STORAGES)
]
TRAINED = sorted(p.stem for p in (Path(edgeseq.models.__file__).parent / "zoo_weights").glob("*.safetensors"))
SOME_TRAINED = ("tiny-dnc", "tiny-mlstm", "tiny-longformer", "tiny-recurrent-gemma", "tiny-gla")
CASES_TRAINED = [(n, s) for i, n in enumerate(TRAINED if EVERY else SOME_TRAINED) for s in rotated(i + 1, STORAGES)]
TOKENS = 64


@cache
def exported(name: str, storage: str) -> Path:
    """A trained model by its name in the zoo; of a family one of odd sizes, or where those are too narrow to be
    quantised, the tiny one with few layers."""
    dtype, quant = storage.split(":")
    if name in TRAINED:
        source: Source = open_source(f"zoo:{name}")
    elif name in STEP_MODELS:
        source = random_source(name, *STEP_MODELS[name])
    else:
        record = families()[name]
        few = replace(record.tiny, **FEWEST.get(name, {"n_layers": 1}))
        source = random_source(name, record, SMALL[name] if quant == "none" else few)
    out = folder() / f"{name}.{storage}"
    export(source, out, context=128, chunks=chunks(name), dtype=dtype, quant=quant)
    return out


@cache
def bundled(name: str, storage: str, target: str) -> Path:
    out = folder() / f"{name}.{storage}.{target}"
    compile_export(exported(name, storage), target, out)
    return out


# Without EDGESEQ_EVERY half of the families are run and the others are watched by Oclgrind: half a minute each.
@pytest.mark.parametrize(("name", "storage"), [*(CASES if EVERY else CASES[::2]), *CASES_TRAINED])
def test_a_model_says_what_pytorch_and_the_cpu_say(name: str, storage: str) -> None:
    """The stages of `verify`, then 64 greedy tokens on both, and again from each other's state."""
    gpu = bundled(name, storage, "opencl")
    assert [s for s in runtime_stages(gpu, thorough=EVERY) if not s.ok] == []
    manifest = bundle_manifest(gpu)
    if not manifest.vocab_size:
        return  # its steps are not tokens
    golden = load_golden(gpu, manifest.step.signature, manifest.family)
    prompt = [ord(c) % manifest.vocab_size for c in "The state of the"]
    cpu = bundled(name, storage, "host")
    with load(gpu, poison=True) as one, load(cpu, threads=1, poison=True) as two:
        here, there = one.session(), two.session()
        here.prefill(prompt)
        there.prefill(prompt)
        saved = here.save(), there.save()
        made, wanted = here.generate_timed(TOKENS)[0], there.generate_timed(TOKENS)[0]
        few = golden.noise["logits"].changed + ROUNDING_CHOICES if golden.noise else 0.0
        for states in (saved, saved[::-1]):  # their own, then each other's
            here.load(states[0])
            there.load(states[1])
            parted = parting(here, there, wanted, golden)
            assert len(parted) <= few * TOKENS
            if states is saved:
                same = parted[0] + 1 if parted else TOKENS  # wanted[i + 1] is said after wanted[i]
                assert made[:same] == wanted[:same]


def parting(here: Session, there: Session, tokens: list[int], golden: Golden) -> list[int]:
    """Step both through `tokens`, all logits equal within the tolerance: where the likeliest token is another.

    Rounded activations alone may part them: summed in another order, a value may round the other way.
    """
    assert golden.logits is not None
    rows = [(here.step(t), there.step(t)) for t in tokens]
    left, right = (np.stack(side) for side in zip(*rows, strict=True))
    assert abs(left - right).max() <= golden.bound("runtime", right)
    return np.flatnonzero(left.argmax(1) != right.argmax(1)).tolist()


@pytest.mark.skipif(not OCLGRIND.is_file(), reason="no oclgrind: apt-get install oclgrind")
@pytest.mark.parametrize(("name", "storage"), CASES if EVERY else CASES[1::2])
def test_no_kernel_of_a_family_races_or_strays(name: str, storage: str, tmp_path: Path) -> None:
    assert oclgrind(bundled(name, storage, "opencl"), tmp_path) == ""
