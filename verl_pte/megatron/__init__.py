"""PTE on megatron-core: tensor, sequence, pipeline and data parallel training of the adapter.

    config.py    a Hugging Face config as a megatron-core one, and what is refused
    model.py     a GPTModel with PTE layers, made through megatron-core's layer spec
    layer.py     the decoder layer: its thought encoder, its adapted linears
    adapter.py   state-modulated LoRA of column- and row-parallel linears
    encoder.py   the thought encoder over the kv heads of a rank
    attention.py core attention that sees the bounded cache
    norm.py      RMSNorm that does with sequence parallelism and without Apex
    current.py   the call under way, which layers read, and its rotary angles
    collectives.py  sums over tensor-parallel ranks, and their gradients
    replay.py    log-probs and gradients: segments are the micro-batches of megatron-core's pipeline schedules
    scores.py    log-probs and entropy from logits that are spread over the vocabulary
    placement.py what lies where: names and shards of the adapter's tensors
    base.py      weights of the base model, from and to Hugging Face names

Needs megatron-core and neither Transformer Engine, Apex nor megatron-bridge. Which parameter is placed how:
docs/sharding.md.
"""
