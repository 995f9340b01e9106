"""Benchmarks: what PTE costs and saves beside its baselines, measured on the machine at hand.

    python -m verl_pte.bench rollout --engine vllm
    python -m verl_pte.bench decode

Baselines are settings of the same code, so all methods take the same path (settings.py). Left out: quality. The models
have random weights, and nothing here says what a method answers well.
"""
