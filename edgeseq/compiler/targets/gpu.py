"""GPUs: kernels of `compiler/gpu`, driven by a CPU for which only the runtime is made."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from . import Dot, Target

if TYPE_CHECKING:
    from devices.profile import Profile


def make(profile: Profile, host: Target) -> Target:
    """host: the target of the CPU that drives the GPU; its own instruction sets do not matter."""
    gpu = profile.gpu
    assert gpu is not None
    if gpu.backend == "cuda" and not gpu.sm:
        gpu = replace(gpu, sm=(local_capability(),))
    if gpu.backend == "cuda":
        gpu = replace(gpu, subgroup=32, mma=min(gpu.sm) >= 80)
    dot = Dot("dp4a", signed=True, tile=(1, 1))
    return replace(host, name=profile.name, llvm=None, features=(), gemm_tile=(1, 1), dot=dot, gpu=gpu)


def local_capability() -> int:
    """Compute capability of this machine's first NVIDIA GPU, 90 for 9.0. Raises CompileError where there is none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    hint = "name the architecture: --target cuda-sm90, say"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        raise CompileError("there is no NVIDIA driver here to ask for the GPU's architecture", hint) from None
    found = re.match(r"(\d+)\.(\d)\s*$", done.stdout.splitlines()[0] if done.stdout else "")
    if done.returncode or not found:
        raise CompileError("the NVIDIA driver did not say which architecture its GPU has", hint)
    return int(found[1]) * 10 + int(found[2])
