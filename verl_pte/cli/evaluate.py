"""``verl-pte evaluate``: its options, and what is seen of a run while it goes (verl_pte/eval does it).

On a terminal a progress bar, otherwise a line every twentieth of the run, on standard error; the closing table
(scores.py) on standard output.
"""

from contextlib import AbstractContextManager, closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from verl_pte.cli.errors import INTERRUPTED, fail, user_errors
from verl_pte.cli.responses import ResponseDisplay
from verl_pte.cli.source import (
    Adapter,
    Dtype,
    EngineName,
    Model,
    Options,
    Source,
    WhichEngine,
    check_dtype,
    check_options,
    quiet_vllm,
    vllm_arguments,
)

if TYPE_CHECKING:
    from verl_pte.eval.folder import EvaluationFolder
    from verl_pte.eval.questions import Question
    from verl_pte.eval.settings import EvaluateSettings

_NATIVE_SEQS = 32


class Baseline(StrEnum):
    """The untouched base, under which cache."""

    window = "window"
    full = "full"


def evaluate(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            help="Parquet file of verl's format, or a set's name (docs/evaluation.md); repeat it for several."
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder of the run: items, numbers, figures.")],
    adapter: Adapter = None,
    baseline: Annotated[
        Baseline | None,
        typer.Option(
            help="The untouched base instead: under the window, evicting as the adapter does if one is given, or with "
            "its full cache.",
            show_default="none",
        ),
    ] = None,
    engine: WhichEngine = EngineName.native,
    window: Annotated[
        list[str] | None,
        typer.Option(
            help="Thought tokens the cache holds beyond the pinned ones; 0 or full for a full cache. Several, with "
            "commas, are a sweep.",
            show_default="the adapter's",
        ),
    ] = None,
    max_tokens: Annotated[
        list[str], typer.Option(help="Longest response. Several, with commas, are a sweep at the price of the longest.")
    ] = ["3072"],  # noqa: B006  typer copies it
    n: Annotated[int, typer.Option(help="Samples a row.")] = 1,
    k: Annotated[list[str] | None, typer.Option(help="Of pass@k, up to n.", show_default="1, 2, 4, ... and n")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1 keeps all tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Responses generated at once: memory.", show_default=f"{_NATIVE_SEQS}; vLLM's own with vllm"
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="PATH.PY:FUNCTION",
            help="Scores responses: compute_score(data_source, solution_str, ground_truth, extra_info), as verl's.",
            show_default="equality in mathematics with the ground truth",
        ),
    ] = None,
    text: Annotated[bool, typer.Option(help="Keep the responses' texts among the items.")] = True,
    dtype: Dtype = "auto",
    options: Options = None,
) -> None:
    """Evaluate a model on questions with known answers: pass@1, unbiased pass@k, intervals, lengths and cache.

    Of each row N samples are generated, under each window, with each budget of tokens, and graded. A run that was
    stopped goes on when it is started again with the same options; nothing is done twice.
    """
    with user_errors():
        from verl_pte.eval.settings import EvaluateSettings, parse_counts, parse_windows

        check_options(engine, options)
        check_dtype(dtype)
        settings = EvaluateSettings(
            model=model,
            adapter=adapter,
            baseline=baseline and baseline.value,
            engine=engine.value,
            window=_windows(model, adapter, baseline, parse_windows(window or [])),
            max_tokens=tuple(sorted(parse_counts("max_tokens", max_tokens))),
            n=n,
            k=parse_counts("k", k or []),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            dtype=dtype,
            reward=reward,
            text=text,
        )
        _run(settings, data, output, max_num_seqs, options or [])


def _windows(
    model: str, adapter: str | None, baseline: Baseline | None, given: tuple[int | None, ...]
) -> tuple[int | None, ...]:
    """The windows to go through. Raises ValueError where they contradict the baseline, or are not said."""
    from verl_pte.peft.saved import saved_config

    if baseline is Baseline.full:
        if given not in ((), (None,)):
            raise ValueError("--window: there is none with --baseline full; leave it out, or use --baseline window")
        return (None,)
    if not given and adapter is not None:
        given = (saved_config(adapter).window,)
    if not given:
        raise ValueError(
            "--adapter DIR is missing; for the base model alone give --baseline full, or --baseline window with "
            "--window N, the thought tokens its cache holds"
        )
    if baseline is Baseline.window and None in given:
        raise ValueError("--window full: is no window for --baseline window; use --baseline full")
    return given


def _source(settings: "EvaluateSettings", window: int | None) -> Source:
    return Source(settings.model, settings.adapter, window or 0, settings.baseline is not None)


def _run(
    settings: "EvaluateSettings", data: list[str], output: str, max_num_seqs: int | None, options: list[str]
) -> None:
    from verl_pte.cli.chat import chat_tokenizer
    from verl_pte.eval.folder import EvaluationFolder
    from verl_pte.eval.questions import check_positions, data_files, digest, read_questions
    from verl_pte.eval.run import Evaluation
    from verl_pte.eval.scoring import MathScorer, OwnScorer, reward_digest
    from verl_pte.export.check import check as check_adapter
    from verl_pte.peft.saved import adapter_digest, base_config

    errors, folder = Console(stderr=True, highlight=False), EvaluationFolder(output)
    pte = [_source(settings, window).settings() for window in settings.window][0]
    max_positions = base_config(settings.model).max_position_embeddings
    weights = _source(settings, None).weights
    if weights is not None:
        check_adapter(weights, settings.model)  # PEFT takes one of a base with fewer layers
    scorer = MathScorer() if settings.reward is None else OwnScorer(settings.reward)
    tokenizer = chat_tokenizer(settings.model)
    folder.check_free()
    with errors.status("reading data"):
        try:
            files = data_files(data, folder.data)
        except RuntimeError as error:
            fail(error, 1)
        sets = {name: read_questions(name, path, tokenizer) for name, path in files.items()}
    questions = [question for rows in sets.values() for question in rows]
    check_positions(questions, max(settings.max_tokens), max_positions)
    identity = settings.identity(
        data={name: digest(rows) for name, rows in sets.items()},
        adapter=weights and f"{Path(weights).resolve()}, digest {adapter_digest(weights)}",
        reward=reward_digest(settings.reward),
        evict_fraction=pte.evict_fraction,
        block_size=pte.block_size,
    )
    with folder:
        folder.claim(identity)
        make = _Engines(settings, tokenizer, questions, max_num_seqs, options, errors)
        run = Evaluation(settings, questions, tokenizer, scorer, folder, make)
        todo = sum(len(run.missing(window)) for window in settings.window)
        done = run.num_responses - todo
        if done:
            errors.print(f"{done} of {run.num_responses} responses are there already")
        try:
            with ResponseDisplay(errors, run.num_responses, done) as display:
                run.run(display.show)
        except KeyboardInterrupt:
            errors.print(f"stopped after {display.done} of {run.num_responses} responses; the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        _close(folder, settings)


def _close(folder: "EvaluationFolder", settings: "EvaluateSettings") -> None:
    """Write the numbers and the figures, and print the table."""
    from verl_pte.cli.scores import scores_table
    from verl_pte.eval.plot import plot
    from verl_pte.eval.summary import summarize

    summary = summarize(folder.records(), settings.ks)
    folder.write_summary(summary)
    plot(summary, folder.records(), folder.path)
    console = Console()
    # Rows of a table in a file or a pipe are not to be broken.
    (console if console.is_terminal else Console(width=200)).print(scores_table(summary))
    typer.echo(f"numbers: {folder.summary}")


class _Engines:
    """Makes the engine of a window. The native model is loaded once, vLLM's once a window: its blocks depend on it."""

    def __init__(
        self,
        settings: "EvaluateSettings",
        tokenizer: Any,
        questions: "list[Question]",
        max_num_seqs: int | None,
        options: list[str],
        errors: Console,
    ) -> None:
        self.settings, self.tokenizer, self.max_num_seqs = settings, tokenizer, max_num_seqs
        self.options, self.errors = options, errors
        self.longest_prompt = max(len(question.prompt) for question in questions)
        self.longest_response = max(settings.max_tokens)
        self._model: Any = None

    def __call__(self, window: int | None, num_responses: int) -> AbstractContextManager:
        source = _source(self.settings, window)
        if self.settings.engine == EngineName.vllm:
            return closing(self._vllm(source))
        return self._native(source, min(self.max_num_seqs or _NATIVE_SEQS, num_responses))

    @contextmanager
    def _native(self, source: Source, max_num_seqs: int) -> Any:
        from verl_pte.engine import RolloutEngine

        if self._model is None:
            with self.errors.status(f"loading {source.model}"):
                self._model = source.load(self.settings.dtype)
        engine = RolloutEngine(
            self._model,
            self.tokenizer,
            max_num_seqs=max_num_seqs,
            max_prompt_length=self.longest_prompt,
            max_response_length=self.longest_response,
            dtype=next(self._model.get_base_model().parameters()).dtype,
            schedule=source.settings().schedule(),
        )
        try:
            yield engine
        finally:
            engine.abort()
            engine.sleep()

    def _vllm(self, source: Source) -> Any:
        quiet_vllm()
        named = {
            "dtype": self.settings.dtype,
            "max-model-len": self.longest_prompt + self.longest_response,
            "max-num-seqs": self.max_num_seqs,
        }
        args = vllm_arguments(source, self.longest_prompt, named, ["--no-use-tqdm-on-load", *self.options])
        from verl_pte.vllm.batch import VLLMBatch

        with self.errors.status(f"starting vLLM on {source.model}"):
            return VLLMBatch(args)
