"""Say what a quickstart run did: a table, curves.png and summary.json; exit 1 if it broke a bound.

    python examples/quickstart/report.py --out outputs/quickstart

Reads the metrics verl's `file` logger wrote (one JSON object a step) and the prompts, from which the cache
limit follows: pinned tokens of the longest prompt plus the window. What is checked: rollout and learner agree,
the cache stayed within its limit, responses were several windows long and, with `--min-rise`, the reward rose.
What such a run does not show is in the README beside.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from verl_pte.core.schedule import Schedule

REWARD, MISMATCH = "critic/score/mean", "pte/mismatch_max"
PEAK, EVICTIONS, LENGTH = "pte/peak_cache_tokens", "pte/evictions_per_seq", "response_length/mean"
MAX_MISMATCH = 1e-4  # fp32 on both sides
MIN_WINDOWS = 3  # mean response, in windows
EDGE = 3  # steps averaged at either end


def read_metrics(path: Path) -> list[dict[str, float]]:
    """One dict a training step, in order. Raises ValueError if a step lacks what the report needs."""
    steps = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if REWARD not in record["data"]:
            continue  # verl logs validation, where switched on, apart
        missing = [key for key in (MISMATCH, PEAK, EVICTIONS, LENGTH) if key not in record["data"]]
        if missing:
            raise ValueError(f"step {record['step']} of {path} has no {', '.join(missing)}")
        steps.append({"step": record["step"], **record["data"]})
    if not steps:
        raise ValueError(f"{path}: no training step was logged")
    return steps


def cache_limit(parquet: Path, model: Path, schedule: Schedule) -> int:
    """Largest pinned + W over all prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    limits = []
    for messages in pd.read_parquet(parquet)["prompt"]:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        limits.append(schedule.cache_limit(len(tokenizer(text)["input_ids"])))
    return max(limits)


def summarize(steps: list[dict[str, float]], *, limit: int, window: int, seconds: float) -> dict[str, Any]:
    """The numbers of summary.json."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    rewards = [step[REWARD] for step in steps]
    return {
        "steps": len(steps),
        "reward_first": mean(rewards[:EDGE]),
        "reward_last": mean(rewards[-EDGE:]),
        "mismatch_max": max(step[MISMATCH] for step in steps),
        "peak_cache_tokens": int(max(step[PEAK] for step in steps)),
        "cache_limit": limit,
        "window": window,
        "mean_response_length": mean([step[LENGTH] for step in steps]),
        "seconds": round(seconds, 1),
    }


def violations(summary: dict[str, Any], min_rise: float | None) -> list[str]:
    """What the run should have kept and did not, in words; empty if all is well. A nan keeps nothing."""
    found = []
    if not summary["mismatch_max"] <= MAX_MISMATCH:
        found.append(f"mismatch_max {summary['mismatch_max']:.1e} is above {MAX_MISMATCH:.0e}")
    if not summary["peak_cache_tokens"] <= summary["cache_limit"]:
        found.append(f"peak_cache_tokens {summary['peak_cache_tokens']} is above the limit {summary['cache_limit']}")
    if not summary["mean_response_length"] >= MIN_WINDOWS * summary["window"]:
        found.append(
            f"mean_response_length {summary['mean_response_length']:.1f} is below {MIN_WINDOWS} windows "
            f"of {summary['window']}"
        )
    rise = summary["reward_last"] - summary["reward_first"]
    if min_rise is not None and not rise >= min_rise:
        found.append(f"the reward rose by {rise:.3f}, less than {min_rise}")
    return found


def print_table(console: Console, summary: dict[str, Any], evictions: float, min_rise: float | None) -> None:
    """The closing table."""
    rise = summary["reward_last"] - summary["reward_first"]
    windows = summary["mean_response_length"] / summary["window"]
    table = Table(title=f"quickstart: {summary['steps']} GRPO steps in {summary['seconds']:.0f} s")
    for name, justify in (("what", "left"), ("measured", "right"), ("must hold", "right")):
        table.add_column(name, justify=justify)
    wanted = "" if min_rise is None else f"+{min_rise} or more"
    table.add_row(f"mean reward, first {EDGE} steps", f"{summary['reward_first']:.3f}", "")
    table.add_row(f"mean reward, last {EDGE} steps", f"{summary['reward_last']:.3f} ({rise:+.3f})", wanted)
    table.add_row("largest log-prob mismatch", f"{summary['mismatch_max']:.1e}", f"<= {MAX_MISMATCH:.0e}")
    table.add_row("most tokens in the cache", str(summary["peak_cache_tokens"]), f"<= {summary['cache_limit']}")
    table.add_row("window W, tokens", str(summary["window"]), "")
    table.add_row("mean response, windows", f"{windows:.1f}", f">= {MIN_WINDOWS}")
    table.add_row("evictions a response", f"{evictions:.1f}", "")
    console.print(table)


def draw(steps: list[dict[str, float]], limit: int, path: Path) -> None:
    """Reward, mismatch and cache tokens over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = [step["step"] for step in steps]
    figure, (reward, mismatch, cache) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    reward.plot(x, [step[REWARD] for step in steps], marker=".")
    reward.set(title="mean reward", ylim=(0, 1))
    mismatch.semilogy(x, [max(step[MISMATCH], 1e-9) for step in steps], marker=".")
    mismatch.axhline(MAX_MISMATCH, color="tab:red", linestyle="--", label="bound")
    mismatch.set(title="largest |log-prob difference|, rollout and learner")
    cache.plot(x, [step[PEAK] for step in steps], marker=".", label="peak")
    cache.axhline(limit, color="tab:red", linestyle="--", label="pinned + W")
    cache.set(title="tokens in the cache", ylim=(0, limit * 1.2))
    for axes in (reward, mismatch, cache):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    mismatch.legend()
    cache.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/quickstart"), help="has metrics.jsonl, model/, *.parquet"
    )
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--evict-fraction", type=float, default=0.25)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--started", type=float, help="when the run began, in seconds since 1970")
    parser.add_argument("--min-rise", type=float, help="least rise of the reward; not demanded when absent")
    args = parser.parse_args()

    console = Console()
    steps = read_metrics(args.out / "metrics.jsonl")
    limit = cache_limit(
        args.out / "train.parquet", args.out / "model", Schedule(args.window, args.evict_fraction, args.block_size)
    )
    seconds = time.time() - args.started if args.started else 0.0
    summary = summarize(steps, limit=limit, window=args.window, seconds=seconds)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(steps, limit, args.out / "curves.png")
    print_table(console, summary, sum(step[EVICTIONS] for step in steps) / len(steps), args.min_rise)
    console.print(f"curves: {args.out / 'curves.png'}   numbers: {args.out / 'summary.json'}")
    found = violations(summary, args.min_rise)
    for violation in found:
        print(f"quickstart failed: {violation}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
