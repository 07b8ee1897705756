"""The trained models that ship: they load, they are small, and they reach the figures recorded beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from edgeseq.errors import UsageError
from edgeseq.models import corpus, families, family
from edgeseq.models.source import ZOO_WEIGHTS, open_source, twin_of
from edgeseq.models.train import Recipe, bits_per_byte, cross_entropy, fresh_model, optimisers, stored, untrained
from edgeseq.models.twin import WITHIN
from edgeseq.verify.tolerances import tolerance
from tests.models.support import run_cut

SAMPLE = (ZOO_WEIGHTS / "held-out.txt").read_bytes()
TRAINED = [name for name in families() if (ZOO_WEIGHTS / f"tiny-{name}.safetensors").is_file()]
names = pytest.mark.parametrize("name", TRAINED)


def record(name: str) -> dict:
    return json.loads((ZOO_WEIGHTS / f"tiny-{name}.json").read_text())


@names
def test_recorded_bits_per_byte_are_reached(name: str) -> None:
    model, facts = open_source(f"zoo:tiny-{name}").build(), record(name)
    assert len(SAMPLE) == facts["data"]["sample_bytes"]
    measured = bits_per_byte(model, SAMPLE, facts["recipe"]["context"])
    assert measured == pytest.approx(facts["sample_bits_per_byte"], abs=1e-3)
    assert facts["held_out_bits_per_byte"] == pytest.approx(measured, abs=0.1)
    assert facts["held_out_bits_per_byte"] < (2.3 if name == "linear-transformer" else 2.2)  # which cannot forget


@names
def test_shipped_models_are_small_and_match_their_record(name: str) -> None:
    source, facts = open_source(f"zoo:tiny-{name}"), record(name)
    assert (ZOO_WEIGHTS / f"tiny-{name}.safetensors").stat().st_size < 1_700_000
    assert source.param_count() == facts["params"]
    assert facts["config"] == json.loads(json.dumps(family(name).tiny, default=vars))
    assert source.tokenizer == "bytes"


def test_the_page_quotes_the_figures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text()
    for name in TRAINED:
        row = next(line for line in page.splitlines() if line.startswith(f"| `zoo:tiny-{name}`"))
        assert f"| {record(name)['held_out_bits_per_byte']:.3f} |" in row
        assert f"| {record(name)['params']:_} |".replace("_", " ") in row


def test_all_were_given_the_same_budget() -> None:
    facts = [record(name) for name in TRAINED]
    for field in ("recipe", "data", "bytes_seen"):
        assert all(f[field] == facts[0][field] for f in facts)


@pytest.mark.parametrize("name", [n for n in TRAINED if n != "transformer"])
def test_the_twin_is_the_trained_transformer(name: str) -> None:
    source = open_source(f"zoo:tiny-{name}")
    other = twin_of(source)
    assert other.name == open_source(f"zoo:tiny-{name}-twin").name == "zoo:tiny-transformer"
    head = 0 if source.config.tie else 256 * 128
    assert abs(other.param_count() / (source.param_count() - head) - 1) <= WITHIN
    assert (other.config.d_model, other.config.vocab_size) == (source.config.d_model, source.config.vocab_size)


@names
def test_text_continues_as_dictionary_english(name: str) -> None:
    """Greedy text from a prompt is made of English words; an untrained or misread model writes none."""
    model = open_source(f"zoo:tiny-{name}").build()
    text = list(b"\nsmall boat: a ")
    state = model.initial_state(1, 128)
    with torch.no_grad():
        logits, *state = model.advance(torch.tensor([text]), torch.tensor([0]), *state)
        while len(text) < 100:
            text.append(int(logits.argmax()))
            logits, *state = model.advance(torch.tensor([text[-1:]]), torch.tensor([len(text) - 1]), *state)
    words = re.findall(r"[a-z]+", bytes(text).decode("ascii")[15:].lower())
    known = set(re.findall(r"[a-z]+", SAMPLE.decode().lower()))
    assert len(words) > 8
    few = name in ("bigbird", "granite-hybrid")  # which go round in circles
    assert len({w for w in words if w in known}) > (1 if few else 2), words
    assert sum(w in known for w in words) >= 0.5 * len(words), words


@names
def test_far_beyond_the_trained_length_scores_stay_finite(name: str) -> None:
    model = open_source(f"zoo:tiny-{name}").build()
    most = getattr(model.config, "n_positions", 2048)  # learned positions end
    tokens = torch.tensor([list(SAMPLE[:most])])
    with torch.no_grad():
        logits = model(tokens)
    assert torch.isfinite(logits).all()
    assert logits.std(-1).min() > 0.1


@names
def test_trained_weights_keep_step_chunk_and_whole_equal(name: str) -> None:
    model = open_source(f"zoo:tiny-{name}").build()
    tokens = torch.tensor([list(SAMPLE[100:260])])
    with torch.no_grad():
        whole = model(tokens)
    for last, logits in run_cut(model, tokens, [64, 128, 129, 130, 137], 160).items():
        assert (logits - whole[:, last]).abs().max() <= tolerance("torch", "float32", whole)


def test_every_family_ships_one() -> None:
    assert [*families()] == TRAINED


@pytest.mark.parametrize("name", families())
def test_training_learns(name: str) -> None:
    """A few steps on one window bring its loss down: gradients reach every parameter."""
    torch.manual_seed(0)
    model = fresh_model(family(name), seed=0)
    window = torch.tensor([list(SAMPLE[:65])])
    opts = optimisers(model, Recipe())
    first = cross_entropy(model, window)
    first.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    for _ in range(8):
        for opt in opts:
            opt.step()
        model.zero_grad()
        loss = cross_entropy(model, window)
        loss.backward()
    assert loss.item() < 0.7 * first.item()
    model.unparametrize()
    assert set(stored(model)) | set(family(name).constants(family(name).tiny)) == set(model.state_dict())


def test_an_interrupted_training_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tiny-mamba.safetensors").touch()  # no record: its training was cut off
    (tmp_path / "tiny-gla.json").touch()
    assert untrained(tmp_path) == [name for name in families() if name != "gla"]


def test_held_out_lines_are_never_trained_on() -> None:
    lines = [b"word %d: a meaning\n" % i for i in range(2000)]
    training, held = corpus.split(lines)
    assert sorted(training + held) == sorted(lines)
    assert not set(training) & set(held)
    assert 20 < len(held) < 60


def test_gloss_lines(tmp_path: Path) -> None:
    rows = ["  1 licence text | not a gloss", "00001740 03 n 02 living_thing 0 entity 0 001 @ 00 n 0000 | a thing  "]
    for part in corpus.PARTS:
        (tmp_path / f"data.{part}").write_text("\n".join(rows) + "\n")
    (tmp_path / "data.adj").write_text('00001740 00 a 01 able(p) 0 000 | having means; "able to swim"  \n')
    assert corpus.gloss_lines(tmp_path) == [b"living thing: a thing\n", b'able: having means; "able to swim"\n']
    (tmp_path / "data.adv").unlink()
    with pytest.raises(UsageError, match=r"data\.adv does not exist"):
        corpus.gloss_lines(tmp_path)


@pytest.mark.skipif(not Path("/usr/share/wordnet/data.noun").is_file(), reason="wordnet-base is not installed")
def test_the_sample_is_the_beginning_of_the_held_out_text() -> None:
    held = corpus.split(corpus.gloss_lines(Path("/usr/share/wordnet")))[1]
    assert b"".join(held)[: len(SAMPLE)] == SAMPLE
