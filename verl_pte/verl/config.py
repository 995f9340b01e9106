"""PTEModelConfig: verl's model config with a typed ``pte:`` block.

Chosen by ``actor_rollout_ref.model._target_``. Building it is what switches a process over to PTE: it validates the
block, refuses model settings the replay cannot honour, and registers the training engines, the rollout and the agent
loop with verl. verl builds it in the trainer, in every training worker, agent loop worker and rollout server.

What lies between this block and others (lengths, rollout options) is checked in checks.py.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

from verl.workers.config import HFModelConfig

MODEL_TYPE = "pte_language_model"
_TARGETS = "model.pte.target_modules"


@dataclass
class PTEModelConfig(HFModelConfig):
    """HFModelConfig plus ``pte``, a PTEConfig (in YAML: its keys).

    Raises ValueError naming the key, its value and what is right.
    """

    _mutable_fields = HFModelConfig._mutable_fields | {"pte", "lora", "lora_rank", "override_config"}

    model_type: str = MODEL_TYPE
    use_remove_padding: bool = False
    enable_gradient_checkpointing: bool = False
    pte: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_plugin()
        self.pte = parse_pte_block(self.pte)
        check_model_settings(self, self.pte)
        self.override_config: dict = {"attn_implementation": "sdpa", **self.override_config}
        super().__post_init__()
        # verl's name for "has an adapter": makes its FSDP engine build one and wrap adapter weights by FSDP1's
        # called-leaf rule.
        self.lora_rank = self.pte.rank

        from verl_pte.verl import components

        components.register()


def require_plugin() -> None:
    """Raise RuntimeError, with the reason, unless verl loaded this package's plugin and it registered everything."""
    plugin = sys.modules.get("verl_pte.verl.plugin")
    if plugin is None:
        raise RuntimeError(
            "verl did not load the verl_pte plugin, without which a PTE model can be neither trained nor served. verl "
            "loads the entry points of the group `verl.plugins` when it is imported: install this package into "
            "the environment "
            "that runs (`pip show verl-pte`), and leave VERL_USE_EXTERNAL_PLUGINS unset, `auto`, or a list "
            "containing `verl_pte`. `python -c 'import verl_pte.verl.plugin'` shows whether it can be imported."
        )
    if plugin.failure is not None:
        reason = plugin.failure
        raise RuntimeError(
            f"the verl_pte plugin could not register with verl: {type(reason).__name__}: {reason}"
        ) from reason


def parse_pte_block(block: Any) -> Any:
    """The PTEConfig a ``pte:`` block stands for. Raises ValueError for unknown keys and bad values."""
    from verl_pte.config import PTEConfig

    if isinstance(block, PTEConfig):
        return block
    if not isinstance(block, Mapping):
        raise ValueError(f"model.pte={block!r}: must be a block of PTE settings, e.g. {{window: 1024}}")
    known = [name for name, _, _ in PTEConfig.knobs()]
    unknown = sorted(set(block) - set(known))
    if unknown:
        raise ValueError(f"model.pte.{unknown[0]}={block[unknown[0]]!r}: no such setting; known are {', '.join(known)}")
    values: dict[str, Any] = {
        key: list(value) if key == "target_modules" and not isinstance(value, str) else value
        for key, value in block.items()
    }
    try:
        return PTEConfig(**values)
    except ValueError as error:
        raise ValueError(f"model.pte: {error}") from None


def _check_lora_is_default(lora: Mapping) -> None:
    # verl's `lora` block is Megatron's; of it only `rank` says something here.
    from omegaconf import OmegaConf

    path = files("verl.trainer.config") / "model" / "hf_model.yaml"
    for key, default in OmegaConf.create(path.read_text()).lora.items():
        if key not in ("rank", "merge") and lora.get(key, default) != default:
            ours = {"alpha": "model.pte.alpha", "target_modules": _TARGETS, "exclude_modules": _TARGETS}.get(key)
            raise ValueError(
                f"model.lora.{key}={lora[key]!r}: must be {default!r}, verl's default, it would be ignored; "
                + (f"set {ours}" if ours else "PTE has no such setting (see model.pte)")
            )


def check_model_settings(model: Any, pte: Any) -> None:
    """Raise ValueError for a setting of the model block that contradicts PTE.

    `model` is a mapping or a model config.
    """
    defaults = {f.name: f.default for f in fields(PTEModelConfig)}

    def require(key: str, right: Any, why: str) -> None:
        value = model.get(key, defaults.get(key))
        if value != right:
            raise ValueError(f"model.{key}={value!r}: must be {right!r}, {why}")

    require("model_type", MODEL_TYPE, "which selects the PTE training engine")
    require(
        "use_remove_padding",
        False,
        "the replay advances the sequences of a micro-batch in step instead of packing them",
    )
    require("enable_gradient_checkpointing", False, "the replay already holds the activations of one chunk only")
    require("enable_activation_offload", False, "the replay already holds the activations of one chunk only")
    require("use_fused_kernels", False, "fused heads bypass the replay's log-probs")
    require("use_liger", False, "its fused MLP bypasses the adapted linears")
    why = "PTE is the adapter; its settings are in model.pte (freeze_state: true makes it plain LoRA)"
    require("lora_rank", 0, why)
    require("lora_alpha", defaults["lora_alpha"], "verl's default, it would be ignored; set model.pte.alpha")
    named = f"adapted modules are named in {_TARGETS}"
    for key, right in (("target_modules", "all-linear"), ("exclude_modules", None), ("target_parameters", None)):
        require(key, right, named)
    for key, why_not in (
        ("tiled_mlp.enabled", "a tiled MLP bypasses the adapted linears"),
        *((f"mtp.{key}", "PTE has no multi-token prediction") for key in ("enable", "enable_train", "enable_rollout")),
    ):
        block, name = key.split(".")
        value = (model.get(block, None) or {}).get(name, False)
        if value:
            raise ValueError(f"model.{key}={value!r}: must be False, {why_not}")
    lora = model.get("lora", None) or {}
    _check_lora_is_default(lora)
    if lora.get("merge", False):
        raise ValueError(
            "model.lora.merge=True: must be False, a PTE adapter cannot be merged (its update depends on the sequence)"
        )
    if lora.get("rank", 0) != pte.rank:
        raise ValueError(
            f"model.lora.rank={lora.get('rank', 0)}: must be {pte.rank}, the value of model.pte.rank. verl takes "
            "it as the sign that the reference policy is the actor without its adapter; write `lora: "
            "{rank: ${..pte.rank}}`. " + why
        )
    from verl_pte.core.attention import BACKENDS

    attention = (model.get("override_config", None) or {}).get("attn_implementation", "sdpa")
    if attention not in BACKENDS:
        raise ValueError(
            f"model.override_config.attn_implementation={attention!r}: must be one of {', '.join(BACKENDS)}"
        )
