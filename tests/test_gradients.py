"""Replay's gradients against backpropagation through the oracle: one graph, token by token, float64."""

import gc

import pytest
import torch
from saved_bytes import SavedBytes
from tiny import random_tokens, tiny_pte

from verl_pte.core.reference import Oracle, _plain_name
from verl_pte.learner import Replay

TEMPERATURE = 0.8


class DifferentiableOracle(Oracle):
    """The oracle with its graph kept, cut where the gradient mode says: at segment boundaries, by detaching."""

    def __init__(self, model, gradient):
        super().__init__(model)
        self.weights = {_plain_name(n): p.double() for n, p in model.named_parameters()}
        self.gradient = gradient

    def feed(self, token):
        if self.gradient != "full" and self.schedule.evicted_at(self.prompt_len, self.position) is not None:
            self.cached = [{p: (k.detach(), v.detach()) for p, (k, v) in layer.items()} for layer in self.cached]
            if self.gradient == "truncated":
                self.states = [s.detach() for s in self.states]
        return super().feed(token)

    def loss(self, prompt, response, weight, entropy_weight):
        total, logits = 0.0, self.start(prompt)
        for i, token in enumerate(response):
            log_probs = (logits / TEMPERATURE).log_softmax(-1)
            total = total + weight[i] * log_probs[token] - entropy_weight[i] * (log_probs.exp() * log_probs).sum()
            if i + 1 < len(response):
                logits = self.feed(token)
        return total


def problem(lengths=((5, 30), (9, 17), (3, 1), (14, 26))):
    prompts = [torch.tensor(t) for t in random_tokens(*(p for p, _ in lengths))]
    responses = [torch.tensor(t) for t in random_tokens(*(r for _, r in lengths), seed=1)]
    generator = torch.Generator().manual_seed(2)
    shape = (len(lengths), max(r for _, r in lengths))
    return prompts, responses, torch.randn(shape, generator=generator), 0.3 * torch.randn(shape, generator=generator)


def replay_gradients(model, prompts, responses, weight, entropy_weight, **kwargs):
    model.zero_grad()
    replay = Replay(model, prompts, responses, temperature=TEMPERATURE, entropy=True, **kwargs)
    out = replay.forward()
    log_probs, entropy = out.log_probs.requires_grad_(), out.entropy.requires_grad_()
    ((weight * log_probs + entropy_weight * entropy) * out.mask).sum().backward()
    replay.backward(log_probs.grad, entropy.grad)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def oracle_gradients(model, prompts, responses, weight, entropy_weight, gradient):
    model.zero_grad()
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        DifferentiableOracle(model, gradient).loss(
            prompt.tolist(), response.tolist(), weight[b], entropy_weight[b]
        ).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def worst_relative(a, b):
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in a)


@pytest.mark.parametrize("gradient", ["full", "state", "truncated"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
def test_gradients_equal_backpropagation_through_one_graph(arch, gradient):
    model = tiny_pte(arch, 8)
    ours = replay_gradients(model, *problem(), gradient=gradient)
    exact = oracle_gradients(model, *problem(), gradient)
    assert all(g.abs().max() > 0 for g in exact.values())
    assert worst_relative(ours, exact) <= 1e-5
    if gradient != "full":  # the modes are not the same thing
        assert worst_relative(ours, oracle_gradients(model, *problem(), "full")) > 0.05


@pytest.mark.parametrize(
    "knobs",
    [
        dict(update_strength=None),
        dict(attention="softmax"),
        dict(normalize="frobenius"),
        dict(window=20, evict_fraction=0.33),
        dict(update_state=False),
        dict(freeze_state=True),
    ],
    ids=str,
)
def test_gradients_of_the_options(knobs):
    model = tiny_pte("llama", **({"window": 8} | knobs))
    assert worst_relative(replay_gradients(model, *problem()), oracle_gradients(model, *problem(), "full")) <= 1e-5


@pytest.mark.parametrize("window", [16, None])
def test_gradients_in_wide_windows_and_without(window):
    model = tiny_pte("mistral", window)
    ours = replay_gradients(model, *problem())
    exact = oracle_gradients(model, *problem(), "full")
    if window is None:  # nothing is evicted, but the global tokens' encoder still learns
        assert all(g.abs().max() > 0 for g in exact.values())
    assert worst_relative(ours, exact) <= 1e-5


@pytest.mark.parametrize("gradient", ["full", "state", "truncated"])
def test_chunk_length_moves_memory_not_gradients(gradient):
    model = tiny_pte("qwen2", 8)
    whole = replay_gradients(model, *problem(), gradient=gradient)
    for chunk_tokens in (1, 3):
        assert (
            worst_relative(replay_gradients(model, *problem(), gradient=gradient, chunk_tokens=chunk_tokens), whole)
            <= 1e-5
        )


def test_micro_batches_add_up_to_the_batch():
    model = tiny_pte("qwen2", 8)
    prompts, responses, weight, entropy_weight = problem()
    whole = replay_gradients(model, prompts, responses, weight, entropy_weight)
    total = {}
    for b in range(len(prompts)):
        n = len(responses[b])
        part = replay_gradients(
            model, [prompts[b]], [responses[b]], weight[b : b + 1, :n], entropy_weight[b : b + 1, :n]
        )
        total = {k: total.get(k, 0) + v for k, v in part.items()}
    assert worst_relative(total, whole) <= 1e-5


def test_saved_activations_do_not_grow_with_the_response():
    peaks, stores = {}, {}
    for length in (256, 8192):
        gc.collect()
        model = tiny_pte("qwen2", 64, model=None, block_size=16)
        model.config.max_position_embeddings = 16384
        prompts, responses = [torch.tensor(random_tokens(11)[0])], [torch.tensor(random_tokens(length, seed=1)[0])]
        replay = Replay(model, prompts, responses)
        out = replay.forward()
        with SavedBytes(model) as saved:
            replay.backward(torch.ones_like(out.log_probs))
        peaks[length], stores[length] = saved.peak, replay.store_bytes
        c = model.config
        elements = 2 * c.num_hidden_layers * (11 + length - 1) * c.num_key_value_heads * c.head_dim
        assert replay.store_bytes <= 4 * elements
    assert peaks[256] > 0 and peaks[8192] <= 1.02 * peaks[256]
    assert stores[8192] > 20 * stores[256]  # the store is what grows


def test_padding_never_reaches_gradients():
    """A batch row that is mostly padding changes nothing for the others."""
    model = tiny_pte("qwen2", 8)
    prompts, responses, weight, entropy_weight = problem(((5, 30), (2, 1)))
    weight[1], entropy_weight[1] = 0, 0
    both = replay_gradients(model, prompts, responses, weight, entropy_weight)
    alone = replay_gradients(model, prompts[:1], responses[:1], weight[:1], entropy_weight[:1])
    assert worst_relative(both, alone) <= 1e-5


def test_backward_twice_is_refused():
    model = tiny_pte("qwen2", 8)
    prompts, responses, *_ = problem()
    replay = Replay(model, prompts, responses)
    out = replay.forward()
    replay.backward(torch.ones_like(out.log_probs))
    with pytest.raises(RuntimeError, match="once"):
        replay.backward(torch.ones_like(out.log_probs))


def test_backward_without_trainable_parameters_says_why():
    model = tiny_pte("qwen2", 8)
    prompts, responses, *_ = problem()
    with model.disable_adapter():
        replay = Replay(model, prompts, responses)
        out = replay.forward()
        with pytest.raises(RuntimeError, match="is_trainable=True"):
            replay.backward(torch.ones_like(out.log_probs))


@pytest.mark.parametrize(("prompts", "responses"), [([[1]], []), ([], []), ([[1], []], [[1], [1]]), ([[1]], [[]])])
def test_bad_batches_are_refused(prompts, responses):
    model = tiny_pte("qwen2", 8)
    as_tensors = [[torch.tensor(s, dtype=torch.long) for s in sequences] for sequences in (prompts, responses)]
    with pytest.raises(ValueError, match="pair|empty"):
        Replay(model, *as_tensors)


def test_sequences_beyond_the_models_positions_are_refused():
    model = tiny_pte("qwen2", 8)
    with pytest.raises(ValueError, match="max_position_embeddings=512"):
        Replay(model, [torch.ones(500, dtype=torch.long)], [torch.ones(13, dtype=torch.long)])
