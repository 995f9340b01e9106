"""The learner benchmark's baseline: verl's engine computes what plain PEFT LoRA does, so both mean the same step."""

import pytest
import torch
import torch.multiprocessing as mp
from verl_baseline_run import exercise

from verl_pte.bench.learner_settings import LearnerSettings

TOLERANCE = 1e-5  # relative; float32, and the loss is summed in another order


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_verl_computes_what_peft_does(attention, tmp_path):
    """The loss, and the gradients of each layer's `lora_A` and `lora_B`, on random weights."""
    settings = LearnerSettings(
        lengths=(40,),
        window=32,
        prompt_length=12,
        num_seqs=2,
        rank=4,
        hidden_size=64,
        layers=2,
        device="cpu",
        attention=attention,
    )
    mp.spawn(exercise, args=(settings, tmp_path), nprocs=1)
    found = torch.load(tmp_path / "found.pt")
    peft, verl = found["peft"], found["verl"]
    assert verl.pop("loss") == pytest.approx(peft.pop("loss"), rel=TOLERANCE)
    assert len(peft) == settings.layers * 7 * 2 and peft.keys() == verl.keys()
    for name, expected in peft.items():
        assert expected.norm() > 0
        assert (verl[name] - expected).norm() <= TOLERANCE * expected.norm(), name
