"""How long a training loop stands still while it saves a model of 120.8 million parameters.

    python tests/save_stall.py DATASET_FOLDER

DATASET_FOLDER is what `minigpt prepare` made. Needs about 6 GB of memory and 3 GB of disk for a moment.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from minigpt_cli.core.config import load_config
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.run import open_run
from minigpt_cli.core.runtime import choose_runtime
from minigpt_cli.core.train import Trainer

SETTINGS = {"model.n_layer": 17, "model.n_head": 12, "model.n_embd": 768, "model.dropout": 0.0, "train.batch_size": 8}


def main() -> None:
    config = load_config("gpt", list(SETTINGS.items()))
    runtime = choose_runtime(config.runtime, width=768, rows=8 * config.model.block_size)
    with tempfile.TemporaryDirectory() as place, open_run(Path(place)) as folder:
        trainer = Trainer(config, Dataset(sys.argv[1]), folder, runtime, [], None, lambda: None)

        def step() -> float:
            start = time.perf_counter()
            trainer._step()
            trainer.saver.poll()
            return time.perf_counter() - start

        step()
        plain = statistics.median(step() for _ in range(4))
        print(f"{trainer.model.parameter_counts()['total']:,} parameters, {plain:.2f} s a step")
        for _ in range(3):
            start = time.perf_counter()
            trainer._save(last=True)
            stall, beside = time.perf_counter() - start, []
            while trainer.saver._pending:
                beside.append(step())
            extra = sum(beside) - plain * len(beside)
            print(
                f"the loop stood for {stall:.2f} s; the {len(beside)} steps beside the writer took {extra:.1f} s longer"
            )
        trainer.saver.close()
        print(f"{folder.last.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
