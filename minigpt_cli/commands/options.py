"""Options that several commands share, and what a shell offers on TAB. Completing is quick: it imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from glob import escape, glob
from shlex import join, split
from typing import Any, Literal, get_args, get_origin

import typer

_key = ""  # of the setting whose value the shell wants, where it takes that for a word of its own


def _configs(incomplete: str) -> list[str]:
    """Shipped configs, and YAML files here or in one of the folders here."""
    from minigpt_cli.core.config import shipped_configs

    names = [name for name in shipped_configs() if name.startswith(incomplete)]
    start = escape(incomplete)
    files = {name for end in ("*.yaml", "*.yml", "*/*.yaml", "*/*.yml") for name in glob(start + end)}
    return [*names, *sorted(files)]


def _setting(incomplete: str) -> list[str]:
    """`section.key=`; `section.key=value` where only one key is left; `value` where bash wants no more."""
    from minigpt_cli.core.config import Config

    known = dict(_settings(Config, ""))
    if _key:
        return [value for value in known.get(_key, []) if value.startswith(incomplete)]
    keys = [name for name in known if f"{name}=".startswith(incomplete.partition("=")[0])]
    if len(keys) > 1 and "=" not in incomplete:
        return [f"{name}=" for name in keys]
    texts = (f"{name}={value}" for name in keys for value in known[name])
    return [text for text in texts if text.startswith(incomplete)]


def _settings(section: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Dotted key -> the values that it may have; where they cannot be listed, its default."""
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _settings(field.annotation, f"{prefix}{name}.")
        else:
            default = "null" if field.default is None else str(field.default)
            yield prefix + name, list(dict.fromkeys([*_values(field.annotation), default.lower()]))


def _values(annotation: Any) -> list[str]:
    """What a bool, a Literal, or a union with one of them, may be."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _values(part)]


def among(*choices: str) -> Callable[[str], list[str]]:
    """Completes to one of these."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def join_words() -> None:
    """Before a completion in bash, to which `--set key=value` is four words: let Typer see `--set` and the value."""
    global _key
    words, at = split(os.environ.get("COMP_WORDS", "")), int(os.environ.get("COMP_CWORD", "0"))
    sign = next((i for i in (at, at - 1) if 2 < i < len(words) and words[i] == "="), None)
    if sign is None or at >= len(words):
        return
    before = words[:sign]
    if not before[-1].startswith("-"):
        _key = before.pop()
    os.environ |= {"COMP_WORDS": join([*before, *words[sign + 1 : at + 1]]), "COMP_CWORD": str(len(before))}


CKPT = typer.Option("--ckpt", help="A checkpoint, or the folder of a run: its best, else its last.")
CONFIG = typer.Option(
    "--config", help="A YAML file, or the name of a shipped config: cpu, modern, gpt, v2, bigram.",
    autocompletion=_configs,
)  # fmt: skip
DEVICE = typer.Option(
    "--device", help="auto, cpu, cuda, cuda:N or mps.", autocompletion=among("auto", "cpu", "cuda", "cuda:0", "mps")
)
PRECISION = typer.Option(
    "--precision", help="auto, fp32 or bf16: auto takes the faster, and says so if it is bf16.",
    autocompletion=among("auto", "fp32", "bf16"),
)  # fmt: skip
SETTINGS = typer.Option(
    "--set", help="Change one setting: section.key=value. Repeatable.", metavar="K=V", autocompletion=_setting
)
