"""Models of unusual sizes, taken through the command line the way a user does, with what PyTorch says they answer."""

from __future__ import annotations

import atexit
import copy
import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

import edgeseq.cli as cli
from edgeseq.verify.tolerances import ROUNDING_ELEMENT, tolerance
from tests.models.huggingface import randomise, save

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CONTEXT = 96
CHUNKS = "4,16"
PROMPT, COUNT = 23, 64  # a prompt of 16 + 4 + 3 steps

MAMBA = {
    "vocab_size": 1009, "hidden_size": 96, "num_hidden_layers": 3, "state_size": 8, "conv_kernel": 3,
    "time_step_rank": 5,
}  # fmt: skip
GQA = {
    "vocab_size": 1009, "hidden_size": 90, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 10,
}  # fmt: skip
ODD_HEADS = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 22, "rms_norm_eps": 1e-3, "attention_bias": True, "mlp_bias": True,
    "tie_word_embeddings": True,
}  # fmt: skip
BIASED = {
    "vocab_size": 101, "hidden_size": 40, "num_hidden_layers": 2, "state_size": 3, "conv_kernel": 2, "expand": 3,
    "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3,
}  # fmt: skip
RETNET = """
import torch
from edgeseq.models.retnet import FAMILY, RetNetConfig

def make():
    config = RetNetConfig(vocab_size=53, d_model=36, n_layers=2, n_heads=3, d_ff=29, tie=False)
    model = FAMILY.model(config)
    for name, value in FAMILY.constants(config).items():
        model.get_buffer(name).copy_(torch.as_tensor(value))
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng) + (1.0 if "norm" in name else 0.0))
    return model
"""


def edgeseq(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, from another directory than the checkout's."""
    command = [sys.executable, "-m", "edgeseq", *map(str, arguments)]
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd or folder(), env=env)


def done(*arguments: object) -> str:
    """Standard output of a command that succeeds."""
    process = edgeseq(*arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout


@cache
def folder() -> Path:
    """One directory for all workers of a test run; the last to leave removes it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    path = Path(tempfile.gettempdir()) / f"edgeseq-e2e-{run}"
    path.mkdir(exist_ok=True)
    users = (path / "users.lock").open("w")
    fcntl.flock(users, fcntl.LOCK_SH)
    atexit.register(_leave, path, users)
    return path


def _leave(path: Path, users: IO[str]) -> None:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # others are still at work
    shutil.rmtree(path, ignore_errors=True)


def once(out: Path, make: Callable[[Path], object]) -> Path:
    """`out`, made by the first worker that asks for it; `make` gets a name beside it to write to."""
    with (out.parent / f"{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            made = out.with_name(f"{out.name}.making")
            make(made)
            made.rename(out)
    return out


def _huggingface(family: str, fields: dict[str, Any], where: Path) -> tuple[str, torch.nn.Module]:
    import transformers

    config, model = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[family]
    reference = model(config(**fields))
    wide = ("in_proj.weight", "conv1d.weight", "out_proj.weight") if family == "mamba" else ()
    randomise(reference, 0, wide)
    once(where, lambda path: save(reference, path))
    return str(where), reference


FAMILIES = {
    "mixtral": ("test_mixtral", "mixtral", "gqa"),
    "mixtral-window": ("test_mixtral", "mixtral", "window"),
    "falcon-mamba": ("test_falcon_mamba", "falcon", "odd"),
    "recurrent-gemma": ("test_recurrent_gemma", "gemma", "odd"),
    **{
        name: ("test_hybrids", "saved", name)
        for name in ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "qwen3_next", "zamba2")
    },
}
"""Module of tests/models, its function (fields, folder) -> the reference saved there, and its case."""


def _family(name: str, where: Path) -> Model:
    module, function, case = FAMILIES[name]
    cases = importlib.import_module(f"tests.models.{module}")
    make, fields = getattr(cases, function), cases.CASES[case]
    once(where, lambda path: make(fields, path))
    with tempfile.TemporaryDirectory() as again:
        reference = make(fields, Path(again))
    return Model(name, str(where), reference, fields["vocab_size"])


def _retnet(where: Path) -> tuple[str, torch.nn.Module]:
    path = once(where.with_suffix(".py"), lambda path: path.write_text(RETNET))
    scope: dict[str, Any] = {}
    exec(RETNET, scope)
    return f"{path}:make", scope["make"]().eval()


@dataclass(frozen=True)
class Model:
    """source: what the command line is given; reference: in PyTorch, asked for a whole sequence in one go."""

    name: str
    source: str
    reference: torch.nn.Module
    vocab: int

    @cached_property
    def export(self) -> Path:
        sizes = ("--context", CONTEXT, "--chunk", CHUNKS)
        return once(folder() / f"{self.name}.export", lambda out: self._done("export", self.source, "-o", out, *sizes))

    @cached_property
    def host(self) -> Path:
        return self._bundle("host")

    @cached_property
    def pi(self) -> Path:
        return self._bundle("raspberry-pi-5")

    def _bundle(self, target: str) -> Path:
        out = folder() / f"{self.name}.{target}"
        return once(out, lambda path: self._done("compile", self.export, "--target", target, "-o", path))

    def _done(self, *arguments: object) -> None:
        """In a process of its own for a few models, which shows that it works; here for the rest, which takes less."""
        if self.name in FAMILIES:
            assert cli.run([str(a) for a in arguments]) == 0
        else:
            done(*arguments)

    def prompt(self, n: int = PROMPT, seed: int = 1) -> list[int]:
        return np.random.default_rng(seed).integers(0, self.vocab, n).tolist()

    def logits(self, tokens: list[int]) -> NDArray[np.float64]:
        """[T,V] of the whole sequence, in float64 as far as the reference lets it."""
        return self._whole(self.wide, tokens)

    @cached_property
    def wide(self) -> torch.nn.Module:
        return copy.deepcopy(self.reference).double()

    def close(self, got: NDArray, tokens: list[int], rows: Any) -> None:
        """`got` are these rows of the logits; what the reference loses in float32 may be lost, as in `verify`."""
        want = self.logits(tokens)[rows]
        lost = np.abs(self._whole(self.reference, tokens)[rows] - want).max()
        close(got, want, float(lost))

    def _whole(self, reference: torch.nn.Module, tokens: list[int]) -> NDArray[np.float64]:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = reference(ids) if self.name == "retnet" else reference(ids, use_cache=False).logits
        return logits[0].double().numpy()

    def assert_greedy(self, prompt: list[int], made: list[int]) -> None:
        """Every made token is the reference's own choice after all before it."""
        choices = self.logits([*prompt, *made])[len(prompt) - 1 : -1].argmax(1)
        assert made == choices.tolist()
        assert len(set(made)) > 2, "a constant answer would prove little"


@cache
def model(name: str) -> Model:
    where = folder() / name
    if name == "retnet":
        return Model(name, *_retnet(where), 53)
    if name in FAMILIES:
        return _family(name, where)
    family, fields = {
        "mamba": ("mamba", MAMBA), "llama-gqa": ("llama", GQA), "llama-odd-heads": ("llama", ODD_HEADS),
        "mamba-biased": ("mamba", BIASED),
    }[name]  # fmt: skip
    return Model(name, *_huggingface(family, fields, where), fields["vocab_size"])


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def close(got: NDArray, want: NDArray, lost: float = 0.0) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance("runtime", "float32", want) + ROUNDING_ELEMENT * lost


def driver(bundle: Path, *arguments: object, check: bool = True) -> dict[str, Any]:
    """`edgeseq-device` of a raspberry-pi-5 bundle under qemu; its JSON line."""
    assert QEMU is not None
    command = [QEMU, bundle / "edgeseq-device", bundle / "model.edgeseq", *arguments, "--threads", 2]
    process = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout)
    return result
