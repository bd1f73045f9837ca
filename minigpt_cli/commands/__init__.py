"""The Typer app: one thin file per subcommand, one error boundary around them all."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from minigpt_cli import __version__
from minigpt_cli.commands.bench import bench
from minigpt_cli.commands.console import Debug, abandon_broken_streams, error_boundary, make_streams_robust
from minigpt_cli.commands.eval import evaluate
from minigpt_cli.commands.export import export
from minigpt_cli.commands.import_ import import_model
from minigpt_cli.commands.info import info
from minigpt_cli.commands.inspect import inspect
from minigpt_cli.commands.options import join_words
from minigpt_cli.commands.prepare import prepare
from minigpt_cli.commands.sample import sample
from minigpt_cli.commands.serve import serve
from minigpt_cli.commands.train import train


class _Group(TyperGroup):
    """The group whose every command is read and run inside the error boundary. Without arguments it shows the help."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with error_boundary():
            if not args and not extra.get("resilient_parsing"):  # which shell completion sets
                args = ["--help"]
            if args[1:] == ["--help"] and args[0] in self.commands:  # at once: to read its own options, Typer imports
                return self.commands[args[0]].make_context(f"{info_name} {args[0]}", ["--help"])  # pydantic
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with error_boundary():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group, rich_markup_mode=None, pretty_exceptions_enable=False, help="""
    Turn a text file into a small GPT.

    First steps: minigpt prepare data/input.txt, then minigpt train --config cpu,
    then minigpt sample --ckpt checkpoints/last.safetensors --tokens 500.
    """,
)  # fmt: skip


def _show_version(value: bool) -> None:
    if value:
        print(f"minigpt {__version__}")
        raise typer.Exit()


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    pass


for name, command in (
    ("prepare", prepare), ("train", train), ("sample", sample), ("eval", evaluate), ("bench", bench),
    ("inspect", inspect), ("info", info), ("serve", serve), ("export", export), ("import", import_model),
):  # fmt: skip
    app.command(name)(command)


def main() -> None:
    """The entry point of the `minigpt` script and of `python -m minigpt_cli`."""
    # OpenMP's threads spin while they wait for one another. On a machine that has other things to do, that made a
    # training step several times as long; a short spin costs nothing measurable (docs/benchmarks.md).
    # Between two tokens they had better not fall asleep; `ThreadChoice` takes care of other programs there.
    decodes = sys.argv[1:2] and sys.argv[1] in ("bench", "sample", "serve")
    os.environ.setdefault("GOMP_SPINCOUNT", "40000" if decodes else "10000")
    make_streams_robust()
    if os.environ.get("_MINIGPT_COMPLETE") == "complete_bash":
        join_words()
    try:
        app(prog_name="minigpt")
    finally:
        abandon_broken_streams()
