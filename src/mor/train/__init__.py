"""Training: one run of one model in one folder. In reading order:

config           `TrainConfig`, every field of a run; `budget`, its length in other units
trainer          `Trainer`, the loop: forward, backward, step, evaluate, save
training_data    the open corpora of a run: batches, evaluation windows, tokenizer
schedule         end, learning rate, capacities and balancing as functions of the step
parallelize      compile, checkpoint activations, shard: in this order, around the model
distributed      `World`: the processes of a run, and what they exchange
optim            AdamW, or Muon and AdamW as one optimizer
checkpoint       saving and resuming, sharded or not
calibrate        routing thresholds that keep the capacities' shares
evaluate         losses under both selection rules, depths, router accuracy
spike_detector   stops a run whose loss breaks
throughput       FLOPs, utilization and memory of a run
metrics_file     `metrics.jsonl`; `tensorboard`, the same numbers there
"""
