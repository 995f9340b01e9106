"""Parts of the vLLM rollout under verl by themselves: weights on their way to a worker, and the engine's arguments."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
from verl_run import make_model

from verl_pte import PTEConfig
from verl_pte.verl.vllm_server import VLLMServer
from verl_pte.verl.vllm_worker import PTEWorkerExtension


def transfer(folder, weights: dict[str, torch.Tensor], load) -> BaseException | None:
    """Send `weights` through verl's transport to a worker whose model takes them with `load`; what it raised."""
    handle = f"ipc://{folder}/weights.sock"
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(get_model=lambda: SimpleNamespace(load_weights=load)),
        _get_zmq_handle=lambda: handle,
        device=torch.device("cpu"),
    )
    raised: list[BaseException] = []

    def receive() -> None:
        try:
            PTEWorkerExtension.update_weights_from_ipc(worker, use_shm=True)
        except BaseException as error:
            raised.append(error)

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    sender = BucketedWeightSender(zmq_handle=handle, bucket_size_mb=1, use_shm=True)
    sending = asyncio.wait_for(sender.async_send_weights(iter(weights.items())), timeout=60)
    asyncio.run(sending)
    receiver.join(timeout=60)
    assert not receiver.is_alive()
    return raised[0] if raised else None


def weights() -> dict[str, torch.Tensor]:
    """More than two buckets of 1 MiB."""
    torch.manual_seed(0)
    return {f"w{i}": torch.randn(300, 400) for i in range(6)}


def test_all_buckets_arrive(tmp_path):
    sent, got, buckets = weights(), {}, []

    def load(bucket):
        buckets.append(len(bucket))
        got.update((name, tensor.clone()) for name, tensor in bucket)

    assert transfer(tmp_path, sent, load) is None
    assert got.keys() == sent.keys() and all(torch.equal(got[name], sent[name]) for name in sent)
    assert len(buckets) > 2


def test_weights_that_do_not_fit_raise_and_leave_nobody_waiting(tmp_path):
    def load(bucket):
        raise ValueError(f"no place for {bucket[0][0]}")

    raised = transfer(tmp_path, weights(), load)
    assert isinstance(raised, ValueError) and str(raised) == "no place for w0"


@pytest.mark.parametrize("form", [dict, lambda override: {"model_config": override}], ids=["flat", "model_config"])
def test_overrides_of_the_models_config_reach_vllm(tmp_path, form):
    """The learner builds its model with them."""
    path = str(make_model(tmp_path / "model", hidden_size=128))
    server = object.__new__(VLLMServer)
    server.config = SimpleNamespace(prompt_length=64, checkpoint_engine=None)
    server.model_config = SimpleNamespace(
        local_path=path,
        hf_config=AutoConfig.from_pretrained(path),
        pte=PTEConfig(window=32),
        override_config={**form({"rms_norm_eps": 0.5}), "attn_implementation": "sdpa"},
    )
    arguments = {"max_num_batched_tokens": 77}
    server._preprocess_engine_kwargs(arguments)
    assert arguments["hf_overrides"] == {"rms_norm_eps": 0.5, "architectures": ["PTEQwen2ForCausalLM"]}
    assert arguments["additional_config"]["pte"]["max_prompt_length"] == 64
    assert arguments["max_num_batched_tokens"] == 77 and "model" not in arguments
