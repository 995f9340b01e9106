"""Every configuration that cannot work is refused by the driver, before Ray starts, naming the key, its value and
what is right.
"""

import warnings

import pytest
import verl.utils.config
import yaml
from hydra import compose, initialize_config_dir
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl_run import PTE, RECIPES, make_adapter, make_model, overrides

from verl_pte import PTEConfig


def validate(folder, *more: str, recipe: str = "pte_tiny_cpu") -> None:
    """What main_ppo does with a composed config before anything else."""
    with initialize_config_dir(str(RECIPES), version_base=None):
        # main_ppo's own config folder comes from its package.
        config = compose(recipe, overrides=["hydra.searchpath=[pkg://verl.trainer.config]", *overrides(folder), *more])
    verl.utils.config.validate_config(
        config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
    )


def test_the_recipe_itself_is_accepted(folder):
    validate(folder)


def test_the_base_recipe_is_accepted(folder):
    """With verl's defaults for everything it does not name."""
    validate(folder, "data.max_prompt_length=64", recipe="pte_grpo")


def test_the_base_recipe_names_every_setting_with_its_default():
    """What a recipe does not name cannot be overridden on the command line without a plus sign."""
    block = yaml.safe_load((RECIPES / "pte_grpo.yaml").read_text())["actor_rollout_ref"]["model"]["pte"]
    assert block == {name: default for name, default, _ in PTEConfig.knobs()}


MODEL, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"
FSDP = "actor_rollout_ref.actor.fsdp_config"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([f"{MODEL}.pte.window=20"], r"model\.pte: window=20: must be a multiple of block_size=8, e\.g\. 16 or 24"),
        ([f"{MODEL}.pte.evict_fraction=1.0"], r"model\.pte: evict_fraction=1\.0: must lie strictly between 0 and 1"),
        ([f"{MODEL}.pte.evict_fraction=0.0"], r"model\.pte: evict_fraction=0\.0"),
        ([f"+{MODEL}.pte.windw=16"], r"model\.pte\.windw=16: no such setting; known are rank, .*window"),
        (
            ["data.max_response_length=512"],
            r"data\.max_prompt_length=64 \+ data\.max_response_length=512 = 576: exceeds .*max_position_embeddings=256",
        ),
        ([f"{MODEL}.pte.target_modules=[q_proj,w_pack]"], r"target_modules=\['w_pack'\]: no such linear .*'q_proj'"),
        ([f"{MODEL}.use_remove_padding=true"], r"model\.use_remove_padding=True: must be False"),
        (
            ["actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"],
            r"actor\.ulysses_sequence_parallel_size=2: must be 1",
        ),
        (
            ["actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"],
            r"actor\.fsdp_config\.ulysses_sequence_parallel_size=2: must be 1",
        ),
        ([f"{MODEL}.enable_gradient_checkpointing=true"], r"model\.enable_gradient_checkpointing=True: must be False"),
        (
            [f"{MODEL}._target_=verl.workers.config.HFModelConfig", f"~{MODEL}.pte", f"{MODEL}.lora.rank=0"],
            r"rollout\.name=pte: serves PTE models only; set actor_rollout_ref\.model\._target_",
        ),
        (
            [f"{ROLLOUT}.name=vllm"],
            r"rollout\.name=vllm: cannot serve a PTE model.*must be pte \(the native engine\) or pte_vllm$",
        ),
        ([f"{ROLLOUT}.tensor_model_parallel_size=2"], r"rollout\.tensor_model_parallel_size=2: must be 1"),
        (
            [f"+{ROLLOUT}.engine_kwargs.vllm.swap_space=4"],
            r"rollout\.engine_kwargs\.vllm=\{'swap_space': 4\}: must be empty",
        ),
        ([f"{ROLLOUT}.quantization=fp8"], r"rollout\.quantization='fp8': must be None"),
        ([f"+{ROLLOUT}.engine_kwargs.pte.threads=2"], r"engine_kwargs\.pte\.threads=2: no such option"),
        ([f"{MODEL}.lora_rank=8"], r"model\.lora_rank=8: must be 0, PTE is the adapter"),
        ([f"{MODEL}.lora.rank=0"], r"model\.lora\.rank=0: must be 4, the value of model\.pte\.rank"),
        ([f"{MODEL}.lora.merge=true"], r"model\.lora\.merge=True: must be False"),
        (
            [f"+{MODEL}.override_config.attn_implementation=flash_attention_2"],
            r"attn_implementation=flash_attention_2: must be sdpa or eager with trainer\.device=cpu",
        ),
        (
            [
                "trainer.device=cuda",
                f"+{MODEL}.override_config.attn_implementation=flash_attention_2",
                f"{ROLLOUT}.dtype=float32",
            ],
            r"flash_attention_2: flash-attn computes in half precision, but actor_rollout_ref\.rollout\.dtype=float32",
        ),
        (
            [
                "trainer.device=cuda",
                f"+{MODEL}.override_config.attn_implementation=flash_attention_2",
                f"{ROLLOUT}.dtype=bfloat16",
                f"++{FSDP}.mixed_precision.param_dtype=fp32",
            ],
            r"half precision, but actor_rollout_ref\.actor\.fsdp_config\.mixed_precision\.param_dtype=fp32",
        ),
        (
            [
                "trainer.device=cuda",
                f"+{MODEL}.override_config.attn_implementation=flash_attention_2",
                f"{ROLLOUT}.dtype=bfloat16",
                f"++{FSDP}.mixed_precision.param_dtype=bf16",
                f"++{ROLLOUT}.engine_kwargs.pte.compile=true",
            ],
            r"flash_attention_2: torch\.compile cannot follow it, leave out rollout\.engine_kwargs\.pte\.compile",
        ),
        (
            [f"+{MODEL}.override_config.attn_implementation=flash_attention_3"],
            r"attn_implementation='flash_attention_3': must be one of sdpa, eager, flex_attention, flash_attention_2",
        ),
        (["trainer.use_v1=false"], r"trainer\.use_v1=False: must be True, .*one seed"),
        (
            [f"{ROLLOUT}.name=pte_vllm"],
            r"model\.pte\.block_size=8: must be a multiple of 16 with rollout\.name=pte_vllm",
        ),
        (["actor_rollout_ref.actor.strategy=megatron"], r"actor\.strategy=megatron: the actor block is not"),
        (["actor_rollout_ref.actor.strategy=fsdp"], r"actor\.strategy=fsdp: must be fsdp2 with trainer\.device=cpu"),
        ([f"{FSDP}.model_dtype=bf16"], r"fsdp_config\.model_dtype=bf16: must be fp32, .*mixed_precision"),
        ([f"{FSDP}.qat.enable=true"], r"actor\.fsdp_config\.qat\.enable=True: must be False"),
        (["actor_rollout_ref.actor.qat.enable=true"], r"actor\.qat\.enable=True: must be False"),
        ([f"{MODEL}.lora_alpha=32"], r"model\.lora_alpha=32: must be 16, .*set model\.pte\.alpha"),
        (
            [f"{MODEL}.exclude_modules=lm_head"],
            r"model\.exclude_modules='lm_head': must be None, .*pte\.target_modules",
        ),
        ([f"{MODEL}.lora.alpha=64"], r"model\.lora\.alpha=64: must be 32, .*set model\.pte\.alpha"),
        ([f"{MODEL}.lora.dropout=0.1"], r"model\.lora\.dropout=0\.1: must be 0\.0, .*no such setting"),
        (
            [f"{MODEL}.lora.exclude_modules=[a]"],
            r"model\.lora\.exclude_modules=\['a'\]: must be \[\], .*target_modules",
        ),
        ([f"{MODEL}.tiled_mlp.enabled=true"], r"model\.tiled_mlp\.enabled=True: must be False"),
        ([f"{MODEL}.mtp.enable=true"], r"model\.mtp\.enable=True: must be False"),
        ([f"{ROLLOUT}.checkpoint_engine.backend=nccl"], r"checkpoint_engine\.backend='nccl': must be 'naive'"),
        ([f"{ROLLOUT}.load_format=safetensors"], r"rollout\.load_format=safetensors: must be auto .*or dummy"),
        ([f"{ROLLOUT}.full_determinism=true"], r"rollout\.full_determinism=True: must be False"),
        ([f"{ROLLOUT}.gpu_memory_utilization=0.8"], r"gpu_memory_utilization=0\.8: must be 0\.5, .*max_num_seqs"),
        ([f"{ROLLOUT}.max_num_batched_tokens=4096"], r"rollout\.max_num_batched_tokens=4096: must be 8192"),
        ([f"{ROLLOUT}.enable_prefix_caching=false"], r"rollout\.enable_prefix_caching=False: must be True"),
        ([f"{ROLLOUT}.enable_chunked_prefill=false"], r"rollout\.enable_chunked_prefill=False: must be True"),
        ([f"{ROLLOUT}.scheduling_policy=priority"], r"rollout\.scheduling_policy='priority': must be 'fcfs'"),
        ([f"{ROLLOUT}.over_sample_rate=0.1"], r"rollout\.over_sample_rate=0\.1: must be 0\.0"),
        ([f"{ROLLOUT}.cudagraph_capture_sizes=[1,2]"], r"rollout\.cudagraph_capture_sizes=\[1, 2\]: must be None"),
        ([f"{ROLLOUT}.layered_summon=true"], r"rollout\.layered_summon=True: must be False"),
        ([f"+{ROLLOUT}.repetition_penalty=1.2"], r"rollout\.repetition_penalty=1\.2: must be 1\.0"),
        ([f"+{ROLLOUT}.server.timeout=5"], r"rollout\.server=\{'timeout': 5\}: must be None"),
        ([f"{ROLLOUT}.max_num_seqs=0"], r"rollout\.max_num_seqs=0: must be an integer of at least 1"),
        (["data.max_prompt_length=0"], r"data\.max_prompt_length=0: must be an integer of at least 1"),
        (["data.max_response_length=0"], r"data\.max_response_length=0: must be an integer of at least 1"),
        (["trainer.v1.trainer_mode=colocate_async"], r"trainer_mode=colocate_async: must be sync"),
        ([f"{ROLLOUT}.multi_turn.enable=true"], r"rollout\.multi_turn\.enable=True: must be False"),
        (
            ["actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]"],
            r"save_contents=\['model', 'hf_model'\]: must not contain hf_model",
        ),
    ],
    ids=lambda value: value[0].split("=")[0].rsplit(".", 1)[-1] if isinstance(value, list) else "",
)
def test_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        validate(folder, *settings)


def test_unsupported_architecture(folder, tmp_path):
    from transformers import AutoConfig, GPT2Config

    path = make_model(tmp_path / "gpt2")
    GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(path)
    assert AutoConfig.from_pretrained(path).model_type == "gpt2"
    with pytest.raises(ValueError, match=r"model_type='gpt2': PTE supports qwen2, qwen3, llama, mistral"):
        validate(folder, f"{MODEL}.path={path}")


def test_a_run_without_pte_is_left_to_verl(folder):
    """Settings PTE refuses are verl's business where PTE is not mentioned."""
    validate(
        folder,
        f"{MODEL}._target_=verl.workers.config.HFModelConfig",
        f"~{MODEL}.pte",
        f"{MODEL}.lora.rank=0",
        f"{MODEL}.use_remove_padding=true",
        f"{ROLLOUT}.name=vllm",
        "data.max_response_length=4096",
    )


def test_an_adapter_to_start_from(folder, tmp_path):
    """Its settings may differ in what belongs to a run; a model.pte of `all-linear` means the modules it names."""
    path = make_adapter(folder, tmp_path / "adapter", window=32, block_size=16, evict_fraction=0.5, chunk_tokens=8)
    validate(folder, f"{MODEL}.lora_adapter_path={path}")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"rank": 8}, r"was trained with rank=8, the model has rank=4: they must agree"),
        ({"alpha": 4.0}, r"alpha=4\.0, the model has alpha=8\.0"),
        ({"num_global_tokens": 2}, r"num_global_tokens=2, the model has num_global_tokens=4"),
        ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\], the model has target_modules=\['down_proj', "),
        ({"normalize": "frobenius"}, r"normalize='frobenius', the model has normalize='row'"),
        ({"attention": "softmax"}, r"attention='softmax'"),
        ({"update_strength": None}, r"update_strength=None, the model has update_strength=0\.3"),
        ({"update_state": False}, r"update_state=False"),
        ({"freeze_state": True}, r"freeze_state=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_of_other_settings(folder, tmp_path, saved, message):
    path = make_adapter(folder, tmp_path / "adapter", **saved)
    with pytest.raises(ValueError, match=r"lora_adapter_path, under model\.pte: adapter=.*" + message):
        validate(folder, f"{MODEL}.lora_adapter_path={path}")


def test_adapters_that_are_not_there_or_not_of_this_model(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def refused(path, message):
        with pytest.raises(ValueError, match=r"model\.lora_adapter_path.*" + message):
            validate(folder, f"{MODEL}.lora_adapter_path={path}")

    refused(tmp_path / "nowhere", "nowhere: no such directory")
    refused(folder, "has no adapter_config.json")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(base, LoraConfig(r=PTE["rank"], target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    refused(tmp_path / "lora", "holds a LORA adapter, not a PTE one")
    make_model(tmp_path / "wide" / "model", hidden_size=64)
    refused(
        make_adapter(tmp_path / "wide", tmp_path / "adapter"),
        r"was trained on another base model: its '.*lora_B.weight' is \(64, 4\), this model's \(32, 4\)",
    )
    make_model(tmp_path / "deep" / "model", num_hidden_layers=3)
    refused(make_adapter(tmp_path / "deep", tmp_path / "adapter3"), r"its '.*layers\.2\..*, this model's missing")


def checkpoint(folder, path, step: int = 3, **pte) -> str:
    """A run's folder whose last checkpoint holds an adapter of settings PTE and `pte`."""
    make_adapter(folder, path / f"global_step_{step}" / "actor" / "pte_adapter", **pte)
    (path / "latest_checkpointed_iteration.txt").write_text(str(step))
    return f"trainer.default_local_dir={path}"


def test_a_run_goes_on_under_other_settings_of_the_run_only(folder, tmp_path):
    validate(folder, checkpoint(folder, tmp_path / "same", window=32))
    other = checkpoint(folder, tmp_path / "other", alpha=4.0)
    with pytest.raises(ValueError, match=r"resume_mode=auto goes on from .*alpha=4\.0, the model has alpha=8\.0"):
        validate(folder, other)
    validate(folder, other, "trainer.resume_mode=disable")
    path = [f"trainer.resume_from_path={tmp_path}/other/global_step_3", "trainer.resume_mode=resume_path"]
    with pytest.raises(ValueError, match=r"resume_mode=resume_path goes on from .*alpha=4\.0"):
        validate(folder, *path)
    with pytest.raises(ValueError, match=r"trainer\.resume_from_path=None: must be a checkpoint's folder"):
        validate(folder, "trainer.resume_mode=resume_path")
    (tmp_path / "foreign" / "global_step_5" / "actor").mkdir(parents=True)
    (tmp_path / "foreign" / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(ValueError, match=r"goes on from a checkpoint, .*global_step_5/actor/pte_adapter: no such dir"):
        validate(folder, f"trainer.default_local_dir={tmp_path}/foreign")


def test_a_checkpoint_that_goes_before_an_adapter_is_said(folder, tmp_path):
    start = f"{MODEL}.lora_adapter_path={make_adapter(folder, tmp_path / 'adapter')}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes on from")
        validate(folder, start, f"trainer.default_local_dir={tmp_path}/new")
    with pytest.warns(UserWarning, match=f"goes on from {tmp_path}/old/global_step_3, not from .*experiment_name"):
        validate(folder, start, checkpoint(folder, tmp_path / "old"))


def test_a_critic_needs_flash_attn(folder, monkeypatch):
    monkeypatch.setattr("verl_pte.verl.checks._flash_attn_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"adv_estimator=gae, .*needs the package flash-attn"):
        validate(folder, "data.max_prompt_length=64", recipe="pte_ppo")
    with pytest.raises(ValueError, match=r"adv_estimator=grpo, critic\.enable=True: needs the package flash-attn"):
        validate(folder, "critic.enable=true")
