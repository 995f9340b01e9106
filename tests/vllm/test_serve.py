"""``verl-pte serve`` as its users have it: a process of its own, asked over HTTP by the openai client.

float32, greedy; what it answers is the oracle's or the native engine's.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from chat_model import ENVIRONMENT, PTE, ChatModel, write_chat_model

from verl_pte.core.reference import Oracle

NAME = "tiny"
MAX_PROMPT_LENGTH, MAX_MODEL_LEN = 256, 32000
LONG = 200  # tokens: more than ten evictions
TOGETHER = ["word " * (1 + 3 * i) for i in range(8)]
START_SECONDS = 240


class Server:
    """A running server and clients of it."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"
        # A connection for each request: an idle one might be closed by the server just when it is used again.
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=120,
            default_headers={"Connection": "close"},
        )

    def ask(self, *texts: str, num_tokens: int = LONG, **more):
        """Greedy chat completion (or, with stream=True, its chunks)."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        return self.client.chat.completions.create(
            model=NAME,
            messages=messages,
            temperature=0,
            max_tokens=num_tokens,
            extra_body={"return_token_ids": True},
            **more,
        )

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read().decode()

    def tokens_generated(self) -> int:
        """By all requests so far."""
        name = "vllm:generation_tokens_total{"
        (line,) = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return int(float(line.rsplit(" ", 1)[1]))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> ChatModel:
    return write_chat_model(tmp_path_factory.mktemp("serve"), max_positions=32768)


@pytest.fixture(scope="module")
def server(chat_model: ChatModel, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("verl-pte"), "serve", "--model", chat_model.base]
    command += ["--adapter", chat_model.adapter, "--port", port, "--served-model-name", NAME, "--dtype", "float32"]
    command += ["--max-model-len", MAX_MODEL_LEN, "--max-prompt-length", MAX_PROMPT_LENGTH, "--", "--enforce-eager"]
    # The cache has what eight requests may hold at most, and vLLM's null block.
    schedule = chat_model.model.peft_config["default"].schedule()
    limits = [schedule.cache_limit(len(chat_model.prompt(text))) for text in TOGETHER]
    command += ["--num-gpu-blocks-override", sum(limits) // PTE["block_size"] + 1]
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        running = Server(process, port)
        _wait_until_healthy(running, log)
        yield running
    finally:
        _end(process)


def _wait_until_healthy(server: Server, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if server.process.poll() is not None:
            pytest.fail(f"the server ended with {server.process.returncode}:\n{log.read_text()[-6000:]}")
        if time.monotonic() > deadline:
            pytest.fail(f"no server after {START_SECONDS} s:\n{log.read_text()[-6000:]}")
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
    """End the server and whatever it started."""
    for kill in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kill)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def test_completion_is_the_oracles(server: Server, chat_model: ChatModel) -> None:
    answer = server.ask("Hello there")
    oracle = Oracle(chat_model.model)
    tokens, _ = oracle.greedy(chat_model.prompt("Hello there"), LONG)
    (choice,) = answer.choices
    assert choice.token_ids == tokens
    assert choice.message.content == chat_model.tokenizer.decode(tokens)
    assert (choice.finish_reason, answer.usage.completion_tokens, answer.model) == ("length", LONG, NAME)
    assert oracle.num_evictions > 5
    assert answer.kv_transfer_params["pte"] == {
        "num_evictions": oracle.num_evictions,
        "peak_cache_tokens": oracle.peak_cache_tokens,
        "peak_cache_blocks": oracle.peak_cache_tokens // PTE["block_size"],
        "num_preemptions": 0,
    }


def test_stream_is_the_same_text_in_pieces(server: Server, chat_model: ChatModel) -> None:
    chunks = [chunk for chunk in server.ask("Hello there", stream=True) if chunk.choices]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert sum(map(bool, texts)) > 2  # one a token, unless the server's process has to wait for a processor
    assert "".join(texts) == chat_model.text(chat_model.greedy("Hello there", num_tokens=LONG))
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]


def test_logprobs_are_the_oracles(server: Server, chat_model: ChatModel) -> None:
    (choice,) = server.ask("How likely?", logprobs=True, top_logprobs=1).choices
    expected = Oracle(chat_model.model).log_probs(chat_model.prompt("How likely?"), choice.token_ids)
    found = [entry.logprob for entry in choice.logprobs.content]
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_next_turn_does_not_reuse_the_answers_cache(server: Server, chat_model: ChatModel) -> None:
    """The second prompt holds the first answer, whose keys were computed under other states."""
    first = server.ask("One", num_tokens=100).choices[0].message.content
    second = server.ask("One", first, "Two", num_tokens=100)
    expected = chat_model.greedy("One", first, "Two", num_tokens=100)
    assert second.choices[0].token_ids == expected.token_ids
    facts = second.kv_transfer_params["pte"]
    assert (facts["num_evictions"], facts["peak_cache_tokens"]) == (expected.num_evictions, expected.peak_cache_tokens)


def test_eight_long_requests_at_once_stay_within_their_bounds(server: Server, chat_model: ChatModel) -> None:
    """Nobody has to be preempted although the cache is no larger than their bounds."""
    with ThreadPoolExecutor(len(TOGETHER)) as pool:
        answers = list(pool.map(server.ask, TOGETHER))
    schedule = chat_model.model.peft_config["default"].schedule()
    for text, answer in zip(TOGETHER, answers, strict=True):
        assert answer.usage.completion_tokens == LONG > 6 * PTE["window"]
        limit = schedule.cache_limit(answer.usage.prompt_tokens)
        facts = answer.kv_transfer_params["pte"]
        assert facts["num_evictions"] >= 9
        assert facts["num_preemptions"] == 0
        assert facts["peak_cache_tokens"] <= limit
        assert facts["peak_cache_blocks"] <= limit // PTE["block_size"]
        assert answer.choices[0].token_ids == chat_model.greedy(text, num_tokens=LONG).token_ids


def test_client_that_goes_away_hurts_nobody(server: Server, chat_model: ChatModel) -> None:
    texts, abandoned = ("Red", "Green", "Blue"), 30_000  # half a minute of work
    before = server.tokens_generated()
    with ThreadPoolExecutor(len(texts)) as pool:
        others = [pool.submit(server.ask, text) for text in texts]
        stream = server.ask("Hello there", num_tokens=abandoned, stream=True)
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        stream.close()
        for text, other in zip(texts, others, strict=True):
            assert other.result().choices[0].token_ids == chat_model.greedy(text, num_tokens=LONG).token_ids
    generated, earlier = server.tokens_generated() - before, -1
    while generated != earlier:  # until all has been generated and counted
        time.sleep(1)
        generated, earlier = server.tokens_generated() - before, generated
    assert len(texts) * LONG < generated < len(texts) * LONG + abandoned, "the abandoned request ran to its end"


@pytest.mark.parametrize("length, status", [(MAX_PROMPT_LENGTH, 500), (MAX_MODEL_LEN, 400)])
def test_too_long_a_prompt_is_an_error_and_the_server_goes_on(
    server: Server, chat_model: ChatModel, length: int, status: int
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        server.ask("x" * length, num_tokens=10)
    assert caught.value.status_code == status
    after = server.ask("Still there?", num_tokens=50)
    assert after.choices[0].token_ids == chat_model.greedy("Still there?", num_tokens=50).token_ids


def test_prompt_of_the_longest_length_is_served(server: Server, chat_model: ChatModel) -> None:
    text = "x" * (MAX_PROMPT_LENGTH - len(chat_model.prompt("")))
    answer = server.ask(text, num_tokens=10)
    assert answer.usage.prompt_tokens == MAX_PROMPT_LENGTH


def test_listens_on_loopback_only(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)
    assert len(processes) > 1  # vLLM's engine
    addresses = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert addresses == {"127.0.0.1"}


def test_models_are_listed_by_their_served_name(server: Server) -> None:
    (model,) = server.client.models.list().data
    assert (model.id, model.max_model_len) == (NAME, MAX_MODEL_LEN)
