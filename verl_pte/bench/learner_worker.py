"""A method's process of the learner benchmark; the parent's handle and the messages are worker.py's."""

import json
import os
import sys
import time
from typing import TextIO

from verl_pte.bench.learner_settings import LearnerSettings
from verl_pte.bench.worker import run


def serve(answers: TextIO) -> None:
    """The worker's side."""
    job = json.loads(sys.stdin.readline())
    settings = LearnerSettings(**job["settings"] | {"lengths": tuple(job["settings"]["lengths"])})
    from pathlib import Path

    import torch

    from verl_pte.bench.learner_steps import make_batch, make_step
    from verl_pte.bench.models import base_config
    from verl_pte.bench.step_memory import measured

    step = make_step(settings, job["method"], Path(job["models"]))
    vocab_size = base_config(settings).vocab_size
    device = torch.cuda.get_device_name(step.device) if step.device.type == "cuda" else step.device.type
    said = {"device": device, "threads": torch.get_num_threads(), "runs": step.runs}
    print(json.dumps(said), file=answers, flush=True)
    for line in sys.stdin:
        length = json.loads(line)["length"]
        step.prepare(make_batch(settings, vocab_size, length))
        load = os.getloadavg()[0]
        with measured(step.device) as memory:
            cpu, start = time.process_time(), time.perf_counter()
            facts = step.run()
            if step.device.type == "cuda":
                torch.cuda.synchronize(step.device)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        sample = {
            "length": length,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,  # of all threads
            "tokens": settings.num_seqs * length,
            "rise_bytes": memory.rise,
            "peak_bytes": memory.peak,
            "memory_by": memory.how,
            "load_average": load,
            **facts,
        }
        print(json.dumps(sample), file=answers, flush=True)


if __name__ == "__main__":
    run(serve)
