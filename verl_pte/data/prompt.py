r"""How a model is asked: a template around the problem, and a system message or none. One format for each model family.

A template is plain text in which ``{problem}`` is replaced and nothing else, so ``\boxed{}`` is written as it is. What
becomes of the messages is the business of the model's chat template. DAPO's rows come with an instruction of their own
around the problem, which `unwrapped` takes off and the family `dapo` puts back.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

PLACEHOLDER = "{problem}"
_STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."
_DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    f"{PLACEHOLDER}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
# Copies of DAPO differ in what follows "of the form".
_WRAPPED = re.compile(
    r"\s*Solve the following math problem step by step\. The last line of your response should be of the form Answer:"
    r'[^\n]*\n\n(.*?)\s*Remember to put your answer on its own line after "Answer:"\.?\s*',
    flags=re.DOTALL,
)


@dataclass(frozen=True)
class PromptFormat:
    """A template with ``{problem}`` for the user's turn, and a system message.

    Raises ValueError for a template without the placeholder, and for an empty system message.
    """

    template: str
    system: str | None = None

    def __post_init__(self) -> None:
        if PLACEHOLDER not in self.template:
            raise ValueError(f"--template {self.template!r}: must contain {PLACEHOLDER}")
        if self.system is not None and not self.system.strip():
            raise ValueError(f"--system {self.system!r}: must be a text, or None for no system message")

    def messages(self, problem: str) -> list[dict[str, str]]:
        """As chat templates take them."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.template.replace(PLACEHOLDER, problem)}]


FAMILIES: dict[str, PromptFormat] = {
    # As Qwen evaluates its math models: the instruction is the system message, in the place of the template's own.
    "qwen2.5": PromptFormat(PLACEHOLDER, system=_STEP_BY_STEP),
    # As DeepSeek's model card asks for: no system message, the instruction beside the problem.
    "r1-distill": PromptFormat(f"{PLACEHOLDER}\n\n{_STEP_BY_STEP}"),
    # The wording DAPO's rows come with.
    "dapo": PromptFormat(_DAPO),
}
DEFAULT_FAMILY = "qwen2.5"


def prompt_format(family: str = DEFAULT_FAMILY, template: str | None = None, system: str | None = None) -> PromptFormat:
    """A family's format, with another template or system message if given.

    `template` is the text, or a file that holds it. `system` "" takes the system message away. Raises ValueError
    naming the option.
    """
    if family not in FAMILIES:
        raise ValueError(f"--family {family}: must be one of {', '.join(FAMILIES)}")
    found = FAMILIES[family]
    if template is not None:
        found = replace(found, template=_text(template))
    if system is not None:
        found = replace(found, system=system or None)
    return found


def unwrapped(prompt: str) -> str | None:
    """The problem in a prompt of DAPO's wording; None for any other wording."""
    match = _WRAPPED.fullmatch(prompt)
    return match[1].strip() if match else None


def _text(template: str) -> str:
    if PLACEHOLDER in template:
        return template
    try:
        text = Path(template).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, ValueError):
        raise ValueError(
            f"--template {template}: must be a text with {PLACEHOLDER}, or a readable file with such a text"
        ) from None
    if PLACEHOLDER not in text:
        raise ValueError(f"--template {template}: the file must contain {PLACEHOLDER}")
    return text
