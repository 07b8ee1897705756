"""The weights of a source as GGUF files, for `edgeseq bench --against llama-bench`, by llama.cpp's own tools.

    python scripts/gguf.py zoo:mamba-130m --llama-cpp ~/llama.cpp -o gguf --types Q4_0,Q8_0,F16

writes gguf/mamba-130m-Q4_0.gguf and so on. SOURCE is a Hugging Face directory or a source that can be written as one
(`edgeseq/models/hf_write.py`); --llama-cpp is a source tree of llama.cpp with `llama-quantize` built in build/bin or on
PATH. A type that ends in "-pure" has every matrix in that type (llama-quantize --pure); without it llama.cpp chooses
more bits for some, such as Q6_K for the output. The conversion goes by way of F32, 4 bytes a weight on disk.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from edgeseq.errors import EdgeseqError, UsageError
from edgeseq.models.hf_write import write_hf
from edgeseq.models.source import open_source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR", help="llama.cpp's source tree")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--types", default="Q4_0,Q8_0,F16", metavar="TYPE,…")
    options = parser.parse_args()
    try:
        convert(options.source, options.llama_cpp, options.out, options.types.split(","))
    except EdgeseqError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        print(f"{error.cmd[0]} failed with {error.returncode}", file=sys.stderr)
        return 1
    return 0


def convert(text: str, llama_cpp: Path, out: Path, types: list[str]) -> None:
    """Write `out`/NAME-TYPE.gguf for each type."""
    converter, quantise = llama_cpp / "convert_hf_to_gguf.py", _quantise(llama_cpp)
    if not converter.is_file():
        raise UsageError(f"{llama_cpp} has no convert_hf_to_gguf.py", "name a source tree of llama.cpp")
    name = Path(text.removeprefix("zoo:")).name
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        directory, whole = Path(text), Path(temporary) / "f32.gguf"
        if not directory.is_dir():
            directory = Path(temporary) / name
            write_hf(open_source(text), directory)
        _run(sys.executable, converter, directory, "--outtype", "f32", "--outfile", whole)
        for kind in types:
            pure = ["--pure"] if kind.endswith("-pure") else []
            made = Path(temporary) / "made.gguf"
            _run(quantise, *pure, whole, made, kind.removesuffix("-pure"))
            made.rename(out / f"{name}-{kind}.gguf")


def _quantise(llama_cpp: Path) -> Path:
    built = llama_cpp / "build" / "bin" / "llama-quantize"
    found = str(built) if built.is_file() else shutil.which("llama-quantize")
    if found is None:
        raise UsageError(f"there is no llama-quantize in {built.parent} or on PATH", "build llama.cpp with CMake")
    return Path(found)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
