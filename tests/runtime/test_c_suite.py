"""The C tests, under the sanitizers; what they check stands in runtimes/c/tests/*.c."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import C_DIR

from . import build, handmade

TESTS = C_DIR / "tests"
FUZZ = C_DIR / "fuzz"
ADDRESS = [*build.SANITIZE, "-fsanitize=address,undefined"]
THREAD = [*build.SANITIZE, "-fsanitize=thread"]


def test_the_contract_of_the_header(handmade_bundle: Path, tmp_path: Path) -> None:
    test = build.program(tmp_path / "api", TESTS / "test_api.c", ADDRESS, build.KERNELS)
    assert build.run([test, handmade_bundle / "model.edgeseq"]) == "ok\n"


def test_sessions_and_pool_have_no_race(handmade_bundle: Path, tmp_path: Path) -> None:
    api = build.program(tmp_path / "api", TESTS / "test_api.c", THREAD, build.KERNELS)
    assert build.run([api, handmade_bundle / "model.edgeseq"]) == "ok\n"
    threads = build.program(tmp_path / "threads", TESTS / "test_threads.c", THREAD, build.KERNELS)
    assert build.run([threads, handmade_bundle / "model.edgeseq"]) == "ok\n"


@pytest.mark.parametrize("flags", [THREAD, ADDRESS, ["-O2"]], ids=["thread", "address", "plain"])
def test_every_block_runs_once_and_launches_are_ordered(tmp_path: Path, flags: list[str]) -> None:
    test = build.program(tmp_path / "pool", TESTS / "test_pool.c", flags, build.KERNELS)
    assert build.run([test]) == "ok\n"


WRAP = "-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc"


def test_a_stream_of_steps_allocates_nothing(handmade_bundle: Path, tmp_path: Path) -> None:
    test = build.program(tmp_path / "steady", TESTS / "test_steady.c", ["-O2", WRAP], build.KERNELS)
    assert build.run([test, handmade_bundle / "model.edgeseq", "1000"]) == "ok\n"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_stream_of_steps_makes_no_system_call(handmade_bundle: Path, tmp_path: Path) -> None:
    test = build.program(tmp_path / "steady", TESTS / "test_steady.c", ["-O2", WRAP], build.KERNELS)
    model = handmade_bundle / "model.edgeseq"
    command = ["strace", "-f", "-o", str(tmp_path / "calls"), str(test), str(model), "1000"]
    if subprocess.run(["strace", "true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not let strace trace")
    for _ in range(3):  # a machine under load may put a thread to sleep; then nothing can be said
        assert subprocess.run(command, capture_output=True, text=True).stdout == "ok\n"
        lines = (tmp_path / "calls").read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if '"steady' in line)
        end = next(i for i, line in enumerate(lines) if '"over' in line)
        between = lines[start + 1 : end]
        if not between:
            return
        assert all("futex" in line or "sched_yield" in line or "resumed" in line for line in between), between[:5]
    pytest.skip("the machine is too busy for threads to stay awake")


def test_fuzzed_bundles_are_refused_or_run(fuzz_model: Path, handmade_bundle: Path) -> None:
    """20000 mutations, most with true checksums again; the same ones every time."""
    assert build.run([fuzz_model, "20000", "1", handmade_bundle / "model.edgeseq"]) == "ok\n"


@pytest.fixture(scope="module")
def fuzz_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "model"
    return build.program(out, FUZZ / "fuzz_model.c", ADDRESS, FUZZ / "standalone.c")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_runs(fuzz_model: Path, data: st.DataObject) -> None:
    """Bytes overwritten and cut off where hypothesis likes, with and without true checksums: never a crash."""
    file = bytearray(handmade.parts().build())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file) - 1) | st.integers(0, 4095))
        new = data.draw(st.binary(min_size=1, max_size=8))
        file[at : at + len(new)] = new
    del file[data.draw(st.just(len(file)) | st.integers(1, len(file))) :]
    damaged = handmade.resealed(bytes(file)) if len(file) >= 64 and data.draw(st.booleans()) else bytes(file)
    path = fuzz_model.with_name("damaged")
    path.write_bytes(damaged)
    assert build.run([fuzz_model, "0", "0", path]) == "ok\n"


def test_fuzzed_states_are_refused_or_kept(handmade_bundle: Path, tmp_path: Path) -> None:
    import edgeseq

    fuzz = tmp_path / "fuzz"
    build.program(fuzz, FUZZ / "fuzz_state.c", ADDRESS, FUZZ / "standalone.c", build.KERNELS)
    with edgeseq.load(handmade_bundle, threads=1) as model, model.session() as session:
        session.prefill(range(9))
        (tmp_path / "state").write_bytes(session.save())
    env = {"EDGESEQ_FUZZ_MODEL": str(handmade_bundle / "model.edgeseq")}
    assert build.run([fuzz, "3000", "1", tmp_path / "state"], env=env) == "ok\n"
