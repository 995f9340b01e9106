"""An adapter saved on Megatron answers in both rollout engines, as the one it was made from."""

import pytest
from megatron_ranks import Layout, run_on_ranks
from replay_work import resave
from safetensors.torch import load_file
from tiny import random_tokens
from vllm_run import Run, carry_out, write_model

from verl_pte import RolloutEngine, SamplingParams
from verl_pte.peft.saved import WEIGHTS, load, saved_config
from verl_pte.vllm.weights import adapter_tensor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts")
    _, base, adapter = write_model(path, "qwen2", 32)
    names = run_on_ranks(resave, Layout(tensor=2, pipeline=2), base, adapter, str(path / "saved"))[0]
    return base, adapter, str(path / "saved"), names


EXPECTED_TENSORS = 2 * (7 * 2 + 6)  # of two layers: seven linears, one encoder


def test_what_is_sent_has_a_place_in_vllm(folders):
    places = [adapter_tensor(name) for name in folders[3]]
    assert None not in places and len(set(places)) == len(places) == EXPECTED_TENSORS


def test_the_file_is_the_one_it_was_loaded_from(folders):
    _, adapter, saved, _ = folders
    left, right = load_file(f"{adapter}/{WEIGHTS}"), load_file(f"{saved}/{WEIGHTS}")
    assert left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)
    assert saved_config(adapter).window == saved_config(saved).window == 32


def test_both_rollout_engines_answer_with_it(folders, tmp_path):
    base, _, saved, _ = folders
    prompts, length = random_tokens(5, 20), 100
    engine = RolloutEngine(
        load(base, saved, saved_config(saved)), max_num_seqs=2, max_prompt_length=32, max_response_length=length
    )
    native = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True))
    (vllm,) = carry_out([Run(base, saved, prompts, [length] * len(prompts))], tmp_path)
    for ours, theirs in zip(native, vllm["requests"], strict=True):
        assert ours.num_evictions == theirs["num_evictions"] > 0
        assert list(ours.token_ids) == theirs["token_ids"]
