"""`minigpt sample`: a checkpoint -> text on stdout, as it is made; nothing else goes there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.commands.console import Debug, find_checkpoint, note, read_prompt, safe, stdout, text_writer
from minigpt_cli.commands.options import CKPT, DEVICE, PRECISION
from minigpt_cli.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt_cli.core.tokenizer import Tokenizer


def sample(
    ckpt: Annotated[Path, CKPT],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="The text to go on from. [default: an end of text, or token 0; not printed]"),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", help="Read the prompt from a file; - is stdin.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="How many tokens to make (of each sample).")] = 500,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest token; above 1 is wilder.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Choose among the N likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Choose among the likeliest tokens that hold P of the probability."),
    ] = None,
    num_samples: Annotated[
        int, typer.Option("--num-samples", help="How many texts, made side by side; a line --- stands between them.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same text. [default: a new one]")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End a text before this string. Repeatable: before any of them.")
    ] = None,
    show_probs: Annotated[
        bool,
        typer.Option(
            "--show-probs", help="Show each token with its probability (before temperature) and the likeliest others."
        ),
    ] = False,
    exact_window: Annotated[
        bool, typer.Option("--exact-window", help="Past the context window, recompute it for every token.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print control characters as they are, on a terminal too.")
    ] = False,
    device: Annotated[str, DEVICE] = "auto",
    precision: Annotated[str, PRECISION] = "auto",
    debug: Debug = False,
) -> None:
    """Write text with a trained model.

    Prompt and text go to stdout as they are made, and nothing else does: to a file or a pipe in UTF-8, byte for byte;
    on a terminal with control characters spelled out. A text ends with its document, where the model was trained on
    documents. When the context window is full, a model with
    rotary positions forgets its oldest token for each new one; learned positions cannot slide, so the newest half is
    kept and read again. --exact-window instead recomputes the whole window for every token, as the original scripts
    did: slower, with exactly the longest context for each token.

    Example: minigpt sample --ckpt checkpoints/best.safetensors --prompt "ROMEO:" --temperature 0.8
    """
    if prompt is not None and prompt_file is not None:
        raise UserError("--prompt and --prompt-file: choose one")
    if num_samples < 1:
        raise UserError(f"--num-samples {num_samples}: at least 1")
    if show_probs and num_samples > 1:
        raise UserError("--show-probs shows one sample: leave out --num-samples")
    if prompt_file is not None:
        prompt = read_prompt(prompt_file)
    from minigpt_cli.commands.display import telling
    from minigpt_cli.core.checkpoint import load
    from minigpt_cli.core.config import RuntimeConfig, parse_section
    from minigpt_cli.core.runtime import require_runtime
    from minigpt_cli.core.writer import Writer, checked_sampling

    sampling = checked_sampling(
        tokens, temperature, top_k, top_p, seed, stop or [], spell=lambda name: f"--{name.replace('_', '-')}"
    )
    if show_probs and precision == "auto":
        precision = "fp32"  # whoever reads every number wants exact ones, and reads slowly
    asked = parse_section(RuntimeConfig, {"device": device, "precision": precision}, "sample")
    require_runtime(asked)  # a device that is not there is said before a large file is read
    with telling(lambda: f"reading {ckpt}"):
        checkpoint = load(find_checkpoint(ckpt), weights_only=True)
        writer = Writer(checkpoint, asked)
    tokenizer, window = checkpoint.tokenizer, checkpoint.config.model.block_size
    length = len(tokenizer.encode(prompt)) if prompt else 0
    if length > window:
        note(f"the prompt has {length:,} tokens and the context {window:,}: only its newest {window:,} count")
    if top_k is not None and top_k > tokenizer.vocab_size:
        note(f"--top-k {top_k} is more than the vocabulary: all {tokenizer.vocab_size} tokens are allowed")
    for line in writer.runtime.notes:
        if line.startswith(("precision", "compile")):
            note(line)
    steps = writer.steps(
        prompt or "", tokens, sampling, count=num_samples, seed=seed, exact_window=exact_window, note=note
    )
    try:
        if show_probs:
            _print_probabilities(steps, tokenizer, prompt or "", stop or [])
        else:
            _print_texts(writer.pieces(steps, num_samples, stop or []), prompt or "", raw)
    except KeyboardInterrupt:  # what is written is written
        raise typer.Exit(130) from None


def _print_texts(pieces: Iterator[list[str]], prompt: str, raw: bool) -> None:
    """The first text as it grows; the others, made beside it, when all are done."""
    write, others = text_writer(raw), list[str]()
    try:
        write(prompt)
        for first, *rest in pieces:
            write(first)
            others = [text + piece for text, piece in zip(others or [prompt] * len(rest), rest, strict=True)]
        for text in others:
            write(f"\n---\n{text}")
    finally:
        if sys.stdout.isatty():
            print(flush=True)


def _print_probabilities(
    steps: Iterator[tuple[Tensor, Tensor]], tokenizer: Tokenizer, prompt: str, stops: list[str]
) -> None:
    """A line a token: itself, the model's probability for it (before temperature and cuts), and the five likeliest."""
    from rich.text import Text

    from minigpt_cli.core.detokenize import Detokenizer

    console, end = stdout(), tokenizer.end_of_text
    text = Detokenizer(tokenizer.token_bytes(), stops, end)
    pieces = [_quoted(piece) if i != end else "<end of text>" for i, piece in enumerate(tokenizer.token_bytes())]
    if prompt:
        console.print(Text(safe(prompt)), soft_wrap=True)
    for ids_B, logits_BV in steps:
        token, probs_V = int(ids_B), logits_BV[0].softmax(dim=-1)
        likeliest = probs_V.topk(min(5, len(probs_V)))
        chosen = float(probs_V[token])
        colour = next(name for floor, name in ((0.5, "green"), (0.1, "yellow"), (0.0, "red")) if chosen >= floor)
        line = Text(f"{pieces[token]:<12} {chosen:7.2%}  ", style=colour)
        others = (f"{pieces[int(i)]} {float(p):.1%}" for p, i in zip(*likeliest, strict=True))
        console.print(line + Text("  ".join(others), style="dim"), soft_wrap=True)
        text.add(token)
        if text.ended:
            break


def _quoted(piece: bytes) -> str:
    """A token in quotes, safe for a terminal; bytes that are only a part of a character as \\xe6."""
    try:
        return safe(repr(piece.decode("utf-8")))
    except UnicodeDecodeError:
        return repr(piece)[1:]
