"""The wheel holds everything and works where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("edgeseq", "exporters", "devices", "runtimes")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout, so nothing says what belongs in it"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the unpacked wheel, built from what git tracks."""
    clone = tmp_path_factory.mktemp("clone")
    for name in _tracked():
        target = clone / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(clone)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def _tracked() -> list[str]:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def _run(site: Path, folder: Path, *arguments: str) -> str:
    """`edgeseq` from the wheel, in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "edgeseq", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_of_the_packages_is_in_it(site: Path) -> None:
    wanted = {name for name in _tracked() if name.split("/")[0] in PACKAGES}
    have = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert wanted - have == set()
    assert any(name.startswith("runtimes/c/src/") for name in wanted)
    assert not any(name.startswith(("tests", "docs")) for name in have)


def test_it_is_the_wheel_that_runs(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import edgeseq, exporters, devices, runtimes; print(edgeseq.__file__, runtimes.__file__)"
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert all(path.startswith(str(site)) for path in found.split())


def test_from_model_to_text_in_another_folder(site: Path, tmp_path: Path) -> None:
    devices = {device["name"] for device in json.loads(_run(site, tmp_path, "list", "devices", "--json"))}
    assert "raspberry-pi-5" in devices
    _run(site, tmp_path, "export", "zoo:tiny-mamba", "-o", "export")
    _run(site, tmp_path, "compile", "export", "--target", "host", "-o", "bundle")
    result = json.loads(_run(site, tmp_path, "run", "bundle", "--prompt", "import ", "-n", "8", "--json"))
    assert len(result["tokens"]) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "export"]
