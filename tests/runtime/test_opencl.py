"""The OpenCL backend beyond what every session test asks of it: what a step enqueues, states that change between CPU
and GPU, kept programs, and every way in which a driver can fail."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import edgeseq
from edgeseq.errors import EdgeseqError, RuntimeFailure
from edgeseq.runtime import Model, Sampling

from . import build, handmade, handmade_gpu
from .opencl_shim import Shim
from .test_session import TOKENS, close, expected

pytestmark = pytest.mark.skipif(bool(build.opencl_missing()), reason=build.opencl_missing() or "there")

MAX_MEM_ALLOC, DRIVER_VERSION, DEVICE_VERSION, UNIFIED, AVAILABLE, WORK_ITEMS = (
    0x1010, 0x102D, 0x102F, 0x1035, 0x1027, 0x1005,
)  # fmt: skip


@pytest.fixture(scope="module")
def built_shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def shim(built_shim: Shim, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shim]:
    monkeypatch.setenv("EDGESEQ_OPENCL_LIBRARY", str(built_shim.path))
    built_shim.clear()
    yield built_shim
    built_shim.clear()
    assert built_shim.live == 0, "objects of the driver are left"


def changed(tmp_path: Path, change: Callable[[handmade.Parts], None], code: bytes | None = None) -> Path:
    """The hand-made bundle after `change`."""
    parts = handmade_gpu.parts(code=code)
    change(parts)
    return build.gpu_bundle(tmp_path / "changed", parts)


def kept(bundle: Path) -> list[Path]:
    """The programs kept beside a bundle."""
    return sorted(bundle.glob("model.edgeseq.*"))


def test_a_step_only_enqueues(opencl_bundle: Path, shim: Shim) -> None:
    """Tokens and position in one write, the launches, logits and next token in one read, one wait."""
    with edgeseq.load(opencl_bundle) as model, model.session() as session:
        session.step(3)
        shim.clear()
        session.step(4)
        assert shim.calls() == {
            "EnqueueNDRangeKernel": 4, "EnqueueWriteBuffer": 1, "EnqueueReadBuffer": 1, "Finish": 1
        }  # fmt: skip


def test_a_prefill_waits_once_and_skips_what_feeds_outputs(opencl_bundle: Path, shim: Shim) -> None:
    with edgeseq.load(opencl_bundle) as model, model.session() as session:
        shim.clear()
        close(session.prefill(TOKENS[:57]), expected(TOKENS[:57])[-1])  # seven chunks of 8 and a step
        calls = shim.calls()
        assert calls["EnqueueNDRangeKernel"] == 7 * 2 + 4 and calls["Finish"] == 1 and calls["EnqueueReadBuffer"] == 1


def test_greedy_steps_make_no_round_trip(opencl_bundle: Path, shim: Shim) -> None:
    with edgeseq.load(opencl_bundle) as model, model.session() as session:
        session.prefill(TOKENS[:3])
        shim.clear()
        session.generate_timed(50)
        assert shim.calls()["Finish"] == 2, "two batches of at most 32"
        assert "EnqueueWriteBuffer" in shim.calls() and shim.calls()["EnqueueReadBuffer"] == 3


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 50])
def test_greedy_is_sample_and_step(model: Model, n: int) -> None:
    loop, batch = model.session(), model.session()
    for session in (loop, batch):
        session.prefill(TOKENS[:9])
    want = list(loop.generate(n))
    got, ns = batch.generate_timed(n)
    assert got == want and len(set(want)) > (n > 2) and (ns > 0).all()
    assert batch.position == 9 + n and np.array_equal(batch.logits, loop.logits) and batch.save() == loop.save()
    close(batch.step(1), loop.step(1))
    assert (batch.profile() == 0).sum() == 0 and batch.position == 9 + n + 2


def test_drawing_draws_the_same_everywhere(opencl_bundle: Path, handmade_bundle: Path) -> None:
    def drawn(bundle: Path) -> list[int]:
        with edgeseq.load(bundle) as model, model.session() as session:
            session.prefill(TOKENS[:9])
            return session.generate_timed(20, Sampling(temperature=4.0, seed=5))[0]

    assert drawn(opencl_bundle) == drawn(handmade_bundle)


def test_a_state_changes_between_cpu_and_gpu(opencl_bundle: Path, handmade_bundle: Path) -> None:
    with edgeseq.load(handmade_bundle, threads=1) as cpu, edgeseq.load(opencl_bundle) as gpu:
        first, want = cpu.session(), expected(TOKENS)
        first.prefill(TOKENS[:21])
        second = gpu.session()
        second.load(first.save())
        assert second.save() == first.save()
        close(second.prefill(TOKENS[21:40]), want[39])
        third = cpu.session()
        third.load(second.save())
        close(third.prefill(TOKENS[40:]), want[-1])
        assert third.save()[48:] != first.save()[48:]


def test_a_copy_on_the_device(opencl_bundle: Path) -> None:
    with edgeseq.load(opencl_bundle) as model:
        left, right = model.session(), model.session()
        left.prefill(TOKENS[:10])
        right.prefill(TOKENS[:3])
        assert model._lib.es_session_copy(right._handle, left._handle) == 0
        assert right.position == 10 and np.array_equal(right.logits, left.logits) and right.save() == left.save()
        left.step(1)
        close(right.step(2), expected(np.append(TOKENS[:10], 2))[-1])


def test_weights_are_cut_at_tensors(tmp_path: Path, shim: Shim) -> None:
    """A third, unused tensor between the two makes three objects where one may have 8 KB; one may not have 4 KB."""

    def padded(p: handmade.Parts) -> None:
        table = len(p.weights) // 2
        p.weights = p.weights[:table] + bytes(8192) + p.weights[table:]
        p.tensors[1][8] = table + 8192
        p.tensors.insert(1, [p.name("pad"), p.name("plain"), 5, 1, 8192, 0, 0, 0, table, 8192])
        for arg in p.args:
            arg[2] = table + 8192 if arg[0] == 0 and arg[2] == table else arg[2]

    bundle = changed(tmp_path, padded)
    shim.info(MAX_MEM_ALLOC, 8192)
    with edgeseq.load(bundle) as model, model.session() as session:
        assert shim.calls()["CreateBuffer"] == 3 + 4
        close(session.prefill(TOKENS), expected(TOKENS)[-1])
    shim.clear()
    shim.info(MAX_MEM_ALLOC, 8191)
    with pytest.raises(RuntimeFailure, match="'pad' has 8192 bytes, .* allocates at most 8191 at once"):
        edgeseq.load(bundle)


@pytest.mark.parametrize("shared", [0, 1])
def test_weights_are_shared_or_copied(opencl_bundle: Path, shim: Shim, shared: int) -> None:
    shim.info(UNIFIED, shared, 4)
    with edgeseq.load(opencl_bundle) as model:
        assert shim.calls().get("EnqueueWriteBuffer", 0) == 1 - shared
        with model.session() as session:
            close(session.prefill(TOKENS), expected(TOKENS)[-1])
        assert model.measure_read_bandwidth() > 0 and model.measure_launch(3, 10) > 0


def test_a_map_that_cannot_be_shared_is_copied(opencl_bundle: Path, shim: Shim) -> None:
    shim.fail("CreateBuffer", -37)  # CL_INVALID_HOST_PTR
    with edgeseq.load(opencl_bundle) as model, model.session() as session:
        close(session.prefill(TOKENS), expected(TOKENS)[-1])


def test_a_program_is_built_once(opencl_bundle: Path, tmp_path: Path, shim: Shim) -> None:
    bundle = changed(tmp_path, lambda p: None)
    assert kept(bundle) == []
    edgeseq.load(bundle).close()
    (file,) = kept(bundle)
    whole = file.read_bytes()
    shim.clear()
    with edgeseq.load(bundle) as model, model.session() as session:
        assert "CreateProgramWithSource" not in shim.calls()
        close(session.prefill(TOKENS), expected(TOKENS)[-1])
    shim.info(DRIVER_VERSION, "another")
    edgeseq.load(bundle).close()
    assert shim.calls()["CreateProgramWithSource"] == 1 and len(kept(bundle)) == 2
    assert file.read_bytes() == whole


def damaged_programs(whole: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "short": whole[:20],
        "cut": whole[:-1],
        "longer": whole + b"x",
        "magic": b"X" + whole[1:],
        "identity size": whole[:8] + b"\xff\xff\xff\xff" + whole[12:],
        "identity": whole[:30] + bytes([whole[30] ^ 1]) + whole[31:],
        "binary size": whole[:16] + b"\xff" * 8 + whole[24:],
        "binary": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
    }


def test_a_damaged_program_is_built_again(tmp_path: Path, shim: Shim) -> None:
    bundle = changed(tmp_path, lambda p: None)
    edgeseq.load(bundle).close()
    (file,) = kept(bundle)
    whole = file.read_bytes()
    for name, data in damaged_programs(whole).items():
        file.write_bytes(data)
        shim.clear()
        edgeseq.load(bundle).close()
        assert shim.calls()["CreateProgramWithSource"] == 1, name
        assert kept(bundle) == [file] and len(file.read_bytes()) >= len(whole) - 64, name
    shim.clear()
    shim.fail("CreateProgramWithBinary", -42)  # CL_INVALID_BINARY
    edgeseq.load(bundle).close()
    assert shim.calls()["CreateProgramWithSource"] == 1


def test_where_nothing_can_be_kept_it_runs_all_the_same(tmp_path: Path) -> None:
    bundle = changed(tmp_path, lambda p: None)
    edgeseq.load(bundle).close()
    (file,) = kept(bundle)
    file.unlink()
    file.mkdir()  # the name is taken by what no rename replaces
    with edgeseq.load(bundle) as model, model.session() as session:
        close(session.prefill(TOKENS), expected(TOKENS)[-1])
    assert kept(bundle) == [file], "no temporary file is left"


def test_there_is_no_driver(opencl_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEQ_OPENCL_LIBRARY", "/nowhere/libOpenCL.so")
    with pytest.raises(RuntimeFailure, match="there is no OpenCL driver: /nowhere/libOpenCL.so cannot be opened") as e:
        edgeseq.load(opencl_bundle)
    assert "compiled for the CPU" in e.value.hint
    monkeypatch.setenv("EDGESEQ_OPENCL_LIBRARY", "libm.so.6")
    with pytest.raises(RuntimeFailure, match="too old: it lacks clGetPlatformIDs"):
        edgeseq.load(opencl_bundle)


def test_there_is_no_device(opencl_bundle: Path, shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    shim.fail("GetPlatformIDs", -1001)
    with pytest.raises(RuntimeFailure, match="offers no device"):
        edgeseq.load(opencl_bundle)
    shim.clear()
    shim.info(AVAILABLE, 0, 4)
    with pytest.raises(RuntimeFailure, match="no OpenCL device is called 'available'; there is "):
        edgeseq.load(opencl_bundle)
    shim.clear()
    shim.info(DEVICE_VERSION, "OpenCL 1.1 old")
    with pytest.raises(RuntimeFailure, match="speaks 'OpenCL 1.1 old', needed is OpenCL 1.2"):
        edgeseq.load(opencl_bundle)
    monkeypatch.setenv("EDGESEQ_OPENCL_DEVICE", "Warp Drive")
    with pytest.raises(RuntimeFailure, match="no OpenCL device is called 'Warp Drive'"):
        edgeseq.load(opencl_bundle)


def test_a_device_is_chosen_by_a_part_of_its_name(opencl_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edgeseq.load(opencl_bundle) as model:
        name = model.info.device.removeprefix("OpenCL, ").split(",")[0]
    monkeypatch.setenv("EDGESEQ_OPENCL_DEVICE", name[2:].upper())
    with edgeseq.load(opencl_bundle) as model:
        assert name in model.info.device


BROKEN: list[tuple[str, bytes | None, Callable[[handmade.Parts], None]]] = [
    ("cannot build the kernels .*error", b"__kernel void gather(__global char *m { oops", lambda p: None),
    ("has no kernel 'gather'", b"__kernel void other(__global int *x) { x[0] = 1; }", lambda p: None),
    ("cannot build the kernels", b"\xff\xfe\0\1 no text", lambda p: None),
    (
        "kernel 'gather' takes 4 arguments, the plan gives 2 x 3",
        handmade_gpu.SOURCE.read_bytes().replace(b"gather(ARG(0), ARG(1), ARG(2))", b"gather(ARG(0), ARG(2))").replace(
            b"AT(float, 1)[(", b"AT(float, 0)[("
        ),
        lambda p: None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "code", "change"), BROKEN)
def test_code_that_is_not_the_plans(
    tmp_path: Path, shim: Shim, sentence: str, code: bytes | None, change: Callable[[handmade.Parts], None]
) -> None:
    with pytest.raises(RuntimeFailure, match=sentence):
        edgeseq.load(changed(tmp_path, change, code))
    assert kept(tmp_path / "changed") == []


def test_groups_that_the_device_cannot_run(opencl_bundle: Path, shim: Shim) -> None:
    shim.info(WORK_ITEMS, sum(8 << 64 * i for i in range(3)), 24)
    with pytest.raises(RuntimeFailure, match="'gather' was compiled for work-groups of 16 x 1 x 1, which .* not take"):
        edgeseq.load(opencl_bundle)


def scenario(bundle: Path) -> None:
    """Everything that calls the driver."""
    with edgeseq.load(bundle, poison=True) as model:
        session = model.session()
        session.prefill(TOKENS[:21])
        state = session.save()
        fork = session.fork()
        fork.load(state)
        fork.prefill(TOKENS[:2])
        model._lib.es_session_copy(session._handle, fork._handle)
        session.generate_timed(8)
        session.profile()
        session.reset()
        session.step(1)
        model.measure_read_bandwidth(repeats=1)
        model.measure_launch(1, 1)


SLOWLY = [pytest.param(code, marks=pytest.mark.slow) for code in (-4, -2, -6, -36, -9999)]


@pytest.mark.parametrize("code", [-5, *SLOWLY])
def test_any_call_may_fail(opencl_bundle: Path, shim: Shim, code: int) -> None:
    """Each function fails at its first, second, third, ... call: a sentence of ours or success, and nothing is left."""
    scenario(opencl_bundle)
    calls, outcomes = shim.calls(), Counter[str]()
    for name in calls:
        if name.startswith("Release"):
            continue
        for skip in {0, 1, calls[name] // 2, calls[name] - 1}:
            shim.clear()
            shim.info(MAX_MEM_ALLOC, 1 << 20)  # no large buffer to measure with
            shim.fail(name, code, skip)
            try:
                scenario(opencl_bundle)
                outcomes["succeeded"] += 1
            except EdgeseqError as refusal:
                assert refusal.sentence and "unknown status" not in refusal.sentence
                outcomes[type(refusal).__name__] += 1
            assert shim.live == 0, f"{name}, call {skip}"
    assert outcomes["RuntimeFailure"] > 20, outcomes


def test_a_lost_device_leaves_the_app_alive(opencl_bundle: Path, shim: Shim) -> None:
    with edgeseq.load(opencl_bundle) as model:
        session, other = model.session(), model.session()
        other.prefill(TOKENS[:4])
        state = session.save()
        session.prefill(TOKENS[:4])
        shim.fail("EnqueueNDRangeKernel", -5, 2)
        for call in (
            lambda: session.step(1), lambda: session.step(1), lambda: session.prefill([1]), session.reset,
            session.save, lambda: session.load(state), session.fork, session.profile, lambda: session.sample(),
            lambda: session.generate_timed(3), lambda: session.run({"tokens": np.zeros((1, 1), np.int64)}),
        ):  # fmt: skip
            with pytest.raises(RuntimeFailure, match="the device was lost: open the model again"):
                call()
        assert session.position == 4
        status = model._lib.es_session_copy(other._handle, session._handle)
        assert status & 0xFF == 9
        close(other.prefill(TOKENS[4:8]), expected(TOKENS[:8])[-1])
        with model.session() as fresh:
            close(fresh.prefill(TOKENS), expected(TOKENS)[-1])


def test_a_prefill_that_fails_halfway_does_not_go_on(opencl_bundle: Path, shim: Shim) -> None:
    with edgeseq.load(opencl_bundle) as model, model.session() as session:
        shim.fail("EnqueueNDRangeKernel", -4, 5)
        with pytest.raises(RuntimeFailure, match="not enough memory on the device"):
            session.prefill(TOKENS)
        with pytest.raises(RuntimeFailure, match="memory on the device|the device was lost"):
            session.step(1)


def test_no_room_for_a_session(opencl_bundle: Path, shim: Shim) -> None:
    with edgeseq.load(opencl_bundle) as model, model.session() as session:
        shim.clear()
        shim.fail("CreateBuffer", -4, 1)
        with pytest.raises(RuntimeFailure, match="the state of 4224 bytes: there is not enough memory on the device"):
            model.session()
        close(session.prefill(TOKENS), expected(TOKENS)[-1])


def test_sessions_of_one_device_on_many_threads(opencl_bundle: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with edgeseq.load(opencl_bundle) as model, ThreadPoolExecutor(4) as pool:

        def stream(seed: int) -> None:
            tokens = np.random.default_rng(seed).integers(0, handmade.V, 40)
            with model.session() as session:
                session.prefill(tokens[:20])
                for token in tokens[20:]:
                    logits = session.step(int(token))
                close(logits, expected(tokens)[-1])

        list(pool.map(stream, range(8)))


def test_the_contract_of_the_header_under_the_sanitizers(opencl_bundle: Path, tmp_path: Path) -> None:
    """Drivers leak by themselves; what the backend leaves is counted in test_any_call_may_fail."""
    flags = [*build.SANITIZE, "-fsanitize=address,undefined", "-DES_WITH_OPENCL"]
    main = build.C_DIR / "tests" / "test_api.c"
    test = build.program(tmp_path / "api", main, flags, build.NO_KERNELS, parts=handmade_gpu.parts())
    assert build.run([test, opencl_bundle / "model.edgeseq"], env={"ASAN_OPTIONS": "detect_leaks=0"}) == "ok\n"


def test_the_driver_program_runs_it(opencl_bundle: Path, tmp_path: Path) -> None:
    """edgeseq-device on a GPU's bundle: the device in a line, and the tokens of the binding."""
    tool = build.C_DIR / "tools" / "edgeseq_device.c"
    flags = ["-O2", "-DES_WITH_OPENCL"]
    driver = build.program(tmp_path / "driver", tool, flags, build.NO_KERNELS, parts=handmade_gpu.parts())
    info, made = (
        json.loads(build.run([driver, opencl_bundle / "model.edgeseq", *command]))
        for command in (["info"], ["run", "--tokens", ",".join(map(str, TOKENS[:9])), "-n", "20"])
    )
    with edgeseq.load(opencl_bundle) as model, model.session() as session:
        assert (info["device"], info["device_session_bytes"]) == (model.info.device, model.info.device_session_bytes)
        session.prefill(TOKENS[:9])
        assert made["tokens"] == list(session.generate(20))


OCLGRIND = Path("/usr/lib/oclgrind/liboclgrind-rt.so")


@pytest.mark.skipif(not OCLGRIND.is_file(), reason="no oclgrind: apt-get install oclgrind")
def test_no_kernel_of_the_model_races_or_strays(opencl_bundle: Path, tmp_path: Path) -> None:
    """Oclgrind executes every kernel and says so; a kernel that strays is told of."""
    assert oclgrind(opencl_bundle, tmp_path) == ""
    source = handmade_gpu.SOURCE.read_bytes()
    stray = changed(tmp_path, lambda p: None, source.replace(b"AT(float, 5)[v] =", b"AT(float, 5)[v + 100] ="))
    assert "Invalid write of size 4" in oclgrind(stray, tmp_path)


def oclgrind(bundle: Path, tmp_path: Path) -> str:
    """What Oclgrind finds in a chunk, a step and a greedy step of the bundle; in a process of its own."""
    log = tmp_path / "oclgrind.log"
    log.unlink(missing_ok=True)
    env = {"EDGESEQ_OPENCL_LIBRARY": str(OCLGRIND), "OCLGRIND_DATA_RACES": "1", "OCLGRIND_CHECK_API": "1",
           "OCLGRIND_LOG": str(log)}  # fmt: skip
    lines = [
        "import sys, edgeseq",
        "with edgeseq.load(sys.argv[1]) as model, model.session() as session:",
        "    graphs = model.info.graphs",
        "    if model.info.takes_tokens:",
        "        session.prefill([i % 20 for i in range(max(g.tokens for g in graphs) + 1)])",
        "        session.generate_timed(1)",
        "    else:",
        "        for graph in range(len(graphs)): session.run({}, graph)",
    ]
    build.run([sys.executable, "-c", "\n".join(lines), bundle], env=env)
    return log.read_text() if log.exists() else ""


def test_no_file_stays_open(opencl_bundle: Path) -> None:
    edgeseq.load(opencl_bundle).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        edgeseq.load(opencl_bundle).close()
    assert len(os.listdir("/proc/self/fd")) <= before
