"""How much autograd holds for backward: the activations that count."""

import torch


class SavedBytes:
    """Peak bytes that autograd holds for backward at any time, parameters not counted."""

    def __init__(self, model):
        self.ignored = {p.data_ptr() for p in model.parameters()}
        self.now = self.peak = 0

    def pack(self, tensor):
        if tensor.data_ptr() in self.ignored:
            return tensor
        return _Held(self, tensor.detach())

    def unpack(self, held):
        return held.tensor if isinstance(held, _Held) else held

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class _Held:
    def __init__(self, counter, tensor):
        self.counter, self.tensor = counter, tensor
        counter.now += tensor.numel() * tensor.element_size()
        counter.peak = max(counter.peak, counter.now)

    def __del__(self):
        self.counter.now -= self.tensor.numel() * self.tensor.element_size()
