"""What each rank of a test does: real runs, one after another. `torchrun ... tests/ranks.py JOBS DATA` starts it.

JOBS is a JSON list of {"name", "changes", "parallel", "runtime", "resume", "stop_at"}; each run goes to the folder
`name` beside it. The first rank writes what was saved to `name/saves.json`, or what it saw of the exchange between
ranks to `name/exchanged.json`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.world import World, joined
from runs import CPU, Recorder, run_in, small_config

GRADIENTS = ("gloo:all_reduce", "gloo:reduce_scatter", "gloo:_reduce_scatter_base")


def main(jobs: Path, data: Path) -> None:
    torch.set_num_threads(1)
    with joined() as world:
        for job in json.loads(jobs.read_text()):
            run(job, world, jobs.parent / job["name"], Dataset(data))
            world.any(False)  # wait for the first, which writes: the next run may go on from what it wrote


def run(job: dict, world: World, path: Path, dataset: Dataset) -> None:  # type: ignore[type-arg]
    if job.get("stop_at") == "no rank 0" and world.leads:  # the stop comes to one of the others
        recorder = Recorder()
    else:
        recorder = Recorder(5 if job.get("stop_at") == "no rank 0" else job.get("stop_at"))
    runtime = replace(CPU, world=world, parallel=job["parallel"], **job.get("runtime", {}))
    config = small_config(**job["changes"])
    if not job.get("count"):
        run_in(path, dataset, config, runtime, recorder, resume=job.get("resume", False))
        if world.leads:
            (path / "saves.json").write_text(json.dumps(recorder.saves))
        return
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run_in(path, dataset, config, runtime, recorder)
    if world.leads:
        counts = Counter(event.name for event in seen.events() if event.name.startswith("gloo:"))
        (path / "exchanged.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
