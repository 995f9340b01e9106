"""The counted FLOPs: against a count by hand, against each other, and as the command prints them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config
from typer.testing import CliRunner

from verl_pte import PTEConfig
from verl_pte.bench import __main__ as command_line
from verl_pte.bench import flops
from verl_pte.plan.configs import NAMED, load_config

HIDDEN, MLP, VOCAB, HEADS, KV_HEADS, HEAD_DIM, RANK = 32, 48, 100, 4, 2, 8, 4
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=MLP,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
LINEARS = [(HIDDEN, HIDDEN), (HIDDEN, 16), (HIDDEN, 16), (HIDDEN, HIDDEN), (HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)]
PROMPT, RESPONSE, WINDOW, GLOBAL = 16, 100, 32, 3


def config(layers: int = 1) -> Any:
    """A tiny Qwen2 whose sequences exceed its positions, which must not matter."""
    return Qwen2Config(**SIZES, num_hidden_layers=layers)


def method(**knobs: Any) -> PTEConfig:
    """PTE under a small window, or what `knobs` make of it."""
    settings = dict(rank=RANK, alpha=4.0, window=WINDOW, num_global_tokens=GLOBAL, evict_fraction=0.5, chunk_tokens=16)
    return PTEConfig(**settings | knobs)


FULL = dict(window=None, freeze_state=True)
LORA_C = dict(freeze_state=True)


def layer_by_hand(state: bool) -> int:
    """One token through a decoder layer, attention's pairs left out."""
    base = sum(2 * i * o for i, o in LINEARS)
    adapters = sum(2 * RANK * (i + o) for i, o in LINEARS)
    return base + adapters + (len(LINEARS) * 2 * RANK * RANK if state else 0)


PAIR = 2 * 2 * HEADS * HEAD_DIM  # query times key, weight times value
HEAD = 2 * HIDDEN * VOCAB
ROPE = HEAD_DIM  # a token's position times half a head's frequencies, once for all layers


@pytest.mark.parametrize("layers", [1, 5])
def test_full_cache_rollout_equals_a_count_by_hand(layers: int) -> None:
    found = flops.rollout(config(layers), method(**FULL), PROMPT, RESPONSE)
    tokens = PROMPT + RESPONSE - 1
    pairs = tokens * (tokens + 1) // 2
    heads = RESPONSE  # of the prompt its last token alone, and every decode step
    assert found.visible == layers * (tokens * layer_by_hand(state=False) + pairs * PAIR) + heads * HEAD + tokens * ROPE
    assert found.counted > found.visible  # the prompt's masked pairs


QUERIES = 2 * RANK * RANK * KV_HEADS * HEAD_DIM  # the global queries' projection


def encode(tokens: int) -> int:
    """Keys and values projected, scores, weighted values; the queries are there."""
    return 2 * 2 * tokens * KV_HEADS * HEAD_DIM * RANK + 2 * 2 * RANK * RANK * tokens


def num_evictions() -> int:
    return method().schedule().num_evictions(PROMPT, PROMPT + RESPONSE - 1)


def test_update_of_the_state_equals_a_count_by_hand() -> None:
    """The engine has queries and initial states from its weights: they cost a sequence nothing."""
    pte, lora_c = (flops.rollout(config(), method(**knobs), PROMPT, RESPONSE) for knobs in ({}, LORA_C))
    assert num_evictions() > 2
    states = (PROMPT + RESPONSE - 1) * len(LINEARS) * 2 * RANK * RANK
    assert pte.visible - lora_c.visible == states + num_evictions() * encode(method().schedule().chunk)


def test_full_cache_step_equals_a_count_by_hand() -> None:
    """A forward and, of the frozen weights, the gradient of the input alone."""
    length, both = 24, [flops.full_cache_step(config(2), RANK, 24, checkpointing=c) for c in (False, True)]
    base, adapters = sum(2 * i * o for i, o in LINEARS), sum(2 * RANK * (i + o) for i, o in LINEARS)
    pairs = length * (length + 1) // 2
    forward = length * (base + adapters) + pairs * PAIR
    backward = length * (base + 2 * adapters) + pairs * 2 * PAIR
    assert both[0].visible == 2 * (forward + backward) + 2 * length * HEAD + length * ROPE
    # Layers run once more, up to the last product, which backward does not need; the output layer does not.
    assert both[1].visible == both[0].visible + 2 * (forward - length * 2 * RANK * HIDDEN)
    assert both[0].counted == both[0].visible + 2 * 3 * PAIR * (length * length - pairs)


@pytest.mark.parametrize("knobs", [{}, LORA_C], ids=["pte", "lora_c"])
def test_replay_and_rollout_do_the_same_work(knobs: dict[str, Any]) -> None:
    """The first pass runs what the rollout ran: two engines, one count, but for the encoder's own weights.

    The output layer runs on the last token of every chunk of the prompt (one here), and on every token that predicts
    another. The learner projects the global queries and makes the initial state anew, since they are being trained.
    """
    layers, encodings = 2, 0 if knobs else 1 + num_evictions()
    encoders = layers * (encodings * QUERIES + (0 if knobs else encode(GLOBAL)))
    rolled = flops.rollout(config(2), method(**knobs), PROMPT, RESPONSE)
    first, second = flops.replay(config(2), method(**knobs), PROMPT, RESPONSE)
    assert first.visible == rolled.visible + encoders
    assert second.visible > 2 * first.visible
    assert first.counted > first.visible and second.counted > second.visible


def test_a_window_is_flat_in_context() -> None:
    """Twice the tokens beyond the window cost twice as much; with the full cache more."""

    def increments(**knobs: Any) -> tuple[int, int]:
        at = [flops.rollout(config(), method(**knobs), PROMPT, n).visible for n in (65, 129, 193)]
        return at[1] - at[0], at[2] - at[1]

    for knobs in ({}, LORA_C):
        first, second = increments(**knobs)
        assert first == second
    first, second = increments(**FULL)
    assert second > first
    pte, lora_c, full = (increments(**knobs)[1] for knobs in ({}, LORA_C, FULL))
    assert lora_c < pte < full


def test_chunk_length_moves_what_is_masked_and_no_more() -> None:
    visible = [
        sum(part.visible for part in flops.replay(config(), method(chunk_tokens=chunk), PROMPT, RESPONSE))
        for chunk in (16, 32)
    ]
    assert visible[0] == visible[1]


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen2.5-3b", 3.09), ("qwen2.5-7b", 7.62), ("r1-distill-llama-8b", 8.03)]
)
def test_named_models_have_the_published_sizes(name: str, billions: float) -> None:
    assert round(flops.parameter_count(load_config(name)) / 1e9, 2) == billions
    assert name in NAMED


def test_command_prints_one_json_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "qwen2", "num_hidden_layers": 2}))
    arguments = ["--model", str(tmp_path), "--response-length", "64,256", "--window", "32", "--prompt-length", "16"]
    arguments += ["--rank", "4", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(command_line.app, ["flops", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["response_length"] == 256
    assert content["ratios"]["pte/full"] == content["pte"] / content["full"]
    assert content["ratios"]["window/full"] == content["window"] / content["full"]
    assert content["full"] > content["pte"] > content["window"] > 0
    for row in content["lengths"]:
        for name, parts in row["flops"].items():
            assert parts["total"]["visible"] == parts["rollout"]["visible"] + parts["learner"]["visible"], name
    shorter, longer = (row["ratios"]["pte"]["total"] for row in content["lengths"])
    assert longer < shorter
    assert content["paper"]["range"] == [0.62, 0.64]
    assert json.loads((tmp_path / "out" / "flops.json").read_text()) == content
    assert (tmp_path / "out" / "flops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (
            ["--model", "qwen3"],
            "--model qwen3: there is none; give a config.json, the folder it is in, or one of qwen2.5",
        ),
        (["--response-length", "0"], "--response-length 0: must be positive"),
        (["--response-length", "64,32"], "must rise"),
        (["--response-length", "64;32"], "numbers with commas between"),
        (["--window", "250"], "window=250: must be a multiple of block_size=16"),
        (["--prompt-length", "0"], "--prompt-length 0: must be at least 1"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(command_line.app, ["flops", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr
