"""Whether a saved adapter is whole and finite, and of its base model: names and shapes of all tensors.

The base is built without memory (on the meta device) from its config.json, and the adapter's settings attached to it:
what PEFT would save of that is what has to be there.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl_pte.peft import attach
from verl_pte.peft.saved import WEIGHTS, base_config, own_shapes, saved_config


def check(adapter: str, model: str) -> dict[str, Tensor]:
    """The adapter's tensors, by the names they have in its file. `model` is the base: of it config.json is read.

    Raises ValueError for what is missing, superfluous, of another shape, or not finite.
    """
    pte, config = saved_config(adapter), base_config(model)
    pte.base_model_name_or_path = None  # PEFT warns where it gets another name than it had
    with torch.device("meta"):
        wanted = own_shapes(attach(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), pte))
    try:
        tensors = load_file(Path(adapter) / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{adapter}: its {WEIGHTS} cannot be read ({error})") from error
    for name in sorted(wanted.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != wanted.get(name):
            raise ValueError(
                f"{adapter}: {name!r} is {found or 'missing'}, and by adapter_config.json and the base model {model} "
                f"it is {wanted.get(name, 'none of the adapter')}: the file is damaged, or the base another one"
            )
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{adapter}: {name!r} holds infinities or NaN: training had diverged when it was saved")
    return tensors
