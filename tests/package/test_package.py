"""Kits are built as their README says, by the host's own compilers, and say what the bundle says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgeseq.cli as cli
from edgeseq.errors import BundleError, UsageError
from edgeseq.package import package
from edgeseq.package.archive import member
from edgeseq.runtime import load
from tests import bundles
from tests.runtime.build import opencl_missing

PROMPT, COUNT = [5, 9, 2, 50, 11, 30, 7, 41, 3], 12
NO_OPENCL = pytest.mark.skipif(bool(opencl_missing()), reason="there is no OpenCL device")
TARGETS = ["host", pytest.param("opencl", marks=[NO_OPENCL, pytest.mark.slow])]
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def _jdk() -> Path | None:
    """A JDK with what JNI code includes."""
    javac = shutil.which("javac")
    home = Path(javac).resolve().parent.parent if javac else None
    return home if home is not None and (home / "include" / "jni.h").is_file() else None


def _ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def _said(bundle: Path) -> list[int]:
    with load(bundle) as model, model.session() as session:
        session.prefill(PROMPT)
        return [int(t) for t in session.generate(COUNT)]


def _run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    return done.stdout.strip()


@needs_gcc
@pytest.mark.parametrize("target", TARGETS)
def test_the_c_kit_says_what_the_bundle_says(target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle, kit = bundles.bundled("retnet", target), tmp_path / "kit"
    assert cli.run(["package", str(bundle), "-o", str(kit)]) == 0
    assert capfd.readouterr().out.strip() == str(kit)
    build, *_ = re.findall(r"^cc (.*)$", (kit / "README.md").read_text(), re.M)
    _run("gcc", "-Wall", "-Wextra", "-Werror", *build.split(), cwd=kit)
    assert _run("./main", "model.edgeseq", _ids(PROMPT), COUNT, cwd=kit) == _ids(_said(bundle))
    assert (kit / "kernels.o").exists() == (target == "host")
    assert len(set(_said(bundle))) > 4
    no_model = subprocess.run(["./main", "none", "1", "1"], cwd=kit, capture_output=True, text=True, check=False)
    assert no_model.returncode == 1 and "none" in no_model.stderr
    package(bundle, kit, "c")  # a kit may be replaced


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_builds_the_c_kit(tmp_path: Path) -> None:
    kit = package(bundles.bundled("retnet"), tmp_path / "kit")
    _run("cmake", "-B", "build", cwd=kit)
    _run("cmake", "--build", "build", cwd=kit)
    assert _run("build/main", "model.edgeseq", _ids(PROMPT), COUNT, cwd=kit) == _ids(_said(bundles.bundled("retnet")))


def test_the_python_kit_needs_nothing_of_ours(tmp_path: Path) -> None:
    bundle = bundles.bundled("retnet")
    kit = package(bundle, tmp_path / "kit", "python")
    blocked = "import sys; sys.modules['edgeseq'] = None; sys.path.insert(0, '.'); sys.argv[1:] = {!r}; {}"
    code = blocked.format([_ids(PROMPT), str(COUNT)], "exec(open('example.py').read())")
    assert _run(sys.executable, "-c", code, cwd=kit) == _ids(_said(bundle))


JAVA = """
import ai.edgeseq.EdgeseqException;
import ai.edgeseq.Model;
import ai.edgeseq.Session;
import java.util.Arrays;

public class Main {
    static void check(boolean holds, String what) {
        if (!holds) throw new AssertionError(what);
    }

    public static void main(String[] args) {
        int[] prompt = {PROMPT};
        try (Model model = Model.open("assets/model.edgeseq", 2); Session session = model.session()) {
            check(model.vocab() == 53 && model.context() == 0 && !model.device().isEmpty(), "facts");
            check(session.logits() == null, "no logits yet");
            session.prefill(prompt);
            byte[] state = session.save();
            int[] said = session.generate(COUNT);
            System.out.println(Arrays.toString(session.logits()));
            System.out.println(Arrays.toString(said));
            check(session.position() == prompt.length + COUNT, "position");
            session.load(state);
            check(session.position() == prompt.length, "loaded");
            try { session.sample(); check(false, "no logits after a load"); } catch (EdgeseqException e) { }
            session.reset();
            session.prefill(prompt);
            check(session.logits().length == 53 && session.sample() == said[0], "greedy");
            session.seed(7);
            int drawn = session.sample(0.9f, 5, 1f, 0f);
            session.seed(7);
            check(drawn == session.sample(0.9f, 5, 1f, 0f), "seed");
            session.step(said[0]);
            check(session.sample() == said[1], "step");
            refused(() -> session.step(53), "token", 1);
            refused(() -> session.prefill(null), "NULL", 1);
            refused(() -> session.load(new byte[3]), "", 6);
            refused(() -> model.close(), "session", 8);
            refused(() -> model.encode("x"), "tokenizer", 1);
            session.close();
            session.close();
            try { session.step(0); check(false, "closed"); } catch (IllegalStateException e) { }
        }
        refused(() -> Model.open("n\\u00f6.edgeseq"), "n\\u00f6.edgeseq", 2);
    }

    static void refused(Runnable call, String words, int kind) {
        try {
            call.run();
        } catch (EdgeseqException e) {
            check(e.getMessage().contains(words) && (e.status() & 255) == kind, e.getMessage());
            return;
        }
        throw new AssertionError("not refused: " + words);
    }
}
"""


@needs_gcc
@pytest.mark.skipif(_jdk() is None, reason="there is no JDK")
@NO_OPENCL
def test_the_java_binding(tmp_path: Path) -> None:
    """The Android kit's own files with this machine's Java, on this machine's OpenCL."""
    bundle, kit, home = bundles.bundled("retnet", "opencl"), tmp_path / "kit", _jdk()
    package(bundle, kit, "android")
    assert "libOpenCL.so" in (kit / "README.md").read_text()
    assert "@" not in re.sub(r"@\w+@", "@", (kit / "cpp" / "CMakeLists.txt").read_text())
    include = [f"-I{home}/include", f"-I{home}/include/linux"]
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *include]
    _run("gcc", *flags, "cpp/edgeseq.c", "cpp/edgeseq_jni.c", "-o", "libedgeseq.so", "-pthread", "-ldl", cwd=kit)
    tool = ["-Wall", "-Wextra", "-Icpp", "cpp/edgeseq_device.c", "cpp/edgeseq.c"]
    _run("gcc", "-std=c99", *tool, "-o", "edgeseq-device", "-pthread", "-ldl", cwd=kit)
    (kit / "Main.java").write_text(JAVA.replace("PROMPT", _ids(PROMPT)).replace("COUNT", str(COUNT)))
    sources = sorted((kit / "java" / "ai" / "edgeseq").glob("*.java"))
    lint = ["-Xlint:all,-options,-try", "-Werror", "--release", "8"]
    _run("javac", *lint, "-d", "out", "Main.java", *sources, cwd=kit)
    said = _run("java", "-Xcheck:jni", "-Djava.library.path=.", "-Dfile.encoding=UTF-8", "-cp", "out", "Main", cwd=kit)
    *checks, logits, tokens = said.splitlines()
    assert "native method" not in "".join(checks)  # -Xcheck:jni also grumbles about drivers' signal handlers
    assert tokens == str(_said(bundle))
    with load(bundle) as model, model.session() as session:
        session.prefill(PROMPT)
        list(session.generate(COUNT))
        np.testing.assert_array_equal(np.array(json.loads(logits), np.float32), session.logits)


def test_what_cannot_be_packaged(tmp_path: Path) -> None:
    bundle = bundles.bundled("retnet")
    with pytest.raises(UsageError, match="not for Android"):
        package(bundle, tmp_path / "kit", "android")
    with pytest.raises(UsageError, match="not a bundle"):
        package(tmp_path, tmp_path / "kit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(UsageError, match="is not a kit, so it is not overwritten"):
        package(bundle, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    assert cli.run(["package", str(bundle), "-o", str(tmp_path / "kit"), "--for", "fridge"]) == 2


@pytest.mark.slow
@NO_OPENCL
@pytest.mark.skipif(_jdk() is None or shutil.which("cmake") is None, reason="there is no JDK, or no cmake")
def test_cmake_builds_the_android_kit(tmp_path: Path) -> None:
    """On this machine, so without what the NDK's tool chain file sets: the library, and the program for adb."""
    kit = package(bundles.bundled("retnet", "opencl"), tmp_path / "kit", "android")
    _run("cmake", "-B", "build", "-S", "cpp", cwd=kit)
    _run("cmake", "--build", "build", cwd=kit)
    assert (kit / "build" / "libedgeseq.so").is_file()
    words = ["assets/model.edgeseq", "run", "--tokens", _ids(PROMPT), "-n", COUNT]
    said = json.loads(_run("build/edgeseq-device", *words, cwd=kit))
    assert said["tokens"] == _said(bundles.bundled("retnet", "opencl"))


@pytest.mark.slow
def test_kernels_for_an_android_cpu_leave_its_register_alone(tmp_path: Path) -> None:
    """x18 is the system's there; the kit takes such kernels, and no others."""
    profile = tmp_path / "phone.toml"
    profile.write_text('description = "a phone"\ntriple = "aarch64-linux-android"\ncpu = "cortex-a55"\n')
    from edgeseq.compiler import compile_export

    compile_export(bundles.exported("retnet"), str(profile), tmp_path / "bundle")
    kit = package(tmp_path / "bundle", tmp_path / "kit", "android")
    assert (kit / "cpp" / "kernels.o").read_bytes()[18:20] == b"\xb7\0"  # EM_AARCH64
    assert "kernels.o kernel_table.o" in (kit / "cpp" / "CMakeLists.txt").read_text()
    assert "uses-native-library" not in (kit / "README.md").read_text()
    objdump = next((o for o in ("llvm-objdump-15", "llvm-objdump", "aarch64-linux-gnu-objdump") if shutil.which(o)), "")
    if objdump:
        code = _run(objdump, "-d", "cpp/kernels.o", cwd=kit)
        assert "x19" in code and not re.search(r"\b[xw]18\b", code)


def test_archives_that_are_none() -> None:
    archive = (bundles.bundled("retnet") / "libmodel.a").read_bytes()
    assert member(archive, "kernels.o")[:4] == b"\x7fELF" and member(archive, "es_kernel_table.o")[:4] == b"\x7fELF"
    for broken in (b"", b"!<arch>\n", archive[:2000], archive[:8] + b"x" * 200):
        with pytest.raises(BundleError):
            member(broken, "kernels.o")
    with pytest.raises(BundleError, match="has no other.o"):
        member(archive, "other.o")
