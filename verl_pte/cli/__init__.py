"""The command line, ``verl-pte``: serve a PTE model over HTTP, or talk to it in the terminal.

Importing it loads typer and rich, nothing of torch, vLLM or verl: each command imports what it runs.
"""

from verl_pte.cli.commands import app

__all__ = ["app"]
