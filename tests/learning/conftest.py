"""A folder for results, in which the base of small cells is already."""

import pytest
from learning_parts import SMALL

from verl_pte.bench.learning.base import base_path, untrained
from verl_pte.bench.learning.tasks import Task


@pytest.fixture
def folder(tmp_path):
    untrained(Task("lookup"), SMALL).save_pretrained(base_path(Task("lookup"), SMALL, tmp_path / "bases"))
    return tmp_path
