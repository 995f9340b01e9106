"""Replay under FSDP2 with two gloo ranks against one process: gradients and log-probs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import fsdp_worker
import pytest
import torch


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("case", fsdp_worker.CASES)
def test_two_ranks_equal_one_process(tmp_path, case):
    here = Path(__file__).parent
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(here / "fsdp_worker.py"), str(tmp_path), case]
    ranks = [subprocess.Popen(command, env=common | {"RANK": str(r)}) for r in range(2)]
    try:
        assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    results = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]

    model = fsdp_worker.build(case)
    calls = []
    for rank, lengths in enumerate(fsdp_worker.CASES[case]):
        for i, batch in enumerate(fsdp_worker.micro_batches(case, lengths)):
            out = fsdp_worker.accumulate(model, batch, 100 * rank + i)
            calls.append(sum(out.num_evictions))
            assert torch.allclose(results[rank]["log_probs"][i], out.log_probs, atol=1e-5)
    if case == "no_eviction":
        assert calls[0] > 0 and calls[-1] == 0
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for result in results:
        assert result["gradients"].keys() == expected.keys()
        worst = max((result["gradients"][n] - g).norm() / g.norm() for n, g in expected.items())
        assert worst <= 1e-5
