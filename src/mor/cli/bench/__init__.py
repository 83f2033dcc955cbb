"""`mor bench`, in reading order; the measurements themselves are in `mor.bench`.

main    train, throughput, latency and ops: options, tables and one JSON record
serve   load on a running server, or HTTP against the engine alone
eval    `mor eval --tasks` against lm-eval's own hf model
"""
