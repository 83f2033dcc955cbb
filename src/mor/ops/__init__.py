"""Operations that cost time or memory, each with one signature. In reading order:

- `paged`: the pool of KV cells and the tokens of one pass, which the engine's operations work on;
- `reference`: the engine's operations in plain torch; `triton` (with `triton_launch`) and `cpu/`
  are the fast ones, held equal to it by tests;
- `low_rank`: LoRA pairs of layers that run at several depths;
- `sampling`: tokens and log-probabilities from logits;
- `document_attention`, `memory_efficient`, `cross_entropy`: attention, layers and loss of training;
- `memory`, `malloc`: how much memory there is, and when it is given back.
"""
