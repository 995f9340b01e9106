"""Methods in processes of their own that take turns, A B C A B C.

What disturbs the machine for a while then falls on all methods alike, and times can be compared within a turn. The
other processes wait meanwhile, without using a core. Each method first runs one length once, untimed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_pte.bench.settings import METHODS, Settings
from verl_pte.bench.worker import Worker


def total_work(settings: Settings, warm_up: int) -> int:
    """What `take_turns` reports as done when it ends: tokens of a sequence, over all methods."""
    return len(METHODS) * (warm_up + settings.repeats * sum(settings.lengths))


def take_turns(
    kind: type[Worker],
    settings: Settings,
    models: Path,
    output: Path,
    warm_up: int,
    progress: Callable[[str, int], None],
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every sample, with its method and repeat, and what each worker said of itself.

    Args:
        kind: of worker.
        models: folder of what make_models made.
        output: folder for the logs of the processes.
        warm_up: length of the untimed run.
        progress: told what begins, and how much was done since it was told last.

    Raises RuntimeError if a process dies or did not do what was asked of it.
    """
    samples: list[dict[str, Any]] = []
    workers: dict[str, Worker] = {}
    said = {}
    try:
        for method, (title, _) in METHODS.items():
            progress(f"starting {title}", 0)
            workers[method] = kind(settings, method, models, output / f"{kind.name}-{method}.log")
            if settings.engine == "vllm":  # on a GPU each looks at the memory that is free
                said[method] = workers[method].ready()
        for method, worker in workers.items():
            if method not in said:
                said[method] = worker.ready()
        done = 0
        for method, worker in workers.items():
            progress(f"warming up {METHODS[method].title}", done)
            worker.measure(warm_up)
            done = warm_up
        for length in settings.lengths:
            for repeat in range(settings.repeats):
                for method, worker in workers.items():
                    progress(f"{length} tokens, {repeat + 1}/{settings.repeats}, {METHODS[method].title}", done)
                    samples.append({"method": method, "repeat": repeat} | worker.measure(length))
                    done = length
        progress("done", done)
    finally:
        for worker in workers.values():
            worker.close()
    return samples, said
