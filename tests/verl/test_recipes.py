"""Every recipe composes on stock verl, passes the checks a run begins with, and says what it claims; scripts run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import verl.utils.config
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from safetensors.torch import load_file
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl_run import PAPER_MODELS, RECIPES, ROOT

from verl_pte.distill.settings import parse_knobs

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
OF_MODELS = [f"pte_grpo_{model}" for model in PAPER_MODELS]
# Of any model, on FSDP; those on Megatron are in test_megatron_config.py.
GENERAL = [n for n in NAMES if not n.startswith("pte_tiny") and n not in OF_MODELS and not n.endswith("_megatron")]
ROLLOUTS = {"native": "pte", "vllm": "pte_vllm"}
SCRIPTS = sorted((ROOT / "examples").glob("run_*.sh"))
DATA = ("data.train_files=train.parquet", "data.val_files=val.parquet")


def composed(recipe: str, *overrides: str):
    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose(recipe, overrides=["hydra.searchpath=[pkg://verl.trainer.config]", *DATA, *overrides])


def validate(config) -> None:
    """What main_ppo does with its config before anything else; wrapped by our plugin."""
    verl.utils.config.validate_config(
        config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
    )


def test_the_recipes_are_those_the_table_lists():
    table = (RECIPES / "README.md").read_text()
    assert all(f"`{name}`" in table for name in NAMES)
    assert all(f"`{path.stem}`" in table for path in (RECIPES / "pte").rglob("*.yaml"))
    assert {*OF_MODELS, "pte_grpo", "pte_dapo", "pte_ppo", "lora_full", "lora_window", "global_only"} <= set(NAMES)


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("recipe", GENERAL)
def test_every_recipe_takes_every_model_and_engine(recipe, rollout, configs, monkeypatch):
    """The adapter is attached to the model of one real config, on the meta device; the others' recipes are below."""
    monkeypatch.setattr("verl_pte.verl.checks._flash_attn_is_installed", lambda: True)  # pte_ppo wants it
    for model in PAPER_MODELS:
        config = composed(recipe, f"pte/model={model}", f"pte/rollout={rollout}")
        assert config.actor_rollout_ref.rollout.name == ROLLOUTS[rollout]
        assert config.actor_rollout_ref.model.path == composed(f"pte_grpo_{model}").actor_rollout_ref.model.path
    config.actor_rollout_ref.model.path = str(configs[model])
    validate(config)


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("recipe", OF_MODELS)
def test_recipes_of_the_papers_models(recipe, rollout, configs):
    model = recipe.removeprefix("pte_grpo_")
    config = composed(recipe, f"pte/rollout={rollout}")
    assert config.actor_rollout_ref.model.path.lower().endswith(
        {"qwen2.5_3b": "qwen2.5-3b-instruct", "qwen2.5_7b": "qwen2.5-7b-instruct"}.get(model, "r1-distill-llama-8b")
    )
    actor, pte = config.actor_rollout_ref.actor, config.actor_rollout_ref.model.pte
    # What arXiv 2602.16839 states.
    assert (pte.rank, pte.num_global_tokens, pte.evict_fraction, pte.window) == (32, 32, 0.25, 1024)
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n == 512
    assert (actor.optim.lr, actor.optim.clip_grad, actor.grad_clip) == (1e-5, 1.0, 1.0)
    assert config.data.max_response_length == 3072 and config.algorithm.adv_estimator == "grpo"
    assert actor.strategy == "fsdp2" and not actor.use_kl_loss
    config.actor_rollout_ref.model.path = str(configs[model])
    validate(config)


@pytest.mark.parametrize("engine", ["pte/rollout=native", "pte/rollout=vllm"])
@pytest.mark.parametrize(
    ("recipe", "differs"),
    [
        ("lora_full", {"window": None, "freeze_state": True}),
        ("lora_window", {"freeze_state": True}),
        ("global_only", {"update_state": False}),
        ("pte_dapo", {}),
        ("pte_ppo", {}),
    ],
)
def test_a_baseline_differs_from_pte_by_its_switch_alone(recipe, differs, engine):
    pte = OmegaConf.to_container(composed("pte_grpo", engine).actor_rollout_ref.model.pte)
    # With a model's group as well, which must not undo it.
    for more in ([], ["pte/model=qwen2.5_7b"], ["pte/model=tiny_cpu"]):
        found = OmegaConf.to_container(composed(recipe, engine, *more).actor_rollout_ref.model.pte)
        base = OmegaConf.to_container(composed("pte_grpo", engine, *more).actor_rollout_ref.model.pte)
        assert found == base | differs
    assert {key: pte[key] for key in differs} != differs or not differs


def test_runs_of_different_models_and_methods_have_different_checkpoints():
    folders = [
        composed(recipe, f"pte/model={model}").trainer.default_local_dir
        for recipe in ("pte_grpo", "pte_dapo", "pte_ppo", "lora_full", "lora_window", "global_only")
        for model in PAPER_MODELS
    ]
    assert len(set(folders)) == len(folders)


def test_dapo_and_ppo_are_verls_own():
    dapo = composed("pte_dapo")
    assert dapo.algorithm.filter_groups.enable and dapo.reward.reward_manager.name == "dapo"
    assert dapo.reward.reward_kwargs.max_resp_len == dapo.data.max_response_length
    assert dapo.actor_rollout_ref.actor.clip_ratio_high > dapo.actor_rollout_ref.actor.clip_ratio_low
    ppo = composed("pte_ppo", "actor_rollout_ref.model.path=somewhere")
    assert need_critic(ppo) and ppo.critic.model.path == "somewhere"
    assert ppo.critic.model._target_.endswith("HFModelConfig"), "the critic is verl's, with a full cache"
    assert ppo.data.train_batch_size * ppo.actor_rollout_ref.rollout.n == 512
    assert not need_critic(composed("pte_grpo"))


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_main_ppo_itself_composes_every_recipe(rollout, tmp_path):
    """``python -m verl.trainer.main_ppo --cfg job``, one after the other in one process."""
    engine = [f"pte/rollout={rollout}"]
    code = (
        "import sys\nfrom hydra.core.global_hydra import GlobalHydra\nfrom verl.trainer.main_ppo import main\n"
        "for name in sys.argv[1].split(','):\n"
        f"    sys.argv = ['main_ppo', '--config-dir', {str(RECIPES)!r}, '--config-name', name, '--cfg', 'job']\n"
        f"    sys.argv += {[*engine, *DATA]}\n"
        "    print('recipe', name, flush=True)\n    main()\n    GlobalHydra.instance().clear()\n"
    )
    run = subprocess.run([sys.executable, "-c", code, ",".join(NAMES)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    printed = dict(part.split("\n", 1) for part in run.stdout.split("recipe ")[1:])
    assert list(printed) == NAMES
    for name in NAMES:
        assert OmegaConf.create(printed[name]) == composed(name, *engine)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "lora_window",
            ["actor_rollout_ref.model.pte.window=1000"],
            r"window=1000: must be a multiple of block_size=16",
        ),
        ("global_only", ["+actor_rollout_ref.model.pte.windw=16"], r"model\.pte\.windw=16: no such setting"),
        ("pte_dapo", ["data.max_response_length=40000"], r"exceeds the model's max_position_embeddings=32768"),
        (
            "pte_grpo_qwen2.5_3b",
            ["pte/rollout=vllm", "actor_rollout_ref.model.pte.block_size=8"],
            r"block_size=8: must be a multiple of 16 with rollout\.name=pte_vllm",
        ),
        (
            "lora_full",
            ["actor_rollout_ref.rollout.tensor_model_parallel_size=2"],
            r"tensor_model_parallel_size=2: must be 1, the native engine is data parallel",
        ),
    ],
)
def test_wrong_overrides_fail_with_our_message(recipe, overrides, message, configs):
    with pytest.raises(ValueError, match=message):
        validate(composed(recipe, f"actor_rollout_ref.model.path={configs['qwen2.5_3b']}", *overrides))


def test_a_model_without_a_recipe_is_an_error_that_lists_those_there_are():
    with pytest.raises(HydraException, match=r"(?s)pte/model/qwen9.*qwen2\.5_3b"):
        composed("pte_grpo", "pte/model=qwen9")


# -- scripts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "examples/quickstart/run.sh"], ids=lambda path: path.name)
def test_scripts_are_clean(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    run = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ") and "set -xeuo pipefail" in lines
    assert os.access(script, os.X_OK) or script.parent.name == "quickstart"


@pytest.fixture
def told(tmp_path) -> Callable[..., list[list[str]]]:
    """Runs a script with a Python that only says what it was asked for, and makes the files it was asked to make."""
    log, python = tmp_path / "asked", tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
printf '%s\\0' "$@" >> {log}; printf '\\n' >> {log}
[[ $3 != prepare-data ]] || {{ mkdir -p "${{*: -1}}"; touch "${{*: -1}}/$4.parquet"; }}
"""
    )
    python.chmod(0o755)

    def run(name: str, *more: str, fails: str = "", **variables: str) -> list[list[str]]:
        log.unlink(missing_ok=True)
        env = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(python),
            "OUT": str(tmp_path / "out"),
            "DATA_DIR": str(tmp_path / "d"),
        }
        command = ["bash", str(ROOT / "examples" / f"{name}.sh"), *more]
        done = subprocess.run(command, env=env | variables, capture_output=True, text=True)
        assert done.returncode == (2 if fails else 0), done.stderr
        assert fails in done.stderr
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.rstrip("\0").split("\0") for line in lines]

    return run


def test_scripts_prepare_what_is_missing(told, tmp_path):
    train, val, run = told("run_r1_distill_llama_8b")
    folder = str(tmp_path / "d")
    assert train == [
        "-m",
        "verl_pte.cli",
        "prepare-data",
        "dapo-math-17k",
        "--family",
        "r1-distill",
        "--output",
        folder,
    ]
    assert val == ["-m", "verl_pte.cli", "prepare-data", "math-500", "--family", "r1-distill", "--output", folder]
    assert (
        f"data.train_files={folder}/dapo-math-17k.parquet" in run and f"data.val_files={folder}/math-500.parquet" in run
    )
    assert len(told("run_r1_distill_llama_8b")) == 1, "now they are there"
    (tmp_path / "mine.parquet").touch()
    (tmp_path / "d" / "math-500.parquet").unlink()
    val, run = told("run_r1_distill_llama_8b", TRAIN_FILE=str(tmp_path / "mine.parquet"))
    assert val[3] == "math-500" and f"data.train_files={tmp_path}/mine.parquet" in run
    assert told("run_qwen2.5_3b", VAL_FILE="nowhere.parquet", fails="nowhere.parquet: no such file") == []


def test_scripts_leave_to_the_recipe_what_is_not_set(told, tmp_path):
    (*_, run) = told("run_pte", MODEL="qwen2.5_7b", RECIPE="pte_ppo", ROLLOUT="vllm")
    overrides = [argument for argument in run if "=" in argument and not argument.startswith("hydra.")]
    ours, recipe = composed("pte_ppo", *overrides), composed("pte_ppo", "pte/model=qwen2.5_7b", "pte/rollout=vllm")
    assert ours.actor_rollout_ref.model.path == "Qwen/Qwen2.5-7B-Instruct"
    for config in (ours, recipe):
        config.data.train_files = config.data.val_files = config.trainer.default_local_dir = ""
    assert ours == recipe
    (*_, run) = told("run_pte", "trainer.nnodes=2", MODEL="qwen2.5_7b", N="4", LR="1e-6", OUT=str(tmp_path / "b"))
    assert {"actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.optim.lr=1e-6"} <= set(run)
    assert run[-1] == "trainer.nnodes=2"
    (*_, run) = told("run_pte", MODEL="qwen2.5_7b", ENGINE="megatron", OUT=str(tmp_path / "c"))
    config = composed("pte_grpo", *(argument for argument in run if "=" in argument and "hydra." not in argument))
    assert config.actor_rollout_ref.actor.strategy == "megatron"
    assert told("run_pte", MODEL="qwen2.5_7b", ENGINE="fsdp", fails="must be fsdp2 or megatron") == []
    for model in ("any", "tiny_cpu"):
        assert told("run_pte", MODEL=model, fails=f"MODEL_PATH is not set, and MODEL={model} names none") == []


def test_scripts_do_not_mix_runs(told, tmp_path):
    told("run_qwen2.5_3b", WINDOW="4096")
    told("run_qwen2.5_3b")  # the first left nothing to go on from
    (tmp_path / "out" / "checkpoints").mkdir()
    (tmp_path / "out" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("50")
    told("run_qwen2.5_3b")
    (tmp_path / "mine.parquet").touch()
    others = {
        "WINDOW": "2048",
        "TRAIN_FILE": str(tmp_path / "mine.parquet"),
        "FAMILY": "llama3",
        "MINI_BATCH_SIZE": "8",
        "DATA_DIR": str(tmp_path),
    }
    for name, value in others.items():
        assert told("run_qwen2.5_3b", fails="holds a run with other settings", **{name: value}) == []
    assert told("run_qwen2.5_3b_1gpu", fails="NUM_GPUS=8") == []


@pytest.mark.parametrize(
    ("recipe", "variables", "size"),
    [
        ("pte_grpo", {}, 16),
        ("pte_dapo", {}, 4),
        ("pte_ppo", {"TRAIN_BATCH_SIZE": "64"}, 16),
        ("pte_dapo", {"MINI_BATCH_SIZE": "8"}, 8),
    ],
)
def test_a_smaller_step_of_the_scripts_keeps_the_recipes_updates(told, recipe, variables, size):
    (*_, run) = told("run_qwen2.5_3b_1gpu", RECIPE=recipe, **variables)
    assert f"actor_rollout_ref.actor.ppo_mini_batch_size={size}" in run
    ours = composed(recipe)
    updates = ours.data.train_batch_size // ours.actor_rollout_ref.actor.ppo_mini_batch_size
    if "MINI_BATCH_SIZE" not in variables:
        assert int(variables.get("TRAIN_BATCH_SIZE", 16)) // size == updates


def test_a_step_that_cannot_be_cut_into_updates_is_refused(told):
    assert (
        told("run_pte", MODEL="qwen2.5_3b", RECIPE="pte_dapo", TRAIN_BATCH_SIZE="6", fails="must be a multiple of 4")
        == []
    )


@pytest.mark.parametrize(
    ("recipe", "switch"),
    [("pte_grpo", []), ("lora_window", ["freeze_state=true"]), ("global_only", ["update_state=false"])],
)
def test_a_warm_start_is_of_the_method_that_goes_on(told, tmp_path, recipe, switch):
    *_, warm, run = told("run_qwen2.5_7b", RECIPE=recipe, WARM_START="1", WINDOW="512")
    assert warm[:2] == ["-m", "torch.distributed.run"] and warm[warm.index("--nproc-per-node") + 1] == "8"
    given = [warm[i + 1] for i, argument in enumerate(warm) if argument == "--pte"]
    assert given == ["window=512", *switch]
    pte = composed(recipe).actor_rollout_ref.model.pte
    distilled = parse_knobs(given)
    for name in ("rank", "alpha", "num_global_tokens", "update_strength", "update_state", "freeze_state", "normalize"):
        assert getattr(distilled, name) == pte[name], name
    assert f"actor_rollout_ref.model.lora_adapter_path={tmp_path}/out/warm/adapter" in run
    told("run_qwen2.5_7b", RECIPE="lora_full", WARM_START="1", fails="WARM_START=1: lora_full has a full cache")


def run_script(folder: Path, name: str, *more: str, **variables: str) -> list[dict]:
    """One training step of a script on a CPU, with the tiny model; its metrics."""
    out = folder / name
    log = out / "metrics.jsonl"
    sizes = {"MAX_PROMPT_LENGTH": "64", "MAX_RESPONSE_LENGTH": "40", "TRAIN_BATCH_SIZE": "4", "N": "4", "WINDOW": "16"}
    files = {"TRAIN_FILE": str(folder / "train.parquet"), "VAL_FILE": str(folder / "val.parquet"), "OUT": str(out)}
    tiny = {"MODEL": "tiny_cpu", "MODEL_PATH": str(folder / "model"), "NUM_GPUS": "1", "TOTAL_STEPS": "1"}
    env = os.environ | sizes | files | tiny | variables
    env |= {"PYTHON": sys.executable, "VERL_FILE_LOGGER_PATH": str(log), "VERL_PLATFORM": "cpu"}
    script = ROOT / "examples" / f"{name}.sh"
    own = [f"reward.custom_reward_function.path={folder}/reward.py", "trainer.logger=[console,file]"]
    run = subprocess.run(
        ["bash", script, *own, *more], cwd=folder, env=env, capture_output=True, text=True, timeout=800
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    found = [json.loads(line)["data"] for line in log.read_text().splitlines()]
    return [metrics for metrics in found if "training/global_step" in metrics]


def check_step(steps: list[dict], window: bool = True) -> None:
    assert [metrics["training/global_step"] for metrics in steps] == [1]
    assert steps[0]["pte/mismatch_max"] <= 1e-5 and steps[0]["actor/grad_norm"] > 0
    assert (steps[0].get("pte/evictions_per_seq", 0) > 0) == window


def test_3b_script_trains(folder):
    check_step(run_script(folder, "run_qwen2.5_3b"))


def test_7b_script_trains_with_dapo(folder):
    overlong = "reward.reward_kwargs.overlong_buffer_cfg.len=16"
    # The tiny model's group names a sampler of ours, to which verl gives no filter.
    steps = run_script(
        folder, "run_qwen2.5_7b", overlong, "trainer.v1.sampler.custom_sampler.path=null", RECIPE="pte_dapo"
    )
    check_step(steps)
    # Answers of a model that never ends them are all cut off, and pay the whole penalty.
    assert steps[0]["critic/rewards/mean"] < 0


def test_8b_script_trains_a_baseline(folder):
    check_step(run_script(folder, "run_r1_distill_llama_8b", RECIPE="lora_full"), window=False)


def test_single_gpu_script_starts_from_a_warm_start(folder):
    pte = "--pte rank=8 --pte alpha=16 --pte num_global_tokens=8 --pte block_size=8 --pte chunk_tokens=64"
    warm = {"WARM_START_STEPS": "2", "WARM_START_ARGS": f"{pte} --warmup-steps 1 --batch-size 4 --dtype float32"}
    steps = run_script(folder, "run_qwen2.5_3b_1gpu", WARM_START="1", **warm)
    check_step(steps)
    adapter = folder / "run_qwen2.5_3b_1gpu" / "warm" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    # One step of Adam from there; a new adapter's lora_B is zero.
    warm_up = load_file(adapter / "adapter_model.safetensors")
    norm = sum(t.double().square().sum() for t in warm_up.values()).sqrt()
    assert sum(t.abs().sum() for name, t in warm_up.items() if "lora_B" in name) > 0
    assert steps[0]["pte/adapter_norm"] == pytest.approx(float(norm), rel=1e-2)
