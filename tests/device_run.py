"""One part of tests/test_device.py, in a process of its own: what it computes on a simulated accelerator, as JSON.

Run as ``python device_run.py PART LENGTH ...``.
"""

import json
import os
import sys

import torch
from accelerator import DEVICE, Accelerator, numbers, placed, waits
from tiny import random_tokens, tiny_model, tiny_pte

from verl_pte import RolloutEngine, SamplingParams
from verl_pte.core.transfer import upload
from verl_pte.learner import Replay


def model(attention: str = "sdpa"):
    return tiny_pte(model=tiny_model("qwen2", attn=attention), window=8)


def replay(length: int, attention: str = "sdpa", kv_store: str = "device") -> dict:
    """Differences to the CPU, calls, and waits of each pass."""
    prompts = [torch.tensor(tokens) for tokens in random_tokens(5, 11, seed=3)]
    responses = [torch.tensor(tokens) for tokens in random_tokens(length, 23, seed=4)]

    def both_passes(of, device) -> tuple:
        run = Replay(of, prompts, responses, entropy=True, kv_store=kv_store)
        out = run.forward()
        forward = waits.total()
        run.backward(torch.ones(out.log_probs.shape, device=device) * out.mask, None)
        gradients = {n: numbers(p.grad) for n, p in of.named_parameters() if p.requires_grad}
        return numbers(out.log_probs), gradients, run.num_calls, forward, waits.total() - forward

    log_probs, gradients, *_ = both_passes(model(attention), torch.device("cpu"))
    there = placed(model(attention))
    waits.clear()
    with Accelerator():
        found, found_gradients, calls, forward, backward = both_passes(there, DEVICE)
    assert found_gradients.keys() == gradients.keys()
    return {
        "log_probs": float((found - log_probs).abs().max()),
        "gradients": max(float((found_gradients[n] - g).abs().max()) for n, g in gradients.items()),
        "calls": calls,
        "waits": [forward, backward],
        "places": dict(waits),
    }


def engine(length: int) -> dict:
    """Whether the same tokens come, steps, and waits."""
    prompts = random_tokens(3, 13, 7)
    sampling = SamplingParams(max_tokens=length, ignore_eos=True, seed=1, top_p=0.95, top_k=30)

    def generate(of) -> list:
        sizes = {"max_num_seqs": 3, "max_prompt_length": 24, "max_response_length": 64}
        made = RolloutEngine(of, **sizes)
        waits.clear()
        return [(o.token_ids, o.num_evictions, o.peak_cache_tokens) for o in made.generate(prompts, sampling)]

    expected = generate(model())
    with Accelerator():
        found = generate(placed(model()))
    return {"same": found == expected, "evictions": found[0][1], "waits": waits.total(), "places": dict(waits)}


def mixed() -> dict:
    """What the simulation is for: both devices in one operation, and numbers that are read."""
    with Accelerator():
        there, here = torch.ones(2, device=DEVICE), torch.ones(2)
        try:
            there + here
        except RuntimeError as error:
            refused = str(error)
        waits.clear()
        (there + there).tolist(), here.to(DEVICE), here.to(DEVICE, non_blocking=True), there[[0]], bool(there.any())
        there[upload([0, 1], DEVICE)] = 3  # pinned, but for the number
        kinds = sorted(place.split(" at ")[0] for place in waits.elements())
        assert (there + here.to(DEVICE)).device == DEVICE
    return {"refused": refused, "waits": kinds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, *arguments = sys.argv[1:]
    given = [int(a) if a.isdigit() else a for a in arguments]
    print(json.dumps({"replay": replay, "engine": engine, "mixed": mixed}[part](*given)), flush=True)
    os._exit(0)  # autograd's thread of a device that is not there now and then aborts an ordinary exit
