"""Rewards: what an answer is worth.

    reward.custom_reward_function.path=pkg://verl_pte.rewards.math reward.custom_reward_function.name=compute_score

`verl-pte evaluate` grades with the same code. Left out: rewards that need a model.
"""
