"""`minigpt prepare`: text -> a dataset folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.commands import console
from minigpt_cli.commands.options import among

if TYPE_CHECKING:
    from minigpt_cli.core.corpus import Report


def prepare(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help='Text files, folders of them, or quoted globs such as "books/*.txt".'),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The dataset folder to make. [default: data/<name of the input>]")
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="char|byte|bpe|FILE.json",
            autocompletion=among("char", "byte", "bpe"),
            help="What a token is; FILE.json is an existing tokenizer.json.",
        ),
    ] = "char",
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="How many tokens bpe learns. [default: 4096]")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(metavar="F", help="The share of the text, from its end, kept for validation.")
    ] = 0.1,
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="The field that holds the text in .jsonl files.")
    ] = "text",
    force: Annotated[bool, typer.Option("--force", help="Replace a dataset that is already there.")] = False,
    debug: console.Debug = False,
) -> None:
    """
    Turn text into tokens: the first step, once for each text.

    Any UTF-8 text will do, of any size: one file, several, a folder. .jsonl holds one document a line, and .gz files
    are unpacked on the way. The first nine tenths become the training text, the rest is kept to measure how good a
    model is. The result is a folder that `minigpt train` reads.

    A token is a character (char, the default: easy to look at, right for small models), a byte (any text, 256 tokens),
    or a frequent piece of a word (bpe: learned from the text, three to four characters a token, right for larger ones).

    Example: minigpt prepare data/input.txt

    Without that file, tiny Shakespeare is fetched first (data/sources.yaml says from where).

    Example: minigpt prepare "books/*.txt" notes.md.gz --out data/books --tokenizer bpe --vocab-size 8000
    """
    from minigpt_cli.core import corpus
    from minigpt_cli.extras import sources

    target = out or default_out(inputs[0])
    corpus.check_out(target, force)  # before anything is fetched
    with console.progress_bar("preparing", None, unit="bytes") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.update(bar.task_ids[0], description=console.safe(stage), completed=done, total=total)

        source = sources.fetch_missing(inputs, note=console.note, progress=show)
        report = corpus.prepare(
            inputs, target, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction,
            text_field=text_field, source=source, force=force, progress=show,
        )  # fmt: skip
    for line in report.notes:
        console.note(line)
    _show(report, target)


def default_out(first: Path) -> Path:
    """data/<stem>: data/input.txt -> data/input, books/a.jsonl.gz -> data/a, books/ -> data/books."""
    name = first.name or first.resolve().name
    if not first.is_dir():
        name = name[:-3] if name.lower().endswith(".gz") else name
        name = Path(name).stem
    name = "".join("_" if c in "*?[]" else c for c in name).strip("_.") or "corpus"
    return Path("data", name)


def _show(report: Report, out: Path) -> None:
    meta = report.meta
    rows: list[tuple[object, ...]] = [
        ("characters", f"{report.characters:,}"),
        ("bytes", f"{report.bytes:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("bytes per token", f"{report.bytes / report.tokens:.2f}"),
        ("vocabulary", f"{report.vocab_size:,} ({meta.tokenizer['kind']})"),
        ("training split", f"{meta.train.tokens:,} tokens"),
        ("validation split", f"{meta.val.tokens:,} tokens"),
        ("time", f"{report.seconds:.2f} s ({report.bytes / 1e6 / report.seconds:,.0f} MB/s)"),
    ]
    console.print_table(f"{out}: ready", rows)
    option = "" if out == Path("data/input") else f" --set data.path={shlex.quote(str(out))}"
    print(console.safe(f"Next: minigpt train --config cpu{option}"))
