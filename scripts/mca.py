"""Whether the inner loop of a product of one token keeps up with a device's memory, by llvm-mca.

    python scripts/mca.py raspberry-pi-5 --storage int4,int8,fp16,fp32
    python scripts/mca.py dimensity-9300-cpu --storage int4 --rows 3072 --width 768

Builds the kernel for the device profile, takes the innermost loop that multiplies, asks llvm-mca for its cycles on each
kind of core of the profile, and prints bytes of weights per cycle, what all cores at their clocks could consume, and
that over the profile's bandwidth: 1 and more keeps up. llvm-mca knows nothing of caches: every load hits the first.

LLVM schedules several cores by an older one's model (cortex-a76 by the A57's). Where their server twin has a model of
its own, there is a second row for that.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from devices.profile import Profile, load_profile
from edgeseq.compiler.codegen import KernelSet
from edgeseq.compiler.ir import KernelRef
from edgeseq.compiler.kernels.linear import Linear
from edgeseq.compiler.kernels.linear_q import LinearQ
from edgeseq.compiler.targets import Target, resolve
from edgeseq.errors import EdgeseqError, UsageError

TWINS = {
    "cortex-a76": "neoverse-n1",
    "cortex-x1": "neoverse-v1",
    "cortex-x3": "neoverse-v2",
    "cortex-x4": "neoverse-v2",
}
"""Server cores of the same design: Arm's Neoverse N1, V1 and V2 technical reference manuals. The X4 has no twin here;
the V2 is the X3's."""
BYTES = {"int4": 0.5 + 2 / 32, "int8": 1 + 2 / 32, "fp16": 2.0, "bf16": 2.0, "fp32": 4.0}
"""Of a weight, scales included."""
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
PRODUCTS = {"sdot": 16, "smmla": 32, "mla": 4, "fmla": 4}
"""Of one instruction; the first one found decides."""
EXTENSIONS = {"dotprod": "dotprod", "i8mm": "i8mm", "fp16": "fullfp16", "fhm": "fp16fml"}
ITERATIONS = 200


@dataclass(frozen=True)
class Loop:
    """Instructions of one turn, and how many products of a weight and an activation they make."""

    lines: tuple[str, ...]
    products: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", metavar="PROFILE")
    parser.add_argument("--storage", default="int4,int8", metavar="TYPE,…", help=f"of {', '.join(BYTES)}")
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1, help="more than one: products per cycle of a chunk")
    parser.add_argument("--llvm-mca", default="", metavar="PATH", help="default: the newest that is installed")
    parser.add_argument("--show", action="store_true", help="the loop's assembly too")
    args = parser.parse_args()
    try:
        report(args)
    except EdgeseqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def report(args: argparse.Namespace) -> None:
    profile, target = load_profile(args.profile), resolve(args.profile)
    if not profile.clusters or not profile.peak_bandwidth_gbs or target.llvm is None:
        raise UsageError(
            f"the profile {args.profile} says no clocks or no bandwidth", "see [[core]] in docs/adding-a-device.md"
        )
    tool = args.llvm_mca or newest()
    rate, all_cores = ("bytes/cycle", "GB/s") if args.tokens == 1 else ("products/cycle", "G products/s")
    print(
        f"| storage | model | instructions | cycles | products | {rate} | {all_cores} of all cores | of the bandwidth |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for storage in args.storage.split(","):
        loop = innermost(assembly(target, storage, args.tokens, args.rows, args.width))
        if args.show:
            print("\n".join(loop.lines))
        each = BYTES[storage] if args.tokens == 1 else 1
        for model in models(profile):
            cycles = {c.cpu: measure(tool, loop, model.get(c.cpu, c.cpu), target.features) for c in profile.clusters}
            rates = {cpu: loop.products * each / n for cpu, n in cycles.items()}
            total = sum(c.count * c.clock_ghz * rates[c.cpu] for c in profile.clusters)
            names = ", ".join(model.get(cpu, cpu) for cpu in cycles)
            share = f"{total / profile.peak_bandwidth_gbs:.2f}" if args.tokens == 1 else ""
            print(
                f"| {storage} | {names} | {len(loop.lines)} | {joined(cycles.values(), 1)} | {loop.products}"
                f" | {joined(rates.values(), 2)} | {total:.1f} | {share} |"
            )


def joined(values, digits: int) -> str:  # type: ignore[no-untyped-def]
    return ", ".join(f"{v:.{digits}f}" for v in values)


def models(profile: Profile) -> list[dict[str, str]]:
    """Names of scheduling models by core: LLVM's own choice, then the twins where there are any."""
    twins = {c.cpu: TWINS[c.cpu] for c in profile.clusters if c.cpu in TWINS}
    return [{}, twins] if twins else [{}]


def assembly(target: Target, storage: str, tokens: int, rows: int, width: int) -> str:
    """Of a product of some tokens."""
    if storage not in BYTES:
        raise UsageError(f"there is no storage {storage!r}", f"known: {', '.join(BYTES)}")
    params: Linear | LinearQ
    if storage in DTYPES:
        params = Linear(
            tokens,
            rows,
            width,
            width,
            DTYPES[storage],
            tile=target.gemm_tile,
            streams=target.streams,
            ahead=target.ahead,
            chains=target.chains,
        )
    else:
        bits, dot = int(storage[3:]), target.dot
        params = LinearQ(tokens, rows, width, bits, dot.name, tile=dot.tile, streams=target.streams, ahead=target.ahead)
    kernels = KernelSet(target)
    kernels.add(KernelRef("linear_q" if isinstance(params, LinearQ) else "linear", params), len(params.args))
    with tempfile.TemporaryDirectory() as folder:
        kernels.write_object(Path(folder) / "k.o", Path(folder) / "k.s")
        return (Path(folder) / "k.s").read_text()


def innermost(text: str) -> Loop:
    """The loop without another inside that makes the most products a turn."""
    lines = [line.split("//")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and (line.endswith(":") or not line.startswith("."))]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    found = []
    for end, line in enumerate(lines):
        target = re.fullmatch(r"(?:b\.\w+|b|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.\w+)", line)
        start = labels.get(target[1], end) if target else end
        if start < end:
            found.append((start, end))
    inner = [(s, e) for s, e in found if not any(s <= s2 and e2 < e for s2, e2 in found)]
    loops = [tuple(line for line in lines[s : e + 1] if not line.endswith(":")) for s, e in inner]
    return max((Loop(body, products_of(body)) for body in loops), key=lambda loop: loop.products)


def products_of(lines: tuple[str, ...]) -> int:
    names = [line.split()[0] for line in lines]
    return next((each * names.count(name) for name, each in PRODUCTS.items() if name in names), 0)


def newest() -> str:
    """The path of the newest llvm-mca."""
    for name in [f"llvm-mca-{n}" for n in range(30, 13, -1)] + ["llvm-mca"]:
        if path := shutil.which(name):
            return path
    raise UsageError("llvm-mca is not installed", "it comes with LLVM: Debian's packages llvm and llvm-19")


def measure(tool: str, loop: Loop, cpu: str, features: tuple[str, ...]) -> float:
    """Cycles of a turn."""
    extensions = ",".join("+" + EXTENSIONS[f] for f in features if f in EXTENSIONS)
    command = [tool, "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu}", f"-mattr={extensions}", f"-iterations={ITERATIONS}"]
    text = "\n".join(line for line in loop.lines) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    cycles = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if done.returncode or not cycles or "not a recognized processor" in done.stderr:
        raise EdgeseqError(f"{Path(tool).name}: {done.stderr.strip().splitlines()[0] if done.stderr else 'no cycles'}")
    return int(cycles[1]) / ITERATIONS


if __name__ == "__main__":
    sys.exit(main())
