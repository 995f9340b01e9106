"""A run on Megatron: its recipes compose on stock verl, and what cannot work is refused before anything starts."""

import shutil
from importlib import metadata
from types import SimpleNamespace

import pytest
import verl.utils.config
from huggingface_hub.errors import LocalEntryNotFoundError
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass
from verl_run import PAPER_MODELS, RECIPES

from verl_pte import PTEConfig
from verl_pte.megatron.base import Weights
from verl_pte.megatron.config import MERGED, check_model, check_targets
from verl_pte.verl import components, megatron_checks

MEGATRON = ("model_engine=megatron", "pte/engine=megatron")
RECIPES_ON_MEGATRON = sorted(path.stem for path in RECIPES.glob("*_megatron.yaml"))


def composed(recipe: str, folder, *overrides: str):
    given = [
        "hydra.searchpath=[pkg://verl.trainer.config]",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/val.parquet",
        f"actor_rollout_ref.model.path={folder}/model",
        "data.max_prompt_length=64",
        "data.max_response_length=96",
    ]
    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose(recipe, overrides=[*given, *overrides])


def validate(config) -> None:
    """What main_ppo does with its config before anything else; wrapped by our plugin."""
    verl.utils.config.validate_config(
        config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
    )


@pytest.mark.parametrize("recipe", RECIPES_ON_MEGATRON)
def test_a_recipe_differs_from_its_fsdp_one_by_the_engine_alone(recipe, folder):
    config, base = composed(recipe, folder), composed(recipe.removesuffix("_megatron"), folder)
    validate(config)
    actor = config.actor_rollout_ref.actor
    assert actor.strategy == config.actor_rollout_ref.ref.strategy == "megatron" and "fsdp_config" not in actor
    assert config.actor_rollout_ref.model.pte == base.actor_rollout_ref.model.pte
    for key in ("name", "n", "max_num_seqs", "load_format", "tensor_model_parallel_size", "calculate_log_probs"):
        assert config.actor_rollout_ref.rollout[key] == base.actor_rollout_ref.rollout[key], key
    assert config.data == base.data and config.reward == base.reward
    for key in ("lr", "weight_decay", "clip_grad"):
        assert actor.optim[key] == base.actor_rollout_ref.actor.optim[key], key
    shared = ("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "use_kl_loss", "entropy_coeff")
    assert {key: actor[key] for key in shared} == {key: base.actor_rollout_ref.actor[key] for key in shared}
    # What verl's worker makes of it.
    engine = omega_conf_to_dataclass(actor).megatron
    assert engine.tensor_model_parallel_size == 2 and not engine.use_distributed_optimizer


@pytest.mark.parametrize("model", PAPER_MODELS)
@pytest.mark.parametrize("rollout", ["native", "vllm"])
def test_the_papers_models_can_be_spread_as_their_recipes_say(model, rollout, configs, folder):
    recipe = f"pte_grpo_{model}_megatron"
    assert recipe in RECIPES_ON_MEGATRON
    config = composed(recipe, folder, f"pte/rollout={rollout}", "data.max_response_length=3072")
    config.actor_rollout_ref.model.path = str(configs[model])
    validate(config)
    by_groups = composed("pte_grpo", folder, *MEGATRON, f"pte/model={model}", f"pte/rollout={rollout}")
    assert by_groups.actor_rollout_ref.actor == composed(recipe, folder).actor_rollout_ref.actor


@pytest.mark.parametrize("recipe", ["pte_dapo", "lora_full", "lora_window", "global_only"])
@pytest.mark.parametrize("rollout", ["native", "vllm"])
def test_other_recipes_take_the_engine(recipe, rollout, folder):
    config = composed(recipe, folder, *MEGATRON, f"pte/rollout={rollout}")
    validate(config)
    assert config.actor_rollout_ref.model.pte == composed(recipe, folder).actor_rollout_ref.model.pte


ENGINE = "actor_rollout_ref.actor.megatron"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.device=cpu"], r"strategy=megatron: needs GPUs; with trainer\.device=cpu use fsdp2"),
        ([f"{ENGINE}.context_parallel_size=2"], r"megatron\.context_parallel_size=2: must be 1, .*segments"),
        ([f"{ENGINE}.expert_model_parallel_size=2"], r"megatron\.expert_model_parallel_size=2: must be 1"),
        ([f"{ENGINE}.virtual_pipeline_model_parallel_size=2"], r"virtual_pipeline_model_parallel_size=2: must be null"),
        ([f"{ENGINE}.dynamic_context_parallel=true"], r"dynamic_context_parallel=True: must be False"),
        ([f"{ENGINE}.use_megatron_fsdp=true"], r"megatron\.use_megatron_fsdp=True: must be False, .*Hugging Face"),
        ([f"{ENGINE}.vanilla_mbridge=true"], r"megatron\.vanilla_mbridge=True: must be False"),
        ([f"{ENGINE}.use_dist_checkpointing=true"], r"megatron\.use_dist_checkpointing=True: must be False"),
        ([f"{ENGINE}.use_mbridge=false"], r"megatron\.use_mbridge=False: must be True"),
        ([f"{ENGINE}.use_distributed_optimizer=true"], r"use_distributed_optimizer=True: must be False, .*small"),
        ([f"{ENGINE}.router_replay.mode=R2"], r"megatron\.router_replay\.mode='R2': must be 'disabled'"),
        ([f"{ENGINE}.qat.enable=true"], r"megatron\.qat\.enable=True: must be False"),
        (
            [f"+{ENGINE}.override_ddp_config.use_distributed_optimizer=true"],
            r"ddp_config.use_distributed_optimizer=True",
        ),
        ([f"{ENGINE}.override_transformer_config.recompute_granularity=full"], r"granularity='full': must be left out"),
        ([f"+{ENGINE}.override_transformer_config.hidden_dropout=0.1"], r"hidden_dropout=0\.1: must be left out"),
        ([f"{ENGINE}.optimizer_offload=true"], r"optimizer_offload=True: must be False, .*stays on the device"),
        ([f"{ENGINE}.dtype=float16"], r"megatron\.dtype='float16': must be 'bfloat16'"),
        (["actor_rollout_ref.actor.optim.optimizer=muon"], r"actor\.optim\.optimizer='muon': must be 'adam'"),
        ([f"{ENGINE}.pipeline_model_parallel_size=3"], r"2 x pipeline_model_parallel_size=3 must divide the 8 GPUs"),
        (
            [f"{ENGINE}.tensor_model_parallel_size=4"],
            r"tensor_model_parallel_size=4: must divide the model's num_key_value_heads=2",
        ),
        (
            [f"{ENGINE}.pipeline_model_parallel_size=4"],
            r"pipeline_model_parallel_size=4: must divide the model's num_hidden_layers=2",
        ),
        (
            ["+actor_rollout_ref.model.override_config.attn_implementation=eager"],
            r"attn_implementation=eager: must be sdpa with actor\.strategy=megatron",
        ),
        (["algorithm.adv_estimator=gae"], r"algorithm\.adv_estimator=gae: must not need a critic .*megatron-bridge"),
        (
            ["actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]"],
            r"save_contents=\['model', 'hf_model'\]: must not contain hf_model",
        ),
    ],
)
def test_refused(folder, settings, message):
    config = composed("pte_grpo_megatron", folder, *settings)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_the_strategy_alone_is_not_enough(folder):
    with pytest.raises(
        ValueError, match=r"strategy=megatron: the actor block is not Megatron's; .*model_engine=megatron"
    ):
        validate(composed("pte_grpo", folder, "actor_rollout_ref.actor.strategy=megatron"))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"megatron-core is not installed; pip install 'megatron-core==0\.16\.1'"),
        ("0.17.0", r"found 0\.17\.0; pip"),
    ],
)
def test_another_megatron_core_is_named_and_leaves_fsdp_alone(folder, monkeypatch, version, message):
    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(
        megatron_checks,
        "metadata",
        SimpleNamespace(version=found, **{"PackageNotFoundError": metadata.PackageNotFoundError}),
    )
    with pytest.raises(RuntimeError, match=message):
        validate(composed("pte_grpo_megatron", folder))
    validate(composed("pte_grpo", folder))
    monkeypatch.setattr(components, "_registered", False)
    components.register()


# -- the model
# ----------------------------------------------------------------------------------------------------------------


def hf(**settings):
    from transformers import LlamaConfig

    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaConfig(**shape | settings)


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        ({"attention_bias": True}, (1, 1), r"attention_bias=True: not supported with Megatron"),
        ({"mlp_bias": True}, (1, 1), r"mlp_bias=True: not supported with Megatron"),
        ({}, (4, 1), r"tensor_model_parallel_size=4: must divide the model's num_key_value_heads=2"),
        ({"intermediate_size": 49}, (2, 1), r"must divide the model's intermediate_size=49"),
        ({}, (1, 3), r"pipeline_model_parallel_size=3: must divide the model's num_hidden_layers=4"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            (1, 1),
            r"rope_type='yarn': not supported with Megatron",
        ),
    ],
)
def test_models_that_cannot_be_spread(settings, layout, message):
    with pytest.raises(ValueError, match=message):
        check_model(hf(**settings), tensor=layout[0], pipeline=layout[1])


def test_modules_to_adapt():
    every = {name for names in MERGED.values() for name in names}
    assert check_targets(PTEConfig()) == every and len(every) == 7
    assert check_targets(PTEConfig(target_modules=["q_proj", "model.layers.0.mlp.up_proj"])) == {"q_proj", "up_proj"}
    with pytest.raises(ValueError, match=r"target_modules=\['w_pack'\]: no such linear"):
        check_targets(PTEConfig(target_modules=["w_pack"]))


def test_weights_of_a_model_on_the_hub_are_those_of_its_snapshot(folder, tmp_path, monkeypatch):
    """As the hub's own client leaves them in its cache; without it, the folder is named that is not there."""
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0123")
    shutil.copy(folder / "model" / "model.safetensors", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ours, file = Weights("some/model"), load_file(folder / "model" / "model.safetensors")
    assert ours.keys() == file.keys() and all(ours[name][:].equal(file[name]) for name in file)
    with pytest.raises(LocalEntryNotFoundError):
        Weights("some/other")


def test_a_model_without_safetensors_is_refused_before_anything_starts(folder, tmp_path):
    shutil.copy(folder / "model" / "config.json", tmp_path)
    config = composed("pte_grpo_megatron", folder, f"actor_rollout_ref.model.path={tmp_path}")
    with pytest.raises(ValueError, match=r"model=.*: holds neither model\.safetensors nor model\.safetensors\.index"):
        validate(config)
