"""`minigpt sample`: a checkpoint -> text on stdout, as it is made; nothing else goes there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt_cli.commands.console import Debug, note, read_prompt, safe, stdout
from minigpt_cli.core.errors import UserError

if TYPE_CHECKING:
    from minigpt_cli.core.tokenizer import Tokenizer


def sample(
    ckpt: Annotated[Path, typer.Option("--ckpt", help="A checkpoint: last.safetensors or best.safetensors of a run.")],
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
    stop: Annotated[str | None, typer.Option("--stop", help="End a text before this string.")] = None,
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
        bool, typer.Option("--raw", help="Print control characters as they are, instead of spelled out.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", help="auto, fp32 or bf16: auto takes the faster, and says so if it is bf16.")
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Write text with a trained model.

    Prompt and text go to stdout as they are made, and nothing else does. A text ends with its document, where the model
    was trained on documents. When the context window is full, a model with
    rotary positions forgets its oldest token for each new one; learned positions cannot slide, so the newest half is
    kept and read again. --exact-window instead recomputes the whole window for every token, as the original scripts
    did: slower, with exactly the longest context for each token.

    Example: minigpt sample --ckpt checkpoints/best.safetensors --prompt "ROMEO:" --temperature 0.8
    """
    _check_arguments(tokens, temperature, top_k, top_p, num_samples, seed, stop, prompt, prompt_file, show_probs)
    if prompt_file is not None:
        prompt = read_prompt(prompt_file)
    import torch

    from minigpt_cli.core.checkpoint import load
    from minigpt_cli.core.config import RuntimeConfig, parse_section
    from minigpt_cli.core.generate import Sampling, for_decoding, generate, read_back
    from minigpt_cli.core.runtime import choose_decoding_runtime

    if show_probs and precision == "auto":
        precision = "fp32"  # whoever reads every number wants exact ones, and reads slowly
    asked = parse_section(RuntimeConfig, {"device": device, "precision": precision}, "sample")
    choose_decoding_runtime(asked, 0)  # a device that is not there is said before a large file is read
    checkpoint = load(ckpt, weights_only=True)
    tokenizer = checkpoint.tokenizer
    ids: list[int] = tokenizer.encode(prompt).tolist() if prompt else []
    window = checkpoint.config.model.block_size
    if len(ids) > window:
        note(f"the prompt has {len(ids):,} tokens and the context {window:,}: only its newest {window:,} count")
    if top_k is not None and top_k > tokenizer.vocab_size:
        note(f"--top-k {top_k} is more than the vocabulary: all {tokenizer.vocab_size} tokens are allowed")
    model = checkpoint.model()
    runtime = choose_decoding_runtime(asked, model.parameter_counts()["total"])
    for line in runtime.notes:
        if line.startswith("precision"):
            note(line)
    model = for_decoding(model.to(runtime.device), runtime)
    prompt_BP = torch.tensor([ids or [tokenizer.end_of_text or 0]], device=runtime.device).expand(num_samples, -1)
    generator = torch.Generator(runtime.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    stream = generate(
        model, prompt_BP, tokens, Sampling(temperature, top_k, top_p), generator=generator, exact_window=exact_window,
        record=runtime.record if runtime.records else None, note=note,
    )  # fmt: skip
    try:
        if show_probs:
            _print_probabilities(stream, tokenizer, prompt or "", stop)
        else:
            _print_texts(read_back(stream, runtime.read_every), tokenizer, prompt or "", stop, raw, num_samples)
    except KeyboardInterrupt:  # what is written is written
        raise typer.Exit(130) from None


def _check_arguments(
    tokens: int, temperature: float, top_k: int | None, top_p: float | None, num_samples: int, seed: int | None,
    stop: str | None, prompt: str | None, prompt_file: str | None, show_probs: bool,
) -> None:  # fmt: skip
    wrong = [
        (tokens < 1, f"--tokens {tokens}: ask for at least 1"),
        (not 0 <= temperature < float("inf"), f"--temperature {temperature}: 0 (always the likeliest) or more"),
        (top_k is not None and top_k < 1, f"--top-k {top_k}: at least 1"),
        (top_p is not None and not 0 < top_p <= 1, f"--top-p {top_p}: above 0, at most 1"),
        (num_samples < 1, f"--num-samples {num_samples}: at least 1"),
        (seed is not None and not 0 <= seed < 1 << 63, f"--seed {seed}: from 0 to 2^63 - 1"),
        (stop == "", "--stop: the text to stop at is empty"),
        (prompt is not None and prompt_file is not None, "--prompt and --prompt-file: choose one"),
        (show_probs and num_samples > 1, "--show-probs shows one sample: leave out --num-samples"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise UserError(message)


def _print_texts(
    stream: Iterator[list[int]], tokenizer: Tokenizer, prompt: str, stop: str | None, raw: bool, count: int
) -> None:
    """The first text as it grows; the others, made beside it, when all are done."""
    from minigpt_cli.core.detokenize import Detokenizer

    pieces = tokenizer.token_bytes()
    texts = [Detokenizer(pieces, [stop] if stop else [], tokenizer.end_of_text) for _ in range(count)]
    try:
        _write(prompt, raw)
        for ids in stream:
            for text, token in zip(texts, ids, strict=True):
                text.add(token)
            _write(texts[0].take(), raw)
            if all(text.ended for text in texts):
                break
        _write(texts[0].finish(), raw)
        for text in texts[1:]:
            _write(f"\n---\n{prompt}{text.finish()}", raw)
    finally:
        if sys.stdout.isatty():
            print(flush=True)


def _write(text: str, raw: bool) -> None:
    if text:
        sys.stdout.write(text if raw else safe(text))
        sys.stdout.flush()


def _print_probabilities(stream: Any, tokenizer: Tokenizer, prompt: str, stop: str | None) -> None:
    """A line a token: itself, the model's probability for it (before temperature and cuts), and the five likeliest."""
    from rich.text import Text

    from minigpt_cli.core.detokenize import Detokenizer

    console, end = stdout(), tokenizer.end_of_text
    text = Detokenizer(tokenizer.token_bytes(), [stop] if stop else [], end)
    pieces = [_quoted(piece) if i != end else "<end of text>" for i, piece in enumerate(tokenizer.token_bytes())]
    if prompt:
        console.print(Text(safe(prompt)), soft_wrap=True)
    for ids_B, logits_BV in stream:
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
