"""`minigpt prepare`: text -> a dataset folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.commands import console
from minigpt_cli.commands.options import among

if TYPE_CHECKING:
    from minigpt_cli.core.corpus import Report
    from minigpt_cli.core.dataset import SplitMeta
    from minigpt_cli.core.tokenizer import Tokenizer


def prepare(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help='Files of text or documents, folders of them, or quoted globs such as "books/*.txt".',
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The dataset folder to make. [default: data/<name of the input>]")
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="char|byte|bpe|FILE",
            autocompletion=among("char", "byte", "bpe"),
            help="What a token is. FILE is a tokenizer.json, a checkpoint, or a folder of a run or Hugging Face model.",
        ),
    ] = "char",
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="How many tokens bpe learns. [default: 4096]")
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(
            metavar="F", help="The share kept for validation: the end of a text, or so many of the documents."
        ),
    ] = 0.1,
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="The field (.jsonl) or column (.parquet) that holds the text.")
    ] = "text",
    documents: Annotated[
        bool, typer.Option("--documents", help="Each text file is a document of its own, not a part of one text.")
    ] = False,
    shard_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="How many tokens a file holds at most. [default: 1073741824]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="How many processes tokenize. [default: one a processor]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a dataset that is already there.")] = False,
    debug: console.Debug = False,
) -> None:
    """
    Turn text into tokens: the first step, once for each text.

    Any UTF-8 text will do, of any size: one file, several, a folder; .gz and .zst are unpacked on the way. The first
    nine tenths become the training text, the rest is kept to measure how good a model is. The result is a folder that
    `minigpt train` reads.

    .jsonl holds one document a line, .parquet one a row. Each document ends with a token of its own, <|endoftext|>, and
    goes to one of the splits as a whole. (.zst and .parquet: pip install "minigpt[data]".)

    A token is a character (char, the default: easy to look at, right for small models), a byte (any text, 256 tokens),
    or a frequent piece of a word (bpe: learned from the text, three to four characters a token, right for larger ones).

    Example: minigpt prepare data/input.txt

    Without that file, tiny Shakespeare is fetched first (data/sources.yaml says from where).

    Example: minigpt prepare "books/*.txt" notes.md.gz --out data/books --tokenizer bpe --vocab-size 8000

    Large corpora take all processors and little memory. Killed or stopped after a while, the same command goes on from
    what was done; what comes out is the same.

    Example: minigpt prepare "crawl/*.parquet" --out data/crawl --tokenizer bpe --vocab-size 32768 --val-fraction 0.005

    Example, to go on training a model on another text: minigpt prepare new.txt --tokenizer checkpoints/best.safetensors
    """
    from minigpt_cli.core import corpus
    from minigpt_cli.extras import sources

    target = out or default_out(inputs[0])
    corpus.check_out(target, force)  # before anything is fetched
    with console.progress_bar("preparing", None, unit="bytes") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.update(bar.task_ids[0], description=console.safe(stage), completed=done, total=total)

        def show_kept(part: Path) -> None:
            console.note(f"{part}: what was done is kept here, and the same command goes on from it")

        source = sources.fetch_missing(inputs, note=console.note, progress=show)
        report = corpus.prepare(
            inputs, target, tokenizer=_existing(tokenizer) or tokenizer, vocab_size=vocab_size,
            val_fraction=val_fraction, text_field=text_field, documents=documents, shard_tokens=shard_tokens,
            workers=workers, source=source, force=force, progress=show, kept=show_kept,
        )  # fmt: skip
    for line in report.notes:
        console.note(line)
    _show(report, target, tokenizer)


def _existing(name: str) -> Tokenizer | None:
    """The tokenizer of a checkpoint or of a folder with a model; None where `name` is something else."""
    path = console.find_checkpoint(Path(name)) if Path(name).is_dir() else Path(name)
    if path.suffix in (".safetensors", ".sharded"):
        from minigpt_cli.core.checkpoint import read_header
        from minigpt_cli.core.tokenizer import from_json

        return from_json(read_header(path).tokenizer)
    if path.is_dir():
        from minigpt_cli.extras.huggingface import read_tokenizer

        return read_tokenizer(path, console.note)
    return None


def default_out(first: Path) -> Path:
    """data/<stem>: data/input.txt -> data/input, books/a.jsonl.zst -> data/a, books/ -> data/books."""
    name = first.name or first.resolve().name
    if not first.is_dir():
        name = Path(name).stem if name.lower().endswith((".gz", ".zst")) else name
        name = Path(name).stem
    name = "".join("_" if c in "*?[]" else c for c in name).strip("_.") or "corpus"
    return Path("data", name)


def _split(meta: SplitMeta) -> str:
    parts = [f"{meta.tokens:,} tokens"]
    parts += [f"{meta.documents:,} documents"] if meta.documents is not None else []
    parts += [f"{len(meta.shards):,} files"] if meta.shards else []
    return ", ".join(parts)


def _show(report: Report, out: Path, tokenizer: str) -> None:
    meta = report.meta
    rows: list[tuple[object, ...]] = [
        ("characters", f"{report.characters:,}"),
        ("bytes", f"{report.bytes:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("bytes per token", f"{report.bytes / report.tokens:.2f}"),
        ("vocabulary", f"{report.vocab_size:,} ({meta.tokenizer['kind']})"),
        ("training split", _split(meta.train)),
        ("validation split", _split(meta.val)),
        ("time", f"{report.seconds:.2f} s ({report.bytes / 1e6 / report.seconds:,.0f} MB/s)"),
    ]
    console.print_table(f"{out}: ready", rows)
    of_model = Path(tokenizer).is_dir() or tokenizer.endswith(".safetensors")
    config = ["finetune", "--init-from", tokenizer] if of_model else ["cpu"]
    data = [] if out == Path("data/input") else ["--data", out]
    print(console.safe(f"Next: {console.command('train', '--config', *config, *data)}"))
