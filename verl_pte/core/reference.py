"""The oracle: the method written plainly, against which every engine is checked.

One sequence, float64, one token at a time, keys and values in a dict by position. It has its own forward of a Qwen2,
Qwen3, Llama or Mistral block, its own low-rank update and its own state arithmetic; it shares only the schedule with
the rest (that is the one definition of what is evicted when, property-tested by itself) and reads nothing but weights
and numbers from the model. If you want to know what PTE computes, read this file. Slow on purpose.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from verl_pte.core.schedule import Schedule


class Oracle:
    """Runs one sequence under the model's window and keeps its cache and states.

    Args:
        model: an attached PeftModel (or a plain transformers model, then without update and with a full cache).
        schedule: overrides the model's own.
        adapter: False leaves the adapter out, as ``disable_adapter`` does.
    """

    def __init__(self, model: nn.Module, schedule: Schedule | None = None, adapter: bool = True) -> None:
        self.weights = {_plain_name(n): p.detach().double() for n, p in model.named_parameters()}
        self.model_config: Any = model.config
        pte = getattr(model, "peft_config", {}).get("default")
        self.pte: Any = pte if adapter else None
        self.schedule = schedule or (pte.schedule() if pte is not None else Schedule(None))
        rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
        self.inv_freq, self.rope_scale = rotary.inv_freq.float(), rotary.attention_scaling

    def start(self, prompt: list[int]) -> Tensor:
        """Begin a sequence; returns the logits after the prompt: float64 [vocab]."""
        self.prompt_len = len(prompt)
        self.position = 0
        self.num_evictions = 0
        self.peak_cache_tokens = 0
        num_layers = self.model_config.num_hidden_layers
        # Per layer: position -> (key [H, D], value [H, D]).
        self.cached: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(num_layers)]
        self.states = [self._initial_state(layer) for layer in range(num_layers)]
        for token in prompt:
            logits = self.feed(token)
        return logits

    def feed(self, token: int) -> Tensor:
        """Run one token; returns the logits for the next: float64 [vocab]."""
        evicted = self.schedule.evicted_at(self.prompt_len, self.position)
        if evicted is not None:
            self.num_evictions += 1
            for layer, cached in enumerate(self.cached):
                gone = [cached.pop(p) for p in range(*evicted)]
                self.states[layer] = self._updated_state(layer, gone)
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(len(self.cached)):
            x = self._block(layer, x)
        x = self._norm("model.norm.weight", x)
        self.peak_cache_tokens = max(self.peak_cache_tokens, len(self.cached[0]))
        self.position += 1
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return head @ x

    def log_probs(self, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
        """Log-probabilities of a given response: float64 [len(response)]."""
        out, logits = [], self.start(prompt)
        for i, token in enumerate(response):
            out.append((logits / temperature).log_softmax(-1)[token])
            if i + 1 < len(response):
                logits = self.feed(token)
        return torch.stack(out)

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
        """Greedy response of `num_tokens` tokens and its log-probabilities."""
        tokens: list[int] = []
        out, logits = [], self.start(prompt)
        while True:
            tokens.append(int(logits.argmax()))
            out.append(logits.log_softmax(-1)[tokens[-1]])
            if len(tokens) == num_tokens:
                return tokens, torch.stack(out)
            logits = self.feed(tokens[-1])

    # -- the decoder block
    # ----------------------------------------------------------------------------------------------

    def _block(self, layer: int, x: Tensor) -> Tensor:
        c, name = self.model_config, f"model.layers.{layer}"
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        h = self._norm(f"{name}.input_layernorm.weight", x)
        q = self._linear(layer, "self_attn.q_proj", h).view(heads, -1)
        k = self._linear(layer, "self_attn.k_proj", h).view(kv_heads, -1)
        v = self._linear(layer, "self_attn.v_proj", h).view(kv_heads, -1)
        if f"{name}.self_attn.q_norm.weight" in self.weights:  # Qwen3
            q = self._norm(f"{name}.self_attn.q_norm.weight", q)
            k = self._norm(f"{name}.self_attn.k_norm.weight", k)
        q, k = self._rope(q), self._rope(k)
        self.cached[layer][self.position] = (k, v)
        keys = torch.stack([key for key, _ in self.cached[layer].values()])  # [visible tokens, kv heads, head_dim]
        values = torch.stack([value for _, value in self.cached[layer].values()])
        attended = []
        for head in range(heads):
            kv_head = head * kv_heads // heads
            weights = (keys[:, kv_head] @ q[head] / math.sqrt(q.shape[-1])).softmax(-1)
            attended.append(weights @ values[:, kv_head])
        x = x + self._linear(layer, "self_attn.o_proj", torch.cat(attended))
        h = self._norm(f"{name}.post_attention_layernorm.weight", x)
        gate, up = self._linear(layer, "mlp.gate_proj", h), self._linear(layer, "mlp.up_proj", h)
        return x + self._linear(layer, "mlp.down_proj", gate * gate.sigmoid() * up)

    def _linear(self, layer: int, which: str, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.{which}"
        y = self.weights[f"{name}.weight"] @ x
        if f"{name}.bias" in self.weights:
            y = y + self.weights[f"{name}.bias"]
        if self.pte is not None and f"{name}.lora_A" in self.weights:
            h = self.states[layer] @ (self.weights[f"{name}.lora_A"] @ x)
            y = y + self.pte.alpha / self.pte.rank * (self.weights[f"{name}.lora_B"] @ h)
        return y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self.weights[name] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.model_config.rms_norm_eps)

    def _rope(self, x: Tensor) -> Tensor:
        # The angle is rounded to float32 as in the checkpoint's own code: far out it is an input of the model, not
        # noise.
        angle = (self.position * self.inv_freq).double()
        cos, sin = angle.cos() * self.rope_scale, angle.sin() * self.rope_scale
        a, b = x[:, : len(angle)], x[:, len(angle) :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    # -- the thought state
    # ----------------------------------------------------------------------------------------------

    def _initial_state(self, layer: int) -> Tensor:
        if self.pte is None or self.pte.freeze_state:
            return torch.eye(self.pte.rank if self.pte else 1, dtype=torch.float64)
        if self.pte.num_global_tokens == 0:
            return torch.zeros(self.pte.rank, self.pte.rank, dtype=torch.float64)
        keys = self._encoder_weight(layer, "global_keys")
        values = self._encoder_weight(layer, "global_values")
        return self._normalized(self._encoded(layer, list(keys), list(values)))

    def _updated_state(self, layer: int, gone: list[tuple[Tensor, Tensor]]) -> Tensor:
        state = self.states[layer]
        if self.pte is None or self.pte.freeze_state or not self.pte.update_state:
            return state
        new = self._encoded(layer, [k.flatten() for k, _ in gone], [v.flatten() for _, v in gone])
        if self.pte.update_strength is not None:
            new = new / new.norm() * math.sqrt(self.pte.rank) * self.pte.update_strength
        return self._normalized(state + new)

    def _encoded(self, layer: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        queries = self._encoder_weight(layer, "global_queries") @ self._encoder_weight(layer, "W_Q").T  # q_g, [r, r]
        projected = [
            (self._encoder_weight(layer, "W_K") @ k, self._encoder_weight(layer, "W_V") @ v)
            for k, v in zip(keys, values, strict=True)
        ]
        rows = []
        for query in queries:
            weights = torch.stack([query @ k for k, _ in projected])
            if self.pte.attention == "softmax":
                weights = (weights / math.sqrt(self.pte.rank)).softmax(-1)
            rows.append(sum(w * v for w, (_, v) in zip(weights, projected, strict=True)))
        return torch.stack(rows)

    def _normalized(self, state: Tensor) -> Tensor:
        if self.pte.normalize == "row":
            return torch.stack([row / row.norm() for row in state])
        return state / state.norm() * math.sqrt(self.pte.rank)

    def _encoder_weight(self, layer: int, which: str) -> Tensor:
        return self.weights[f"model.layers.{layer}.{which}"]


def _plain_name(name: str) -> str:
    """Parameter name without the wrappers: `model.layers.0.mlp.up_proj.weight`, `...up_proj.lora_A`,
    `model.layers.0.W_K`.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    for adapter in (".pte_adapter.default", ".thought_encoder.pte_encoder.default"):
        if adapter in name:
            name = name.replace(adapter, "").removesuffix(".weight")
    return name
