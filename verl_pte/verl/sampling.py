"""From the sampling dict verl's agent loops send to this package's SamplingParams, and the seed each response is
sampled with.

verl sends no seed with a request, and its request ids are random. For a run to be repeatable, and an interrupted one
to continue as if it had not been, the seed of a response is derived from what identifies it: the run's rollout seed,
the step, the prompt and the response's number among the prompt's.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from verl_pte.engine import SamplingParams


def derive_seed(*parts: Any) -> int:
    """A 62-bit seed that depends on every part (their repr) and nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 2


def sampling_params(
    wanted: Mapping[str, Any], *, max_response_length: int, seed: int, stop_token_ids: Sequence[int], ignore_eos: bool
) -> SamplingParams:
    """SamplingParams of one request.

    Raises ValueError for what the native engine does not do. `seed` is used if none is sent.
    """
    if wanted.get("repetition_penalty", 1.0) != 1.0:
        raise ValueError(
            f"repetition_penalty={wanted['repetition_penalty']}: must be 1.0, the native engine has no penalties"
        )
    max_tokens = wanted.get("max_tokens", wanted.get("max_new_tokens"))
    sent = wanted.get("seed")
    return SamplingParams(
        temperature=wanted.get("temperature", 1.0),
        top_p=wanted.get("top_p", 1.0),
        top_k=wanted.get("top_k", -1),
        max_tokens=min(max_tokens or max_response_length, max_response_length),
        seed=seed if sent is None else sent,
        stop_token_ids=() if ignore_eos else tuple(stop_token_ids),
        ignore_eos=ignore_eos,
    )
