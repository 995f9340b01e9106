"""How the tests run: hypothesis without deadlines, because a busy machine is no defect, and spread over pytest-xdist's
workers as follows (``--dist loadgroup``; without xdist this changes nothing).

Tests of one file stay together, so that their fixtures are made once. Everything under tests/verl is one group and
comes first: those tests start Ray and several processes each, and two at a time would be slower than one by one.
"""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

_VERL_TESTS = Path(__file__).parent / "tests" / "verl"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = "verl" if item.path.is_relative_to(_VERL_TESTS) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: not item.path.is_relative_to(_VERL_TESTS))
