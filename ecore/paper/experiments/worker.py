"""One run in a process of its own: train it, or resume it, and score it.

``python -m ecore.paper.experiments.worker`` reads one JSON object, a line, from its standard input, which stays open
as long as the process that started it lives.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any


def main() -> int:
    """Do the job on standard input; 0 done, 130 stopped (it can go on), 1 failed: the last line says why."""
    job = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    threading.Thread(target=_stop_when_orphaned, daemon=True).start()
    try:
        return work(job)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"ecore: error: {message}", file=sys.stderr, flush=True)
        return 1


def work(job: dict[str, Any]) -> int:
    """Train and score one run; 130 where it was stopped before its last step."""
    import torch

    from ecore.config import ModelConfig, TrainingConfig, from_dict
    from ecore.data.prepared import PreparedData
    from ecore.errors import InputError
    from ecore.evaluation.report import evaluate_run
    from ecore.paper.experiments.runs import SCORES
    from ecore.training.allocator import keep_freed_memory
    from ecore.training.run_folder import read_settings
    from ecore.training.trainer import train

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    if job["device"] == "cpu":
        keep_freed_memory()
    folder, data = Path(job["folder"]), PreparedData.load(job["data"])
    model, training = from_dict(ModelConfig, job["model"]), from_dict(TrainingConfig, job["training"])
    resume = (folder / "config.json").exists()
    if resume:
        before = read_settings(folder)
        if (before.model, before.training) != (model, training):
            raise InputError(f"{folder}: a run with other settings; move it away or take another --out")
        summary = train(folder, data, device=job["device"], resume=True)
    else:
        summary = train(folder, data, model, training, device=job["device"], preset=job["preset"])
    if summary["interrupted"]:
        return 130
    out = folder / SCORES
    evaluate_run(folder, "test", data.folder, job["device"], out=out, limit=job["limit"], yardsticks=False)
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop_when_orphaned() -> None:
    # Not sys.stdin: a thread that waits in there holds a lock which the interpreter needs to end.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
