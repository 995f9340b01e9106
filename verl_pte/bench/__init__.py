"""Benchmarks: what PTE costs and saves beside its baselines, measured on the machine at hand, and what it learns.

    python -m verl_pte.bench rollout --engine vllm
    python -m verl_pte.bench decode
    python -m verl_pte.bench learner
    python -m verl_pte.bench flops
    python -m verl_pte.bench learning

Baselines are settings of the same code, so all methods take the same path (settings.py); of the learner and of flops,
the full cache is other people's. The models of the first four have random weights. `learning` trains small ones on
generated tasks. Left out: answers of real models.
"""
