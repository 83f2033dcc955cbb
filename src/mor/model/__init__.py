"""The model: configuration, layers, routing, stages, cost, and the reference generator.

In reading order:

    config        MoRConfig: every field, its default, what goes with what
    presets       the paper's shapes by name
    sharing       which shared layer runs at which depth
    kv_policy     which depths write keys and values, and which they read
    ragged_batch  RaggedBatch: the tokens that are present, (N, E) without holes
    depth_lora    a shared matrix with a LoRA pair for each depth
    norm          RMSNorm
    attention     grouped-query attention, RoPE, and the protocol of the caches
    layers        SwiGLU, the Llama layer
    router        expert choice and token choice, their losses
    transformer   MoRModel: prelude, block, coda; the forward pass with losses
    cost          parameters, FLOPs and KV bytes in closed form
    sampling      SamplingParams and Completion: what a request asks for and gets
    generation    the reference generator that the engine is compared with
"""
