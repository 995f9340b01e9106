"""The four architectures in vLLM with PTE: vLLM's own models, with an adapter in every decoder layer.

`ThoughtModel` is mixed into vLLM's model classes. vLLM builds the model; then each decoder layer gets an adapter, whose
forward hooks add to the layer's linears, and a bounded attention layer. The forward passes are vLLM's, compiled as
vLLM compiles them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from verl_pte.peft.model import check_architecture
from verl_pte.vllm.adapter import LayerAdapter, TokenStates
from verl_pte.vllm.attention import BoundedAttention, Gaps
from verl_pte.vllm.settings import Settings, check
from verl_pte.vllm.states import ThoughtStates
from verl_pte.vllm.version import require_version
from verl_pte.vllm.weights import adapter_tensor, base_name

require_version()


class ThoughtModel(nn.Module):
    """What PTE adds to a vLLM causal LM.

    Attributes:
        thoughts: the requests' states; the model runner tells it what each step runs.
    """

    thoughts: ThoughtStates

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        check(vllm_config)
        self.settings = Settings.of(vllm_config)
        check_architecture(vllm_config.model_config.hf_config)
        config, scheduler = self.settings.pte, vllm_config.scheduler_config
        # The states' shape is part of what is compiled, and vLLM's key for compiled code does not know it.
        vllm_config.additional_config["pte"]["max_num_seqs"] = scheduler.max_num_seqs
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        layers: Any = self.get_submodule(maybe_prefix(prefix, "model")).layers
        device = next(self.parameters()).device
        self.token_states: TokenStates | None = None
        if not config.freeze_state:
            tokens = max(
                scheduler.max_num_batched_tokens, vllm_config.compilation_config.max_cudagraph_capture_size or 0
            )
            self.token_states = TokenStates(len(layers), scheduler.max_num_seqs + 1, tokens, config.rank)
        gaps = Gaps(scheduler.max_num_seqs, device)
        self.adapters: list[LayerAdapter] = []
        pairs = []
        for index, layer in enumerate(layers):
            layer.pte = LayerAdapter(layer, index, config, self.token_states)
            attention = BoundedAttention.in_place_of(layer.self_attn.attn, vllm_config, vllm_config.quant_config)
            attention.gaps = gaps
            layer.self_attn.attn = attention
            self.adapters.append(layer.pte)
            pairs.append((layer.pte, attention))
        self.thoughts = ThoughtStates(config.schedule(), pairs, self.token_states, gaps, scheduler.max_num_seqs)
        self._adapter_loaded = False

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load base weights through vLLM's loader and adapter tensors by their PEFT names, in any mixture.

        The first call, vLLM's own, also loads the adapter named in the settings. Raises ValueError for adapter
        tensors that do not fit.
        """
        if not self._adapter_loaded:
            self._adapter_loaded = True
            if self.settings.adapter is not None:
                self._load_adapter(Path(self.settings.adapter))
        loaded: set[str] = set(super().load_weights(self._base_weights(weights)) or ())
        self.thoughts.forget_weights()
        # vLLM checks that no parameter is left as it was; the adapter's have their initial values by right.
        return loaded | {name for name, _ in self.named_parameters() if ".pte." in name}

    def _base_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if not self._take(name, tensor):
                yield base_name(name), tensor

    def _load_adapter(self, folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        unknown = [name for name, tensor in tensors.items() if not self._take(name, tensor)]
        if unknown:
            raise ValueError(f"adapter={folder}: {unknown[0]!r} is not a tensor of a PTE adapter")
        expected = sum(adapter.num_tensors for adapter in self.adapters)
        if len(tensors) != expected:
            raise ValueError(
                f"adapter={folder}: has {len(tensors)} tensors, the settings make {expected}; "
                "leave pte out to use those the adapter was saved with"
            )

    @torch.no_grad()
    def _take(self, name: str, tensor: Tensor) -> bool:
        """Load an adapter tensor; False for a base weight."""
        place = adapter_tensor(name)
        if place is None:
            return False
        adapter = self.adapters[place.layer] if place.layer < len(self.adapters) else None
        if adapter is not None and place.linear is not None:
            for linear in adapter.linears.values():
                if place.linear in linear.index:
                    linear.load(place.linear, place.matrix, tensor)
                    return True
        elif adapter is not None and adapter.encoder is not None and hasattr(adapter.encoder, place.matrix):
            own = getattr(adapter.encoder, place.matrix).weight
            if own.shape != tensor.shape:
                raise ValueError(
                    f"load_weights: {name!r} has shape {tuple(tensor.shape)}, the rollout model's {tuple(own.shape)}; "
                    "was the adapter made with other settings?"
                )
            own.copy_(tensor)
            return True
        raise ValueError(f"load_weights: the rollout model has no place for {name!r}; compare its PTE settings")


class PTEQwen2ForCausalLM(ThoughtModel, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class PTEQwen3ForCausalLM(ThoughtModel, Qwen3ForCausalLM):
    """Qwen3 (dense)."""


class PTELlamaForCausalLM(ThoughtModel, LlamaForCausalLM):
    """Llama, and its descendants of the same architecture."""


class PTEMistralForCausalLM(ThoughtModel, MistralForCausalLM):
    """Mistral without a sliding window."""
