"""Makes the folder that `tests/gpu/run` checks, on a machine that has the compiler and needs no GPU:

    python -m tests.gpu.prepare DIR                                 the hand-made model and the tiny ones
    python -m tests.gpu.prepare DIR --case mamba:fp16:int4          a family's tiny model, storage, quantisation
    python -m tests.gpu.prepare DIR --case mlstm-odd:fp32:none      a random model of tests/models/support.py
    python -m tests.gpu.prepare DIR --every                         all of those
    python -m tests.gpu.prepare DIR --large zoo:mamba-1.4b:fp16     shapes alone, weights left out
    python -m tests.gpu.prepare DIR --twin zoo:mamba-130m:fp16      its KV-cached attention twin, likewise
    python -m tests.gpu.prepare DIR --full                          all that one visit to a GPU should bring home

A case is DIR/NAME/gpu (bundle), DIR/NAME/host (the same model for a plain x86-64), cpu.state and expect.json: the
prompt, the tokens that the CPU runtime chose after it and by how much, the bound of its golden. DIR/run and DIR/script
are `tests/gpu/run` and what it needs, so that DIR can be carried to a machine that has Python and a driver, no more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import edgeseq
from edgeseq.bundle.ledger import ledger
from edgeseq.bundle.reader import BundleFile
from edgeseq.cli import run
from edgeseq.compiler.gpu.nvrtc import images
from edgeseq.compiler.targets import resolve
from edgeseq.models.source import FamilySource
from edgeseq.verify.golden import load_golden
from exporters import golden as golden_file

from ..models.support import ODD
from ..runtime import build, cuda_bundle, handmade
from .refill import KEPT_BYTES, strip

HERE = Path(__file__).parent
HOST = HERE / "x86-64-v3.toml"
ARM = HERE / "aarch64.toml"
GREEDY = 64
PROMPTS = 6
STORAGES = ("fp32:none", "fp16:none", "bf16:none", "fp32:int8", "fp16:int4")
LARGE = (
    "mamba-130m:fp16", "mamba-130m:fp16:int4", "mamba-1.4b:fp16", "mamba-1.4b:fp16:int4", "mamba-2.8b:fp16",
    "mamba-2.8b:fp16:int4", "mamba2-1.3b:fp16", "mamba2-1.3b:fp16:int4", "mamba2-2.7b:fp16", "mamba2-2.7b:fp16:int4",
)  # fmt: skip
TWINS = ("mamba-130m:fp16", "mamba-1.4b:fp16")
TWIN_CONTEXT = "132096"  # room for 1024 tokens at a depth of 128k
CARRIED = (
    "tests/gpu/run.py", "tests/gpu/checks.py", "tests/gpu/refill.py", "tests/gpu/runtime.py", "tests/gpu/speed.py",
    "edgeseq/runtime_abi.py", "edgeseq/bench/nvml.py",
)  # fmt: skip
RUN = """#!/bin/sh
# Checks and measures what lies beside it on this machine's GPU. Needs Python 3.9 and NVIDIA's driver: ./run --help
here="$(cd "$(dirname "$0")" && pwd)"
exec "${PYTHON:-python3}" "$here/script/tests/gpu/run.py" "$here" "$@"
"""
THREADS = {
    "gather": 16,
    "leak1": 16,
    "leak4": 16,
    "leak8": 16,
    "logits1": 32,
    "logits4": 32,
    "logits8": 32,
    "choose": 32,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.prepare", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="cuda-sm90", help="of the GPU bundles")
    parser.add_argument("--case", action="append", default=[], metavar="FAMILY:DTYPE:QUANT")
    parser.add_argument("--every", action="store_true", help="a random model of odd sizes of every family")
    parser.add_argument("--large", action="append", default=[], metavar="SOURCE:DTYPE[:QUANT]")
    parser.add_argument("--twin", action="append", default=[], metavar="SOURCE:DTYPE[:QUANT]")
    parser.add_argument("--full", action="store_true", help="tiny, every family, the large shapes and twins")
    parser.add_argument("--context", default="2048", help="of large shapes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sys.exit(1 if _cases(options) else 0)


def carry(out: Path) -> None:
    """The script and what it imports, into the folder."""
    shutil.rmtree(out / "script", ignore_errors=True)
    for name in CARRIED:
        (out / "script" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE.parents[1] / name, out / "script" / name)
    (out / "run").write_text(RUN)
    (out / "run").chmod(0o755)


def _cases(options: argparse.Namespace) -> int:
    """How many were refused."""
    special = options.large or options.twin or options.every
    chosen = options.case or ([] if special and not options.full else ["handmade", *_all_tiny()])
    chosen += [f"{name}:fp32:none" for name in ODD] if options.every or options.full else []
    large = options.large + [f"zoo:{name}" for name in (LARGE if options.full else ())]
    twins = options.twin + [f"zoo:{name}" for name in (TWINS if options.full else ())]
    refused = 0
    carry(options.out)
    for case in chosen:
        if case == "handmade":
            hand_made(options.out / case, target=options.target)
            continue
        name, dtype, quant = case.split(":")
        try:
            _small(options.out / f"{name}-{dtype}-{quant}", name, dtype, quant, options)
        except Refused as error:
            refused += 1
            print(f"{case}: {error}", flush=True)
    for case, command in [*((case, "export") for case in large), *((case, "twin") for case in twins)]:
        try:
            _large(options, command, *_large_parts(case))
        except Refused as error:
            refused += 1
            print(f"{case}: {error}", flush=True)
    return refused


class Refused(Exception):
    """A command that failed, in its words."""


def _all_tiny() -> list[str]:
    listed = json.loads(_edgeseq("list", "zoo", "--json"))
    families = [z["name"].removeprefix("zoo:tiny-") for z in listed if z["name"].startswith("zoo:tiny-")]
    return [f"{family}:{storage}" for family in families for storage in STORAGES]


def _large_parts(case: str) -> tuple[str, str, str]:
    parts = case.split(":")
    quant = parts.pop() if parts[-1] in ("none", "int8", "int4") else "none"
    return ":".join(parts[:-1]), parts[-1], quant


def _edgeseq(*arguments: str | Path) -> str:
    """The command line; its words are this script's when it fails."""
    done = subprocess.run(
        [Path(sys.executable).with_name("edgeseq"), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Refused(f"edgeseq {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


ODD_SOURCE = """
import sys
sys.path.insert(0, {root!r})
from tests.models.support import ODD, random_model

def make():
    return random_model(ODD[{name!r}])
"""


def _small(out: Path, name: str, dtype: str, quant: str, options: argparse.Namespace) -> None:
    """A tiny model of the zoo, or one of odd sizes with a context that it can have."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="edgeseq-gpu-") as work:
        export, source, chunk = Path(work) / "export", f"zoo:tiny-{name}", "8,64"
        if name in ODD:
            file = Path(work) / "odd.py"
            file.write_text(ODD_SOURCE.format(root=str(HERE.parents[1]), name=name))
            source, chunk = f"{file}:make", "4,16"
        _export(export, source, ["--dtype", dtype, "--quant", quant, "--chunk", chunk])
        with tempfile.TemporaryDirectory(prefix="edgeseq-gpu-") as made:
            for target, place in ((options.target, "gpu"), (HOST, "host")):
                _edgeseq("compile", export, "--target", target, "-o", Path(made) / "case" / place)
            shutil.move(Path(made) / "case", out)
            _expect(out)
            if on_arm(options.target):  # the CPU beside that GPU
                shutil.rmtree(out / "host")
                _edgeseq("compile", export, "--target", ARM, "-o", Path(made) / "host")
                shutil.move(Path(made) / "host", out / "host")
    _slim(out)
    print(out.name, flush=True)


def on_arm(target: str) -> bool:
    """The GPU's host is no x86-64, as Jetson's."""
    return resolve(target).shared.startswith("aarch64")


def _export(out: Path, source: str, arguments: list[str]) -> None:
    """With room for the greedy tokens where the model has it."""
    try:
        _edgeseq("export", source, "-o", out, *arguments, "--context", "512")
    except Refused as error:
        if "context" not in str(error):
            raise
        _edgeseq("export", source, "-o", out, *arguments)


def _large(options: argparse.Namespace, command: str, source: str, dtype: str, quant: str) -> None:
    """The matrices are not even drawn: `refill` draws others. command: "export", or "twin" of the source."""
    name = f"{source.rpartition(':')[2].rpartition('/')[2]}-{dtype}-{quant}"
    out = options.out / (name if command == "export" else f"{name}.twin")
    context = options.context if command == "export" else TWIN_CONTEXT
    facts = {"prompt": [1, 2, 3], "source": source, "dtype": dtype, "quant": quant}
    facts |= {"twin_of": name} if command == "twin" else {}
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="edgeseq-gpu-", dir=options.out.parent) as work, shapes_alone():
        export, extra = Path(work) / "export", ["--calibrate", "0"] if quant == "int4" else []
        _in_process(command, source, "-o", export, "--dtype", dtype, "--quant", quant, "--chunk", "64",
                    "--context", context, *extra)  # fmt: skip
        _in_process("compile", export, "--target", options.target, "-o", Path(work) / "case" / "gpu")
        case = Path(work) / "case"
        (case / "expect.json").write_text(json.dumps(facts | _facts(case / "gpu")))
        _slim(case)
        strip(case / "gpu")
        shutil.move(case, out)
    print(out.name, flush=True)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Exports write a constant for each large tensor, and no golden: PyTorch would need the whole model in memory."""
    tensor, write = FamilySource.tensor, golden_file.write

    def cheap(self: FamilySource, name: str) -> Any:
        shape = self._shapes[name]
        large = name not in self._constants and 2 * int(np.prod(shape)) > KEPT_BYTES
        return np.full(shape, 0.01, np.float32) if large else tensor(self, name)

    FamilySource.tensor, golden_file.write = cheap, lambda *_: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        FamilySource.tensor, golden_file.write = tensor, write  # type: ignore[method-assign]


def _in_process(*arguments: str | Path) -> None:
    if run([str(a) for a in arguments]):
        raise Refused(f"edgeseq {arguments[0]} failed")


def _slim(out: Path) -> None:
    """What the script does not use stays here."""
    for bundle in (p for p in out.iterdir() if p.is_dir()):
        for name in ("libmodel.a", "edgeseq-device", "edgeseq.h"):
            (bundle / name).unlink(missing_ok=True)


def _facts(bundle: Path) -> dict[str, Any]:
    """Bytes that a token moves, and the names of the step's launches."""
    with BundleFile(bundle, check_weights=False) as file:
        plan = file.plan
        return {"bytes_per_token": ledger(plan).bytes_per_token(), "launches": [x.kernel for x in plan.step.launches]}


def _expect(out: Path) -> None:
    """expect.json and cpu.state, by the CPU runtime."""
    with BundleFile(out / "host", check_weights=False) as file:
        manifest = file.plan.manifest
    golden = load_golden(out / "gpu", manifest.step.signature, manifest.family)
    assert golden.tokens is not None and golden.logits is not None
    bound = golden.bound("runtime", golden.logits)
    _choose(out, [int(t) for t in golden.tokens], bound)


def _choose(out: Path, tokens: list[int], bound: float) -> None:
    """Of some prompts the one after which the CPU's choices are clearest."""
    best: tuple[float, dict[str, Any], bytes] | None = None
    with edgeseq.load(out / "host", threads=1) as model:
        for i in range(PROMPTS):
            prompt = tokens[i : i + max(1, len(tokens) // 2)]
            session = model.session()
            logits = session.prefill(prompt)
            state = session.save()
            made, margins = [], []
            room = model.info.context - len(prompt) if model.info.context else GREEDY
            for _ in range(min(GREEDY, room)):
                second, first = np.partition(logits, -2)[-2:]
                made.append(int(np.argmax(logits)))
                margins.append(float(first - second))
                logits = session.step(made[-1])
            found = {"prompt": prompt, "tokens": made, "margins": margins, "bound": bound}
            if best is None or min(margins) > best[0]:
                best = (min(margins), found, state)
    assert best is not None
    (out / "cpu.state").write_bytes(best[2])
    (out / "expect.json").write_text(json.dumps(best[1] | _facts(out / "gpu")))


def hand_made(out: Path, code: bytes | None = None, target: str = "cuda-sm90") -> None:
    """The runtime's own test model: its kernels by nvcc, so that little of the compiler is in it. code: other images,
    for a driver that is none."""
    shutil.rmtree(out, ignore_errors=True)
    there, p = resolve(target), cuda_bundle.parts(threads=THREADS)
    assert there.gpu is not None
    cuda_bundle.code(p, code or images((HERE / "handmade.cu").read_text(), there.gpu.sm))
    zig = [*build.ZIG, "-target", there.shared, "-fno-sanitize=all"]
    cuda_bundle.bundle(out / "gpu", p, tuple(zig))
    (out / "host").mkdir()
    (out / "host" / "model.edgeseq").write_bytes(handmade.parts().build())
    library, flags = out / "host" / "libmodel.so", ["-O2", "-fPIC", "-shared"]
    build.program(library, build.KERNELS, flags)
    reference, tokens = handmade.Reference(), [int(t) for t in np.random.default_rng(3).integers(0, handmade.V, 12)]
    logits = np.stack([reference.step(t) for t in tokens]).astype(np.float32)
    from safetensors.numpy import save_file

    save_file({"tokens": np.array(tokens, np.int64), "logits": logits}, out / "gpu" / "golden.safetensors")
    _choose_hand_made(out, tokens, 1e-5 * float(np.abs(logits).max()))
    build.program(library, build.KERNELS, flags, compiler=zig)  # for the machine that it goes to
    print(out.name, flush=True)


def _choose_hand_made(out: Path, tokens: list[int], bound: float) -> None:
    """Its context is 64: the prompt and fewer tokens than elsewhere fit."""
    reference, made, margins = handmade.Reference(), [], []
    for t in tokens[:6]:
        logits = reference.step(t)
    with edgeseq.load(out / "host", threads=1) as model:
        session = model.session()
        session.prefill(tokens[:6])
        (out / "cpu.state").write_bytes(session.save())
    for _ in range(50):
        second, first = np.partition(logits, -2)[-2:]
        made.append(int(np.argmax(logits)))
        margins.append(float(first - second))
        logits = reference.step(made[-1])
    facts = {"prompt": tokens[:6], "tokens": made, "margins": margins, "bound": bound}
    (out / "expect.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
