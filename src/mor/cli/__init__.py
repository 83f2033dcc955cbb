"""The command `mor`, one module per verb.

Read first

    main            the verbs, and what becomes of an error: one sentence and an exit status
    options/        options that are made from the fields of configs

then a verb

    generate        continue a prompt
    chat            talk with a model; `chat_backends`: in this process, or behind a server
    serve           an OpenAI-compatible server
    train           pre-train a model
    data            text to tokenized shards
    eval            loss and depths of a model; `eval_tasks`: lm-evaluation-harness
    convert, push   checkpoints of other programs in, ours out, and up to the hub
    info            parameters, FLOPs and bytes of a model
    bench/          measurements against baselines
    demo, experiment, report

A verb module has `HELP`, `EXAMPLES` and `run(args)`, which returns the exit status. It parses and
prints; what it computes lies in the rest of the package, which raises a `MorError` where a value
cannot work.
"""
