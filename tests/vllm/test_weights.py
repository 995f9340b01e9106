"""Names of weights, and settings that travel through vLLM's configuration."""

from types import SimpleNamespace

import pytest
from tiny import tiny_model, tiny_pte

from verl_pte import PTEConfig
from verl_pte.vllm import engine_args
from verl_pte.vllm.settings import Settings, check
from verl_pte.vllm.version import require_version
from verl_pte.vllm.weights import AdapterTensor, adapter_tensor, base_name


def test_every_tensor_of_an_attached_model_has_a_place():
    base = {name for name, _ in tiny_model("qwen3").named_parameters()}
    model = tiny_pte("qwen3")
    places = {name: adapter_tensor(name) for name, _ in model.named_parameters()}
    assert {base_name(name) for name, place in places.items() if place is None} == base
    adapter = [place for place in places.values() if place is not None]
    assert len(set(adapter)) == len(adapter) == 2 * (7 * 2 + 6)
    assert AdapterTensor(1, "gate_proj", "lora_B") in adapter and AdapterTensor(0, None, "global_keys") in adapter


def test_names_of_a_saved_adapter_are_known_and_others_are_not():
    name = "base_model.model.model.layers.3.mlp.down_proj.pte_adapter.lora_A.weight"
    assert adapter_tensor(name) == AdapterTensor(3, "down_proj", "lora_A")
    with pytest.raises(ValueError, match="not a name PTE gives"):
        adapter_tensor("base_model.model.model.layers.3.mlp.down_proj.pte_adapter.default.lora_C.weight")


# -- settings
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama").config.save_pretrained(path)
    return str(path)


def test_settings_survive_the_way_through_vllm(base):
    pte = PTEConfig(window=64, target_modules=["v_proj", "q_proj"], update_strength=None)
    arguments = engine_args(base, pte=pte, max_prompt_length=100)
    back = Settings.of(SimpleNamespace(additional_config=arguments["additional_config"]))
    assert back == Settings(pte, None, 100)
    assert arguments["hf_overrides"] == {"architectures": ["PTELlamaForCausalLM"]} and arguments["block_size"] == 16


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(), r"give pte=PTEConfig\(\.\.\.\), or adapter=DIR"),
        (dict(pte=PTEConfig(window=24, block_size=8)), r"block_size=8: must be a multiple of 16 with vLLM"),
        (dict(pte=PTEConfig(), max_prompt_length=0), r"max_prompt_length=0: must be at least 1"),
    ],
)
def test_arguments_that_cannot_work(base, how, message):
    with pytest.raises(ValueError, match=message):
        engine_args(base, **how)


def test_the_other_model_runner_is_refused(base, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1: must be 0 or unset"):
        engine_args(base, pte=PTEConfig())


@pytest.mark.parametrize("found", ["0.27.0", "0.30.0", None])
def test_other_vllm_versions_are_refused(found, monkeypatch):
    monkeypatch.setattr("verl_pte.vllm.version.installed_version", lambda: found)
    with pytest.raises(RuntimeError, match=r"vllm==0\.27\.1"):
        require_version()


def vllm_config(**changed):
    """The parts of a VllmConfig that are checked, as they should be but for what is `changed`."""
    values = dict(
        block_size=16,
        cache_dtype="auto",
        pipeline_parallel_size=1,
        data_parallel_size=1,
        quantization=None,
        load_format="auto",
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        enable_dbo=False,
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        use_v2_model_runner=False,
        enable_chunked_prefill=True,
        additional_config={"pte": Settings(PTEConfig()).to_json()},
    )
    assert not changed.keys() - values.keys()
    every = SimpleNamespace(**(values | changed))
    blocks = ("parallel_config", "cache_config", "scheduler_config", "model_config", "load_config")
    return SimpleNamespace(**vars(every), **dict.fromkeys(blocks, every))


def test_a_good_vllm_configuration_passes():
    check(vllm_config())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(block_size=32), r"block_size=32: must be 16"),
        (dict(pipeline_parallel_size=2), r"pipeline_parallel_size=2: must be 1"),
        (dict(data_parallel_size=2), r"data_parallel_size=2: must be 1"),
        (dict(quantization="fp8"), r"quantization='fp8': must be None"),
        (
            dict(load_format="dummy", additional_config={"pte": Settings(PTEConfig(), "a").to_json()}),
            r"load_format='dummy': must be auto with an adapter",
        ),
        (dict(decode_context_parallel_size=2), r"decode_context_parallel_size=2: must be 1"),
        (dict(enable_dbo=True), r"enable_dbo=True: must be False"),
        (dict(speculative_config="ngram"), r"speculative_config='ngram': must be None"),
        (dict(lora_config="lora"), r"enable_lora=True: must be False"),
        (dict(kv_transfer_config="nixl"), r"kv_transfer_config='nixl': must be None"),
        (dict(cache_dtype="fp8"), r"kv_cache_dtype='fp8': must be auto"),
        (dict(use_v2_model_runner=True), r"VLLM_USE_V2_MODEL_RUNNER=True: must be False"),
        (dict(enable_chunked_prefill=False), r"enable_chunked_prefill=False: must be True"),
        (dict(additional_config={}), r"additional_config has no `pte`"),
    ],
    ids=str,
)
def test_vllm_options_pte_cannot_honour(changed, message):
    with pytest.raises(ValueError, match=message):
        check(vllm_config(**changed))
