"""Export: an adapter out of a checkpoint, checked, described and free of this machine's paths, to give to others.

source.py   which adapter a path means, and what is known about its training
check.py    that the adapter is whole, finite and of its base model
card.py     the README.md beside it
write.py    the folder
"""

from verl_pte.export.check import check
from verl_pte.export.source import Source, find
from verl_pte.export.write import Export

__all__ = ["Export", "Source", "check", "find"]
