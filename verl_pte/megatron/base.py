"""Weights of the base model: from a Hugging Face folder into a rank's parts, and back to full tensors.

Each parameter of the GPTModel is one tensor of the Hugging Face model, or several merged: query, key and value a kv
head at a time, gate and up one after the other. Read from safetensors files slice by slice, so a rank reads what it
holds. megatron-bridge does this for many architectures; the four here need no Transformer Engine to be imported.

Left out: other formats than safetensors, quantised weights.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from verl_pte.megatron.adapter import AdaptedLinear
from verl_pte.megatron.placement import PREFIX, from_all_stages

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Weights(Mapping[str, Any]):
    """The tensors of a model by name, as things to slice: ``weights[name][rows]``, ``[:, columns]``, ``[:]``.

    `model` is a folder or a name on the hub. From there a machine's ranks download it together, once.
    """

    def __init__(self, model: str) -> None:
        folder = Path(model)
        if not folder.is_dir():
            folder = Path(snapshot_download(model, allow_patterns=["model*.safetensors", INDEX]))
        index, single = folder / INDEX, folder / SINGLE
        if index.is_file():
            self._files = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), single.name)
        else:
            raise ValueError(
                f"model={model}: holds neither {SINGLE} nor {INDEX}; save it with model.save_pretrained(DIR), or take "
                "a model that has safetensors"
            )
        self._open = {name: safe_open(folder / name, framework="pt") for name in set(self._files.values())}

    def __getitem__(self, name: str) -> Any:
        return self._open[self._files[name]].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Piece(NamedTuple):
    """A tensor of the Hugging Face model that a parameter holds, or is merged from."""

    name: str
    adapted: bool = False  # then it has a different name in the attached model


class Held(NamedTuple):
    """A base parameter of this rank."""

    parameter: nn.Parameter
    pieces: tuple[Piece, ...]
    dim: int | None  # along which ranks share each piece
    kv_heads: int | None = None  # of this rank, where pieces are interleaved a kv head at a time
    rows: int | None = None  # of the whole tensor, where ranks' shares are padded


def held(model: nn.Module) -> Iterator[Held]:
    """This rank's base parameters, in order. `model` is the unwrapped PTEGPTModel."""
    vocab = model.hf.vocab_size
    if model.pre_process:
        embedding = model.embedding.word_embeddings.weight
        yield Held(embedding, (Piece("model.embed_tokens.weight"),), 0, rows=vocab)
    for layer in model.decoder.layers:
        root, attention, mlp = f"model.layers.{layer.layer_number - 1}.", layer.self_attention, layer.mlp
        yield Held(layer.input_layernorm.weight, (Piece(root + "input_layernorm.weight"),), None)
        heads = attention.num_query_groups_per_partition
        yield from _linear(attention.linear_qkv, root + "self_attn.", ("q_proj", "k_proj", "v_proj"), 0, heads)
        yield from _linear(attention.linear_proj, root + "self_attn.", ("o_proj",), 1)
        for ours, theirs in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
            if hasattr(getattr(attention, ours), "weight"):
                yield Held(getattr(attention, ours).weight, (Piece(f"{root}self_attn.{theirs}.weight"),), None)
        yield Held(layer.pre_mlp_layernorm.weight, (Piece(root + "post_attention_layernorm.weight"),), None)
        yield from _linear(mlp.linear_fc1, root + "mlp.", ("gate_proj", "up_proj"), 0)
        yield from _linear(mlp.linear_fc2, root + "mlp.", ("down_proj",), 1)
    if model.post_process:
        yield Held(model.decoder.final_layernorm.weight, (Piece("model.norm.weight"),), None)
        if model.output_layer.weight is not None:
            name = "model.embed_tokens.weight" if model.hf.tie_word_embeddings else "lm_head.weight"
            yield Held(model.output_layer.weight, (Piece(name),), 0, rows=vocab)


@torch.no_grad()
def load(model: nn.Module, weights: Mapping[str, Any], group: Any) -> None:
    """Fill the base's parameters. Raises ValueError for a tensor that is missing or has another shape."""
    for entry in held(model):
        missing = [piece.name for piece in entry.pieces if piece.name not in weights]
        if missing:
            raise ValueError(f"base weights: {missing[0]!r} is missing; is this a {model.hf.model_type} causal LM?")
        parts = [_share(weights[piece.name], entry, group) for piece in entry.pieces]
        merged = _merge(parts, entry.kv_heads)
        if merged.shape != entry.parameter.shape:
            raise ValueError(
                f"base weights: {entry.pieces[0].name!r} gives a part of shape {tuple(merged.shape)}, and by the "
                f"model's config.json it has {tuple(entry.parameter.shape)}"
            )
        entry.parameter.copy_(merged)


def full_tensors(model: nn.Module, tensor_group: Any, pipeline_group: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in the attached model, full tensor) of the whole base, stage after stage, on every rank.

    A collective over tensor- and pipeline-parallel ranks, which iterate together.
    """
    yield from from_all_stages(_own_full_tensors(model, tensor_group), pipeline_group, next(model.parameters()).device)


@torch.no_grad()
def _own_full_tensors(model: nn.Module, group: Any) -> Iterator[tuple[str, Tensor]]:
    for entry in held(model):
        if entry.parameter is getattr(getattr(model, "output_layer", None), "weight", None) and (
            model.hf.tie_word_embeddings
        ):
            continue  # the first stage has it
        for piece, part in zip(entry.pieces, _split(entry, model), strict=True):
            full = part.contiguous()
            if entry.dim is not None and group.size() > 1:
                parts = [torch.empty_like(full) for _ in range(group.size())]
                dist.all_gather(parts, full, group=group)
                full = torch.cat(parts, entry.dim)
            yield _attached_name(piece), full if entry.rows is None else full[: entry.rows]


def _linear(
    linear: nn.Module, root: str, names: tuple[str, ...], dim: int, kv_heads: int | None = None
) -> Iterator[Held]:
    adapted = {name for name, _ in linear.adapters()} if isinstance(linear, AdaptedLinear) else set()
    base = linear.base_layer if isinstance(linear, AdaptedLinear) else linear
    for kind in ("weight", "bias"):
        if getattr(base, kind, None) is not None:
            pieces = tuple(Piece(f"{root}{name}.{kind}", name in adapted) for name in names)
            yield Held(getattr(base, kind), pieces, dim, kv_heads)


def _share(source: Any, entry: Held, group: Any) -> Tensor:
    shape = source.get_shape() if hasattr(source, "get_shape") else source.shape
    if entry.dim is None:
        return source[:]
    if entry.rows is not None:
        share = entry.parameter.shape[0]
        mine = source[group.rank() * share : min((group.rank() + 1) * share, entry.rows)]
        return nn.functional.pad(mine, (0, 0, 0, share - mine.shape[0]))
    width = shape[entry.dim] // group.size()
    mine = slice(group.rank() * width, (group.rank() + 1) * width)
    return source[mine] if entry.dim == 0 else source[:, mine]


def _merge(parts: list[Tensor], kv_heads: int | None) -> Tensor:
    if kv_heads is None:
        return torch.cat(parts)
    return torch.cat([part.unflatten(0, (kv_heads, -1)) for part in parts], 1).flatten(0, 1)


def _split(entry: Held, model: nn.Module) -> list[Tensor]:
    """The pieces a merged parameter was made of, as far as this rank has them."""
    tensor, config = entry.parameter, model.config
    if entry.kv_heads is not None:
        queries = config.num_attention_heads // config.num_query_groups
        widths = [queries * config.kv_channels, config.kv_channels, config.kv_channels]
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (entry.kv_heads, -1)).split(widths, 1)]
    return list(tensor.chunk(len(entry.pieces)))


def _attached_name(piece: Piece) -> str:
    module, _, kind = piece.name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{kind}" if piece.adapted else PREFIX + piece.name
