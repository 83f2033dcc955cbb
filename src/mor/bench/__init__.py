"""Benchmarks: each measures something of `mor` against a baseline in the same run.

In reading order:

    timing          two tasks timed in turns, and the median of their ratios
    workload        random models, and an engine with a constant number of requests
    throughput latency  engines: MoR against vanilla and against the bound that FLOPs set
    baselines       the engine against transformers, int8 against float32 weights
    ops             kernels alone: matrix products and attention
    train_step train_ab data_loading    optimizer steps, and the share of reading data in them
    serve           a load on any OpenAI-compatible server
    serve_offline   our server against its engine without HTTP
    harness         `mor eval` against lm-eval's own model class

Nothing here parses options or prints: that is `mor.cli.bench`.
"""
