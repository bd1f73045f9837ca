"""The Python interface: what a notebook or a script needs, in six functions. Prints nothing, and knows no terminal.

They are imported from the package itself: `from minigpt_cli import load, generate`. Wrong input raises `UserError`
(a ValueError), everything else that can go wrong `MinigptError`, which `UserError` is one of.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from minigpt_cli.core import checkpoint as checkpoints
from minigpt_cli.core import corpus, session
from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.core.config import Config, RuntimeConfig, parse_section
from minigpt_cli.core.corpus import Report
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.evaluate import EVALUATED_AT_ONCE, Score, evaluation_settings
from minigpt_cli.core.evaluate import evaluate as score_tokens
from minigpt_cli.core.metrics import Listener, Record
from minigpt_cli.core.model import GPT
from minigpt_cli.core.run import checkpoint_in
from minigpt_cli.core.runtime import choose_runtime
from minigpt_cli.core.signals import StopSignals
from minigpt_cli.core.tokenizer import Tokenizer
from minigpt_cli.core.train import Result
from minigpt_cli.core.world import ALONE
from minigpt_cli.core.writer import Writer, checked_sampling

__all__ = ["MinigptError", "Model", "UserError", "evaluate", "generate", "load", "prepare", "stream", "train"]


class Model:
    """A trained model, as `load` gives it; not to be made by hand.

    `tokenizer.encode(text)` gives token ids and `tokenizer.decode(ids)` text; `module` is the torch module, in float32,
    (B, T) ids -> (B, T, V) logits.
    """

    def __init__(self, checkpoint: Checkpoint, device: str, precision: str) -> None:
        self._checkpoint, self._device = checkpoint, device
        asked = parse_section(RuntimeConfig, {"device": device, "precision": precision}, "load")
        self._writer = Writer(checkpoint, asked)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._checkpoint.tokenizer

    @property
    def config(self) -> Config:
        """The resolved settings of the run that made it."""
        return self._checkpoint.config

    @property
    def step(self) -> int:
        """Optimizer steps that it was trained for."""
        return self._checkpoint.header.step

    @property
    def val_loss(self) -> float | None:
        """Nats per token on the validation split, if that was measured at this step."""
        return self._checkpoint.header.val_loss

    @cached_property
    def module(self) -> GPT:
        return self._checkpoint.model(self._writer.runtime.device).eval()

    def __repr__(self) -> str:
        count = self._writer.model.parameter_counts()["total"]
        return f"<minigpt model: {count:,} parameters, step {self.step:,}, on {self._writer.runtime.device}>"


def load(path: str | Path, *, device: str = "auto", precision: str = "auto") -> Model:
    """Read a checkpoint, or the best one of a run folder, verify every tensor, and make it ready to write. No code in
    the file can run.

    `device`: auto, cpu, cuda, cuda:N or mps. `precision`, of writing: auto, fp32 or bf16; auto takes the faster one, by
    the machine and the model only, as `minigpt sample` does. Raises UserError if there is no such file or device,
    CheckpointError (a MinigptError) for a file that is damaged or none of ours.
    """
    return Model(checkpoints.load(checkpoint_in(Path(path)), weights_only=True), device, precision)


def generate(
    model: Model, prompt: str = "", *, tokens: int = 500, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, seed: int | None = None, stop: str | Sequence[str] | None = None,
) -> str:  # fmt: skip
    """What the model writes after `prompt`, without it: so many `tokens`, or fewer where it comes to the text `stop`,
    or to one of several.

    `temperature` 0 always takes the likeliest token; `top_k` and `top_p` (0 to 1) leave only the likeliest to choose
    from. The same `seed` gives the same text, and `minigpt sample` gives the same too. Raises UserError for arguments
    that make no sense, and for a prompt with characters that are not in the vocabulary.
    """
    return "".join(
        stream(model, prompt, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop)
    )


def stream(
    model: Model, prompt: str = "", *, tokens: int = 500, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, seed: int | None = None, stop: str | Sequence[str] | None = None,
) -> Iterator[str]:  # fmt: skip
    """The text of `generate` in pieces, as it is made: whole characters, at least one in each."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    sampling = checked_sampling(tokens, temperature, top_k, top_p, seed, stops)
    steps = model._writer.steps(prompt, tokens, sampling, seed=seed)
    return (piece for (piece,) in model._writer.pieces(steps, 1, stops) if piece)


def evaluate(model: Model, text: str) -> Score:
    """How well the model predicts a text, in windows that do not overlap, as `minigpt eval --data FILE` measures it.

    The result's `loss` is in nats per token, `perplexity` is exp(loss), `accuracy` between 0 and 1. Raises UserError
    for a text of fewer than two tokens, or with characters that are not in the vocabulary.
    """
    wanted = evaluation_settings(model._device, model._checkpoint.header.progress.precision)
    runtime = choose_runtime(wanted, width=model.config.model.n_embd, rows=EVALUATED_AT_ONCE)
    score = score_tokens(model.module, model.tokenizer.encode(text), runtime)
    assert score is not None  # nothing asked it to stop
    return score


def prepare(
    inputs: str | Path | Sequence[str | Path], out: str | Path, *, tokenizer: str = "char",
    vocab_size: int | None = None, val_fraction: float = 0.1, force: bool = False,
) -> Report:  # fmt: skip
    """Make the dataset folder `out` from text files, folders or globs, as `minigpt prepare` does, but in this process
    alone: others would run a script that has no `if __name__ == "__main__"` again. Nothing is fetched.

    `tokenizer`: char, byte, bpe (with `vocab_size`) or the path of a tokenizer.json. The result tells `tokens`,
    `characters`, `vocab_size` and more. Raises UserError for input that will not do, and for a folder that is already
    there, unless `force`.
    """
    paths = [inputs] if isinstance(inputs, str | Path) else inputs
    return corpus.prepare(
        [Path(path) for path in paths], Path(out), tokenizer=tokenizer, vocab_size=vocab_size,
        val_fraction=val_fraction, force=force, workers=1,
    )  # fmt: skip


def train(
    config: str | Path | None = None, *, data: str | Path | None = None, out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None, device: str | None = None, resume: bool = False,
    overwrite: bool = False, on_record: Callable[[Record], object] = lambda record: None,
    note: Callable[[str], object] = lambda message: None,
) -> Result:  # fmt: skip
    """Train as `minigpt train` does, in this process alone, and leave the same run folder.

    `config` is a file or the name of a shipped config, None to `resume` with the run's own; `settings` go on top
    ({"train.max_iters": 500}), then `data` (the dataset folder), `out` (the run folder) and `device`. `on_record` hears
    every record of metrics.jsonl as it comes, `note` what a person should know; `print` will do for both.

    The result's `best` and `last` are checkpoints, `metrics` the list of all records, `progress.best_loss` is in nats
    per token, and `reason` one of finished, patience, time, or complete (nothing was left to do). Raises UserError for
    settings, data or a folder that will not do, MinigptError for a loss that is not finite. A Ctrl-C or a notebook's
    "interrupt" raises KeyboardInterrupt as ever, after the run has saved itself: `resume` goes on exactly there.
    """
    if config is None and not resume:
        raise UserError("which config? For example config='cpu' (on a CPU) or config='gpt' (on a GPU)")
    if resume and overwrite:
        raise UserError("resume goes on with a run and overwrite replaces it: choose one")
    named = {"data.path": data, "out_dir": out, "runtime.device": device}
    overrides = [*(settings or {}).items(), *((key, str(value)) for key, value in named.items() if value is not None)]

    class Ears(Listener):
        def log(self, record: Record) -> None:
            on_record(record)

        def note(self, message: str) -> None:
            note(message)

    job = session.make_job(str(config) if config is not None else None, overrides, ALONE, note)
    with StopSignals(leaving=False) as stop:
        result = session.run_session(
            job, resume=resume, overwrite=overwrite, allow_data_change=False, stop=stop, note=note,
            listen=lambda folder, saved: [Ears()],
        )  # fmt: skip
    if (received := stop()) is not None:
        signal.raise_signal(received)  # to whom it would have gone
    return result
