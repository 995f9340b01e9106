"""``python -m verl_pte.cli``: the command line of a given Python, wherever its scripts are."""

from verl_pte.cli import app

app(prog_name="verl-pte")
