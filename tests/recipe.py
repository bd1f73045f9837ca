"""What each ingredient of the modern recipe is worth, and whether the recipe holds on other texts. Prints Markdown.

    python tests/recipe.py ablate --text input.txt [--config cpu] [--steps 600] [--seeds 3] [--jobs 1]
    python tests/recipe.py repeat --text input.txt [--only WORDS] [--jobs 1]
    python tests/recipe.py corpora prose.txt code.txt other.txt [--tokenizer char] [--config cpu] [--steps 500]

`ablate` looks at the first nine tenths of the text only, and judges on the last tenth of those: what is chosen here has
not seen the validation text. Nor has `repeat`, which reads a short piece of that text many times, with models that have
ten times more parameters than it has characters. `corpora` trains the config, and then `gpt.yaml`'s recipe, in
`gpt.yaml`'s shape and in the config's, for as long as the config took; it judges on each text's own last tenth. Timings
want an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ABLATIONS: dict[str, dict[str, str]] = {
    "the whole recipe": {},
    "AdamW instead of Muon": {"train.optimizer": "adamw"},
    "learned positions instead of rotary": {"model.position": "learned"},
    "no QK-norm": {"model.qk_norm": "false"},
    "GELU instead of SwiGLU": {"model.mlp": "gelu"},
    "squared ReLU instead of SwiGLU": {"model.mlp": "relu2"},
    "RMSNorm instead of LayerNorm": {"model.norm": "rmsnorm"},
    "two heads instead of four": {"model.n_head": "2"},
    "biases everywhere": {"model.bias": "true", "model.bias_qkv": "true", "model.bias_head": "true"},
    "constant rate instead of linear to zero": {"train.lr_schedule": "constant"},
    "cosine instead of linear": {"train.lr_schedule": "cosine"},
    "random windows instead of epochs": {"data.sampling": "random"},
    "no weight decay": {"train.weight_decay": "0"},
    "half the context, twice the sequences": {"model.block_size": "64", "train.batch_size": "32"},
}
TRIED: dict[str, dict[str, str]] = {
    "+ zero-initialised projections": {"model.zero_init": "true"},
    "+ logits capped at 15": {"model.logit_softcap": "15"},
    "+ dropout 0.1": {"model.dropout": "0.1"},
    "+ weight average (EMA 0.99)": {"train.ema": "0.99"},
    "+ tied head": {"model.tie_weights": "true"},
    "+ grouped queries (one key-value head)": {"model.n_kv_head": "1"},
    "warmup, stable, decay (last 40 %)": {"train.lr_schedule": "wsd", "train.cooldown": "0.4"},
}
CLASSIC = {  # gpt.yaml's recipe, for a model of any shape
    "model.position": "learned", "model.norm": "layernorm", "model.qk_norm": "false", "model.mlp": "relu",
    "model.bias": "true", "model.bias_head": "true", "model.dropout": "0.2", "model.zero_init": "false",
    "train.optimizer": "adamw", "train.learning_rate": "3e-4", "train.lr_schedule": "constant",
    "train.warmup_iters": "0", "train.weight_decay": "0.01", "train.decay": "all", "train.beta2": "0.999",
    "train.grad_clip": "null", "train.max_iters": "1000000", "data.sampling": "random",
}  # fmt: skip
SHORT, LONGER, PAGES = 110_000, 265_000, 10_000  # characters; the first two are a tenth of the parameters
SMALL = {"model.n_embd": "128", "model.n_head": "2", "train.batch_size": "7", "train.learning_rate": "3e-3"}
MIDDLE = {"model.n_embd": "192", "model.n_head": "3", "train.batch_size": "17", "train.learning_rate": "2.8e-3"}
ADAMW = SMALL | {"train.optimizer": "adamw"}
TWICE = SMALL | {"train.batch_size": "14", "train.warmup_iters": "50", "train.eval_interval": "61"}
QUICK = {"train.eval_interval": "215"}
REPEATED = [  # config, characters, its settings, steps, dropout, weight decay
    *(("modern", SHORT, SMALL, 737, 0.2, decay) for decay in (0.1, 1)),
    *(("modern", SHORT, SMALL, 737, 0.1, decay) for decay in (0.1, 1, 2)),
    *(("modern", SHORT, SMALL, 737, 0, decay) for decay in (0.1, 0.5, 1, 2, 2.7, 4)),
    ("modern", SHORT, SMALL, 982, 0, 2), ("modern", SHORT, SMALL, 1228, 0.2, 0.1),
    *(("modern", SHORT, SMALL, 1228, 0, decay) for decay in (1, 2)),
    *(("modern", SHORT, SMALL, steps, 0, decay) for steps in (307, 430) for decay in (0.1, 1, 2.7)),
    *(("modern", SHORT, TWICE, 368, 0, decay) for decay in (1, 2)),
    *(("modern", SHORT, ADAMW, 737, 0, decay) for decay in (0.3, 1, 2, 6, 18)),
    *(("modern", LONGER, MIDDLE, 737, dropout, decay) for dropout in (0, 0.1) for decay in (1, 2)),
    ("cpu", SHORT, QUICK, 645, 0.1, 0.1), *(("cpu", SHORT, QUICK, 645, 0, decay) for decay in (1.2, 2.4)),
    *(("cpu", SHORT, QUICK, 1300, 0, decay) for decay in (0.1, 2.4)),
    *(("cpu", PAGES, QUICK, 1300, 0, decay) for decay in (0.1, 5)),
    *(("cpu", PAGES, QUICK | {"train.batch_size": size}, 1300, 0, 5) for size in ("4", "2")),
    *(("modern", SHORT, {"train.batch_size": size, "train.warmup_iters": warmup}, steps, 0, 5)
      for size, warmup, steps in (("64", "100", 81), ("64", "20", 81), ("16", "80", 322), ("8", "100", 645))),
]  # fmt: skip
Repeated = tuple[str, int, dict[str, str], int, float, float]
MINIGPT = [sys.executable, "-m", "minigpt_cli"]


def train(folder: Path, config: str, data: Path, settings: dict[str, str], threads: int | None) -> dict[str, float]:
    """One run from start to end: its validation loss and the wall time of the whole command, in seconds."""
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [*MINIGPT, "train", "--config", config, "--set", f"data.path={data}", "--out", str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return {
        "best": min(losses), "last": losses[-1], "seconds": records[-1]["seconds"], "speed": statistics.median(speeds),
    }  # fmt: skip


def prepare(text: Path, out: Path, tokenizer: str, val_fraction: float = 0.1) -> None:
    subprocess.run([*MINIGPT, "prepare", str(text), "--out", str(out), "--tokenizer", tokenizer,
                    "--val-fraction", repr(val_fraction)], check=True, capture_output=True)  # fmt: skip


def ablate(arguments: argparse.Namespace, scratch: Path) -> None:
    text = arguments.text.read_text(encoding="utf-8")
    piece = scratch / "piece.txt"
    piece.write_text(text[: len(text) * 9 // 10], encoding="utf-8")
    prepare(piece, scratch / "data", "char")
    chosen = ABLATIONS | TRIED
    common = {"train.max_iters": str(arguments.steps), "train.eval_interval": str(arguments.steps),
              "train.checkpoint_interval": str(arguments.steps)}  # fmt: skip
    threads = 1 if arguments.jobs > 1 else None

    def run(job: tuple[str, int]) -> tuple[str, dict[str, float]]:
        name, seed = job
        settings = common | {"train.seed": str(seed)} | chosen[name]
        folder = scratch / f"{list(chosen).index(name)}-{seed}"
        result = train(folder, arguments.config, scratch / "data", settings, threads)
        print(f"{name}, seed {seed}: {result['last']:.4f}, {result['seconds']:.0f} s", file=sys.stderr, flush=True)
        return name, result

    results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for name, result in pool.map(run, [(name, seed) for seed in range(arguments.seeds) for name in chosen]):
            results[name].append(result)
    base = [r["last"] for r in results["the whole recipe"]]
    speed = statistics.median(r["speed"] for r in results["the whole recipe"])
    print(
        f"| `{arguments.config}`, {arguments.steps} steps, {arguments.seeds} seeds | loss | worse by | time a token |"
    )
    print("| --- | --- | --- | --- |")
    for name, runs in results.items():
        losses = [r["last"] for r in runs]
        by_seed = [loss - other for loss, other in zip(losses, base, strict=True)]
        error = statistics.stdev(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 and any(by_seed) else 0.0
        time = speed / statistics.median(r["speed"] for r in runs)
        print(
            f"| {name} | {statistics.mean(losses):.4f} | {statistics.mean(by_seed):+.4f} ± {error:.4f} | {time:.2f}x |"
        )


def repeat(arguments: argparse.Namespace, scratch: Path) -> None:
    text = arguments.text.read_text(encoding="utf-8")
    text = text[: len(text) * 9 // 10]
    judging = len(text) - len(text) * 9 // 10
    for characters in (SHORT, LONGER, PAGES):
        piece = scratch / f"{characters}.txt"
        piece.write_text(text[-judging - characters :], encoding="utf-8")
        prepare(piece, scratch / str(characters), "char", judging / (judging + characters))
    threads = 1 if arguments.jobs > 1 else None

    def run(job: tuple[int, Repeated]) -> str:
        number, (config, characters, shape, steps, dropout, decay) = job
        settings = {
            "train.max_iters": str(steps), "train.eval_interval": "123", "train.checkpoint_interval": str(steps),
            "model.dropout": str(dropout), "train.weight_decay": str(decay), **shape,
        }  # fmt: skip
        result = train(scratch / f"repeat-{number}", config, scratch / str(characters), settings, threads)
        named = f"`{config}` {' '.join(f'{key}={value}' for key, value in shape.items())}"
        losses = f"{result['best']:.4f} | {result['last']:.4f}"
        return f"| {named} | {characters:,} | {steps:,} | {dropout} | {decay} | {losses} |"

    print("| config | characters | steps | dropout | weight decay | best loss | last |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    jobs = [job for job in enumerate(REPEATED) if arguments.only in str(job[1])]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(run, jobs):
            print(row, flush=True)


def corpora(arguments: argparse.Namespace, scratch: Path) -> None:
    print(f"| text | `{arguments.config}` | time | `gpt.yaml`, as long | its recipe in the same shape, as long |")
    print("| --- | --- | --- | --- | --- |")
    for text in arguments.texts:
        cells: list[list[float]] = [[], [], [], []]
        data = scratch / text.stem
        prepare(text, data, arguments.tokenizer)
        for seed in range(arguments.seeds):
            own = {"train.seed": str(seed), "train.max_iters": str(arguments.steps)}
            modern = train(scratch / f"{text.stem}-{seed}", arguments.config, data, own, None)
            limits = own | {"train.max_minutes": str(modern["seconds"] / 60), "train.eval_interval": "200"}
            many = {"train.max_iters": "1000000", "train.batch_size": "8"}  # 64 a step are too few steps on a CPU
            gpt = train(scratch / f"{text.stem}-{seed}-gpt", "gpt", data, limits | many, None)
            same = train(scratch / f"{text.stem}-{seed}-same", arguments.config, data, limits | CLASSIC, None)
            for cell, value in zip(cells, (modern["best"], modern["seconds"], gpt["best"], same["best"]), strict=True):
                cell.append(value)
        loss, seconds, gpt_loss, same_loss = (statistics.mean(cell) for cell in cells)
        print(f"| {text.name}, {text.stat().st_size / 1e6:.1f} MB | {loss:.4f} | {seconds:.0f} s | {gpt_loss:.4f} "
              f"| {same_loss:.4f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("ablate", ablate), ("repeat", repeat), ("corpora", corpora)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        if name == "repeat":
            command.add_argument("--only", default="", help="only the runs whose settings contain this")
        else:
            command.add_argument("--config", default="cpu")
            command.add_argument("--seeds", type=int, default=3 if name == "ablate" else 1)
            command.add_argument("--steps", type=int, default=600 if name == "ablate" else 1500)
        if name in ("ablate", "repeat"):
            command.add_argument("--text", type=Path, required=True)
            command.add_argument("--jobs", type=int, default=1, help="runs side by side, with one thread each")
        else:
            command.add_argument("texts", type=Path, nargs="+")
            command.add_argument("--tokenizer", default="char")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        arguments.function(arguments, Path(scratch))


if __name__ == "__main__":
    main()
