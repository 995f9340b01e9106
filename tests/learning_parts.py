"""For the tests of the learning benchmark: small examples, models and cells."""

import torch

from verl_pte import attach
from verl_pte.bench.learning.base import BaseSettings, untrained
from verl_pte.bench.learning.cells import Cell
from verl_pte.bench.learning.methods import pte_settings
from verl_pte.bench.learning.tasks import Task

SMALL = BaseSettings(hidden_size=32, layers=1)
WORKS = (10, 20)


def examples_of(kind, count=20, seed=0, **knobs):
    works = [WORKS[0] + i % 11 for i in range(count)]
    return Task(kind, **knobs).examples(works, torch.Generator().manual_seed(seed))


def small_model(method="pte", seed=0, kind="lookup", **knobs):
    base = untrained(Task(kind), SMALL)
    torch.manual_seed(seed)
    model = attach(base, pte_settings(method, **knobs))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def small_cell(**settings):
    return Cell(**dict(task="lookup", method="pte", way="supervised", steps=2, batch=2, tests=4, base=SMALL) | settings)
