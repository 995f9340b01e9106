"""Rollout ``pte_vllm`` under stock ``main_ppo`` on vLLM's CPU build: trains, resumes, and ends when vLLM dies."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

import psutil
import pytest
import verl.utils.config
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl_run import RECIPES, command, make_adapter, make_data, make_model, metrics, overrides, train

RECIPE = "pte_tiny_cpu_vllm"
ROLLOUT = "actor_rollout_ref.rollout"
WINDOW = 32
RUN = ("trainer.save_freq=2", "data.max_response_length=96")


@pytest.fixture(scope="module")
def vllm_folder(tmp_path_factory):
    """As `folder`, with heads of 32 dimensions, the fewest vLLM's CPU attention has."""
    path = tmp_path_factory.mktemp("vllm")
    make_model(path / "model", hidden_size=128)
    make_data(path)
    return path


@pytest.fixture(scope="module")
def whole(vllm_folder):
    """Metrics of three steps, with a checkpoint after the second."""
    return train(vllm_folder, "whole", *RUN, "trainer.total_training_steps=3", recipe=RECIPE)


def steps_of(logged: list[dict]) -> list[dict]:
    return [entry for entry in logged if "training/global_step" in entry]


def test_trains(whole):
    steps = steps_of(whole)
    assert [entry["training/global_step"] for entry in steps] == [1, 2, 3]
    for entry in steps:
        assert 0 <= entry["pte/mismatch_mean"] <= entry["pte/mismatch_max"] <= 1e-4
        assert entry["pte/evictions_per_seq"] > 1
        assert WINDOW < entry["pte/peak_cache_tokens"] <= entry["pte/cache_limit"]
        assert entry["actor/grad_norm"] > 0
    assert len({entry["pte/adapter_norm"] for entry in steps}) == 3


def test_resumes(whole, vllm_folder):
    (vllm_folder / "resumed").mkdir()
    shutil.copytree(vllm_folder / "whole" / "global_step_2", vllm_folder / "resumed" / "global_step_2")
    (vllm_folder / "resumed" / "latest_checkpointed_iteration.txt").write_text("2")
    more = ("trainer.total_training_steps=4", "trainer.save_freq=4")
    steps = steps_of(train(vllm_folder, "resumed", *RUN, *more, recipe=RECIPE))
    assert [entry["training/global_step"] for entry in steps] == [3, 4]
    # The rollout runs the checkpoint's adapter, not a new one: it agrees with the learner, and samples what the
    # uninterrupted run sampled.
    assert steps[0]["pte/mismatch_max"] <= 1e-4
    assert steps[0]["critic/score/mean"] == pytest.approx(steps_of(whole)[2]["critic/score/mean"], abs=1e-6)
    two, four = (
        load_file(vllm_folder / run / f"global_step_{step}" / "actor" / "pte_adapter" / "adapter_model.safetensors")
        for run, step in (("whole", 2), ("resumed", 4))
    )
    assert max(float((four[name] - two[name]).abs().max()) for name in four) > 1e-4


def vllm_processes(parent: int) -> list[psutil.Process]:
    """vLLM's engine processes of this run."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline", "environ"])
        if "EngineCore" in f"{process.info['name']} {' '.join(process.info['cmdline'] or ())}"
        and (process.info["environ"] or {}).get("PTE_TEST_RUN") == str(parent)
    ]


@dataclass
class Killed:
    """A run that starts from a saved adapter, and whose vLLM is killed after a step.

    Attributes:
        step: metrics of that step.
        said: what the run printed.
    """

    step: dict
    said: str


@pytest.fixture(scope="module")
def killed(vllm_folder) -> Killed:
    """The learning rate is zero, so that the step's rollouts and scores are the saved adapter's throughout."""
    path = make_adapter(vllm_folder, vllm_folder / "warm", window=WINDOW, block_size=16)
    more = ("trainer.total_training_steps=50", "actor_rollout_ref.actor.optim.lr=0")
    more += (f"actor_rollout_ref.model.lora_adapter_path={path}", "actor_rollout_ref.actor.use_kl_loss=true")
    arguments, env = command(vllm_folder, "killed", *RUN, *more, recipe=RECIPE)
    env["PTE_TEST_RUN"] = str(os.getpid())  # inherited by everything the run starts
    log = vllm_folder / "killed.log"
    with log.open("w") as output:
        run = subprocess.Popen(
            arguments, cwd=vllm_folder, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while not steps_of(metrics(vllm_folder, "killed")):
            assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.5)
        engines = vllm_processes(os.getpid())
        assert engines, "no vLLM engine is running"
        for engine in engines:
            engine.kill()
        assert run.wait(timeout=180) != 0
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    return Killed(steps_of(metrics(vllm_folder, "killed"))[0], log.read_text())


def test_starts_from_a_saved_adapter(killed):
    assert killed.step["pte/mismatch_max"] <= 1e-4
    assert killed.step["actor/kl_loss"] > 1e-2, "the adapter does something, and the reference is still the base"


def test_a_dead_vllm_ends_the_run(killed):
    """Killed while it generates; the run says why it ends, and does not hang."""
    died = ("vLLM's engine died", "EngineDeadError", "EngineCore encountered")
    assert any(words in killed.said for words in died), killed.said[-6000:]
    assert not vllm_processes(os.getpid())


# -- configuration
# ----------------------------------------------------------------------------------------------


def validate(folder, *more: str, recipe: str = RECIPE) -> None:
    """What main_ppo does with a composed config before anything else."""
    with initialize_config_dir(str(RECIPES), version_base=None):
        searchpath = "hydra.searchpath=[pkg://verl.trainer.config]"
        config = compose(recipe, overrides=[searchpath, *overrides(folder, RECIPE), *more])
    verl.utils.config.validate_config(
        config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
    )


def test_the_recipe_itself_is_accepted(vllm_folder):
    validate(vllm_folder)
    validate(vllm_folder, "actor_rollout_ref.rollout.tensor_model_parallel_size=2")


def test_the_base_recipe_runs_on_vllm_by_its_name(vllm_folder):
    """With verl's and the recipe's defaults for everything else, and the trainer on GPUs."""
    more = ("data.max_prompt_length=64", f"{ROLLOUT}.name=pte_vllm", f"{ROLLOUT}.tensor_model_parallel_size=2")
    validate(vllm_folder, *more, recipe="pte_grpo")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("actor_rollout_ref.model.pte.block_size=8", r"model\.pte\.block_size=8: must be a multiple of 16 with"),
        (f"{ROLLOUT}.data_parallel_size=2", r"rollout\.data_parallel_size=2: must be 1"),
        (f"{ROLLOUT}.pipeline_model_parallel_size=2", r"pipeline_model_parallel_size=2: must be 1"),
        (f"{ROLLOUT}.checkpoint_engine.backend=nccl", r"checkpoint_engine\.backend='nccl': must be 'naive'"),
        (f"{ROLLOUT}.logprobs_mode=raw_logprobs", r"logprobs_mode='raw_logprobs': must be 'processed_logprobs'"),
        (f"{ROLLOUT}.enable_chunked_prefill=false", r"enable_chunked_prefill=False: must be True"),
        (f"{ROLLOUT}.quantization=fp8", r"quantization='fp8': must be None"),
        (f"{ROLLOUT}.full_determinism=true", r"full_determinism=True: must be False"),
        (f"{ROLLOUT}.load_format=dummy", r"load_format='dummy': must be 'auto', vLLM on a CPU repacks"),
        (f"{ROLLOUT}.load_format=safetensors", r"load_format=safetensors: must be auto .*or dummy"),
        (f"{ROLLOUT}.enable_sleep_mode=true", r"enable_sleep_mode=True: must be False, vLLM cannot put"),
        (f"+{ROLLOUT}.engine_kwargs.vllm.block_size=32", r"engine_kwargs\.vllm\.block_size=32: must not be set"),
        (f"+{ROLLOUT}.engine_kwargs.vllm.scheduler_cls=mine", r"scheduler_cls='mine': must not be set, it is PTE's"),
        (f"+{ROLLOUT}.engine_kwargs.pte.compile=true", r"engine_kwargs\.pte=.*must be empty, .*engine_kwargs\.vllm"),
        (f"{ROLLOUT}.max_num_seqs=0", r"rollout\.max_num_seqs=0: must be an integer"),
    ],
    ids=lambda value: value.split("=")[0].rsplit(".", 1)[-1],
)
def test_refused(vllm_folder, setting, message):
    with pytest.raises(ValueError, match=message):
        validate(vllm_folder, setting)


def test_another_vllm_is_refused(vllm_folder, monkeypatch):
    monkeypatch.setattr("verl_pte.vllm.version.installed_version", lambda: "0.30.0")
    with pytest.raises(RuntimeError, match=r"found vllm 0\.30\.0"):
        validate(vllm_folder)
