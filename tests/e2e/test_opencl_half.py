"""Halves, sub-groups and integer dot products, where a driver has them: Intel's OpenCL for CPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from edgeseq.compiler import compile_export
from exporters import export
from tests.bundles import folder

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(sys.prefix) / "lib" / "libintelocl.so"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not DRIVER.is_file(), reason="no driver with halves: pip install intel-opencl-rt intel-cmplr-lib-rt"
    ),
]


@cache
def environment() -> dict[str, str]:
    """With that driver alone, and optimised, as it has its own compiler."""
    vendors = folder() / "vendors"
    vendors.mkdir()
    (vendors / "intel.icd").write_text(f"{DRIVER}\n")
    libraries = [str(DRIVER.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        **os.environ,
        "OCL_ICD_VENDORS": str(vendors),
        "LD_LIBRARY_PATH": ":".join(libraries),
        "XDG_CACHE_HOME": str(folder() / "cache"),
    }


def python(*arguments: object) -> str:
    """What such a command says.

    This driver's compiler dies in 2 to 8 of 100 builds of the same text, also when pyopencl alone asks for the build:
    releases 2025.0.5, 2025.3.3 and 2026.2.0 do, the last in its pass ReduceCrossBarrierValues. A death inside
    one of the compiler's passes is therefore tried again, three times at most; any other end of the command is not.
    """
    command = [sys.executable, *map(str, arguments)]
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        if not compiler_died(done.returncode, done.stdout + done.stderr):
            break
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def compiler_died(code: int, told: str) -> bool:
    return code < 0 and "bug report to https://software.intel.com" in told and "Running pass" in told


def phone(name: str) -> Path:
    """A profile with that phone's GPU beside this machine's CPU."""
    text = (ROOT / "devices" / "profiles" / f"{name}.toml").read_text()
    made = folder() / f"{name}.toml"
    made.write_text(re.sub(r'(?m)^(triple|cpu) = ".*"', r'\1 = "auto"', text))
    return made


def test_the_driver_has_what_phones_have() -> None:
    code = "import pyopencl as cl; print(cl.get_platforms()[0].get_devices()[0].extensions)"
    extensions = set(python("-c", code).split())
    assert {"cl_khr_fp16", "cl_khr_subgroup_shuffle", "cl_khr_integer_dot_product"} <= extensions


def test_only_a_death_of_the_drivers_compiler_is_tried_again() -> None:
    report = "double free or corruption (out)\nPLEASE submit a bug report to https://software.intel.com/en-us/support"
    assert compiler_died(-14, f'{report}\nStack dump:\n0.\tRunning pass "')
    assert not compiler_died(-11, report)  # a kernel that died
    assert not compiler_died(1, 'edgeseq: Running pass "')


def test_every_kernel_says_what_it_says_without_them() -> None:
    """The comparisons of tests/compiler, which the same command makes on PoCL."""
    told = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow", "tests/compiler/test_opencl_text.py", "-k",
        "test_the_same_text_runs_on_any_device",
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", told)
    assert passed and int(passed[1]) > 40 and "skipped" not in told.splitlines()[-1]


@pytest.mark.parametrize(
    ("model", "dtype", "quant", "name"),
    [
        ("mamba", "fp32", "int4", "tensor-g3"),
        ("mamba2", "fp16", "none", "snapdragon-8-gen-3"),
        ("transformer", "fp16", "int8", "tensor-g3"),
        ("rwkv7", "fp16", "none", "tensor-g3"),
    ],
)
def test_a_trained_model_verifies(model: str, dtype: str, quant: str, name: str) -> None:
    out, bundle = folder() / f"half.{model}", folder() / f"half.{model}.bundle"
    export(f"zoo:tiny-{model}", out, context=128, dtype=dtype, quant=quant, calibrate=0)
    compile_export(out, str(phone(name)), bundle)
    python("-m", "edgeseq", "verify", bundle)
