"""What leaves the library, what it asks of the system, how large it is, and that every compiler is content."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from runtimes import C_DIR, sources

from . import build

HEADER = C_DIR / "include" / "edgeseq.h"

# libc and pthreads, and nothing that prints, exits, aborts or keeps state behind the caller's back.
ALLOWED = {
    "calloc", "free", "malloc", "qsort", "memcmp", "memcpy", "memset", "strcmp", "snprintf", "vsnprintf",
    "__errno_location",
    "open", "close", "fstat", "mmap", "munmap", "madvise", "sysconf", "clock_gettime", "getauxval",
    "sched_getaffinity", "sched_setaffinity", "sched_yield", "nanosleep", "__sched_cpucount", "__cpu_model",
    "pthread_attr_destroy", "pthread_attr_init", "pthread_attr_setstacksize", "pthread_cond_broadcast",
    "pthread_cond_destroy", "pthread_cond_init", "pthread_cond_wait", "pthread_create", "pthread_join",
    "pthread_mutex_destroy", "pthread_mutex_init", "pthread_mutex_lock", "pthread_mutex_unlock",
    "es_linked_kernels",
}  # fmt: skip


# A driver is opened, asked for by the environment, and what it built is kept.
ALLOWED_WITH_A_DRIVER = {
    "dlopen", "dlsym", "dlclose", "dlerror", "getenv", "strlen", "strstr", "strncmp", "strtol", "posix_memalign",
    "read", "write", "rename", "unlink", "getpid",
}  # fmt: skip


def declared() -> set[str]:
    """Functions of the header."""
    return set(re.findall(r"^ES_API [^;(]*?\b(es_\w+)\(", HEADER.read_text(), re.M))


def symbols(path: Path, *flags: str) -> list[tuple[str, str]]:
    """(type, name) of nm."""
    lines = [line.split() for line in build.run(["nm", *flags, path]).splitlines()]
    return [(fields[-2], fields[-1]) for fields in lines if len(fields) >= 2]


def test_only_the_header_leaves_the_library(handmade_bundle: Path) -> None:
    exported = {name for _, name in symbols(handmade_bundle / "libmodel.so", "-D", "--defined-only")}
    assert exported == declared(), "undeclared or missing functions"
    assert len(exported) > 30


def test_other_symbols_are_prefixed_and_hold_no_data() -> None:
    for obj in build.core(("-O2", "-fno-pic", *GPUS)):  # position-independent code moves constants of pointers
        for kind, name in symbols(obj):
            if kind == "U":
                gpu = obj.stem.startswith(("opencl", "cuda")) and name in ALLOWED_WITH_A_DRIVER
                assert gpu or name in ALLOWED or name.startswith("es_"), f"{obj.stem} calls {name}"
            elif kind.isupper():
                assert name.startswith("es_"), f"{obj.stem} defines {name}"
            assert kind not in "DdBbCSs", f"{obj.stem} has the global variable {name}"


GPUS = ["-DES_WITH_OPENCL", "-DES_WITH_CUDA"]


@pytest.mark.parametrize(("gpus", "most"), [([], 64), (GPUS, 100)], ids=["cpu", "gpus"])
def test_the_core_is_small(tmp_path: Path, record_property: pytest.RecordProperty, gpus: list[str], most: int) -> None:
    flags = ["-Os", "-fPIC", "-shared", "-s", "-ffunction-sections", "-Wl,--gc-sections", *gpus]
    library = build.program(tmp_path / "core.so", build.KERNELS, flags)
    size = library.stat().st_size
    record_property("core_bytes", size)
    print(f"stripped core: {size} bytes")
    assert size < most * 1024


@pytest.mark.parametrize("gpus", [[], GPUS], ids=["cpu", "gpus"])
def test_all_files_in_one_unit(handmade_bundle: Path, tmp_path: Path, gpus: list[str]) -> None:
    """The amalgamation needs names that do not collide."""
    unit = tmp_path / "unit.c"
    unit.write_text("".join(f'#include "{path}"\n' for path in [*sources(), build.KERNELS]))
    api = C_DIR / "tests" / "test_api.c"
    test = build.compile_c(tmp_path / "unit", [unit, api], [build.plan_id(), "-O1", *gpus, "-ldl"])
    assert build.run([test, handmade_bundle / "model.edgeseq"]) == "ok\n"


@pytest.mark.parametrize("standard", ["c99", "c11", "c17"])
def test_header_in_c(tmp_path: Path, standard: str) -> None:
    file = tmp_path / "one.c"
    file.write_text('#include "edgeseq.h"\n#include "edgeseq.h"\nint main(void) { return (int)ES_OK; }\n')
    build.run(["gcc", *build.WARNINGS, f"-std={standard}", f"-I{HEADER.parent}", "-fsyntax-only", file])


def test_header_in_cpp(tmp_path: Path) -> None:
    file = tmp_path / "one.cc"
    file.write_text(
        '#include "edgeseq.h"\n'
        "int main() { es_error e = ES_ERROR_INIT; es_options o = ES_OPTIONS_INIT; es_sampler s = ES_SAMPLER_INIT;\n"
        "  es_model_info m = ES_MODEL_INFO_INIT; es_graph_info g = ES_GRAPH_INFO_INIT;\n"
        "  es_tensor_info t = ES_TENSOR_INFO_INIT; es_model *model = nullptr;\n"
        '  return es_model_open("x", &o, &model, &e) == ES_OK && s.top_k + m.vocab + g.tokens + t.rank; }\n'
    )
    flags = ["-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", f"-I{HEADER.parent}"]
    build.run(["g++", *flags, "-fsyntax-only", file])


@pytest.mark.parametrize("target", ["x86_64-linux-gnu.2.28", "aarch64-linux-gnu.2.31", "aarch64-linux-musl"])
def test_clang_is_content_too(tmp_path: Path, target: str) -> None:
    """zig's clang, with its own idea of warnings, for each target; objects alone, so no libc needs to be built."""
    unit = tmp_path / "unit.c"
    unit.write_text("".join(f'#include "{path}"\n' for path in sources()))
    for file in (unit, C_DIR / "tools" / "edgeseq_device.c", C_DIR / "examples" / "hello.c"):
        flags = [*build.WARNINGS, *build.HIDDEN, *GPUS, "-target", target]
        build.run([*build.ZIG, *flags, "-c", file, "-o", tmp_path / f"{file.stem}.o"])


def test_the_layout_of_structs_is_the_bindings(tmp_path: Path) -> None:
    """sizeof and offsets as ctypes sees them."""
    import ctypes

    from edgeseq import runtime_abi as abi

    pairs = {
        "es_error": abi.Error, "es_options": abi.Options, "es_model_info": abi.ModelInfo,
        "es_device_info": abi.DeviceInfo, "es_graph_info": abi.GraphInfo, "es_tensor_info": abi.TensorInfo,
        "es_sampler": abi.Sampler,
    }  # fmt: skip
    checks = []
    for name, cls in pairs.items():
        checks.append(f"sizeof({name}) == {ctypes.sizeof(cls)}")
        for field in cls._fields_:
            checks.append(f"offsetof({name}, {field[0]}) == {getattr(cls, field[0]).offset}")
    lines = "".join(f"typedef char check_{i}[({c}) ? 1 : -1];\n" for i, c in enumerate(checks))
    file = tmp_path / "layout.c"
    file.write_text(f'#include "edgeseq.h"\n{lines}')
    build.run(["gcc", "-std=c99", f"-I{HEADER.parent}", "-fsyntax-only", file])
    assert set(abi._PROTOTYPES) <= declared()


def test_the_document_lists_the_instruction_sets() -> None:
    document = (C_DIR.parent.parent / "docs" / "abi.md").read_text()
    listed = " ".join(re.findall(r"on (?:x86|aarch64) `([^`]*)`", document))
    known = re.findall(r'\{"([^"]+)", (?:\d|0x)', (C_DIR / "src" / "cpu.c").read_text())
    assert set(listed.split()) == set(known) and len(known) > 40


def test_the_fuzz_targets_compile_for_libfuzzer() -> None:
    for target in sorted((C_DIR / "fuzz").glob("fuzz_*.c")):
        build.run(["gcc", *build.WARNINGS, *build.HIDDEN, "-fsyntax-only", target])


def test_no_tool_is_missing() -> None:
    """Tests above must not pass because a tool printed nothing."""
    assert subprocess.run(["nm", "--version"], capture_output=True).returncode == 0
    assert len(sources()) >= 10 and len(declared()) > 30
