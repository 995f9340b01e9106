"""The thought encoder where kv heads are spread over ranks."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from encoder_ranks import encode_on_rank, encoders, evicted, moved

from verl_pte.core.encoder_stack import EncoderStack


@pytest.mark.parametrize("world", [2, 4])
def test_encoding_over_ranks_is_encoding_on_one(world):
    expected = moved(EncoderStack(encoders()), *evicted())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=encode_on_rank, args=(r, world, port, results)) for r in range(world)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    for rank in range(world):
        assert (torch.tensor(found[rank]) - expected).abs().max() <= 1e-5
