"""The PTE tuner: puts adapters on a decoder's linears and a thought encoder into each decoder layer.

The state reaches the linears through a forward pre-hook on the decoder layer: it asks the call's `ThoughtCache` for
the layer's state (which applies a pending eviction) and lends it to the layer's `PTELinear`s until the layer's
forward ends. It runs inside the layer's own forward because that is where FSDP has gathered the layer's parameters.
The rollout engine's `BoundedCache` moves its states between calls and only lends them; its calls take the fused way
through the linears (shared_input.py).
Without a `ThoughtCache` (a plain ``model(input_ids)``) nothing is ever evicted, and the initial state holds: the
full-cache result.

Left out: more than one PTE adapter on a model, and merging (refused, see layer.py).
"""

import inspect
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from verl_pte.config import PTEConfig
from verl_pte.core import flash
from verl_pte.core.attention import BACKENDS
from verl_pte.core.cache import BoundedCache, ThoughtCache
from verl_pte.core.encoder import ThoughtEncoder
from verl_pte.peft.layer import MERGE_REFUSED, PTELinear, ThoughtEncoderLayer
from verl_pte.peft.shared_input import SHARED_INPUTS, Lent, SharedInput

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
AttentionInterface.register(flash.NAME, flash.flash_attention)


class PTEModel(BaseTuner):
    """Base model with PTE adapters; made by ``get_peft_model(model, PTEConfig(...))``."""

    prefix = "pte_"
    tuner_layer_cls = (PTELinear, ThoughtEncoderLayer)
    target_module_mapping: dict[str, list[str]] = {}

    def _check_new_adapter_config(self, config: PTEConfig) -> None:
        if len(self.peft_config) > 1:
            raise ValueError(
                f"the model already has a PTE adapter ({', '.join(self.peft_config)}): one a model is supported"
            )

    def _prepare_model(self, peft_config: PTEConfig, model: nn.Module) -> None:
        _check_base(model, peft_config)

    def _create_and_replace(
        self,
        peft_config: PTEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, nn.Linear):
            raise ValueError(
                f"target_modules names {current_key!r}, a {type(target).__name__}: only nn.Linear can be adapted"
            )
        if ".layers." not in f".{current_key}":
            raise ValueError(f"target_modules names {current_key!r}: only linears inside decoder layers can be adapted")
        self._replace_module(parent, target_name, PTELinear(target, adapter_name, peft_config), target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target linears, then give every decoder layer its encoder and its hooks."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        kv_dim = model.config.num_key_value_heads * head_dim(model.config)
        for index, layer in enumerate(decoder_layers(model)):
            if not config.freeze_state:
                like = next(m for m in layer.modules() if isinstance(m, nn.Linear))
                layer.thought_encoder = ThoughtEncoderLayer(kv_dim, adapter_name, config, like)
            _install_hooks(layer, index)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused with the reason (ValueError)."""
        raise ValueError(MERGE_REFUSED)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused with the reason (ValueError)."""
        raise ValueError(MERGE_REFUSED)

    def unload(self) -> nn.Module:
        """Take the adapters off and return the base model."""
        for layer in decoder_layers(self.model):
            for name in ("_pte_groups", "_pte_lent"):
                layer.__dict__.pop(name, None)
            for handle in layer.__dict__.pop("_pte_hooks", ()):
                handle.remove()
            if hasattr(layer, "thought_encoder"):
                del layer.thought_encoder
        return super().unload()


def attach(model: PreTrainedModel, config: PTEConfig) -> PeftModel:
    """Freeze `model` and put a trainable PTE adapter on it; ``lora_B`` is zero, so it starts as the base model.

    Raises ValueError for unsupported architectures, attention implementations and target modules.
    """
    _check_base(model, config)  # before PEFT's own, less direct complaints
    return get_peft_model(model, config)


def pte_tuner(model: nn.Module) -> PTEModel:
    """The tuner inside an attached model (a PeftModel, or one wrapped further). Raises ValueError if there is none."""
    for module in model.modules():
        if isinstance(module, PTEModel):
            return module
    raise ValueError(f"{type(model).__name__} has no PTE adapter: call verl_pte.attach(model, PTEConfig(...)) first")


def pte_config(model: nn.Module) -> PTEConfig:
    """The PTEConfig an attached model was made with."""
    (config,) = pte_tuner(model).peft_config.values()
    return config


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers causal LM (unwrapped, or within its tuner)."""
    inner = model.model
    while not isinstance(getattr(inner, "layers", None), nn.ModuleList):
        inner = inner.model
    return inner.layers


def head_dim(config: Any) -> int:
    """Width of an attention head of a transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_architecture(model_config: Any) -> None:
    """Raise ValueError unless PTE supports the transformers config's architecture, attention span and RoPE."""
    kind = getattr(model_config, "model_type", type(model_config).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type={kind!r}: PTE supports {', '.join(ARCHITECTURES)}")
    layer_types = getattr(model_config, "layer_types", None) or ()
    if "sliding_attention" in layer_types or (kind == "mistral" and model_config.sliding_window is not None):
        raise ValueError(
            f"sliding_window={model_config.sliding_window}: the base model's own sliding window "
            "would be lost under PTE's; where sequences never exceed it, load the model with sliding_window=None"
        )
    rope_type = (getattr(model_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"rope_type={rope_type!r}: changes the rotation with the length seen so far: cached keys and a replay "
            "would disagree; use a model with a fixed one (default, linear, llama3, yarn)"
        )


def _check_base(model: nn.Module, config: PTEConfig) -> None:
    model_config: Any = getattr(model, "config", model)
    check_architecture(model_config)
    attention = model_config._attn_implementation
    if attention not in BACKENDS:
        raise ValueError(
            f"attn_implementation={attention!r}: must be one of {', '.join(BACKENDS)}; "
            "load the model with attn_implementation='sdpa'"
        )
    if isinstance(config.target_modules, set):
        linears = {n.rpartition(".")[2] for n, m in decoder_layers(model).named_modules() if isinstance(m, nn.Linear)}
        unknown = sorted(t for t in config.target_modules if t.rpartition(".")[2] not in linears)
        if unknown:
            raise ValueError(
                f"target_modules={unknown}: no such linear in a {model_config.model_type} decoder layer, which has "
                f"{sorted(linears)}"
            )


def _install_hooks(layer: nn.Module, index: int) -> None:
    # Read off the layer when a hook runs: a deep copy of the layer then has its own.
    layer._pte_groups, layer._pte_lent = _group_linears(layer), Lent()
    parameters = list(inspect.signature(layer.forward).parameters)
    for linear in layer.modules():
        if isinstance(linear, PTELinear):
            linear.lent = layer._pte_lent

    def lend_state(module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = dict(zip(parameters, args, strict=False)) | kwargs
        cache, lent = call.get("past_key_values"), module._pte_lent
        lent.fused = isinstance(cache, BoundedCache)
        lent.state_BRR = _state(module, index, call["hidden_states"], cache)

    def take_back(module: nn.Module, args: tuple, output: Any) -> None:
        lent = module._pte_lent
        lent.state_BRR = None  # a state kept here would keep its whole graph alive
        if lent.fused:
            lent.fused = False
            for group in module._pte_groups:
                group.forget()

    layer._pte_hooks = (
        layer.register_forward_pre_hook(lend_state, with_kwargs=True),
        layer.register_forward_hook(take_back, always_call=True),
    )


def _group_linears(layer: nn.Module) -> list[SharedInput]:
    """Give every adapted linear its place in a group; linears of unknown names stand alone."""
    named = {n.rpartition(".")[2]: m for n, m in layer.named_modules() if isinstance(m, PTELinear)}
    known = {name for names in SHARED_INPUTS for name in names}
    groups = []
    for names in (*SHARED_INPUTS, *((name,) for name in named if name not in known)):
        linears = [named[name] for name in names if name in named]
        if linears:
            group = SharedInput([linear.pte_adapter[linear.active_adapters[0]] for linear in linears])
            groups.append(group)
            for place, linear in enumerate(linears):
                linear.group = (group, place)
    return groups


def refresh_shared_inputs(model: nn.Module) -> None:
    """Let the fused way take over the adapter's parameters as they are now (model as in `decoder_layers`)."""
    for layer in decoder_layers(model):
        for group in layer._pte_groups:
            group.refresh()


def thought_encoders(model: nn.Module) -> list[ThoughtEncoder] | None:
    """The active encoder of each decoder layer; None while adapters are disabled, or if the state is frozen."""
    holders = [getattr(layer, "thought_encoder", None) for layer in decoder_layers(model)]
    encoders = [holder.encoder for holder in holders if holder is not None and holder.encoder is not None]
    return encoders or None


def _state(layer: nn.Module, index: int, hidden_states: Tensor, cache: Any) -> Tensor | None:
    holder = getattr(layer, "thought_encoder", None)
    encoder = None if holder is None else holder.encoder
    if encoder is None:
        return None
    if isinstance(cache, BoundedCache):
        return cache.thought_state(index, encoder)
    with encoder.gathered():
        if isinstance(cache, ThoughtCache):
            state_BRR = cache.thought_state(index, encoder)
        else:
            state_BRR = encoder.initial_state(hidden_states.shape[0])
        if torch.is_grad_enabled():
            # Ranks of FSDP reduce the same gradients only if every parameter has one, also where nothing was evicted.
            state_BRR = state_BRR + encoder.touch()
    return state_BRR
