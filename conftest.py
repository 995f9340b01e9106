"""How the tests run: hypothesis without deadlines, because a busy machine is no defect, and pytest-xdist's workers
(``-n``) as follows.

Tests of one file stay together, so that their fixtures are made once. What of tests/verl starts Ray is one group and
comes first: those tests have several processes each, and two at a time would be slower than one by one. The other
long files, under tests/vllm and tests/megatron, come next. ``--dist loadgroup`` would say the same, but pytest-xdist
3.8 loses the groups under pytest 9.2.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

_LONGEST_FIRST = [Path(__file__).parent / "tests" / name for name in ("verl", "vllm", "megatron")]
# Of tests/verl, those that start nothing.
_LIGHT = {
    f"test_{name}.py"
    for name in ("config_errors", "megatron_config", "metrics", "pass_at_k", "patches", "plugin", "vllm_parts")
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[bool, ...]:
        return item.path.name in _LIGHT, *(not item.path.is_relative_to(folder) for folder in _LONGEST_FIRST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            is_group = file.startswith("tests/verl/") and file.rpartition("/")[2] not in _LIGHT
            return "tests/verl" if is_group else file

    config.option.loadscopereorder = False  # keep the order of collection: the longest group starts first
    return ByFile(config, log)
