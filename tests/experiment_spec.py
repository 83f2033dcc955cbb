"""A small experiment: two variants and a random twin, two seeds, six steps each."""

SPEC = """\
about: Two variants and a twin.
train:
  model:
    vocab_size: 300
    hidden_size: 32
    intermediate_size: 64
    num_attention_heads: 4
    max_position_embeddings: 32
  data: {data}
  sequence_length: 32
  batch_size: 4
  lr: 1.0e-2
  eval_every: 3
  eval_windows: 2
  calibration_windows: 2
  save_every: 2
  device: cpu
sizes:
  tiny: {{layers: 4}}
variants:
  vanilla: {{model: {{num_recursions: 1}}}}
  mor-2: {{model: {{num_recursions: 2}}}}
random_twins: [mor-2]
baseline: vanilla
budgets: [6 steps]
seeds: [0, 1]
"""
NAMES = [
    f"{variant}_tiny_6-steps_seed{seed}"
    for seed in (0, 1)
    for variant in ("vanilla", "mor-2", "mor-2-random")
]
