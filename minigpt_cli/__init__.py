"""minigpt turns a text file into a small GPT. Importing this package imports nothing heavy: what it offers to Python,
which `minigpt_cli.api` describes, comes when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt_cli.api import MinigptError, Model, UserError, evaluate, generate, load, prepare, stream, train

__version__ = "0.1.0"
__all__ = ["MinigptError", "Model", "UserError", "evaluate", "generate", "load", "prepare", "stream", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minigpt_cli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
