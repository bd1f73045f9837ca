"""`minigpt eval`: a checkpoint and a text -> how good it is, beside models that only count."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt_cli.commands.console import Debug, find_checkpoint, note, print_table, progress_bar
from minigpt_cli.commands.options import CKPT, DEVICE, among
from minigpt_cli.core.errors import UserError

if TYPE_CHECKING:
    from minigpt_cli.core.checkpoint import Checkpoint
    from minigpt_cli.core.dataset import Tokens
    from minigpt_cli.core.evaluate import Score
    from minigpt_cli.core.model import GPT
    from minigpt_cli.core.runtime import Runtime
    from minigpt_cli.core.world import World


def evaluate(
    ckpt: Annotated[Path, CKPT],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A dataset folder or a text file. [default: what it was trained on]"),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", autocompletion=among("val", "train"), help="val or train (of a dataset folder).")
    ] = "val",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Annotated[str, DEVICE] = "auto",
    debug: Debug = False,
) -> None:
    """Measure a model on a whole split: every token once, in fixed windows.

    Beside its loss stand models that only count the training split: uniform knows the vocabulary, unigram how often
    each token comes, bigram what follows what. A model that has learned anything beats them.

    Example: minigpt eval --ckpt checkpoints/best.safetensors --json
    """
    if split not in ("val", "train"):
        raise UserError(f"--split {split}: val or train")
    from minigpt_cli.core.world import joined

    with joined() as world:
        result, title = _measure(ckpt, data, split, device, world)
    if not world.leads:
        return
    if as_json:
        print(json.dumps(result))
    else:
        _print(result, title)


def _measure(ckpt: Path, data: Path | None, split: str, device: str, world: World) -> tuple[dict[str, Any], str]:
    """All the numbers, and what they are of. Ranks share the work."""
    from minigpt_cli.commands.display import telling
    from minigpt_cli.core.checkpoint import load
    from minigpt_cli.core.evaluate import EVALUATED_AT_ONCE, baselines, evaluation_settings, text_size
    from minigpt_cli.core.runtime import choose_runtime

    with telling(lambda: f"reading {ckpt}"), world.together():
        ckpt = find_checkpoint(ckpt)
        checkpoint = load(ckpt, weights_only=True)
        config, tokenizer = checkpoint.config, checkpoint.tokenizer
        wanted = evaluation_settings(device, checkpoint.header.progress.precision)
        tokens, train = _find_tokens(checkpoint, data, split)
    runtime = choose_runtime(wanted, width=config.model.n_embd, rows=EVALUATED_AT_ONCE, world=world)
    model = checkpoint.model(runtime.device)
    score = _score(model, tokens, runtime, str(data or config.data.path))
    characters, n_bytes = text_size(tokens, tokenizer)
    bits = score.loss * score.tokens / math.log(2)
    result: dict[str, Any] = {
        "loss": score.loss, "standard_error": score.standard_error if score.tokens > config.model.block_size else None,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "bits_per_character": bits / max(1, characters), "bits_per_byte": bits / max(1, n_bytes),
        "accuracy": score.accuracy, "tokens": score.tokens, "characters": characters, "bytes": n_bytes,
        "step": checkpoint.header.step, "precision": runtime.precision,
    }  # fmt: skip
    if train is not None:
        with telling(lambda: "counting the training text"):
            result["baselines"] = baselines(train, tokens, tokenizer.vocab_size)
        if split == "val":
            other = _score(model, train[-len(tokens) :], runtime, "the end of the training split")
            result |= {"train_loss": other.loss, "gap": score.loss - other.loss}
    return result, f"{ckpt}, step {checkpoint.header.step:,}, on {data or config.data.path}"


def _find_tokens(checkpoint: Checkpoint, data: Path | None, split: str) -> tuple[Tokens, Tokens | None]:
    """The tokens to score, and the training split to count baselines on where there is one."""
    from minigpt_cli.core.dataset import Dataset, require_known_tokens
    from minigpt_cli.core.tokenizer import same_ids

    path = data if data is not None else Path(checkpoint.config.data.path)
    if path.is_file():
        if split != "val":
            raise UserError("--split goes with a dataset folder; a text file is scored whole")
        training = Path(checkpoint.config.data.path)
        train = None
        with suppress(UserError):  # baselines only where the training data still lies there whole
            if (dataset := Dataset(training)).meta.fingerprint == checkpoint.header.dataset_fingerprint:
                train = dataset.train
        return _encode(checkpoint, path), train
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder"
            if data is not None
            else f"{path}, the data it was trained on, is not here; name a dataset folder or a text file with --data"
        )
    dataset = Dataset(path)
    if not same_ids(dataset.meta.tokenizer, checkpoint.tokenizer.to_json()):
        raise UserError(f"{path}: prepared with another tokenizer than the model's; give --data the text file itself")
    for tokens in (dataset.train, dataset.val):
        require_known_tokens(tokens, checkpoint.tokenizer.vocab_size, path)
    if dataset.meta.fingerprint != checkpoint.header.dataset_fingerprint:
        note(f"{path} is not the data that this model was trained on")
    return dataset.split("train" if split == "train" else "val"), dataset.train


def _encode(checkpoint: Checkpoint, path: Path) -> Tokens:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        return checkpoint.tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _score(model: GPT, tokens: Tokens, runtime: Runtime, what: str) -> Score:
    from minigpt_cli.commands.display import telling
    from minigpt_cli.core.evaluate import evaluate

    with progress_bar(f"evaluating {what}", total=None) as bar:
        task = bar.task_ids[0]
        shown = bar.tasks[0]
        with telling(lambda: f"evaluating {what}: {shown.percentage:.0f} %", but_on_a_terminal=True):
            score = evaluate(
                model, tokens, runtime, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
    assert score is not None  # nothing asked it to stop
    return score


def _print(result: dict[str, Any], title: str) -> None:
    error, perplexity = result["standard_error"], result["perplexity"]  # None: of one window; too large for a float
    rows = [
        ("loss (nats per token)", f"{result['loss']:.4f}" + (f" +/- {error:.4f}" if error is not None else "")),
        ("perplexity", f"{perplexity:,.3f}" if perplexity is not None else "beyond all bounds"),
        ("bits per character", f"{result['bits_per_character']:.4f}"),
        ("bits per byte", f"{result['bits_per_byte']:.4f}"),
        ("top-1 accuracy", f"{result['accuracy']:.2%}"),
        ("tokens", f"{result['tokens']:,}"),
    ]
    if "gap" in result:
        rows.append(("loss on as much training text", f"{result['train_loss']:.4f} (gap {result['gap']:+.4f})"))
    rows += [(f"for comparison: {name}", f"{loss:.4f}") for name, loss in result.get("baselines", {}).items()]
    print_table(title, rows)
