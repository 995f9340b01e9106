"""Adds the member PTE to PEFT's private enum ``PeftType``.

Why: ``peft.utils.register_peft_method`` accepts out-of-tree methods only if their name is already a member of that
enum, and ``adapter_config.json`` is read back through it. An enum cannot be extended by public means.

Guard: PEFT 0.21.x, the range this was read and tested against.
Retire when: ``register_peft_method`` takes names that are not in the enum (or adds them itself).
"""

import peft
from packaging.version import Version
from peft.utils.peft_types import PeftType

SUPPORTED = ("0.21", "0.22")  # [from, below)


def apply() -> None:
    """Add ``PeftType.PTE``; does nothing when it is there. Raises RuntimeError outside the supported PEFT versions."""
    if "PTE" in PeftType.__members__:
        return
    if not Version(SUPPORTED[0]) <= Version(peft.__version__) < Version(SUPPORTED[1]):
        raise RuntimeError(
            f"verl_pte extends PEFT's PeftType enum by internals known for peft >={SUPPORTED[0]},<{SUPPORTED[1]}; "
            f"found peft {peft.__version__}. Install a supported version: pip install 'peft>=0.21,<0.22'"
        )
    member = str.__new__(PeftType, "PTE")
    member._name_ = member._value_ = "PTE"
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append("PTE")
    PeftType._member_map_["PTE"] = member
    PeftType._value2member_map_["PTE"] = member
    type.__setattr__(PeftType, "PTE", member)
