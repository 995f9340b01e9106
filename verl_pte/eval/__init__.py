"""Evaluation: what ``verl-pte evaluate`` does, from a parquet to pass@k with intervals, over windows and budgets.

    items.py       what is generated and graded: one sample of one row under one window with one budget of tokens
    questions.py   prompts and ground truths of data sets
    scoring.py     what an answer is worth
    run.py         generates on an engine, grades beside it, writes each item once
    folder.py      the run's folder, from which a killed evaluation goes on
    summary.py     the numbers; pass_at_k.py and intervals.py are their mathematics
    plot.py        the figures

Left out: the command (verl_pte/cli/evaluate.py) and the data sets (verl_pte/data).
"""
