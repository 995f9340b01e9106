"""Learner: log-probabilities, entropy and exact gradients of rollouts, with the activations of one chunk of tokens."""

from verl_pte.learner.replay import Replay, ReplayOutput, replay_log_probs

__all__ = ["Replay", "ReplayOutput", "replay_log_probs"]
