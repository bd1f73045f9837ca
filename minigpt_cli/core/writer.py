"""A checkpoint put to work: text in, text out, as it is made. Joins tokenizer, model and generation; knows no terminal.

Shapes: B texts side by side, P prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.core.config import RuntimeConfig
from minigpt_cli.core.detokenize import Detokenizer
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.generate import Sampling, for_decoding, generate, read_back
from minigpt_cli.core.runtime import choose_decoding_runtime


class Writer:
    """A checkpoint's model, made ready to decode on its device. Raises UserError where the machine has no such device.

    The same checkpoint, machine, arguments and seed give the same text, whoever asks for it.
    """

    def __init__(self, checkpoint: Checkpoint, config: RuntimeConfig) -> None:
        model = checkpoint.model()
        self.tokenizer = checkpoint.tokenizer
        self.runtime = choose_decoding_runtime(config, model.parameter_counts()["total"])
        self.model = for_decoding(model.to(self.runtime.device), self.runtime)

    def steps(
        self, prompt: str, tokens: int, sampling: Sampling, *, count: int = 1, seed: int | None = None,
        exact_window: bool = False, note: Callable[[str], None] = lambda message: None,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """What `generate` yields: `tokens` times (ids (B,), logits (B, V)), for B = `count` texts that go on from
        `prompt`; where that is empty, from an end of text or else token 0. UserError for a prompt with unknown text."""
        ids: list[int] = (self.tokenizer.encode(prompt).tolist() if prompt else []) or [self.tokenizer.end_of_text or 0]
        device, record = self.runtime.device, self.runtime.record if self.runtime.records else None
        generator = torch.Generator(device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        return generate(
            self.model, torch.tensor([ids], device=device).expand(count, -1), tokens, sampling,
            generator=generator, exact_window=exact_window, record=record, note=note,
        )  # fmt: skip

    def pieces(self, steps: Iterator[tuple[Tensor, Tensor]], count: int, stops: Sequence[str]) -> Iterator[list[str]]:
        """What each of `count` texts has grown by, step after step: whole UTF-8, up to the first of `stops`."""
        known = self.tokenizer.token_bytes()
        texts = [Detokenizer(known, stops, self.tokenizer.end_of_text) for _ in range(count)]
        for ids in read_back(steps, self.runtime.read_every):
            for text, token in zip(texts, ids, strict=True):
                text.add(token)
            yield [text.take() for text in texts]
            if all(text.ended for text in texts):
                break
        yield [text.finish() for text in texts]


def checked_sampling(
    tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int | None,
    stops: Sequence[str], spell: Callable[[str], str] = str,
) -> Sampling:  # fmt: skip
    """How to choose tokens. Raises UserError for what makes no sense; `spell` makes a parameter's name the caller's."""
    wrong = [
        (tokens < 1, f"{spell('tokens')} {tokens}: ask for at least 1"),
        (
            not 0 <= temperature < float("inf"),
            f"{spell('temperature')} {temperature}: 0 (always the likeliest) or more",
        ),
        (top_k is not None and top_k < 1, f"{spell('top_k')} {top_k}: at least 1"),
        (top_p is not None and not 0 < top_p <= 1, f"{spell('top_p')} {top_p}: above 0, at most 1"),
        (seed is not None and not 0 <= seed < 1 << 63, f"{spell('seed')} {seed}: from 0 to 2^63 - 1"),
        ("" in stops, f"{spell('stop')}: the text to stop at is empty"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise UserError(message)
    return Sampling(temperature, top_k, top_p)
