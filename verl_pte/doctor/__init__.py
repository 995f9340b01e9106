"""Doctor: what of this package works in this environment, and what to do about the rest.

check.py      a finding
packages.py   installed versions against those this package declares
probe.py      runs the others, each in a process of its own: a broken package ends one of them, not the doctor
torch_probe.py, verl_probe.py, vllm_probe.py, self_test.py
examine.py    all of it
"""
