"""Evaluation: loss on text, benchmark tasks, recursion depths, and what quantization costs.

In reading order:

    loss               nats per token, perplexity, bits per byte
    depth              histograms of recursion counts; the tokens that go deepest
    quantization_loss  loss and changed recursion counts with rounded weights
    scoring            Scorer: log-likelihoods of continuations, on the engine or by `topk`
    harness            tasks of lm-evaluation-harness, run on a Scorer
    local_tasks        tasks from files, for machines without a network
"""
