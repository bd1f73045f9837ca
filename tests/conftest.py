"""What many tests begin with: a tiny model's settings, a seed, and a text."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from minigpt_cli.core.config import ModelConfig

# Every machine tries the same examples: a failure can be repeated, and nothing is red by chance, or because the machine
# has other work.
settings.register_profile(
    "same-everywhere", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same-everywhere")

# Tiny tensors gain nothing from a second thread, and on a busy machine threads that wait for one another take many
# times as long as one.
torch.set_num_threads(1)

# A shell that starts the tests in the background lets them ignore Ctrl-C, and whatever they start would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: else one core waits at the end while another works on the longest."""
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1337)


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """`tiny(mlp="gelu", ...)`: a model of two layers and two heads, 16 wide, with a window of 8."""

    def make(**changes: Any) -> ModelConfig:
        return ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, **changes})

    return make


@pytest.fixture
def verse() -> str:
    """A few kilobytes that a tiny model can learn: words in an order that a seed drew."""
    words = re.findall(r"\S+", "the king and queen of winter come to speak no more, my lord; what say you? Exeunt.")
    order = torch.randint(len(words), (800,), generator=torch.Generator().manual_seed(7)).tolist()
    return " ".join(words[i] for i in order)
