"""Checkpoints of unusual sizes: 64 greedy tokens and every logit as the reference's own whole forward has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgeseq
from tests.every import EVERY

from .support import COUNT, FAMILIES, QEMU, done, driver, ids, model

SLOW = ("retnet", "llama-odd-heads", "mamba-biased", *FAMILIES)
NAMES = ["mamba", "llama-gqa", "retnet", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW[1:])]
emulated = pytest.mark.skipif(QEMU is None, reason="qemu-user-static is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line(name: str) -> None:
    m = model(name)
    prompt = m.prompt()
    result = json.loads(done("run", m.host, "--tokens", ids(prompt), "-n", COUNT, "--json"))
    assert result["prompt_tokens"] == len(prompt) and len(result["tokens"]) == COUNT
    m.assert_greedy(prompt, result["tokens"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_python_api(name: str, threads: int) -> None:
    """Logits after the prompt and after every step, scratch memory poisoned."""
    m = model(name)
    prompt, made, rows = m.prompt(), [], []
    with edgeseq.load(m.host, threads=threads, poison=True) as opened, opened.session() as session:
        rows.append(session.prefill(prompt))
        for _ in range(COUNT):
            made.append(int(np.argmax(rows[-1])))
            rows.append(session.step(made[-1]))
    m.assert_greedy(prompt, made)
    m.close(np.stack(rows), [*prompt, *made], slice(len(prompt) - 1, None))


@emulated
@pytest.mark.parametrize(
    "name", ["mamba", "llama-gqa", *(pytest.param(n, marks=pytest.mark.slow) for n in (SLOW if EVERY else SLOW[::2]))]
)
def test_the_device_bundle(name: str, tmp_path: Path) -> None:
    """The same on aarch64, under emulation, by the bundle's own driver."""
    m = model(name)
    prompt = m.prompt()
    made = driver(m.pi, "run", "--tokens", ids(prompt), "-n", COUNT, "--poison")["tokens"]
    m.assert_greedy(prompt, made)
    out = tmp_path / "logits"
    told = driver(m.pi, "logits", "--tokens", ids([*prompt, *made]), "--cut", "5,16,1,3,20,1", "--out", out, "--poison")
    ends = np.minimum(np.cumsum([5, 16, 1, 3, 20, *[1] * 100]), len(prompt) + COUNT)[: told["rows"]] - 1
    m.close(np.fromfile(out, np.float32).reshape(told["rows"], -1), [*prompt, *made], ends)
