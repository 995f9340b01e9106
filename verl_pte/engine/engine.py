"""RolloutEngine: continuous batching over fixed slots.

A request waits until a row of the bounded cache is free, is prefilled in chunks, and decodes one token a step beside
whatever else is running; the row goes to the next request the moment it finishes. Memory is allocated once, at
construction (and again after `sleep`), and does not depend on how much is generated.

Left out: tensor parallelism and paging (the vLLM engine has them), preemption (a row is never taken away).

Shape suffixes: B rows, V vocabulary.
"""

import gc
import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from verl_pte.core.cache import BoundedCache
from verl_pte.core.schedule import Schedule
from verl_pte.core.transfer import upload
from verl_pte.engine.forward import Forward
from verl_pte.engine.request import RolloutOutput, RunningSequence
from verl_pte.engine.sampling import SamplingParams, sample
from verl_pte.peft import head_dim, pte_config


class RolloutEngine:
    """Generates under the model's bounded cache.

    Args:
        model: from ``verl_pte.attach`` or ``PeftModel.from_pretrained``; put into eval mode and, if asked, cast and
            moved.
        tokenizer: only its end-of-sequence token is used; without one the model's generation config says what ends a
            response.
        max_num_seqs: rows, i.e. sequences decoded at once.
        max_prompt_length, max_response_length: in tokens; size the rows and bound requests.
        dtype, device: of the model and cache; None leaves the model as it is.
        schedule: in place of the model's, e.g. its ``full()`` for a teacher.
        compile: run decode steps through torch.compile.
        cuda_graph: capture decode steps on a CUDA device.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        max_num_seqs: int,
        max_prompt_length: int,
        max_response_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        schedule: Schedule | None = None,
        compile: bool = False,
        cuda_graph: bool = True,
    ) -> None:
        sizes = {
            "max_num_seqs": max_num_seqs,
            "max_prompt_length": max_prompt_length,
            "max_response_length": max_response_length,
        }
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"{key}={value}: must be at least 1")
        self.config = pte_config(model)
        self.schedule = schedule or self.config.schedule()
        limit = model.config.max_position_embeddings
        if max_prompt_length + max_response_length > limit:
            raise ValueError(
                f"max_prompt_length={max_prompt_length} + max_response_length={max_response_length} exceeds the "
                f"model's max_position_embeddings={limit}: shorten them, or load a base model with more positions"
            )
        if compile and model.config._attn_implementation == "flash_attention_2":
            raise ValueError(
                "compile=True: torch.compile cannot follow flash-attn's decoding kernel; leave it out, or load the "
                "model with attn_implementation='sdpa'"
            )
        self.model = _placed(model, device, dtype).eval()
        self.max_num_seqs, self.max_prompt_length = max_num_seqs, max_prompt_length
        self.max_response_length = max_response_length
        self.vocab_size = model.get_base_model().get_input_embeddings().num_embeddings
        self.eos_ids = _eos_ids(model, tokenizer)
        self._compile, self._cuda_graph = compile, cuda_graph
        self._waiting: deque[RunningSequence] = deque()
        self._running: dict[int, RunningSequence] = {}  # row -> sequence
        self.cache: BoundedCache | None = None
        self._forward: Forward | None = None
        self.wake()

    # -- offline
    # ----------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        progress: bool = False,
    ) -> list[RolloutOutput]:
        """Responses to all prompts, prompt-major: with n = 2, outputs 0 and 1 answer prompt 0.

        `sampling` is one for all or one each. Raises ValueError for a prompt or parameters that cannot be served,
        before anything runs, and RuntimeError while other requests are in the engine.
        """
        if self.has_unfinished:
            raise RuntimeError("generate() needs an idle engine: requests added with add_request() are unfinished")
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(
                f"sampling: {len(each)} SamplingParams for {len(prompts)} prompts; give one, or one for each"
            )
        sequences = []
        for index, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            sequences += [self._sequence((index, i), index, prompt, params, i) for i in range(params.n)]
        order = {s.request_id: i for i, s in enumerate(sequences)}
        self._waiting.extend(sequences)
        outputs: list[RolloutOutput | None] = [None] * len(sequences)
        with tqdm(total=len(sequences), desc="rollout", unit="seq", disable=not progress) as bar:
            try:
                while self.has_unfinished:
                    for output in self.step():
                        outputs[order[output.request_id]] = output
                        bar.update()
            except BaseException:
                self.abort(None)
                raise
        return [output for output in outputs if output is not None]

    # -- online
    # -----------------------------------------------------------------------------------------------------------

    def add_request(self, request_id: Any, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Queue one prompt (n must be 1). Raises ValueError if it cannot be served."""
        if sampling.n != 1:
            raise ValueError(f"n={sampling.n}: add_request serves one response; add n requests")
        if any(s.request_id == request_id for s in (*self._waiting, *self._running.values())):
            raise ValueError(f"request_id={request_id!r}: already in the engine")
        self._waiting.append(self._sequence(request_id, 0, prompt, sampling, 0))

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> list[RunningSequence]:
        """What holds a row, with what it has generated so far; to be read only."""
        return list(self._running.values())

    @torch.no_grad()
    def step(self) -> list[RolloutOutput]:
        """Prefill into free rows, then decode one token of every running sequence; returns what finished."""
        if self.cache is None:
            raise RuntimeError("the engine sleeps: call wake() first")
        finished = []
        if self._waiting and len(self._running) < self.max_num_seqs:
            assert self._forward is not None
            if not self._running:  # weights may have changed since
                self._forward.refresh()
            free = [row for row in range(self.max_num_seqs) if row not in self._running]
            rows = free[: len(self._waiting)]
            self._running.update((row, self._waiting.popleft()) for row in rows)
            finished += self._take(rows, self._prefill(rows))
        if self._running:
            finished += self._take(sorted(self._running), self._decode())
        return finished

    def abort(self, request_id: Any = None) -> list[RolloutOutput]:
        """Stop one request, or all with None; returns what they had generated, with finish reason "abort"."""
        gone = [s for s in self._waiting if request_id is None or s.request_id == request_id]
        self._waiting = deque(s for s in self._waiting if s not in gone)
        outputs = [s.output("abort", 0) for s in gone]
        for row, sequence in list(self._running.items()):
            if request_id is None or sequence.request_id == request_id:
                outputs.append(self._finish(row, "abort"))
        return outputs

    # -- weights and memory
    # -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        """Copy tensors into the model by its own state_dict names; returns how many.

        Raises ValueError for an unknown name or a wrong shape, RuntimeError while sequences run under the old weights.
        """
        if self._running:
            raise RuntimeError(
                f"{len(self._running)} sequences are running: finish or abort them before loading weights"
            )
        own, count = self.model.state_dict(keep_vars=True), 0
        for name, tensor in weights:
            if name not in own:
                raise ValueError(f"load_weights: no parameter {name!r} in the rollout model")
            if own[name].shape != tensor.shape:
                raise ValueError(
                    f"load_weights: {name!r} has shape {tuple(tensor.shape)}, "
                    f"the rollout model's {tuple(own[name].shape)}"
                )
            own[name].copy_(tensor)
            count += 1
        return count

    def sleep(self) -> None:
        """Free the cache and its CUDA graphs. Raises RuntimeError while sequences run; waiting requests stay."""
        if self._running:
            raise RuntimeError(f"{len(self._running)} sequences are running: finish or abort them before sleep()")
        self.cache, self._forward = None, None
        gc.collect()  # a compiled forward refers back to itself
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Allocate the cache again; does nothing when awake."""
        if self.cache is not None:
            return
        model_config = self.model.config
        parameter = next(self.model.parameters())
        self.cache = BoundedCache(
            self.schedule,
            num_rows=self.max_num_seqs,
            max_prompt_length=self.max_prompt_length,
            max_thoughts=self.max_response_length,
            num_layers=model_config.num_hidden_layers,
            num_kv_heads=model_config.num_key_value_heads,
            head_dim=head_dim(model_config),
            rank=self.config.rank,
            dtype=parameter.dtype,
            device=parameter.device,
            adapter_dtype=next(p.dtype for name, p in self.model.named_parameters() if "lora_A" in name),
        )
        self._peak_B = torch.zeros(self.max_num_seqs, dtype=torch.long, device=parameter.device)
        on_gpu = parameter.device.type == "cuda"
        self._forward = Forward(self.model, self.cache, cuda_graph=self._cuda_graph and on_gpu, compile=self._compile)

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for the cache now; 0 asleep."""
        return 0 if self.cache is None else self.cache.num_bytes

    # -- inside
    # -----------------------------------------------------------------------------------------------------------

    def _sequence(
        self, request_id: Any, prompt_index: int, prompt: Sequence[int], params: SamplingParams, sample_index: int
    ) -> RunningSequence:
        prompt = [int(t) for t in prompt]
        if not 1 <= len(prompt) <= self.max_prompt_length:
            raise ValueError(
                f"prompt of {len(prompt)} tokens: must have 1 to max_prompt_length={self.max_prompt_length}"
            )
        if params.max_tokens > self.max_response_length:
            raise ValueError(f"max_tokens={params.max_tokens}: exceeds max_response_length={self.max_response_length}")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise ValueError(
                f"prompt token ids reach from {min(prompt)} to {max(prompt)}: must be in [0, {self.vocab_size})"
            )
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        seed = None if params.seed is None else params.seed + sample_index
        return RunningSequence(request_id, prompt_index, prompt, params, stop_ids, random.Random(seed))

    def _prefill(self, rows: list[int]) -> Tensor:
        """Run the prompts of freshly taken rows; logits after each prompt's last token [len(rows), V]."""
        assert self.cache is not None and self._forward is not None
        sequences = [self._running[row] for row in rows]
        prompt_lens = [len(s.prompt) for s in sequences]
        plans = [self.schedule.chunks(n, n, self.config.chunk_tokens) for n in prompt_lens]
        self._peak_B.index_fill_(0, upload(rows, self._peak_B.device), 0)
        last: list[Tensor | None] = [None] * len(rows)
        for index in range(max(map(len, plans))):
            busy = [i for i, plan in enumerate(plans) if index < len(plan)]
            chunks = [plans[i][index] for i in busy]
            step = self.cache.plan([rows[i] for i in busy], chunks, [prompt_lens[i] for i in busy])
            width = step.positions.shape[1]
            tokens = [sequences[i].prompt[c.start : c.end] for i, c in zip(busy, chunks, strict=True)]
            padded = upload([t + [0] * (width - len(t)) for t in tokens], self.cache.device)
            logits_BV = self._forward.prefill(padded, step)
            for k, i in enumerate(busy):
                last[i] = logits_BV[k]
        for sequence, n in zip(sequences, prompt_lens, strict=True):
            sequence.next_eviction = self.schedule.next_boundary(n, n - 1)
        return torch.stack([logits for logits in last if logits is not None])

    def _decode(self) -> Tensor:
        """Run every running sequence's newest token; logits [len(running), V], in row order."""
        assert self.cache is not None and self._forward is not None
        tokens, positions = [0] * self.max_num_seqs, [-1] * self.max_num_seqs
        evicting = []
        for row, sequence in self._running.items():
            positions[row], tokens[row] = sequence.position, sequence.token_ids[-1]
            if positions[row] == sequence.next_eviction:
                evicting.append(row)
        if evicting:
            self._evict(evicting)
        logits_BV = self._forward.decode(upload([tokens, positions], self.cache.device))
        if len(self._running) == self.max_num_seqs:
            return logits_BV
        return logits_BV[upload(sorted(self._running), logits_BV.device)]

    def _evict(self, rows: list[int]) -> None:
        """Oldest tokens leave these rows, as the schedule has it for the tokens they are about to run."""
        assert self.cache is not None
        self._note_peaks(rows)
        spans = []
        for row in rows:
            sequence = self._running[row]
            span = self.schedule.evicted_at(len(sequence.prompt), sequence.position)
            assert span is not None
            spans.append(span)
            sequence.num_evictions += 1
            sequence.next_eviction = self.schedule.next_boundary(len(sequence.prompt), sequence.position)
        self.cache.evict(rows, spans)

    def _note_peaks(self, rows: list[int]) -> None:
        """What rows hold only grows until they evict or finish: it is counted then."""
        assert self.cache is not None
        rows_E = upload(rows, self._peak_B.device)
        self._peak_B[rows_E] = torch.maximum(self._peak_B[rows_E], self.cache.occupancy(rows_E))

    def _take(self, rows: list[int], logits_BV: Tensor) -> list[RolloutOutput]:
        """Sample a token for each row, and let go of those that finish."""
        sequences = [self._running[row] for row in rows]
        uniform = [s.random_stream.random() for s in sequences]
        tokens_B, log_probs_B = sample(logits_BV, [s.params for s in sequences], uniform)
        finished = []
        drawn_2B = torch.stack((tokens_B.double(), log_probs_B.double()))  # both are exact, and come back at once
        for row, sequence, token, log_prob in zip(rows, sequences, *drawn_2B.tolist(), strict=True):
            reason = sequence.append(int(token), log_prob)
            if reason is not None:
                finished.append(self._finish(row, reason))
        return finished

    def _finish(self, row: int, reason: str) -> RolloutOutput:
        self._note_peaks([row])
        return self._running.pop(row).output(reason, int(self._peak_B[row]))


def _placed(model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """`model` on the device with its parameters cast; unlike ``Module.to`` this leaves buffers in their precision.

    RoPE's frequencies are a float32 buffer: in bfloat16 they would turn every position by another angle than the
    learner's.
    """
    if device is not None:
        model = model.to(device)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def _eos_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    generation_config = getattr(model.get_base_model(), "generation_config", None)
    ids = getattr(generation_config, "eos_token_id", None)
    out = set(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        out.add(tokenizer.eos_token_id)
    return frozenset(out)
