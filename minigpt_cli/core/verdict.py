"""What the numbers of a run mean, in plain words: of a planned one, what does not suit its text; of a finished one."""

from __future__ import annotations

from collections.abc import Sequence

from minigpt_cli.core.config import Config
from minigpt_cli.core.metrics import Record
from minigpt_cli.core.optim import FEW_EPOCHS, fitting_decay
from minigpt_cli.core.train import Result

NOTICEABLE = 0.01  # a difference of loss, relative, that is worth a word
LEARNED_BY_HEART = 0.15  # a training loss so much lower than the validation loss, relative
MANY_EPOCHS = 10  # from which a text is learned by heart if nothing is done
FEW_STEPS = 30  # in a pass over the text: smaller batches then learn more of it (docs/recipe.md)


def advice(config: Config, n_tokens: int, n_parameters: int) -> str | None:
    """One sentence where a setting does not suit how often the run reads the same text; the rules of docs/recipe.md.

    Up to about 4 passes repeated text teaches nearly as much as new text would (Muennighoff et al. 2023,
    arXiv:2305.16264), and dropout only slows a small model down.
    """
    train, dropout = config.train, config.model.dropout
    steps_per_epoch = n_tokens / (train.batch_size * config.model.block_size)
    epochs = train.steps / steps_per_epoch
    if epochs < FEW_EPOCHS and dropout > 0.05:
        return f"Only {epochs:.1f} passes over the text: model.dropout=0.0 would learn more in them than {dropout:g}."
    if epochs < MANY_EPOCHS:
        return None
    if steps_per_epoch < FEW_STEPS:
        smaller = _fitting_batch(config, n_tokens)
        makes = f"train.batch_size={smaller} makes {n_tokens / (smaller * config.model.block_size):.0f} of it"
        return (
            f"A pass over the text takes only {steps_per_epoch:.1f} steps: it is soon known by heart. "
            f"{makes if smaller < train.batch_size else 'More text would help'}; "
            "--init-from begins with what another model knows."
        )
    if dropout < 0.1 and (decay := _missing_decay(config, n_tokens, n_parameters)):
        return (
            f"{epochs:.0f} passes over the text: train.weight_decay=auto, which is {decay:g} here, would keep it from "
            "being learned by heart."
        )
    return None


def verdict(result: Result, records: Sequence[Record], config: Config, n_tokens: int, n_parameters: int) -> list[str]:
    """Sentences: best step, epochs seen, whether it overfits, what to change. `records` is metrics.jsonl.

    Advises only what the run has not: no more weight decay or smaller batches where the rules ask for none. The decay
    takes dropout's place, and would undo what a fine-tuned model began with. After a change of data only what came
    later counts.
    """
    decay, progress = [], result.progress
    begun = progress.data_step
    if not (result.fine_tuned or begun) and _missing_decay(config, n_tokens, n_parameters):
        decay = ["train.weight_decay=auto" + (" with model.dropout=0" if config.model.dropout >= 0.1 else "")]
    batch = _fitting_batch(config, n_tokens)
    settings = decay + ([f"train.batch_size={batch}"] if batch < config.train.batch_size else [])
    later = [record for record in records if record.get("data_step", 0) == begun]
    losses = [record["val_loss"] for record in later if "val_loss" in record]
    training = [(record["step"], record["train_loss"]) for record in later if "train_loss" in record]
    if progress.best_loss is None or not losses:
        return [f"Stopped after step {progress.step}, before the first evaluation."]
    lines = [
        f"Best validation loss {progress.best_loss:.4f} at step {progress.best_step:,}, "
        f"after {_epochs(result, progress.best_step)}."
    ]
    if result.reason == "patience":
        lines.append(f"Stopped early: {progress.worse} evaluations without a better one (train.patience).")
    if result.reason == "time":
        lines.append("Stopped by the time budget (train.max_minutes), before train.max_iters.")
    last, final = losses[-1], _mean([loss for _, loss in training][-10:])
    gap = last - final if training else 0.0
    planned = config.train.lr_schedule != "constant" and result.reason == "finished"
    at_best = _mean([loss for step, loss in training if step <= progress.best_step][-10:])
    if last > progress.best_loss * (1 + NOTICEABLE) and final < at_best:
        lines.append(
            f"It overfits: since then the validation loss rose to {last:.4f} while the training loss fell on. "
            f"Use best.safetensors; next time stop near step {progress.best_step:,} "
            f"(train.max_iters or train.patience), {''.join(f'set {setting}, ' for setting in settings)}or add text."
        )
    elif last > progress.best_loss * (1 + NOTICEABLE):
        lines.append(
            f"It lost its way: since then the validation loss rose to {last:.4f}, and the training loss did not fall. "
            "A lower train.learning_rate, train.warmup_iters or train.grad_clip=1.0 should help."
        )
    elif len(losses) < 3:
        lines.append("Too few evaluations to tell more: train longer, or lower train.eval_interval.")
    elif planned and gap <= LEARNED_BY_HEART * last and result.epochs >= MANY_EPOCHS:
        lines.append(
            "It ended as its schedule was planned. More passes over the text would gain little; "
            "more text would gain more."
        )
    elif planned and gap <= LEARNED_BY_HEART * last:
        lines.append(
            "It ended as its schedule was planned. A new run with twice the train.max_iters, or a larger model, could "
            "go lower; to go on with this one would raise its learning rate again."
        )
    elif not planned and losses[-2] - last > NOTICEABLE / 2 * last and result.reason in ("finished", "time"):
        more = "train.max_minutes" if result.reason == "time" else "train.max_iters"
        lines.append(f"It was still learning at the end: a larger {more} (with --resume) will lower the loss further.")
    elif gap > LEARNED_BY_HEART * last:
        lines.append(
            f"The training loss is {gap:.2f} lower than the validation loss: the model begins to learn the text "
            f"by heart. {' or '.join(['More text', *settings])} would help; a larger model would not."
        )
    else:
        lines.append(
            "No sign of overfitting; the curve has flattened. A larger model, or a longer context, could go lower."
        )
    return lines


def _missing_decay(config: Config, n_tokens: int, n_parameters: int) -> float | None:
    """The weight decay that `auto` would have chosen, where that is much more than the config's."""
    decay = fitting_decay(config, n_tokens, n_parameters)
    return decay if config.train.decay_strength < decay / 2 else None


def _fitting_batch(config: Config, n_tokens: int) -> int:
    """The config's batch size, halved until a pass over the text takes FEW_STEPS."""
    batch = config.train.batch_size
    while batch > 1 and n_tokens / (batch * config.model.block_size) < FEW_STEPS:
        batch //= 2
    return batch


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _epochs(result: Result, step: int) -> str:
    begun = result.progress.data_step
    epochs = result.epochs * (step - begun) / max(1, result.progress.step - begun)
    return f"{epochs:.1f} passes over the training text" if epochs >= 0.05 else "a small part of the training text"
