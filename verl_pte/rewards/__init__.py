"""Rewards: what an answer is worth.

    reward.custom_reward_function.path=.../verl_pte/rewards/math.py reward.custom_reward_function.name=compute_score

`verl-pte evaluate` grades with the same code. Left out: rewards that need a model.
"""
