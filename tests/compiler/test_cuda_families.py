"""CUDA programs of every family: kernels of every storage compile to machine code for each GPU we name, and to PTX."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from edgeseq.bundle.reader import BundleFile
from edgeseq.compiler import compile_export
from edgeseq.compiler.gpu.nvrtc import CUBIN, MAGIC, PTX
from edgeseq.models import families
from edgeseq.models.source import random_source
from exporters import export
from tests.every import STEP_MODELS, chunks, rotated

from .ptx import needs_nvcc

SMS = (87, 90, 100)
TARGET = f"""
description = "every GPU that has a target, in one program"
triple = "auto"
cpu = "auto"
[gpu]
backend = "cuda"
sm = {list(SMS)}
threads = 1024
local_bytes = 49152
half = true
[transport]
kind = "local"
"""


def images(code: bytes) -> dict[tuple[int, int], bytes]:
    """What an archive of gpu/nvrtc.py holds, by kind and compute capability."""
    assert code[:8] == MAGIC
    (n, _) = struct.unpack_from("<II", code, 8)
    records = [struct.unpack_from("<IIQQ", code, 16 + 24 * i) for i in range(n)]
    return {(kind, sm): code[at : at + size] for kind, sm, at, size in records}


STORAGES = ("fp32:none", "fp16:none", "bf16:none", "fp32:int8", "fp16:int4")
PAIRS = [
    (family, storage)
    for i, family in enumerate(sorted(families().keys() | STEP_MODELS.keys()))
    for storage in rotated(i, STORAGES)
]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("family", "storage"), PAIRS)
def test_every_kernel_is_in_every_image(family: str, storage: str, tmp_path: Path) -> None:
    dtype, quant = storage.split(":")
    record, config = STEP_MODELS[family] if family in STEP_MODELS else (families()[family], families()[family].tiny)
    source = random_source(family, record, config)
    export(source, tmp_path / "export", chunks=chunks(family), dtype=dtype, quant=quant)
    (tmp_path / "gpus.toml").write_text(TARGET)
    compile_export(tmp_path / "export", str(tmp_path / "gpus.toml"), tmp_path / "bundle")
    with BundleFile(tmp_path / "bundle") as file:
        names = [k.name for k in file.plan.kernels]
        found = images(file.plan.kernels[0].code)
    assert found.keys() == {*((CUBIN, sm) for sm in SMS), (PTX, min(SMS))}
    for (kind, sm), image in found.items():
        assert image.startswith(b"\x7fELF") == (kind == CUBIN)
        assert [name for name in names if name.encode() not in image] == [], f"missing for sm_{sm}"
    assert f".target sm_{min(SMS)}".encode() in found[PTX, min(SMS)]
    steps = {"none": "linear_mma_t4", "int8": "linear_q_t4", "int4": "linear_q_t4"}[quant]
    if storage != "fp32:none" and family in families():
        assert any(name.startswith(steps) for name in names), "prompts go to tensor cores"
