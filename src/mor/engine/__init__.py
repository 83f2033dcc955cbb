"""The inference engine: continuous batching over depths, with paged keys and values.

In reading order:

- `request.py`: a sequence being generated, its chunks of tokens in flight, the outputs of it.
- `pages.py`: which pages of KV memory are free, and which entries lie where.
- `prefix.py`: the tree of prefixes whose pages are kept for later requests.
- `plan.py`: plans and outputs of a step's phases, which scheduler and model runner exchange.
- `scheduler.py`: which tokens run when.
- `output_processor.py`: sampled tokens into texts, outputs, streams and completions.
- `llm.py`: `LLM`, which builds all parts and runs their steps.

Up to here it is bookkeeping, without tensors. What computes:

- `config.py`: `EngineConfig`, the settings of all this.
- `backend.py`: device, dtypes and kernels that the settings come to.
- `kv_cache.py`: the memory behind the pages.
- `kernels/`: stacks of layers, prepared for torch or for the compiled CPU kernels.
- `states.py`: hidden states of tokens in flight, and the routers between two passes.
- `sampler.py`: the next token of each row of logits.
- `model_runner.py`: plans into tensors, and the model's stages on them.
- `stats.py`: counters, and a progress bar.
- `multistep/`: several decode steps in a row on the device.
"""
