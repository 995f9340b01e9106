"""vLLM with PTE against the oracle: greedy tokens, log-probs and cache facts, in every way vLLM may run a request.

float32, random models with random adapters. vLLM runs in processes of its own (vllm_run.py).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import ARCHITECTURES, random_tokens, randomize_adapter
from vllm_run import Run, carry_out, prompts, write_model

from verl_pte import replay_log_probs
from verl_pte.core.reference import Oracle

NUM_TOKENS = 400
TOLERANCE = 1e-4


class Model:
    """A random model on disk, and what the oracle makes of it."""

    def __init__(self, folder: Path, arch: str, window: int | None, **knobs) -> None:
        self.model, self.base, self.adapter = write_model(folder, arch, window, **knobs)
        self.schedule = self.model.peft_config["default"].schedule()
        self._answers: dict[tuple, tuple] = {}

    def run(self, asked: list[list[int]], num_tokens: int = NUM_TOKENS, **more) -> Run:
        """A run of these prompts on this model."""
        return Run(self.base, self.adapter, asked, [num_tokens] * len(asked), **more)

    def oracle(self, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor, int, int]:
        """Greedy tokens, their log-probs, evictions, peak cache tokens; remembered."""
        key = (*prompt, num_tokens)
        if key not in self._answers:
            oracle = Oracle(self.model)
            answer = oracle.greedy(prompt, num_tokens)
            self._answers[key] = (*answer, oracle.num_evictions, oracle.peak_cache_tokens)
        return self._answers[key]

    def check(self, run: Run, found: dict, skip: tuple[int, ...] = ()) -> None:
        """Every request of a run against the oracle."""
        for i, (prompt, request) in enumerate(zip(run.prompts, found["requests"], strict=True)):
            if i in skip:
                continue
            tokens, log_probs, evictions, peak = self.oracle(prompt, run.max_tokens[i])
            assert request["token_ids"] == tokens, f"request {i}"
            assert (torch.tensor(request["log_probs"]) - log_probs).abs().max() <= TOLERANCE
            assert (request["num_evictions"], request["peak_cache_tokens"]) == (evictions, peak)
            limit = self.schedule.cache_limit(len(prompt))
            assert limit is None or request["peak_cache_blocks"] <= self.schedule.blocks(limit)
        if "free_blocks" in found:
            assert found["free_blocks"] == found["num_blocks"] - 1, "blocks were lost"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`Model`s by architecture, window and options, made once."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Model] = {}

    def model(arch: str, window: int | None = 32, **knobs) -> Model:
        name = f"{arch} {window} {knobs}"
        if name not in made:
            made[name] = Model(folder, arch, window, **knobs)
        return made[name]

    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_responses_are_the_oracles(arch, models, tmp_path):
    """Windows of 32, 64 and 128; and a window of 32 again with preemption, asynchronous scheduling, shared prefixes."""
    asked = prompts()
    plain = [(models(arch, window), {}) for window in (32, 64, 128)]
    small_pool = dict(blocks=14)  # six requests want up to 30 blocks
    rough = [
        (models(arch), small_pool),
        (models(arch), dict(async_scheduling=True, max_num_batched_tokens=32)),
        (
            models(arch),
            dict(
                async_scheduling=True,
                prefix_caching=True,
                preempt_at=[NUM_TOKENS * 3 // 8, NUM_TOKENS * 3 // 4],
                reset_at=[NUM_TOKENS // 2],
                **small_pool,
            ),
        ),
    ]
    runs = [model.run(asked, **how) for model, how in plain + rough]
    found = carry_out(runs, tmp_path)
    for (model, _), run, result in zip(plain + rough, runs, found, strict=True):
        model.check(run, result)
    preempted = [sum(request["num_preemptions"] for request in result["requests"]) for result in found]
    assert preempted[:3] == [0, 0, 0] and preempted[3] > 0 and preempted[5] > 3
    assert [result["async"] for result in found] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled(arch, models, tmp_path):
    run = models(arch).run(prompts(), compile=True)
    models(arch).check(run, carry_out([run], tmp_path)[0])


def test_compiled_code_is_not_shared_between_sizes(models, tmp_path):
    """vLLM loads compiled code by a key of its configuration; the states' shape has to be part of it."""
    runs = [models("qwen2").run([[1, 2, 3]], 2, max_num_seqs=size) for size in (3, 3, 6)]
    first, again, other = (found["compile_key"] for found in carry_out(runs, tmp_path))
    assert first == again != other


@pytest.mark.parametrize(
    ("tensor_parallel_size", "kv_heads"), [(1, 2), (2, 2), (2, 1)], ids=["one", "two", "two-sharing-a-kv-head"]
)
def test_in_processes_of_their_own(tensor_parallel_size, kv_heads, models, tmp_path):
    """EngineCore in a subprocess; with two ranks a worker in each, and a kv head, or the same one, in each worker."""
    # The literal update, for a rescaled one is the same where a shared head is added twice.
    model = models("qwen2", kv_heads=kv_heads, update_strength=None)
    # More sequences than run at once, and several windows long.
    run = model.run(prompts()[:10], 150, subprocess=True, tensor_parallel_size=tensor_parallel_size)
    model.check(run, carry_out([run], tmp_path)[0])


def test_responses_that_stop(models, tmp_path):
    """At a token, of which asynchronous scheduling learns a step late: tokens and evictions are those of the answer."""
    model, asked, stop = models("qwen2"), prompts(), 7
    run = model.run(asked, sampling={"temperature": 0.0, "stop_token_ids": [stop]}, async_scheduling=True, blocks=14)
    found = carry_out([run], tmp_path)[0]
    stopped = 0
    for prompt, request in zip(asked, found["requests"], strict=True):
        tokens, *_ = model.oracle(prompt, NUM_TOKENS)
        said = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert request["token_ids"] == said
        assert request["num_evictions"] == model.schedule.num_evictions(len(prompt), len(prompt) + len(said) - 1)
        assert request["peak_cache_tokens"] <= model.schedule.cache_limit(len(prompt))
        stopped += len(said) < NUM_TOKENS
    assert stopped > 4


def test_shared_prompt_prefixes_are_hit(models, tmp_path):
    """Prompt blocks are reused; thought blocks never, though a longer prompt may hold the same tokens.

    Request 1's prompt is request 0's prompt and the beginning of its answer: the next turn of a chat. When request 0
    comes back from preemption, its tokens match blocks of that prompt, whose keys were computed without evictions.
    """
    model, shared = models("qwen2"), random_tokens(48, seed=7)[0]
    answer, *_ = model.oracle(shared, NUM_TOKENS)
    asked = [shared, [*shared, *answer[:120]], *([*shared, *tail] for tail in random_tokens(1, 5, 16, 16, 9, seed=8))]
    sizes = dict(max_num_seqs=3, max_prompt_length=200, max_model_len=640)
    run = model.run(asked, prefix_caching=True, preempt_at=[100, 170, 250], **sizes)
    found = carry_out([run], tmp_path)[0]
    model.check(run, found)
    assert [request["cached"] for request in found["requests"][3:]] == [48, 48, 48, 48]
    assert found["requests"][0]["num_preemptions"] == 3


def test_preempted_requests_wait_without_a_slot(models, tmp_path):
    """Two run, are preempted, and wait while two of higher priority run: states for two are all there is."""
    model, asked = models("qwen2"), prompts()[:4]
    run = model.run(
        asked, 150, max_num_seqs=2, arrive_at=[0, 0, 60, 60], priorities=[5, 5, 0, 0], preempt_at=[60], blocks=40
    )
    found = carry_out([run], tmp_path)[0]
    model.check(run, found)
    assert [request["num_preemptions"] for request in found["requests"]] == [1, 1, 0, 0]


OPTIONS = [
    dict(window=None),
    dict(freeze_state=True),
    dict(update_state=False),
    dict(num_global_tokens=0),
    dict(update_strength=None),
    dict(normalize="frobenius"),
    dict(attention="softmax"),
    dict(evict_fraction=0.6),
    dict(window=128, block_size=32),
    dict(target_modules=["q_proj", "up_proj", "down_proj"]),
]


@pytest.fixture(scope="module")
def with_options(models, tmp_path_factory):
    """(model, run, result) for each of OPTIONS, all run in one process."""
    made = [models("qwen2", **({"window": 32} | knobs)) for knobs in OPTIONS]
    runs = [model.run(prompts()[:6], 150) for model in made]
    return list(zip(made, runs, carry_out(runs, tmp_path_factory.mktemp("options")), strict=True))


@pytest.mark.parametrize("index", range(len(OPTIONS)), ids=[str(knobs) for knobs in OPTIONS])
def test_every_option(index, with_options, models):
    model, run, found = with_options[index]
    model.check(run, found)
    usual, *_ = models("qwen2").oracle(run.prompts[4], 150)
    assert model.oracle(run.prompts[4], 150)[0] != usual, "the option changed nothing"


def test_sampled_responses_replay_to_their_own_log_probs(models, tmp_path):
    model, asked = models("mistral", 64), prompts(seed=3)
    run = model.run(asked, 200, sampling={"temperature": 0.7, "seed": 5}, blocks=20)
    found = carry_out([run], tmp_path)[0]
    responses = [request["token_ids"] for request in found["requests"]]
    replayed = replay_log_probs(model.model, asked, responses, temperature=0.7)
    for request, replay in zip(found["requests"], replayed, strict=True):
        assert (replay - torch.tensor(request["log_probs"])).abs().max() <= TOLERANCE
    assert responses[0] != model.oracle(asked[0], 200)[0], "nothing was sampled"


def test_aborted_and_refused_requests_leave_the_others_alone(models, tmp_path):
    model, asked = models("llama"), [*prompts(), random_tokens(65)[0]]
    run = model.run(asked, 150, abort=[2, 9], blocks=20, async_scheduling=True)  # max_prompt_length is 64
    found = carry_out([run], tmp_path)[0]
    model.check(run, found, skip=(2, 9, 16))
    for aborted in (2, 9):
        tokens, *_ = model.oracle(asked[aborted], 150)
        got = found["requests"][aborted]["token_ids"]
        assert 10 <= len(got) < 150 and got == tokens[: len(got)]
    assert found["requests"][16]["finish_reason"] == "error"


def test_weights_sent_later_are_the_ones_used(models, tmp_path):
    """By the attached model's names, as the trainer sends them; the base's stay where they are."""
    trained = Model(tmp_path, "qwen3", 32)
    randomize_adapter(trained.model, seed=9)
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "pte_encoder" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    sent = {name: p.detach().clone() for name, p in trained.model.named_parameters() if "pte_" in name}
    assert any(".pte_adapter.default.lora_B.weight" in name for name in sent)
    save_file(sent, tmp_path / "sent.safetensors")
    run = trained.run(prompts()[:6], 150, weights=str(tmp_path / "sent.safetensors"), prefix_caching=True)
    trained.check(run, carry_out([run], tmp_path)[0])
    before, *_ = models("qwen3").oracle(run.prompts[0], 150)
    assert trained.oracle(run.prompts[0], 150)[0] != before


def test_weights_of_another_size_are_refused(models, tmp_path):
    """Also where a rank takes a part of the tensor: the part would fit."""
    model = models("qwen3")
    name = next(n for n, _ in model.model.named_parameters() if "q_proj.pte_adapter" in n and "lora_B" in n)
    own = model.model.get_parameter(name)
    save_file({name: torch.zeros(2 * own.shape[0], own.shape[1])}, tmp_path / "sent.safetensors")
    run = model.run([[1, 2, 3]], 2, weights=str(tmp_path / "sent.safetensors"))
    with pytest.raises(AssertionError, match=r"q_proj\.lora_B has shape \(256, 6\), the rollout model's \(128, 6\)"):
        carry_out([run], tmp_path)


def test_a_pool_smaller_than_the_longest_sequence_is_admitted(models, tmp_path):
    """Seven blocks of memory, six of them usable: pinned 64 + window 32; the sequence takes 29.

    Preempted near its end it is admitted again, though its tokens would never fit at once.
    """
    model = models("qwen2")
    block = 2 * 2 * 16 * 2 * 32 * 4  # layers, keys and values, tokens, kv heads, head_dim, bytes
    (prompt,) = random_tokens(64, seed=4)
    run = model.run([prompt, prompt[:9]], kv_cache_bytes=7 * block, preempt_at=[300])
    found = carry_out([run], tmp_path)[0]
    assert found["num_blocks"] == 7
    model.check(run, found)


def test_a_pool_below_the_bound_is_refused(models, tmp_path):
    """By vLLM, which asks the cache spec."""
    run = models("qwen2").run([[1, 2, 3]], blocks=5)
    with pytest.raises(AssertionError, match=r"larger than the available KV cache memory"):
        carry_out([run], tmp_path)
