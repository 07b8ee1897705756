"""Public shapes, seeded weights, twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.errors import SourceError
from edgeseq.models import families, family
from edgeseq.models.mamba import MambaConfig
from edgeseq.models.retnet import RetNetConfig
from edgeseq.models.source import open_source, random_source, twin_of, zoo_names
from edgeseq.models.twin import WITHIN, twin

# state-spaces/mamba-130m to -2.8b as published (vocabulary padded to 50280, tied head).
PUBLISHED = {
    "zoo:mamba-130m": 129_135_360, "zoo:mamba-370m": 371_516_416, "zoo:mamba-790m": 793_204_224,
    "zoo:mamba-1.4b": 1_372_178_432, "zoo:mamba-2.8b": 2_768_345_600,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_the_public_shapes(name: str) -> None:
    assert open_source(name).param_count() == PUBLISHED[name]


def test_retnet_is_of_the_size_its_name_says() -> None:
    source = open_source("zoo:retnet-1.3b")
    c = source.config
    assert source.param_count() == pytest.approx(1.3e9, rel=0.03)
    assert (c.d_model, c.n_layers, c.n_heads, c.d_key, c.d_value, c.vocab_size) == (2048, 24, 8, 256, 512, 32000)
    assert sum(slot.nbytes for slot in source.build("meta").state_slots(0)) == 24 * 8 * 256 * 512 * 4


@pytest.mark.parametrize("name", ["zoo:mamba-130m", "zoo:mamba-370m", "zoo:mamba-790m", "zoo:retnet-1.3b"])
def test_twins_match_in_width_vocabulary_and_parameters(name: str) -> None:
    source, other = open_source(name), open_source(f"{name}-twin")
    assert other.family == "transformer"
    assert (other.config.d_model, other.config.vocab_size) == (source.config.d_model, source.config.vocab_size)
    assert abs(other.param_count() / source.param_count() - 1) <= WITHIN
    assert twin_of(source).config == other.config


configs = st.one_of(
    st.builds(
        MambaConfig,
        vocab_size=st.integers(1, 3000),
        d_model=st.integers(16, 200),
        n_layers=st.integers(1, 8),
        d_inner=st.integers(64, 500),
        d_state=st.integers(1, 32),
        d_conv=st.integers(2, 5),
        dt_rank=st.integers(1, 20),
        tie=st.booleans(),
    ),
    st.builds(
        lambda heads, key, **rest: RetNetConfig(d_model=2 * heads * key, n_heads=heads, **rest),
        heads=st.integers(1, 6),
        key=st.integers(2, 20),
        vocab_size=st.integers(1, 3000),
        n_layers=st.integers(1, 8),
        d_ff=st.integers(1, 300),
        tie=st.booleans(),
    ),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(config=configs)
def test_twins_of_odd_shapes_stay_within_two_percent(config: MambaConfig | RetNetConfig) -> None:
    name = "mamba" if isinstance(config, MambaConfig) else "retnet"
    target = family(name).param_count(config)
    try:
        made = twin(config)
    except SourceError as error:
        assert "within 2%" in error.sentence
        return
    assert abs(family("transformer").param_count(made) - target) <= WITHIN * target
    assert (made.d_model, made.vocab_size, made.tie) == (config.d_model, config.vocab_size, config.tie)


def test_a_twin_is_refused_where_there_is_none() -> None:
    with pytest.raises(SourceError, match="already"):
        twin(family("transformer").tiny)
    with pytest.raises(SourceError, match="no family"):
        twin(3)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_attention_of_another_kind_has_the_tiny_transformer_as_its_twin(name: str) -> None:
    """`twin_of` takes the trained one where it is as large within 2 %, and a twin has to exist for that."""
    made, tiny = twin(family(name).tiny), family("transformer").tiny
    assert (made.d_model, made.vocab_size, made.tie) == (tiny.d_model, tiny.vocab_size, tiny.tie)
    trained, size = family("transformer").param_count(tiny), family(name).param_count(family(name).tiny)
    assert abs(trained / size - 1) <= WITHIN


def test_random_weights_do_not_depend_on_the_order_of_reading() -> None:
    one, two = (open_source("zoo:mamba-130m") for _ in range(2))
    names = ["norm", "layers.3.dt_bias", "layers.3.in_proj.weight"]
    first = {n: one.tensor(n) for n in names}
    for n in reversed(names):
        assert (two.tensor(n) == first[n]).all()
    other = open_source("zoo:mamba-370m").tensor("layers.3.in_proj.weight")
    assert not (other[0, :8] == first["layers.3.in_proj.weight"][0, :8]).all()


@pytest.mark.parametrize("name", families())
def test_random_weights_keep_long_runs_finite_and_lively(name: str) -> None:
    """400 steps of the tiny shape with random weights: finite, and the scores neither collapse nor explode."""
    source = random_source(f"random-{name}", family(name), family(name).tiny)
    model, token = source.build(), torch.zeros(1, 1, dtype=torch.int64)
    steps = min(400, model.longest or 400)
    state, spread = model.initial_state(1, steps), []
    with torch.no_grad():
        for position in range(steps):
            logits, *state = model.advance(token, torch.tensor([position]), *state)
            token = (token * 7 + 13 + position) % 256
            spread.append(logits.std().item())
    assert all(torch.isfinite(t).all() for t in state)
    assert min(spread) > 0.2
    assert max(spread) < 5.0


def test_every_zoo_name_opens() -> None:
    for name in zoo_names():
        assert open_source(f"zoo:{name}").build("meta").config is not None


def test_family_records_agree_with_their_models() -> None:
    for record in families().values():
        model = record.meta_model(record.tiny)
        slots = model.state_slots(128)
        assert (record.growth == "linear") == any(s.update == "append" for s in slots)
        names = set(model.state_dict())
        made = {*record.constants(record.tiny), *record.derived(record.tiny)}
        assert made == names - {n for n, _ in model.named_parameters()}
