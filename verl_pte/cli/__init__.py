"""The command line, ``verl-pte``, from data to a served model; ``verl-pte --help`` lists what there is.

Importing it loads typer and rich, nothing of torch, vLLM or verl: each command imports what it runs.
"""

from verl_pte.cli.commands import app

__all__ = ["app"]
