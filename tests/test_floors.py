"""Imports go down only: every core module stands on a floor, and a command loads nothing heavy before it must."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import minigpt_cli

PACKAGE = Path(minigpt_cli.__file__).parent
FLOORS = [
    {"allocator", "background", "detokenize", "errors", "files", "gpus", "processor", "shell", "signals"},
    {"bpe", "compiler", "folders", "metrics", "plain_yaml", "processes", "textfiles"},
    {"config", "dataset", "sharding", "textstream", "tokenizer", "world"},
    {"documents", "kernels", "runtime", "unfinished"},
    {"encoder", "layers"},
    {"corpus", "model"},
    {"native"},
    {"checkpoint", "evaluate", "generate", "optim", "step"},
    {"shards"},
    {"run", "start", "state", "writer"},
    {"train"},
    {"measure", "plan", "verdict"},
    {"session"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
CORE, EXTRAS, COMMANDS = (sorted((PACKAGE / folder).rglob("*.py")) for folder in ("core", "extras", "commands"))


def imports(tree: ast.AST, only_on_loading: bool = False) -> Iterator[str]:
    """Dotted names of the imports in a module; of those, only what is imported whenever the module is."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (only_on_loading and runs_later(node)):
            yield from imports(node, only_on_loading)


def runs_later(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))


def imports_of(path: Path, only_on_loading: bool = False) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), only_on_loading))


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_a_core_module_imports_only_from_lower_floors_and_no_terminal(path: Path) -> None:
    floor = 0 if path.stem == "__init__" else FLOOR[path.stem]
    for name in imports_of(path):
        assert not name.startswith(("typer", "rich", "click", "minigpt_cli.commands", "minigpt_cli.extras"))
        if name.startswith("minigpt_cli.core."):
            assert FLOOR[name.split(".")[2]] < floor, name


@pytest.mark.parametrize("path", EXTRAS, ids=lambda path: path.stem)
def test_extras_do_not_import_commands(path: Path) -> None:
    assert not any(name.startswith("minigpt_cli.commands") for name in imports_of(path))


def test_starting_the_program_loads_only_the_standard_library_typer_and_what_is_light_of_ours() -> None:
    waiting, loaded = [PACKAGE / "__main__.py", PACKAGE / "commands" / "__init__.py"], set()
    while waiting:
        path = waiting.pop()
        loaded.add(path)
        for name in imports_of(path, only_on_loading=True):
            light = ("typer", "minigpt_cli.__version__", "minigpt_cli.core.errors", "minigpt_cli.commands")
            assert name.split(".")[0] in sys.stdlib_module_names or name.startswith(light), f"{path.name}: {name}"
            waiting += {PACKAGE / "commands" / f"{part}.py" for part in name.split(".")[2:]} & set(COMMANDS) - loaded
    assert {path.stem for path in loaded} >= {"__main__", "__init__", "console", "prepare", "train", "sample", "eval"}
