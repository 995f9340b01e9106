"""Rewards inside verl's reward loop: configured, loaded and called as a run does it, many responses at once."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer
from verl_run import RECIPES, overrides

import verl_pte.rewards

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "rewards"
MATH = Path(verl_pte.rewards.__file__).with_name("math.py")


class Loop:
    """verl's reward worker, in this process, with a reward chosen by configuration."""

    def __init__(self, folder: Path, path: Path | str, **reward_kwargs: Any) -> None:
        from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

        keywords = [
            f"+reward.custom_reward_function.reward_kwargs.{key}={value}" for key, value in reward_kwargs.items()
        ]
        ours = [text for text in overrides(folder) if not text.startswith("reward.")]
        chosen = f"reward.custom_reward_function.path={path}"
        verls = "hydra.searchpath=[pkg://verl.trainer.config]"  # main_ppo's own config folder comes from its package
        with initialize_config_dir(str(RECIPES), version_base=None):
            config = compose("pte_tiny_cpu", overrides=[verls, *ours, chosen, *keywords])
        self.worker = RewardLoopWorker(config)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def data(self, items: list[tuple[str, str]]):
        """(response, ground truth) as verl hands a batch of rollouts over: padded, with the row's columns."""
        from verl import DataProto

        responses = [self.tokenizer(response, add_special_tokens=False)["input_ids"] for response, _ in items]
        longest, prompt = max(map(len, responses)), 3
        ids, mask = (torch.zeros(len(items), longest, dtype=torch.long) for _ in range(2))
        for row, response in enumerate(responses):
            ids[row, : len(response)] = torch.tensor(response)
            mask[row, : len(response)] = 1
        tensors = {
            "prompts": torch.ones(len(items), prompt, dtype=torch.long),
            "responses": ids,
            "attention_mask": torch.cat([torch.ones(len(items), prompt, dtype=torch.long), mask], 1),
        }
        columns = {
            "data_source": ["task"] * len(items),
            "reward_model": [{"style": "rule", "ground_truth": truth} for _, truth in items],
            "extra_info": [{"index": row} for row in range(len(items))],
        }
        columns = {key: np.array(values, dtype=object) for key, values in columns.items()}
        return DataProto.from_dict(tensors=tensors, non_tensors=columns)

    def score(self, items: list[tuple[str, str]]) -> list[dict]:
        """All items at once, in the worker's own event loop."""
        return self.worker.loop.run_until_complete(self.worker.compute_score_batch(self.data(items)))

    def order(self, items: list[tuple[str, str]]) -> tuple[list[int], list[dict]]:
        """In which order the items were done, and what each got."""
        data, done = self.data(items), []

        async def one(row: int) -> dict:
            result = await self.worker.compute_score(data[row : row + 1])
            done.append(row)
            return result

        async def everything() -> list[dict]:
            return await asyncio.gather(*(one(row) for row in range(len(items))))

        return done, self.worker.loop.run_until_complete(everything())


def check_form(results: list[dict]) -> None:
    """What verl does with the results: a number for training, and one column of numbers for each key of the log."""
    keys = results[0]["reward_extra_info"].keys()
    for result in results:
        assert result["reward_extra_info"].keys() == keys, "verl makes columns of the first item's keys"
        assert result["reward_score"] == result["reward_extra_info"]["score"]
        assert all(isinstance(value, float) for value in result["reward_extra_info"].values())


# -- mathematics
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["path", "pkg"])
def math(request, folder) -> Loop:
    return Loop(folder, MATH if request.param == "path" else "pkg://verl_pte.rewards.math")


def test_math(math):
    cases = [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0, 0.0),
        (r"first \boxed{3}, no: \boxed{4}", "4", 1.0, 0.0),
        ("Answer: 12", "12", 1.0, 0.0),
        (r"\boxed{41}", "42", 0.0, 0.0),
        (r"it is \boxed{4", "4", 0.0, 1.0),
        ("no idea", "4", 0.0, 1.0),
        (r"\boxed{$$$}", "4", 0.0, 1.0),
    ]
    results = math.score([case[:2] for case in cases] * 4)
    check_form(results)
    for (response, _, score, unparsed), result in zip(cases * 4, results, strict=True):
        assert result["reward_extra_info"] == {"score": score, "acc": score, "unparsed": unparsed}, response


def test_a_hostile_answer_does_not_hold_up_the_others(math):
    """It comes first, and is done last: it waits for its time limit, the others do not wait for it."""
    right = [(rf"\boxed{{\frac{{{2 * n}}}{{2}}}}", str(n)) for n in range(12)]
    math.score(right[:4])  # the grading processes have started
    order, results = math.order([(r"\boxed{9^{9^{9^9}}}", "4"), *right])
    check_form(results)
    assert order[-1] == 0 and sorted(order) == list(range(13))
    assert results[0]["reward_extra_info"] == {"score": 0.0, "acc": 0.0, "unparsed": 1.0}
    assert [result["reward_score"] for result in results[1:]] == [1.0] * 12


# -- examples/rewards
# ----------------------------------------------------------------------------------------------------


def formatted(thought: str, answer: str) -> str:
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


def test_format_and_length(folder):
    loop = Loop(folder, EXAMPLES / "format_and_length.py", free=40, most=80, floor=0.25, format_share=0.2)
    cases = [
        (formatted("short", "7"), 1.0, 1.0, 1.0),
        (formatted("x" * 40, " 7\n"), 1.0, 1.0, 1.0),
        (formatted("x" * 60, "7"), 0.2 + 0.8 * 0.625, 1.0, 1.0),
        (formatted("x" * 80, "7"), 0.2 + 0.8 * 0.25, 1.0, 1.0),
        (formatted("x" * 150, "7"), 0.2 + 0.8 * 0.25, 1.0, 1.0),
        (formatted("short", "8"), 0.2, 0.0, 1.0),
        (formatted("x" * 150, "8"), 0.2, 0.0, 1.0),
        ("7", 0.0, 0.0, 0.0),
        (formatted("cut off", "7").removesuffix(">"), 0.0, 0.0, 0.0),
        (formatted("short", "7") + " or 8", 0.0, 0.0, 0.0),
        (formatted("short", "8") + formatted("short", "7"), 0.0, 0.0, 0.0),
        (formatted("a </think><think> b", "7"), 0.0, 0.0, 0.0),
        ("<answer>7</answer><think>short</think>", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ]
    results = loop.score([(response, "7") for response, *_ in cases] * 3)
    check_form(results)
    for (response, score, acc, form), result in zip(cases * 3, results, strict=True):
        found = result["reward_extra_info"]
        assert (found["acc"], found["formatted"]) == (acc, form), response
        assert found["score"] == pytest.approx(score), response
    assert results[2]["reward_extra_info"]["thought"] == 60.0


@pytest.mark.parametrize("settings", [{"free": 80}, {"free": -1}, {"floor": 1.5}, {"format_share": -0.1}])
def test_format_and_length_refuses_settings_that_cannot_be(folder, settings):
    loop = Loop(folder, EXAMPLES / "format_and_length.py", **{"most": 80, "free": 40} | settings)
    with pytest.raises(ValueError, match=f"{next(iter(settings))}={next(iter(settings.values()))}"):
        loop.score([("7", "7")])


ASSERTIONS = [
    {"at": [], "is": "type", "value": "object"},
    {"at": ["route"], "is": "length", "value": 3},
    {"at": ["route"], "is": "unique", "value": True},
    {"at": ["cost"], "is": "at_most", "value": 10},
]


def answer(value: Any, before: str = "") -> str:
    return f"{before}```json\n{value if isinstance(value, str) else json.dumps(value)}\n```"


def test_unit_tests(folder):
    loop = Loop(folder, EXAMPLES / "unit_tests.py", partial=0.5)
    right = {"route": ["a", "b", "c"], "cost": 9.5}
    cases = [
        (answer(right, "I think so.\n"), 1.0),
        (answer({"route": ["c", "b", "a"], "cost": 1}), 1.0),
        (answer(right | {"route": ["a", "b", "b"]}), 0.75),
        (answer(right | {"cost": 11}), 0.75),
        (answer(right | {"cost": "9"}), 0.75),
        (answer({"route": ["a", "b", "c"]}), 0.75),
        (answer({}), 0.25),
        (answer([1]), 0.0),
        (answer({}) + "\nno:\n" + answer(right), 1.0),
        (answer(right) + "\nno:\n" + answer({}), 0.25),
    ]
    hostile = [
        "no JSON",
        "```json\n" + json.dumps(right),
        answer("__import__('os').abort()"),
        answer("{'route': 1}"),
        answer('{"cost": NaN}'),
        answer("[" * 9000),
        "```json\n" * 3000,
        answer("9" * 9000),
        answer(json.dumps(right) + " " * 30_000),
    ]
    items = [(response, 1.0, share) for response, share in cases] + [(response, 0.0, 0.0) for response in hostile]
    results = loop.score([(response, json.dumps(ASSERTIONS)) for response, *_ in items] * 2)
    check_form(results)
    for (response, parsed, share), result in zip(items * 2, results, strict=True):
        score = 1.0 if share == 1 else 0.5 * share
        expected = {"score": score, "acc": float(share == 1), "passed": share, "parsed": parsed}
        assert result["reward_extra_info"] == expected, response[:80]


@pytest.mark.parametrize(
    ("kind", "value", "holds", "fails"),
    [
        ("type", "integer", [3, -1], [3.0, True, "3", None, [3]]),
        ("type", "number", [3, 3.5], [False, "3", None]),
        ("type", "boolean", [True, False], [1, 0, None]),
        ("type", "string", ["", "x"], [1, None]),
        ("type", "array", [[], [1]], [{}, "x"]),
        ("equals", 1, [1], [True, 1.0, "1", [1], None]),
        ("equals", {"a": 1, "b": [2]}, [{"b": [2], "a": 1}], [{"a": 1}]),
        ("one_of", [1, "x"], [1, "x"], [True, 2, [1, "x"], None]),
        ("length", 2, ["ab", [1, 2], {"a": 1, "b": 2}], [2, None, "abc"]),
        ("at_least", 1, [1, 4.5], [0, True, "4", None, [4]]),
        ("at_most", 3, [3, -1], [4, "2", None, 1e999]),
        ("contains", "a", ["bar", ["a"], {"a": 0}], ["xyz", ["ab"], 3, None]),
        ("sorted", True, [[1, 2, 2], []], [[2, 1], [1, "a"], 3, None]),
        ("sorted", False, [[2, 1]], [[1, 2], [1, "a"]]),
        ("unique", True, [[1, 2], [1, True], [[1], [2]]], [[1, 1], [[1], [1]], 3]),
        ("sum", 6, [[1, 2, 3], [6.0]], [[1, 2], [5, True], ["6"], 6, None]),
    ],
)
def test_assertions(kind, value, holds, fails):
    from verl.utils.import_utils import load_extern_object

    compute_score = load_extern_object(str(EXAMPLES / "unit_tests.py"), "compute_score")
    truth = json.dumps([{"at": ["x", 0], "is": kind, "value": value}])
    for found, right in [(h, 1.0) for h in holds] + [(f, 0.0) for f in fails]:
        text = json.dumps({"x": [found]}).replace("Infinity", "1e999")
        assert compute_score("task", answer(text), truth)["score"] == right, (kind, value, found)
    assert compute_score("task", answer({"x": []}), truth)["score"] == 0.0, "a place that is not there"


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("42", "must be a JSON list"),
        ("[]", "at least one assertion"),
        ("not json", "Expecting value"),
        ('[{"at": [], "is": "length"}]', "must have the keys at, is and value"),
        ('[{"at": [], "is": "lenght", "value": 1}]', "is must be one of type, equals"),
        ('[{"at": [], "is": "type", "value": "list"}]', "value must be one of object, array"),
    ],
)
def test_assertions_that_cannot_be_read_end_the_run(folder, truth, message):
    with pytest.raises(ValueError, match=message):
        Loop(folder, EXAMPLES / "unit_tests.py").score([(answer({}), truth)])


def test_every_kind_of_assertion_is_documented():
    from verl.utils.import_utils import load_extern_object

    checks = load_extern_object(str(EXAMPLES / "unit_tests.py"), "CHECKS")
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}`" in text for name in checks)


def test_rewards_that_the_documentation_names_load(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    pages = [ROOT / "docs" / "verl.md", *EXAMPLES.iterdir()]
    texts = [page.read_text() for page in pages if page.suffix in (".md", ".py")]
    paths = {path for text in texts for path in re.findall(r"custom_reward_function\.path=(\S+)", text)}
    assert len(paths - {"reward.py"}) == 3
    for path in paths - {"reward.py"}:
        assert callable(Loop(folder, path).worker.reward_manager.compute_score)
