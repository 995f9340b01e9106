"""A method's process of the learner benchmark; the parent's handle and the messages are worker.py's."""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from verl_pte.bench.learner_settings import LearnerSettings
from verl_pte.bench.step_memory import measured
from verl_pte.bench.worker import run


def serve(answers: TextIO) -> None:
    """The worker's side."""
    job = json.loads(sys.stdin.readline())
    settings = LearnerSettings(**job["settings"] | {"lengths": tuple(job["settings"]["lengths"])})
    from verl_pte.bench.learner_steps import make_batch, make_step
    from verl_pte.bench.models import base_config

    step = make_step(settings, job["method"], Path(job["models"]))
    vocab_size = base_config(settings).vocab_size
    device = torch.cuda.get_device_name(step.device) if step.device.type == "cuda" else step.device.type
    said = {"device": device, "threads": torch.get_num_threads(), "runs": step.runs}
    print(json.dumps(said), file=answers, flush=True)
    for line in sys.stdin:
        length = json.loads(line)["length"]
        step.prepare(make_batch(settings, vocab_size, length))
        try:
            sample = _sample(step)
        except torch.OutOfMemoryError:
            sample = {"out_of_memory": True}
        if sample["out_of_memory"]:  # outside the handler: what it handles holds on to the run's tensors
            gc.collect()
            torch.cuda.empty_cache()
        sample |= {"length": length, "tokens": settings.num_seqs * length}
        print(json.dumps(sample), file=answers, flush=True)


def _sample(step: Any) -> dict[str, Any]:
    """What a step takes. Raises torch.OutOfMemoryError if it does not fit on the GPU."""
    load = os.getloadavg()[0]
    with measured(step.device) as memory:
        cpu, start = time.process_time(), time.perf_counter()
        facts = step.run()
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {
        "out_of_memory": False,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads
        "rise_bytes": memory.rise,
        "peak_bytes": memory.peak,
        "memory_by": memory.how,
        "load_average": load,
        **facts,
    }


if __name__ == "__main__":
    run(serve)
