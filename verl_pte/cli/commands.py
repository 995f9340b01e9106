"""The command line's `serve` and `generate`: what they are told, and what they start.

What commands share is in source.py. Left out: the server (verl_pte/vllm/serve.py), the chat (chat.py, terminal.py,
display.py), and the other commands, which are files of their own.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from verl_pte.cli.doctor import doctor
from verl_pte.cli.errors import INTERRUPTED, user_errors
from verl_pte.cli.evaluate import evaluate
from verl_pte.cli.export import export
from verl_pte.cli.plan import plan
from verl_pte.cli.prepare_data import prepare_data
from verl_pte.cli.source import (
    Adapter,
    Dtype,
    EngineName,
    Model,
    Options,
    Source,
    WhichEngine,
    check_options,
    quiet_vllm,
    vllm_arguments,
)
from verl_pte.cli.warm_start import warm_start

if TYPE_CHECKING:
    from verl_pte.engine.stream import Streamer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Models trained with Progressive Thought Encoding, under a bounded KV cache.",
)


app.command("prepare-data")(prepare_data)
app.command("warm-start")(warm_start)
app.command()(plan)
app.command()(evaluate)
app.command()(export)
app.command()(doctor)


Window = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Thought tokens the cache holds beyond the pinned ones; 0 for a full cache. To be given where there is no "
        "adapter, which is the untouched base model.",
        show_default="the adapter's",
    ),
]


@app.command()
def serve(
    model: Model,
    adapter: Adapter = None,
    window: Window = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Prompt and answer together.", show_default="the model's positions")
    ] = None,
    max_prompt_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest prompt, which with the window bounds what a request may hold. A longer one gets HTTP 500; "
            "the log says why.",
            show_default="max-model-len",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="--model")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="As vLLM's: auto runs float32 checkpoints in 16 bits, float32 keeps them.")
    ] = "auto",
    options: Options = None,
) -> None:
    """Serve a model under PTE with vLLM's OpenAI-compatible HTTP server, at constant memory per request.

    The prompt is never evicted; of the answer the last WINDOW tokens stay in the cache. Every response that is not
    streamed says in its field kv_transfer_params, under "pte": num_evictions, peak_cache_tokens (most tokens a layer
    held), peak_cache_blocks and num_preemptions.

    There is no password unless you give one: -- --api-key KEY.
    """
    named = {
        "host": host,
        "port": port,
        "max-model-len": max_model_len,
        "served-model-name": served_model_name,
        "dtype": dtype,
    }
    with user_errors():
        args = vllm_arguments(Source(model, adapter, window), max_prompt_length, named, options)
        from verl_pte.vllm.serve import serve as run

        run(args)


@app.command()
def generate(
    model: Model,
    adapter: Adapter = None,
    engine: WhichEngine = EngineName.native,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and end.", show_default="chat in a terminal, else standard input")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    max_prompt_length: Annotated[
        int, typer.Option(min=1, help="Longest prompt, the history of the chat included.")
    ] = 8192,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.", show_default="random")] = None,
    window: Window = None,
    dtype: Dtype = "auto",
    options: Options = None,
) -> None:
    """Talk to a model under PTE, and watch its cache.

    In a terminal this is a chat: Ctrl-C stops an answer, /clear forgets the conversation, exit or Ctrl-D ends it. What
    was said before becomes part of the next prompt, and a prompt is never evicted: the bound on the cache grows with
    the conversation, not with the length of an answer.

    With --prompt, or where input or output is not a terminal, it answers once: the text goes to standard output, the
    numbers to standard error.
    """
    source = Source(model, adapter, window)
    interactive = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    with user_errors():
        from verl_pte.cli.chat import Chat, chat_tokenizer
        from verl_pte.cli.terminal import answer_once, converse
        from verl_pte.engine import SamplingParams

        sampling = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
        check_options(engine, options)
        source.settings()  # what is wrong with it comes first
        tokenizer = chat_tokenizer(model)
        waiting = Console(stderr=True).status(f"loading {model}") if interactive else nullcontext()
        with waiting:
            if engine is EngineName.vllm:
                streamer = _vllm_streamer(source, dtype, max_prompt_length, options or [])
            else:
                streamer = _native_streamer(source, tokenizer, dtype, max_prompt_length)
        chat = Chat(streamer, tokenizer, sampling)
        if interactive:
            converse(chat)
        elif not answer_once(chat, sys.stdin.read() if prompt is None else prompt):
            raise typer.Exit(INTERRUPTED)


def _vllm_streamer(source: Source, dtype: str, max_prompt_length: int, options: Sequence[str]) -> "Streamer":
    quiet_vllm()
    named = {"dtype": dtype}
    args = vllm_arguments(source, max_prompt_length, named, ["--no-use-tqdm-on-load", *options])
    from verl_pte.vllm.stream import VLLMStreamer

    return VLLMStreamer(args, max_prompt_length)


def _native_streamer(source: Source, tokenizer: Any, dtype: str, max_prompt_length: int) -> "Streamer":
    from verl_pte.engine.stream import NativeStreamer

    return NativeStreamer(source.load(dtype), tokenizer, max_prompt_length)
