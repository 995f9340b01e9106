"""Our sampling parameters as vLLM's."""

from typing import Any

from verl_pte.engine.sampling import SamplingParams


def vllm_sampling(sampling: SamplingParams, output_kind: str) -> Any:
    """vLLM's SamplingParams for token ids, no text. `output_kind` names one of vLLM's: ``DELTA``, ``FINAL_ONLY``."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VLLMSamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(sampling.top_k, 0),
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        detokenize=False,
        output_kind=RequestOutputKind[output_kind],
    )
