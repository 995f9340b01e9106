"""``verl-pte warm-start`` under torchrun: ranks share a step's prompts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from warm_start_run import COMMAND, SAMPLED, arguments, assert_same_to_rounding, log, wait_for, weights


def two_ranks(folder: Path, output: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    return [*torchrun, str(COMMAND), *arguments(folder, output, *SAMPLED)]


@pytest.fixture(scope="module")
def ranks(folder) -> Path:
    """As `sampled`, by two ranks. Shares of a step's three prompts are uneven."""
    done = subprocess.run(two_ranks(folder, folder / "ranks"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("adapter: ") == 1, "one rank speaks"
    return folder / "ranks"


def test_two_ranks_train_what_one_does(sampled, ranks):
    assert_same_to_rounding(sampled, ranks)


def test_two_ranks_that_were_stopped_end_in_the_adapter_of_uninterrupted_ones(ranks, folder):
    output = folder / "stopped ranks"
    process = subprocess.Popen(two_ranks(folder, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        path = output / "log.jsonl"
        wait_for(lambda: path.exists() and path.read_text().count("\n") >= 4, process)
    finally:
        process.terminate()  # torchrun ends its ranks
        process.wait()
    assert (output / "checkpoint.pt").exists() and not (output / "adapter").exists()
    done = subprocess.run(two_ranks(folder, output), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "going on after step" in done.stdout + done.stderr, done.stderr[-4000:]
    assert log(output) == log(ranks)
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(ranks).items())
