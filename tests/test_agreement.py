"""Oracle, rollout engine and learner agree: architectures x windows x mixed batches, and every option of the method."""

import pytest
import torch
from tiny import ARCHITECTURES, random_tokens, tiny_model, tiny_pte

from verl_pte import RolloutEngine, SamplingParams, replay_log_probs
from verl_pte.core.reference import Oracle
from verl_pte.learner import Replay

PROMPT_LENGTHS = (1, 5, 8, 19, 37)  # odd, on a block, longer than a window of 8 and of 32
RESPONSE_LENGTHS = (45, 33, 60, 3, 51)
TOLERANCE = 1e-5


def check_agreement(model, adapter=True):
    """Greedy tokens, log-probs and cache facts of engine and oracle; log-probs of the learner."""
    prompts = random_tokens(*PROMPT_LENGTHS)
    engine = RolloutEngine(model, max_num_seqs=3, max_prompt_length=37, max_response_length=60)
    params = [SamplingParams(temperature=0, max_tokens=n) for n in RESPONSE_LENGTHS]
    outputs = engine.generate(prompts, params)
    replayed = replay_log_probs(model, prompts, [o.token_ids for o in outputs])
    for prompt, output, replay in zip(prompts, outputs, replayed, strict=True):
        oracle = Oracle(model, adapter=adapter)
        tokens, log_probs = oracle.greedy(prompt, len(output.token_ids))
        assert output.token_ids == tokens
        assert (torch.tensor(output.log_probs) - log_probs).abs().max() <= TOLERANCE
        assert (replay - log_probs).abs().max() <= TOLERANCE
        assert (output.num_evictions, output.peak_cache_tokens) == (oracle.num_evictions, oracle.peak_cache_tokens)
    return outputs


@pytest.mark.parametrize("window", [8, 32, None])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_engine_oracle_and_learner_agree(arch, window):
    model = tiny_pte(arch, window, chunk_tokens=7)
    outputs = check_agreement(model)
    assert [o.num_evictions > 0 for o in outputs] == [window is not None and n > window + 4 for n in RESPONSE_LENGTHS]


@pytest.mark.parametrize(
    "knobs",
    [
        dict(normalize="frobenius"),
        dict(attention="softmax"),
        dict(update_strength=None),
        dict(update_strength=1.0, normalize="frobenius"),
        dict(num_global_tokens=0),
        dict(update_state=False),
        dict(freeze_state=True),
        dict(evict_fraction=0.6),
        dict(evict_fraction=0.99),
        dict(block_size=8),
        dict(block_size=1),
        dict(target_modules=["q_proj", "down_proj"]),
    ],
    ids=str,
)
def test_every_option_agrees(knobs):
    outputs = check_agreement(tiny_pte("qwen2", 8, **knobs))
    plain = check_agreement(tiny_pte("qwen2", 8))
    assert [o.log_probs for o in outputs] != [o.log_probs for o in plain], "the option changed nothing"


def test_window_that_the_chunk_does_not_divide():
    schedule = tiny_pte("llama", 20, evict_fraction=0.33).peft_config["default"].schedule()
    assert schedule.window % schedule.chunk
    check_agreement(tiny_pte("llama", 20, evict_fraction=0.33))


def test_eager_attention_agrees():
    check_agreement(tiny_pte(model=tiny_model("llama", attn="eager")))


def test_disabled_adapter_is_the_base_under_the_window():
    model = tiny_pte("qwen3", 8)
    with model.disable_adapter():
        outputs = check_agreement(model, adapter=False)
    assert outputs[0].num_evictions > 0
    adapted = check_agreement(model)
    assert outputs[0].log_probs != adapted[0].log_probs


def test_a_window_no_sequence_fills_is_the_full_cache():
    wide, full = tiny_pte("qwen2", 64), tiny_pte("qwen2", None)
    for a, b in zip(check_agreement(wide), check_agreement(full), strict=True):
        assert a.token_ids == b.token_ids
        assert (torch.tensor(a.log_probs) - torch.tensor(b.log_probs)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("window", [8, 32, None])
def test_sampled_rollouts_replay_to_their_own_log_probs(window):
    model = tiny_pte("mistral", window)
    prompts = random_tokens(*PROMPT_LENGTHS, seed=3)
    engine = RolloutEngine(model, max_num_seqs=2, max_prompt_length=37, max_response_length=60)
    outputs = engine.generate(prompts, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=50, n=2, seed=5))
    twice = [p for p in prompts for _ in range(2)]
    replayed = replay_log_probs(model, twice, [o.token_ids for o in outputs], temperature=0.7)
    assert max((r - torch.tensor(o.log_probs)).abs().max() for r, o in zip(replayed, outputs, strict=True)) <= TOLERANCE


def bfloat16_differences(window, chunk_tokens):
    """|log-prob of the rollout - log-prob of the replay|, both in bfloat16, over a sampled batch."""
    model = tiny_pte("llama", window)
    prompts = random_tokens(9, 3, 20, 14, 6, 11, 17, 23)
    engine = RolloutEngine(model, max_num_seqs=8, max_prompt_length=24, max_response_length=100, dtype=torch.bfloat16)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=100, seed=3))
    pairs = [[torch.tensor(p) for p in prompts], [torch.tensor(o.token_ids) for o in outputs]]
    replayed = Replay(model, *pairs, chunk_tokens=chunk_tokens).forward().log_probs
    return (replayed - torch.tensor([o.log_probs for o in outputs])).abs().flatten()


@pytest.mark.parametrize("window", [8, 32])
def test_low_precision_mismatch_is_no_wider_than_with_a_full_cache(window):
    """Compared at one chunk length: what bfloat16 kernels round depends on the shapes they are called with."""
    chunk_tokens = tiny_pte("llama", window).peft_config["default"].schedule().chunk
    bounded, full = bfloat16_differences(window, chunk_tokens), bfloat16_differences(None, chunk_tokens)
    assert full.mean() > 1e-4, "the two sides round differently, or nothing is compared"
    assert bounded.mean() <= 1.3 * full.mean()
    assert bounded.quantile(0.99) <= 1.3 * full.quantile(0.99)
