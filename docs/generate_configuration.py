"""Writes docs/configuration.md from `PTEConfig`: the knobs, their defaults and descriptions live in the code alone.

    python docs/generate_configuration.py

tests/test_docs.py fails where the committed file is not what this makes.
"""

import dataclasses
from pathlib import Path
from typing import Any

from verl_pte import PTEConfig

TARGET = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

<!-- Made by docs/generate_configuration.py from verl_pte/config.py. Edit those, not this file. -->

Every knob of the method is a field of `verl_pte.PTEConfig`. In Python:

    config = verl_pte.PTEConfig(window=1024, rank=32)
    model = verl_pte.attach(model, config)

Under verl the same keys stand in `actor_rollout_ref.model.pte`, in YAML or on the command line:

    actor_rollout_ref.model.pte.window=2048 actor_rollout_ref.model.pte.evict_fraction=0.125

A key that does not exist and a value that cannot work are errors at start-up; the message names the key, the value and
what would be right. What the paper leaves open is marked; [deviations.md](deviations.md) says why the defaults are what
they are. Lengths, batch sizes, devices and everything else about a run stay where verl has them; [verl.md](verl.md)
lists the ones that matter here.

## Knobs

| key | type | default | meaning |
|---|---|---|---|
"""

TAIL = """\

Sizes that follow from these:

| | |
|---|---|
| tokens evicted at once, `C` | `evict_fraction * window`, rounded up to whole tokens and then to whole blocks |
| pinned tokens of a prompt of `P` tokens | `P` rounded up to a multiple of `block_size` |
| most tokens a layer holds for it | pinned + `window` |
| state of a sequence | `4 * rank * rank` bytes a layer |
"""


def render() -> str:
    """The whole file."""
    types = {f.name: f.type for f in dataclasses.fields(PTEConfig)}
    types["target_modules"] = "str | list[str]"
    rows = [
        f"| `{name}` | {_code(types[name])} | {_code(default)} | {_cell(help)} |\n"
        for name, default, help in PTEConfig.knobs()
    ]
    return HEAD + "".join(rows) + TAIL


def _code(value: Any) -> str:
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = getattr(value, "__name__", None) or str(value)
    return f"`{_cell(text.replace('None', 'null'))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(render())
    print(f"wrote {TARGET}")
