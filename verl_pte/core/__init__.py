"""The method: schedule, thought encoder, state-modulated LoRA, bounded cache, and the oracle they are checked
against.
"""
