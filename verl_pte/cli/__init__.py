"""The command line, ``verl-pte``: serve a PTE model over HTTP, talk to it in the terminal, distil a first
adapter, export one from a checkpoint, say what works here.

Importing it loads typer and rich, nothing of torch, vLLM or verl: each command imports what it runs.
"""

from verl_pte.cli.commands import app

__all__ = ["app"]
