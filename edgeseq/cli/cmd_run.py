"""`edgeseq run`: a prompt goes in, tokens come out."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeseq.cli.params import Ints
from edgeseq.errors import UsageError

if TYPE_CHECKING:
    from edgeseq.cli.text import Text
    from edgeseq.runtime import Sampling, Session


@dataclass
class Outcome:
    """What was done. Rates are tokens per second, None where there was nothing to time."""

    tokens: list[int]
    text: str | None
    prompt_tokens: int
    prefill_tok_s: float | None
    decode_tok_s: float | None


@click.command("run")
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--tokens", metavar="1,2,3", type=Ints(), help="Token ids to continue, without a tokenizer.")
@click.option("-n", "n", metavar="N", type=click.IntRange(min=0), default=64, show_default=True, help="Tokens to make.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0, the default, takes the likeliest.")
@click.option("--seed", metavar="N", type=click.IntRange(0, (1 << 64) - 1), default=0, help="Seed of the draws.")
@click.option("-t", "--threads", metavar="N", type=click.IntRange(1, 256), help="Default: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of the text.")
@click.option("--load-state", metavar="F", type=click.Path(path_type=Path), help="Resume from a saved state.")
@click.option("--save-state", metavar="F", type=click.Path(path_type=Path), help="Save the state at the end.")
def command(
    bundle: Path,
    prompt: str | None,
    tokens: tuple[int, ...] | None,
    n: int,
    temperature: float,
    seed: int,
    threads: int | None,
    as_json: bool,
    load_state: Path | None,
    save_state: Path | None,
) -> None:
    """Continue a prompt on this machine."""
    from edgeseq.bundle.directory import require_bundle
    from edgeseq.cli.text import open_text
    from edgeseq.runtime import Sampling, load

    _check(prompt, tokens, load_state, save_state)
    with load(require_bundle(bundle), threads) as model, model.session() as session:
        if not model.info.takes_tokens:
            raise UsageError(f"{bundle} takes named inputs, not tokens", "use it through the Python or the C API")
        text = open_text(bundle, model.info.tokenizer)
        ids = list(tokens) if tokens is not None else _encode(bundle, text, prompt or "")
        if load_state:
            session.load(load_state.read_bytes())
        _check_room(model.info.context, session.position, len(ids), n)
        shown = None if as_json else text
        outcome = _generate(session, ids, n, Sampling(temperature=temperature, seed=seed), shown, as_json)
        outcome.text = text.decode(outcome.tokens) if text else None
        if save_state:
            _write_whole(save_state, session.save())
    if as_json:
        click.echo(json.dumps(outcome.__dict__))
    elif sys.stderr.isatty():
        _say_rates(outcome)


def _check(prompt: str | None, tokens: tuple[int, ...] | None, load_state: Path | None, save: Path | None) -> None:
    """Refuse what cannot work before anything is loaded."""
    if prompt is not None and tokens is not None:
        raise UsageError("--prompt and --tokens exclude each other", "give one of them")
    if not prompt and not tokens:
        after = "a saved state resumes with the next tokens" if load_state else "generation starts from a token"
        raise UsageError("there is nothing to continue", f"{after}: give --prompt TEXT or --tokens 1,2,3")
    if load_state and not load_state.is_file():
        raise UsageError(f"there is no saved state {load_state}", "make one with --save-state")
    if save and not save.absolute().parent.is_dir():
        raise UsageError(f"the directory of {save} does not exist", "make it, or choose another path")


def _encode(bundle: Path, text: Text | None, prompt: str) -> list[int]:
    if text is None:
        raise UsageError(f"{bundle} has no tokenizer", "give ids with --tokens 1,2,3")
    ids = text.encode(prompt)
    if not ids:
        raise UsageError("the prompt has no tokens", "give some text")
    return ids


def _check_room(limit: int, position: int, prompt: int, n: int) -> None:
    if limit and position + prompt + n > limit:
        before = f"{position} tokens in the state, " if position else ""
        raise UsageError(
            f"{before}{prompt} of prompt and {n} to make exceed the context of {limit}",
            "ask for fewer, or export the model with a larger --context",
        )


def _generate(session: Session, ids: list[int], n: int, sampling: Sampling, text: Text | None, quiet: bool) -> Outcome:
    """Prefill and decode; unless `quiet`, what is certain is printed at once: text, or ids without a tokenizer."""
    start = time.perf_counter()
    session.prefill(ids)
    middle = time.perf_counter()
    made: list[int] = []
    for token in session.generate(n, sampling, recent=ids):
        made.append(token)
        if not quiet:
            _show(text.feed(token) if text else f"{token} ")
    end = time.perf_counter()
    if not quiet:
        _show((text.flush() if text else "") + "\n")
    return Outcome(
        made, None, len(ids), _rate(len(ids), middle - start), _rate(n, end - middle) if n else None
    )  # fmt: skip


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _rate(tokens: int, seconds: float) -> float:
    return round(tokens / max(seconds, 1e-9), 2)


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a reader sees all or nothing."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _say_rates(outcome: Outcome) -> None:
    decode = f", {len(outcome.tokens)} made at {outcome.decode_tok_s:.1f}/s" if outcome.decode_tok_s else ""
    click.echo(f"{outcome.prompt_tokens} tokens read at {outcome.prefill_tok_s:.1f}/s{decode}", err=True)
