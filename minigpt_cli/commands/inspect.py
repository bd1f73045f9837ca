"""`minigpt inspect`: a checkpoint and a text -> one HTML page that shows what happens inside the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt_cli.commands.console import Debug, find_checkpoint, note, progress_bar, read_prompt, safe, size
from minigpt_cli.commands.options import CKPT, DEVICE
from minigpt_cli.core.errors import MinigptError, UserError

if TYPE_CHECKING:
    from minigpt_cli.core.checkpoint import Checkpoint

DEFAULT_OUT = Path("report.html")


def inspect(
    ckpt: Annotated[Path, CKPT],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="The text to look at. [default: the beginning of the validation text]"),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", help="Read the text to look at from a file; - is stdin.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="A dataset folder, or a text file, to measure losses on. [default: what it was trained on]"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the page. [default: report.html]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it exists.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the numbers as one JSON object; a page is then written only with --out."),
    ] = False,
    device: Annotated[str, DEVICE] = "auto",
    debug: Debug = False,
) -> None:
    """See inside a trained model: one self-contained HTML page, for any browser, without a network.

    It shows the text as the model sees it, its embeddings, the queries and keys of every head, what each head does
    and how much the validation loss rises without it, the residual stream, and the training.

    Example: minigpt inspect --ckpt checkpoints/best.safetensors --prompt "ROMEO:" --out report.html
    """
    if prompt is not None and prompt_file is not None:
        raise UserError("--prompt and --prompt-file: choose one")
    page = out if out is not None or as_json else DEFAULT_OUT
    ckpt = find_checkpoint(ckpt)
    if page is not None:
        _check_output(page, force, ckpt)
    where = "--prompt" if prompt is not None else str(prompt_file)
    if prompt_file is not None:
        prompt = read_prompt(prompt_file)
    if page is not None:
        _require_jinja()

    from minigpt_cli.core.checkpoint import load
    from minigpt_cli.core.config import RuntimeConfig, parse_section
    from minigpt_cli.core.runtime import choose_runtime
    from minigpt_cli.extras.inspect.analysis import as_plain

    runtime = choose_runtime(
        parse_section(RuntimeConfig, {"device": device, "precision": "fp32"}, "--device"), width=1, rows=1
    )
    checkpoint = load(ckpt, weights_only=True)
    report = _analyse(checkpoint, runtime.device, prompt, where, data)
    if page is not None:
        _write(page, report, force)
    if as_json:
        print(json.dumps(as_plain(report), allow_nan=False))


def _analyse(checkpoint: Checkpoint, device: Any, prompt: str | None, where: str, data: Path | None) -> dict[str, Any]:
    from minigpt_cli.extras.inspect.analysis import analyse
    from minigpt_cli.extras.inspect.text import default_text, given_text, validation_text

    text = given_text(checkpoint, prompt, where) if prompt is not None else None
    validation = validation_text(checkpoint, data)
    if validation.note:
        note(validation.note + ("" if validation.tokens is not None else "; name some with --data"))
    model = checkpoint.model(device)
    text = text or default_text(checkpoint, model, validation)
    if text.note:
        note(text.note)
    with progress_bar("silencing heads", total=None) as bar:
        task = bar.task_ids[0]
        return analyse(
            checkpoint, model, text, validation, lambda done, total: bar.update(task, completed=done, total=total)
        )


def _check_output(page: Path, force: bool, ckpt: Path) -> None:
    """Before any work: may the page be written there? Raises UserError."""
    try:
        if page.exists():
            if not page.is_file():
                raise UserError(f"{page}: not a plain file; name another with --out")
            if ckpt.exists() and page.samefile(ckpt):
                raise UserError(f"{page}: that is the checkpoint itself; name another file with --out")
            if not force:
                raise UserError(f"{page} exists; --force replaces it, --out names another file")
        if not page.parent.is_dir():
            raise UserError(f"{page}: there is no folder {page.parent}")
        if not os.access(page.parent, os.W_OK | os.X_OK):
            raise UserError(f"{page}: the folder {page.parent} cannot be written to; choose another with --out")
    except OSError as error:  # a name too long, a folder that may not be entered
        raise UserError(f"{page}: {error.strerror}") from None


def _require_jinja() -> None:
    import importlib.util

    if importlib.util.find_spec("jinja2") is None:
        raise MinigptError("the page is made with Jinja2, which is not installed: pip install 'minigpt[inspect]'")


def _write(page: Path, report: dict[str, Any], force: bool) -> None:
    from minigpt_cli.core.files import atomic_write
    from minigpt_cli.extras.inspect.page import render

    html = render(report)
    with atomic_write(page) as file:
        if page.exists() and not force:  # it came while the numbers were made
            raise UserError(f"{page} exists; --force replaces it, --out names another file")
        file.write(html)
    note(safe(f"Wrote {page} ({size(len(html))}). Open it in a browser; it needs nothing else."))
