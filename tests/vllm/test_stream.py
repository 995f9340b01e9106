"""Streaming on both engines: the same tokens, and the same cache at every one of them.

The native engine counts what its cache's slots hold; vLLM's side takes it from the schedule.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_model import ENVIRONMENT, ChatModel, write_chat_model

from verl_pte import SamplingParams
from verl_pte.engine.stream import NativeStreamer

NUM_TOKENS, MAX_PROMPT_LENGTH = 200, 80
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> ChatModel:
    return write_chat_model(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def on_vllm(chat_model: ChatModel, tmp_path_factory) -> dict:
    """What `main` below finds, in a process of its own."""
    spec = tmp_path_factory.mktemp("run") / "spec.json"
    prompts = [chat_model.prompt("Hello there"), chat_model.prompt("x" * (MAX_PROMPT_LENGTH + 1))]
    spec.write_text(json.dumps([str(chat_model.base), str(chat_model.adapter), *prompts]))
    done = subprocess.run(
        [sys.executable, __file__, str(spec)],
        # More cache memory than fits is asked for by nobody: it has to be what one sequence needs.
        env={key: value for key, value in (os.environ | ENVIRONMENT).items() if key != "VLLM_CPU_KVCACHE_SPACE"}
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(spec.with_suffix(".out").read_text())


def states(pieces: list) -> dict[int, list]:
    """Tokens generated so far -> what the pieces say about the cache then."""
    out, count = {}, 0
    for piece in pieces:
        count += len(piece[0])
        out[count] = list(piece[1:])
    return out


def test_vllm_streams_what_the_native_engine_does(chat_model: ChatModel, on_vllm: dict) -> None:
    native = list(NativeStreamer(chat_model.model, chat_model.tokenizer, 100).stream(on_vllm["prompt"], GREEDY))
    expected = chat_model.greedy("Hello there", num_tokens=NUM_TOKENS)
    for pieces in (native, on_vllm["pieces"]):
        assert [token for piece in pieces for token in piece[0]] == expected.token_ids
        assert len(pieces) >= NUM_TOKENS - 1  # the native engine's first step prefills and decodes
        assert list(pieces[-1][4:]) == ["length", expected.peak_cache_tokens]
    counted, derived = states(native), states(on_vllm["pieces"])
    assert counted.keys() <= derived.keys()
    assert counted == {count: derived[count] for count in counted}
    assert counted[NUM_TOKENS][2] == expected.num_evictions > 5
    assert len({state[0] for state in counted.values()}) > 20  # it fills up and is emptied


def test_cache_of_vllm_is_sized_for_one_sequence(on_vllm: dict) -> None:
    # 80 prompt tokens are 5 blocks, the window 2, the null block 1.
    assert on_vllm["num_blocks"] == 8


def test_vllm_goes_on_after_an_abandoned_response(on_vllm: dict) -> None:
    assert on_vllm["after_abort"] == [token for piece in on_vllm["pieces"] for token in piece[0]]
    assert on_vllm["unfinished"] == 0


def test_vllm_refuses_a_prompt_that_does_not_fit(on_vllm: dict) -> None:
    assert "at most 80 fit" in on_vllm["too_long"]


def test_native_goes_on_after_an_abandoned_response(chat_model: ChatModel) -> None:
    streamer, prompt = NativeStreamer(chat_model.model, chat_model.tokenizer, 100), chat_model.prompt("Hello there")
    abandoned = streamer.stream(prompt, GREEDY)
    for _ in range(50):
        next(abandoned)
    abandoned.close()
    again = [token for piece in streamer.stream(prompt, GREEDY) for token in piece.token_ids]
    assert again == chat_model.greedy("Hello there", num_tokens=NUM_TOKENS).token_ids


def test_native_rows_grow_with_the_prompt(chat_model: ChatModel) -> None:
    streamer = NativeStreamer(chat_model.model, chat_model.tokenizer, 900)
    short, long = chat_model.prompt("Hello there"), chat_model.prompt("x" * 600)

    def tokens(prompt: list[int]) -> list[int]:
        return [token for piece in streamer.stream(prompt, GREEDY) for token in piece.token_ids]

    assert tokens(short) == chat_model.greedy("Hello there", num_tokens=NUM_TOKENS).token_ids
    assert streamer.engine is not None
    small = streamer.engine.cache_bytes
    assert tokens(long) == chat_model.greedy("x" * 600, num_tokens=NUM_TOKENS).token_ids
    assert streamer.engine.cache_bytes > 2 * small
    # With 1,024 positions a prompt of 900 tokens leaves 124 for the answer, and a longer one is not for this streamer.
    edge = chat_model.prompt("x" * (900 - len(chat_model.prompt(""))))
    assert (len(edge), len(tokens(edge))) == (900, 124)
    with pytest.raises(ValueError, match="at most 900 fit"):
        tokens([*edge, 1])


def main() -> None:
    """Stream on vLLM and write down what came."""
    from verl_pte.vllm import engine_args
    from verl_pte.vllm.options import parse
    from verl_pte.vllm.stream import VLLMStreamer

    spec = Path(sys.argv[1])
    model, adapter, prompt, too_long = json.loads(spec.read_text())
    args = engine_args(model, adapter=adapter, max_prompt_length=MAX_PROMPT_LENGTH)
    streamer = VLLMStreamer(parse(args, ["--dtype=float32", "--enforce-eager"]), MAX_PROMPT_LENGTH)
    found = {"prompt": prompt, "pieces": list(streamer.stream(prompt, GREEDY))}
    abandoned = streamer.stream(prompt, GREEDY)
    for _ in range(50):
        next(abandoned)
    abandoned.close()
    found["after_abort"] = [token for piece in streamer.stream(prompt, GREEDY) for token in piece.token_ids]
    found["unfinished"] = streamer.engine.get_num_unfinished_requests()
    try:
        next(streamer.stream(too_long, GREEDY))
    except ValueError as error:
        found["too_long"] = str(error)
    found["num_blocks"] = streamer.engine.engine_core.engine_core.scheduler.kv_cache_config.num_blocks
    spec.with_suffix(".out").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
