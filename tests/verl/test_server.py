"""The rollout server as a Ray actor: what verl's trainer and agent loops ask of it."""

import asyncio
import time
from types import SimpleNamespace

import pytest
import ray
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from verl_run import PTE

from verl_pte import PTEConfig, RolloutEngine
from verl_pte.verl.server import _build_model
from verl_pte.verl.weight_transfer import buckets, unpack

GREEDY = {"temperature": 0, "top_k": -1, "top_p": 1.0, "logprobs": True}
SAMPLED = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "logprobs": True}
PROMPT = [10, 20, 30, 40, 50]
LONG = 160


def start_server(folder):
    from verl.workers.config import RolloutConfig

    from verl_pte.verl.config import PTEModelConfig
    from verl_pte.verl.server import RolloutServer

    model_config = {
        "_target_": f"{PTEModelConfig.__module__}.PTEModelConfig",
        "path": str(folder / "model"),
        "pte": PTE,
        "lora": {"rank": PTE["rank"]},
    }
    config = RolloutConfig(
        name="pte",
        dtype="float32",
        load_format="auto",
        max_num_seqs=3,
        prompt_length=16,
        response_length=LONG,
        tensor_model_parallel_size=1,
        ignore_eos=True,
    )
    actor = ray.remote(RolloutServer).options(num_cpus=0, max_concurrency=32).remote(config, model_config, 0)
    ray.get(actor.ready.remote())
    return actor


@pytest.fixture(scope="module")
def server(folder):
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield start_server(folder)
    ray.shutdown()


def ask(server, request_id="r", sampling=GREEDY, **more):
    return server.generate.remote(request_id=request_id, prompt_ids=PROMPT, sampling_params={**sampling, **more})


def test_greedy_response_is_the_base_models_and_says_what_it_held(server, folder):
    ray.get(server.set_global_steps.remote(7))
    output = ray.get(ask(server, max_tokens=12))  # shorter than the window: the full-cache answer, as lora_B is zero
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    expected = base.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert output.token_ids == expected[0, len(PROMPT) :].tolist()
    assert len(output.log_probs) == 12 and output.stop_reason == "completed"
    # The last sampled token has not entered the cache.
    facts = {"global_steps": 7, "num_evictions": 0, "peak_cache_tokens": len(PROMPT) + 11}
    assert output.extra_fields == facts


def test_same_seed_same_response_whatever_runs_beside_it(server):
    alone = ray.get(ask(server, "alone", SAMPLED, seed=5, max_tokens=40))
    crowd = [ask(server, f"c{i}", SAMPLED, max_tokens=40) for i in range(4)]
    beside = ray.get(ask(server, "beside", SAMPLED, seed=5, max_tokens=40))
    assert beside.token_ids == alone.token_ids
    others = [output.token_ids for output in ray.get(crowd)]
    assert len({tuple(tokens) for tokens in others}) == 4, "without a seed of their own, requests must still differ"


def test_requests_wait_while_it_sleeps(server):
    ray.get(server.sleep.remote())
    request = ask(server, "sleeper", max_tokens=4)
    assert ray.wait([request], timeout=1.0)[0] == []
    ray.get(server.wake_up.remote(tags=["weights"]))
    assert ray.wait([request], timeout=1.0)[0] == [], "the cache is not back yet"
    ray.get(server.wake_up.remote(tags=["kv_cache"]))
    assert len(ray.get(request, timeout=20).token_ids) == 4


def test_abort_returns_what_there_is_and_resume_serves_again(server):
    requests = [ask(server, f"a{i}") for i in range(5)]  # two of them wait for a row
    time.sleep(0.1)
    ray.get(server.abort_all_requests.remote())
    outputs = ray.get(requests, timeout=20)
    assert {output.stop_reason for output in outputs} == {"aborted"}
    assert all(len(output.token_ids) < LONG for output in outputs)
    held = ask(server, "held", max_tokens=3)
    assert ray.wait([held], timeout=1.0)[0] == []
    ray.get(server.resume_generation.remote())
    assert len(ray.get(held, timeout=20).token_ids) == 3
    ray.get(server.abort_all_requests.remote(reject_request=True))
    with pytest.raises(Exception, match="rejects requests until resume_generation"):
        ray.get(ask(server, "rejected"))
    ray.get(server.resume_generation.remote())


def test_weights_arrive_by_name_and_change_the_answer(server, folder):
    before = ray.get(ask(server, "w0", max_tokens=12)).token_ids
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    prefix = "base_model.model."
    torch.manual_seed(1)
    changed = {f"{prefix}lm_head.weight": torch.randn_like(base.lm_head.weight)}
    for bucket in buckets(changed.items(), 1 << 20):
        assert ray.get(server.load_weights.remote(bucket)) == 1
    base.lm_head.weight.data.copy_(changed[f"{prefix}lm_head.weight"])
    expected = base.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    after = ray.get(ask(server, "w1", max_tokens=12)).token_ids
    assert after == expected[0, len(PROMPT) :].tolist() != before
    (bucket,) = buckets([("no.such.weight", torch.zeros(2))], 1 << 20)
    with pytest.raises(Exception, match="no parameter 'no.such.weight'"):
        ray.get(server.load_weights.remote(bucket))


def test_what_it_cannot_do_is_refused(server):
    with pytest.raises(Exception, match=r"repetition_penalty=1\.2: must be 1\.0"):
        ray.get(ask(server, "p", repetition_penalty=1.2))
    with pytest.raises(Exception, match="text only"):
        ray.get(server.generate.remote("i", PROMPT, GREEDY, image_data=["image"]))


def test_it_ends_with_its_engine_and_only_with_it(server, folder):
    """A dead engine ends the actor, so that nobody waits for it; requests that fail one by one do not."""
    mortal = start_server(folder)
    with pytest.raises(ValueError, match="prompt"):
        ray.get(mortal.generate.remote("too long", PROMPT * 10, GREEDY))

    def fail_one_step(self):
        def step():
            del self.engine.engine.step
            raise ZeroDivisionError("one bad step")

        self.engine.engine.step = step

    ray.get(mortal.__ray_call__.remote(fail_one_step))
    with pytest.raises(ZeroDivisionError, match="one bad step"):
        ray.get(ask(mortal, "bad step"))
    assert len(ray.get(ask(mortal, "next", max_tokens=4)).token_ids) == 4

    def break_engine(self):
        def lost(*_):
            raise RuntimeError("device lost")

        self.engine.engine.step = self.engine.engine.abort = lost

    ray.get(mortal.__ray_call__.remote(break_engine))
    for request in [ask(mortal, f"d{i}") for i in range(5)]:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(request, timeout=30)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(mortal.wake_up.remote(), timeout=30)


def test_the_device_is_the_platforms_and_has_to_be_there(monkeypatch):
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    from verl_pte.verl import server

    assert server._device() == "cpu"
    monkeypatch.setattr(server, "get_platform", PlatformCUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(RuntimeError, match=r"no cuda device.*CUDA_VISIBLE_DEVICES='7'.*VERL_PLATFORM=cpu"):
        server._device()


def test_the_agent_loop_needs_the_responses_number():
    from verl_pte.verl.agent_loop import SeededSingleTurnLoop

    loop = object.__new__(SeededSingleTurnLoop)
    with pytest.raises(ValueError, match=r"session_id=None: must be .*trainer\.use_v1=True"):
        asyncio.run(loop.run({}, raw_prompt=[], index=0))


def test_a_bfloat16_server_keeps_the_rotary_frequencies_in_float32(folder):
    model_config = SimpleNamespace(
        local_path=str(folder / "model"),
        hf_config=AutoConfig.from_pretrained(folder / "model", attn_implementation="sdpa"),
        trust_remote_code=False,
        pte=PTEConfig(rank=2, window=8, block_size=4, num_global_tokens=2),
    )
    for load_format in ("auto", "dummy"):
        model = _build_model(model_config, torch.bfloat16, "cpu", load_format)
        RolloutEngine(model, max_num_seqs=1, max_prompt_length=8, max_response_length=8, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.get_base_model().model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_keep_names_shapes_and_values(dtype):
    weights = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(100, 2), "d": torch.tensor(1.5)}
    packed = list(buckets(weights.items(), max_bytes=200, dtype=dtype))
    assert len(packed) > 1 and all(len(bucket.layout) == 1 or bucket.data.nbytes <= 200 for bucket in packed)
    back = {name: tensor for bucket in packed for name, tensor in unpack(bucket)}
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name].to(dtype)) for name in weights)
