"""Probe: a tiny random model generates past its window, and the learner finds the same log-probabilities."""

from verl_pte.doctor.check import Check, Part, State
from verl_pte.doctor.probe import report

TOLERANCE = 1e-4


def judge(difference: float, evictions: int, device: str) -> Check:
    """Whether rollout and learner agree."""
    found = f"on {device}, {evictions} evictions: log-probs of rollout and learner differ by {difference:.1e}"
    if evictions and difference < TOLERANCE:
        return Check("self test", Part.core, State.ok, found)
    advice = f"more than {TOLERANCE:.0e} in float32 is a bug here or in PyTorch: please report it with this table"
    return Check("self test", Part.core, State.problem, found, advice)


def main() -> None:
    """Run it, in float32, on the first GPU where there is one."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import verl_pte

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    pte = verl_pte.PTEConfig(rank=4, window=16, block_size=8, num_global_tokens=4)
    model = verl_pte.attach(Qwen2ForCausalLM(config).to(device), pte)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: the state would not matter
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    engine = verl_pte.RolloutEngine(model, max_num_seqs=2, max_prompt_length=8, max_response_length=64)
    sampling = verl_pte.SamplingParams(max_tokens=64, seed=0, ignore_eos=True)
    outputs = engine.generate(prompts, sampling)
    replayed = verl_pte.replay_log_probs(model, prompts, [output.token_ids for output in outputs])
    difference = max(
        float((torch.as_tensor(output.log_probs) - log_probs.cpu()).abs().max())
        for output, log_probs in zip(outputs, replayed, strict=True)
    )
    report(judge(difference, sum(output.num_evictions for output in outputs), device))


if __name__ == "__main__":
    main()
