"""lm-evaluation-harness on an export, run as docs/neighbours.md says: it measures what `minigpt eval` measures."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clock import PATIENCE
from inspected import made_checkpoint
from minigpt_cli.core.config import Config, ModelConfig
from minigpt_cli.core.evaluate import evaluate
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import CharTokenizer
from minigpt_cli.extras.huggingface import write
from runs import CPU

TASK = Path(__file__).parents[2] / "docs" / "lm_eval" / "minigpt_text.yaml"
installed = all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate"))


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="lm-evaluation-harness is not installed")
def test_the_harness_and_eval_agree_on_the_same_windows(tmp_path: Path, verse: str) -> None:
    """The text after its first character, which the harness is given as what stands before it; in whole windows."""
    tokenizer = CharTokenizer("".join(sorted(set(verse))))
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, bias_head=False), len(tokenizer.chars))
    with torch.no_grad():
        model.head.weight.mul_(20)
    text = verse[: 1 + 16 * 12]
    write(made_checkpoint(tmp_path, model, tokenizer, config=Config(model=model.config).model_dump()), tmp_path / "out")
    (tmp_path / "text.txt").write_text(text[1:])
    shutil.copytree(TASK.parent, tmp_path / "tasks")
    first = tokenizer.encode(text[0])[0]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained=out,prefix_token_id={first}",
         "--tasks", "minigpt_text", "--include_path", "tasks", "--device", "cpu", "--output_path", "found.json"],
        cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(tmp_path.glob("found*.json")).read_text())["results"]["minigpt_text"]
    score = evaluate(model, tokenizer.encode(text), CPU)
    assert score is not None
    assert score.loss > math.log(len(tokenizer.chars)) + 0.05  # not what a model that says nothing scores
    assert found["bits_per_byte,none"] == pytest.approx(score.loss / math.log(2), abs=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(score.perplexity, rel=1e-5)
