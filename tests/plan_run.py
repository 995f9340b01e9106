"""Measures the peak of a replay and of a prefill on small models.

To be run where the allocator gives memory back at once. Prints one JSON object: what was measured and what
`verl_pte.plan` counts, in bytes.
"""

import json

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from verl_pte import PTEConfig, RolloutEngine, SamplingParams, attach
from verl_pte.bench.step_memory import measured
from verl_pte.learner import Replay
from verl_pte.plan import count

BATCH, PROMPT, RESPONSE = 4, 192, 1100
CPU = torch.device("cpu")


def config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )


def pte(**settings: object) -> PTEConfig:
    return PTEConfig(**{"rank": 16, "window": 256, "num_global_tokens": 16, "chunk_tokens": 256} | settings)


def replay(settings: PTEConfig) -> int:
    model = attach(AutoModelForCausalLM.from_config(config()), settings).train()

    def step(batch: int, prompt: int, response: int) -> None:
        sequences = [list(torch.randint(0, 8192, (batch, n))) for n in (prompt, response)]
        run = Replay(model, *sequences)
        log_probs = run.forward().log_probs.requires_grad_()
        log_probs.sum().backward()
        run.backward(log_probs.grad)
        model.zero_grad(set_to_none=True)

    step(1, 8, 8)  # what is loaded once is no part of a step
    with measured(CPU) as found:
        step(BATCH, PROMPT, RESPONSE)
    return found.rise


def prefill(settings: PTEConfig) -> int:
    model = attach(AutoModelForCausalLM.from_config(config()), settings)
    sizes = {"max_num_seqs": 32, "max_prompt_length": PROMPT, "max_response_length": RESPONSE}
    engine = RolloutEngine(model, **sizes)
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    engine.generate([[1] * 8] * 2, sampling)
    with measured(CPU) as found:
        engine.generate([[1] * PROMPT] * 32, sampling)
    return found.rise


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = {}
    for name, settings in (("pte", {}), ("full", {"window": None, "freeze_state": True})):
        peak, store = count.replay_bytes(config(), pte(**settings), BATCH, PROMPT, RESPONSE, torch.float32)
        out[name] = {"measured": replay(pte(**settings)), "counted": peak, "store": store}
    counted = count.rollout_bytes(config(), pte(), 32, PROMPT, RESPONSE, torch.float32)
    out["prefill"] = {"measured": prefill(pte()), "counted": counted}
    print(json.dumps(out))
