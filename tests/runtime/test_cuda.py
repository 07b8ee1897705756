"""The CUDA backend on a driver over host memory (fake_cuda.c): sequences, captured graphs, greedy steps, errors."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgeseq
from edgeseq.errors import BundleError, EdgeseqError, RuntimeFailure
from edgeseq.runtime import Model, Session

from . import build, handmade
from . import cuda_bundle as cb
from .handmade import Parts

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
UNLOADING = {
    "cuCtxPopCurrent_v2", "cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuEventDestroy_v2", "cuModuleUnload",
    "cuGraphDestroy", "cuGraphExecDestroy", "cuDevicePrimaryCtxRelease_v2",
}  # fmt: skip
"""What gives things back: were it to fail, the driver itself would leak."""


@pytest.fixture(scope="session")
def bundle(cuda_plan: Path) -> Path:
    return cuda_plan


def opened(directory: Path, p: Parts) -> Model:
    return edgeseq.load(cb.bundle(directory, p), threads=1, poison=True)


def endless() -> Parts:
    """Without a context: the history is a ring for the kernels and nothing for the plan."""
    p = cb.parts()
    p.context = 0
    p.slots[1][3:5] = [0, -1]
    return p


def expected(tokens: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """n greedy tokens after the prompt, and the logits after them, by numpy."""
    reference = handmade.Reference()
    for token in tokens:
        logits = reference.step(token)
    made = []
    for _ in range(n):
        made.append(int(np.argmax(logits)))
        logits = reference.step(made[-1])
    return made, logits


def stepped(session: Session, n: int) -> list[int]:
    """n greedy tokens, each chosen here."""
    made = []
    for _ in range(n):
        made.append(int(np.argmax(session.logits)))
        session.step(made[-1])
    return made


@pytest.mark.parametrize("narrow", [False, True], ids=["int64", "int32"])
def test_prefill_steps_and_greedy_steps_are_the_model(fake: cb.Fake, tmp_path: Path, narrow: bool) -> None:
    with opened(tmp_path / "b", cb.parts(narrow)) as model:
        session = model.session()
        wanted, logits = expected(PROMPT, 20)
        session.prefill(PROMPT)
        twin = session.fork()
        assert session.generate_timed(20)[0] == wanted
        np.testing.assert_allclose(session.logits, logits, rtol=2e-6, atol=2e-4)
        assert stepped(twin, 20) == wanted and twin.position == session.position == len(PROMPT) + 20
        np.testing.assert_array_equal(twin.logits, session.logits)


def test_a_graph_is_captured_once_and_replayed(fake: cb.Fake, bundle: Path) -> None:
    with edgeseq.load(bundle, threads=1) as model:
        session = model.session()
        for _ in range(3):
            session.prefill(PROMPT)  # chunks of 8 and 4 without outputs, a step with
        session.generate_timed(10)
        assert fake.calls("cuGraphInstantiateWithFlags") == 4
        assert fake.calls("cuGraphLaunch") == 9 + 10
        before = fake.calls("cuLaunchKernelEx") + fake.calls("cuLaunchKernel")
        session.step(1)
        session.generate_timed(5)
        assert fake.calls("cuLaunchKernelEx") + fake.calls("cuLaunchKernel") == before


def test_greedy_steps_do_not_wait_for_each_other(fake: cb.Fake, tmp_path: Path) -> None:
    with opened(tmp_path / "b", endless()) as model:
        session = model.session()
        session.prefill(PROMPT)
        twin = session.fork()
        waits = fake.calls("cuStreamSynchronize") + fake.calls("cuEventSynchronize")
        made, ns = session.generate_timed(600)
        assert fake.calls("cuStreamSynchronize") + fake.calls("cuEventSynchronize") <= waits + 3
        assert made == stepped(twin, 600)
        np.testing.assert_array_equal(twin.logits, session.logits)
        assert ns.tolist() == [5000] * 600  # four kernels and the helper, a microsecond each
        assert list(session.generate(3)) == stepped(twin, 3)


@pytest.mark.parametrize("entry", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags",
                                   "cuGraphLaunch"])  # fmt: skip
def test_without_capture_launches_go_one_by_one(fake: cb.Fake, bundle: Path, entry: str) -> None:
    with edgeseq.load(bundle, threads=1, poison=True) as model:
        session = model.session()
        for nth in range(1, 40):
            fake.fail(entry, nth, 801)
            session.reset()
            session.prefill(PROMPT)
            assert session.generate_timed(5)[0] == expected(PROMPT, 5)[0]
        np.testing.assert_allclose(session.logits, expected(PROMPT, 5)[1], rtol=2e-6, atol=2e-4)


def test_a_driver_whose_graphs_hold_no_early_launches_gets_others(fake: cb.Fake, bundle: Path) -> None:
    fake.set("early", 0)
    with edgeseq.load(bundle, threads=1, poison=True) as model:
        session = model.session()
        session.prefill(PROMPT)
        assert session.generate_timed(5)[0] == expected(PROMPT, 5)[0]
        assert fake.calls("cuLaunchKernelEx") == 1 and fake.calls("cuGraphLaunch") == 3 + 5


def test_without_a_compiler_for_ptx_copies_do_what_the_helper_does(fake: cb.Fake, tmp_path: Path) -> None:
    fake.set("jit", 0)
    for narrow in (False, True):
        with opened(tmp_path / f"b{narrow}", cb.parts(narrow)) as model:
            session = model.session()
            session.prefill(PROMPT)
            assert session.generate_timed(20)[0] == expected(PROMPT, 20)[0]
            assert session.profile().tolist() == [1000] * 4
            with pytest.raises(RuntimeFailure, match="cannot build"):
                model.measure_read_bandwidth()
            with pytest.raises(RuntimeFailure, match="cannot build"):
                model.measure_launch(4)


def test_chunks_reuse_the_pinned_inputs_only_when_they_have_travelled(fake: cb.Fake, tmp_path: Path) -> None:
    """The fake driver reads pinned memory as late as it can."""
    ids = np.random.default_rng(0).integers(0, handmade.V, 400).tolist()
    with opened(tmp_path / "b", endless()) as model:
        whole, steps = model.session(), model.session()
        got = whole.prefill(ids)
        for token in ids:
            wanted = steps.step(token)
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-4)


def test_states_travel_between_cpu_and_gpu(fake: cb.Fake, bundle: Path, handmade_bundle: Path) -> None:
    with edgeseq.load(bundle, threads=1) as gpu, edgeseq.load(handmade_bundle, threads=1) as cpu:
        ours, theirs = gpu.session(), cpu.session()
        theirs.prefill(PROMPT)
        ours.load(theirs.save())
        np.testing.assert_allclose(ours.step(7), theirs.step(7), rtol=2e-6, atol=2e-4)
        again = cpu.session()
        again.load(ours.save())
        np.testing.assert_allclose(again.step(8), ours.step(8), rtol=2e-6, atol=2e-4)
        assert ours.save() == again.save()


def test_a_large_slot_starts_at_its_value(fake: cb.Fake, tmp_path: Path) -> None:
    p = cb.parts()
    p.slots.append([p.name("extra"), 1, 1, 0, -1, 1.5, 5001, 0, 0, 0, p.state_bytes, 10002])
    p.state_bytes += 10048
    with opened(tmp_path / "b", p) as model:
        session = model.session()
        want = np.full(5001, 1.5, np.float16).tobytes()
        assert session.save()[-10002:] == want
        session.prefill(PROMPT)
        session.reset()
        assert session.save()[-10002:] == want


def test_sessions_in_threads_do_not_disturb_each_other(fake: cb.Fake, bundle: Path) -> None:
    with edgeseq.load(bundle, threads=1) as model:
        found: dict[int, list[int]] = {}

        def work(first: int) -> None:
            session = model.session()
            session.prefill([first, *PROMPT])
            found[first] = session.generate_timed(12)[0] + stepped(session, 8)
            session.close()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert found == {i: expected([i, *PROMPT], 20)[0] for i in range(4)}


def test_profile_and_measurements(fake: cb.Fake, tmp_path: Path) -> None:
    p = cb.parts()
    with opened(tmp_path / "b", p) as model:
        session = model.session()
        session.prefill(PROMPT)
        assert session.profile().tolist() == [1000] * 4
        assert session.profile(1).tolist() == [1000] * 4 and session.position == len(PROMPT) + 5
        assert model.measure_read_bandwidth() > 0
        assert model.measure_launch(8, 500) == pytest.approx(1000, rel=1e-3)


# ---- Errors: a sentence and a code, and nothing is left ----


def scenario(bundle: Path) -> list[object]:
    """Every entry of the backend once; what came out."""
    with edgeseq.load(bundle, threads=1, poison=True) as model:
        session = model.session()
        session.prefill(PROMPT)
        made: list[object] = [session.generate_timed(3)[0]]
        state = session.save()
        twin = session.fork()
        made += [twin.step(5).tolist(), len(twin.profile())]
        twin.reset()
        twin.load(state)
        made.append(twin.step(5).tolist())
        model.measure_read_bandwidth(repeats=1)
        model.measure_launch(2, 10)
        return made


def symbols() -> list[str]:
    header = (build.C_DIR / "src" / "es_cuda.h").read_text()
    found = [part.split('"')[0] for part in header.split(', "cu')[1:]]
    return [f"cu{name}" for name in found if not name.startswith("GetError") and f"cu{name}" not in UNLOADING]


@pytest.mark.parametrize("symbol", [*symbols(), "cuLaunchKernelEx"])
def test_whatever_fails_is_told_and_leaves_nothing(fake: cb.Fake, bundle: Path, symbol: str) -> None:
    wanted = scenario(bundle)
    calls = fake.calls(symbol)
    assert fake.live == 0 and (calls > 0 or symbol in ("cuMemGetInfo_v2", "cuDeviceTotalMem_v2"))
    for nth in sorted({1, 2, 3, 4, calls // 2, calls - 1, calls} - {-1, 0}):
        for code in (1, 2, 700):
            fake.reset()
            fake.fail(symbol, nth, code)
            try:
                made = scenario(bundle)
            except EdgeseqError as refused:
                assert len(refused.sentence) > 10 and refused.sentence.isprintable()
            else:
                assert made == wanted, f"{symbol} call {nth}, code {code}"
            assert fake.live == 0, f"{symbol} call {nth}, code {code} leaves something"
    fake.reset()
    assert scenario(bundle) == wanted


def test_an_illegal_access_loses_the_device_and_not_the_app(fake: cb.Fake, bundle: Path) -> None:
    with edgeseq.load(bundle, threads=1) as model:
        session, other = model.session(), model.session()
        other.prefill(PROMPT)
        fake.set("fault", 3)
        with pytest.raises(RuntimeFailure, match="lost"):
            session.step(1)
        for call in (lambda: session.step(1), lambda: other.step(1), lambda: other.save(), lambda: other.fork(),
                     lambda: other.reset(), lambda: model.session(), lambda: other.generate_timed(3)):  # fmt: skip
            with pytest.raises(RuntimeFailure, match="lost"):
                call()
        assert (
            "failed: running a graph: an illegal memory access was encountered (700)"
            in model._read_device().text.decode()
        )
    assert fake.live == 0
    fake.reset()
    assert scenario(bundle)


DRIVER, OLD, NONE, MEMORY, BUILD, ARCH = range(1, 7)  # details of ES_CLASS_DEVICE (edgeseq.h)
REFUSALS: list[tuple[str, int, dict[str, int], dict[str, str]]] = [
    ("cannot be opened", DRIVER, {}, {"EDGESEQ_CUDA_LIBRARY": "/nowhere/libcuda.so"}),
    (r"for CUDA 11\.3, this bundle needs 11\.4", OLD, {"version": 11030}, {}),
    ("offers no device", NONE, {"devices": 0}, {}),
    ("offers no device", NONE, {"init": 100}, {}),
    ("starting the driver failed", DRIVER, {"init": 34}, {}),
    ("'1', expected a number from 0 to 0", NONE, {}, {"EDGESEQ_CUDA_DEVICE": "1"}),
    ("'-1', expected", NONE, {}, {"EDGESEQ_CUDA_DEVICE": "-1"}),
    ("'first', expected", NONE, {}, {"EDGESEQ_CUDA_DEVICE": "first"}),
    ("'99999999999999999999', expected", NONE, {}, {"EDGESEQ_CUDA_DEVICE": "9" * 20}),
    ("the weights need 4096 bytes on Fake 0, where 4095 of", MEMORY, {"memory": 4095}, {}),
    ("compiled for sm_90, sm_75, Fake 0 is sm_70", ARCH, {"major": 7, "minor": 0}, {}),
    ("at most 0 threads a block, 1 are asked", BUILD, {"threads": 0}, {}),
]


def answer(bundle: Path) -> tuple[int, str]:
    """Status and sentence of es_model_open, of which nothing is left."""
    from edgeseq import runtime_abi as abi

    library = abi.open_library(bundle / "libmodel.so")
    handle, why = ctypes.c_void_p(), abi.Error()
    path = str(bundle / "model.edgeseq").encode()
    status = library.es_model_open(path, None, ctypes.byref(handle), ctypes.byref(why))
    if status == abi.OK:
        library.es_model_close(ctypes.byref(handle))
    return status, why.text.decode()


@pytest.mark.parametrize(("sentence", "detail", "properties", "environment"), REFUSALS, ids=[r[0] for r in REFUSALS])
def test_what_a_machine_lacks_is_said_and_has_a_code(
    fake: cb.Fake, bundle: Path, monkeypatch: pytest.MonkeyPatch, sentence: str, detail: int,
    properties: dict[str, int], environment: dict[str, str],
) -> None:  # fmt: skip
    for name, value in properties.items():
        fake.set(name, value)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(RuntimeFailure, match=sentence):
        edgeseq.load(bundle)
    status, text = answer(bundle)
    assert status == 9 | detail << 8 and re.search(sentence, text)


@pytest.mark.parametrize(("code", "detail"), [(46, 3), (2, 4), (700, 8)])
def test_a_device_that_cannot_be_opened_has_its_code(fake: cb.Fake, bundle: Path, code: int, detail: int) -> None:
    fake.fail("cuDevicePrimaryCtxRetain", 1, code)
    status, text = answer(bundle)
    assert status == 9 | detail << 8 and "opening the device failed" in text


def test_a_session_that_does_not_fit_is_refused(fake: cb.Fake, bundle: Path) -> None:
    with edgeseq.load(bundle, threads=1) as model:
        fake.set("memory", 500)
        with pytest.raises(RuntimeFailure, match=r"a session's .* need \d+ bytes on Fake 0, where 500 of"):
            model.session()


def test_a_driver_without_a_function_is_too_old(fake: cb.Fake, bundle: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    source = tmp_path / "stub.c"
    source.write_text("int cuDriverGetVersion(int *v) { *v = 12000; return 0; }\n")
    build.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "stub.so", source])
    monkeypatch.setenv("EDGESEQ_CUDA_LIBRARY", str(tmp_path / "stub.so"))
    with pytest.raises(RuntimeFailure, match=r"driver for CUDA 12\.0 lacks cuInit"):
        edgeseq.load(bundle)
    assert answer(bundle)[0] == 9 | OLD << 8


def test_the_second_device_can_be_chosen(fake: cb.Fake, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.set("devices", 2)
    monkeypatch.setenv("EDGESEQ_CUDA_DEVICE", "1")
    with edgeseq.load(bundle, threads=1) as model:
        assert "Fake 1, sm_90" in model.info.device


# ---- Images ----


def notes(kinds: list[tuple[int, int]]) -> Parts:
    """Images that carry their kind and version as a note."""
    p = cb.parts()
    names = cb.counts(p)
    images = [(k, sm, (cb.cubin if k == cb.CUBIN else cb.text)(names, f"{'cubin' if k == cb.CUBIN else 'ptx'} {sm}"))
              for k, sm in kinds]  # fmt: skip
    return cb.code(p, cb.archive(images))


ALL = [(cb.CUBIN, 80), (cb.CUBIN, 87), (cb.CUBIN, 86), (cb.PTX, 75), (cb.PTX, 90), (cb.CUBIN, 90), (cb.CUBIN, 100)]


@pytest.mark.parametrize(("sm", "image"), [
    (75, "ptx 75"), (80, "cubin 80"), (86, "cubin 86"), (87, "cubin 87"), (89, "cubin 87"), (90, "cubin 90"),
    (100, "cubin 100"), (103, "cubin 100"), (120, "ptx 90"), (81, "cubin 80"),
])  # fmt: skip
def test_the_image_that_fits_the_gpu_is_taken(fake: cb.Fake, tmp_path: Path, sm: int, image: str) -> None:
    fake.set("major", sm // 10)
    fake.set("minor", sm % 10)
    with opened(tmp_path / "b", notes(ALL)) as model:
        assert fake.loaded == f"// {image}"
        session = model.session()
        session.prefill(PROMPT)
        assert session.generate_timed(3)[0] == expected(PROMPT, 3)[0]
        early = fake.calls("cuLaunchKernelEx") > 0
        assert early == (int(image.split()[1]) >= 90)  # older code cannot wait for the launch before


def vandal(change: Callable[[bytearray], object]) -> Callable[[Parts], None]:
    def apply(p: Parts) -> None:
        blob = bytearray(p.code)
        change(blob)
        cb.code(p, bytes(blob))

    return apply


def put(at: int, layout: str, value: int) -> Callable[[Parts], None]:
    return vandal(lambda blob: struct.pack_into("<" + layout, blob, at, value))


def other(data: bytes, kind: int = cb.PTX, sm: int = 75) -> Callable[[Parts], None]:
    return lambda p: cb.code(p, cb.archive([(kind, sm, data)])) and None


def elf(at: int, layout: str, value: int) -> bytes:
    data = bytearray(cb.cubin(cb.counts(cb.parts())))
    struct.pack_into("<" + layout, data, at, value)
    return bytes(data)


def split(p: Parts) -> None:
    p.kernels[1][4:6] = [16, len(p.code) - 16]


def source(p: Parts) -> None:
    p.kernels[0][3] = 1


def wide(p: Parts) -> None:
    p.launches[0][6:8] = [1, 65]


def deep(p: Parts) -> None:
    p.launches[0][3] = 65536


def fewer(p: Parts) -> None:
    names = cb.counts(p)
    cb.code(p, cb.archive([(cb.PTX, 75, cb.text({**names, "gather": 2}))]))


def unknown(p: Parts) -> None:
    names = cb.counts(p)
    del names["leak4"]
    cb.code(p, cb.archive([(cb.PTX, 75, cb.text(names))]))


DEFECTS: list[tuple[str, Callable[[Parts], None]]] = [
    ("no archive", put(0, "B", 0)),
    ("no archive", put(12, "I", 1)),
    ("no archive", vandal(lambda blob: blob.__delitem__(slice(15, None)))),
    ("truncated: 4294967295 images", put(8, "I", 2**32 - 1)),
    ("truncated: 100 images", put(8, "I", 100)),
    ("image 0 has the unknown kind 3", put(16, "I", 3)),
    ("image 0 lies outside", put(24, "Q", 17)),
    ("image 0 lies outside", put(24, "Q", 0)),
    ("image 1 lies outside", put(48, "Q", 2**64 - 16)),
    ("image 0 lies outside", put(32, "Q", 2**63)),
    ("image 0 lies outside", put(32, "Q", 0)),
    ("image 1 is not what its kind says", vandal(lambda blob: blob.__setitem__(-1, 65))),
    ("image 0 is not what its kind says", put(64, "B", 0)),
    ("image 0 is not what its kind says", other(elf(40, "Q", 2**63), cb.CUBIN, 90)),
    ("image 0 is not what its kind says", other(elf(60, "H", 60000)[:54] + b"\xff\xff" * 5, cb.CUBIN, 90)),
    ("image 0 is not what its kind says", other(b"\x7fELF\x02", cb.CUBIN, 90)),
    ("compiled for no GPU, Fake 0 is sm_90", lambda p: cb.code(p, cb.archive([])) and None),
    ("compiled for sm_120, Fake 0 is sm_90", other(b"x\0", cb.PTX, 120)),
    ("compiled for sm_75, Fake 0 is sm_90", other(b"other arch\0")),
    (r"driver for CUDA 12\.4 is older than the kernels' PTX", other(b"newer\0")),
    ("ptxas: line 7", other(b"error\0")),
    ("code of its own or of the wrong kind", split),
    ("code of its own or of the wrong kind", source),
    ("grid or block out of CUDA's range", wide),
    ("grid or block out of CUDA's range", deep),
    ("'gather' does not take 3 pointers", fewer),
    ("leak4 failed", unknown),
]


@pytest.mark.parametrize(("sentence", "defect"), DEFECTS, ids=[f"{i}-{d[0]}" for i, d in enumerate(DEFECTS)])
def test_a_damaged_archive_is_refused(
    fake: cb.Fake, tmp_path: Path, sentence: str, defect: Callable[[Parts], None]
) -> None:
    p = cb.parts()
    defect(p)
    with pytest.raises((BundleError, RuntimeFailure), match=sentence):
        opened(tmp_path / "b", p)


def test_random_damage_to_the_archive_never_crashes(fake: cb.Fake, bundle: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(5)
    directory = tmp_path / "b"
    directory.mkdir()
    (directory / "libmodel.so").symlink_to(bundle / "libmodel.so")  # CODE is not in plan_id
    good = bytearray(cb.parts().code)
    loaded = 0
    for _ in range(300):
        p = cb.parts()
        blob = bytearray(good)
        for _ in range(int(chance.integers(1, 4))):
            blob[int(chance.integers(0, 128))] = int(chance.choice([0, 1, 2, 16, 64, 127, 128, 255]))
        p.code = bytes(blob)
        (directory / "model.edgeseq").write_bytes(p.build())
        try:
            edgeseq.load(directory, threads=1).close()
            loaded += 1
        except EdgeseqError as refused:
            assert refused.sentence
    assert 0 < loaded < 300


# ---- In C ----


def test_sanitizers_find_nothing(fake: cb.Fake, tmp_path: Path) -> None:
    p = cb.parts()
    (tmp_path / "model.edgeseq").write_bytes(p.build())
    env = {"EDGESEQ_CUDA_LIBRARY": str(fake.path)}
    for name, flags in (("address", "-fsanitize=address,undefined"), ("thread", "-fsanitize=thread")):
        flagged = [*build.SANITIZE, flags, "-DES_WITH_CUDA"]
        main = build.C_DIR / "tests" / "test_threads.c"
        test = build.program(tmp_path / name, main, flagged, build.NO_KERNELS, parts=p)
        assert build.run([test, tmp_path / "model.edgeseq"], env=env) == "ok\n"


CUDA_HEADERS = [Path(p) for p in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/usr") if p]


def test_numbers_and_names_are_those_of_nvidias_header(tmp_path: Path) -> None:
    folder = next((p / "include" for p in CUDA_HEADERS if (p / "include" / "cuda.h").is_file()), None)
    if folder is None:
        pytest.skip("there is no cuda.h")
    main = Path(__file__).with_name("cuda_header.c")
    build.run(["gcc", "-DES_WITH_CUDA", f"-I{folder}", f"-I{build.C_DIR / 'include'}", f"-I{build.C_DIR / 'src'}",
               "-Wall", "-Werror", "-o", tmp_path / "header", main])  # fmt: skip
    assert build.run([tmp_path / "header"]) == "ok\n"


# ---- The script for machines with a GPU ----


def test_the_gpu_script_checks_a_bundle(fake: cb.Fake, tmp_path: Path) -> None:
    from tests.gpu.prepare import carry, hand_made

    names = cb.counts(cb.parts())
    hand_made(tmp_path / "cases" / "handmade", cb.archive([(cb.CUBIN, 90, cb.cubin(names))]))
    script = Path(__file__).parents[1] / "gpu" / "run"
    command = [str(script), str(tmp_path / "cases"), "--tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok ") == 9 and "0 failed" in done.stdout
    carry(tmp_path / "cases")
    alone = [str(tmp_path / "cases" / "run"), "--tokens", "4", "--only", "greedy"]
    there = {"cwd": tmp_path, "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
    done = subprocess.run(alone, capture_output=True, text=True, check=False, **there)  # type: ignore[call-overload]
    assert done.returncode == 0 and "1 results, 0 failed" in done.stdout, done.stdout + done.stderr
    expect = tmp_path / "cases" / "handmade" / "expect.json"
    expect.write_text(expect.read_text().replace('"tokens": [', '"tokens": [0, ', 1))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the CPU chose 0" in done.stdout, done.stdout + done.stderr
