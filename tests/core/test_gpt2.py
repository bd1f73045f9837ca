"""GPT-2 itself: all 124 million parameters and all 50,257 tokens, for a few real steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minigpt_cli.core.config import load_config
from minigpt_cli.core.run import open_run
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.train import Trainer
from runs import write_dataset

VOCABULARY = 50257
# Where there are no instructions for it, bf16 is a hundred times as slow as float32.
HAS_BF16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


@pytest.mark.slow
def test_it_trains(tmp_path: Path) -> None:
    """On the CPU, with a short context and small batches, by the config's recipe warmed up sooner."""
    characters = "".join(chr(0x10000 + i) for i in range(VOCABULARY))  # a vocabulary of the right size
    common = "".join(characters[i] for i in torch.randint(50, (10 * VOCABULARY,)).tolist())
    dataset = write_dataset(tmp_path / "data", common + characters)  # of which the last tenth validates
    overrides = {"model.block_size": 32, "train.batch_size": 2, "train.micro_batch_size": 1, "train.warmup_iters": 1}
    config = load_config("gpt2", list(overrides.items()))
    with open_run(tmp_path / "run") as folder:
        runtime = Runtime(torch.device("cpu"), "bf16" if HAS_BF16 else "fp32", False)
        trainer = Trainer(config, dataset, folder, runtime, [], None, lambda: None)
        losses = []
        for _ in range(4):
            before = float(trainer.statistics.loss_sum)
            trainer._step()
            losses.append(float(trainer.statistics.loss_sum) - before)
        trainer.saver.close()
    counts = trainer.model.parameter_counts()
    assert counts["total"] == 124_439_808 - (1024 - 32) * 768  # but for positions beyond the shorter context
    assert losses[0] == pytest.approx(10.825, abs=0.3)  # log 50257: it knows nothing
    assert losses[-1] < losses[0] - 0.5, losses
    trainer._check_finite()
