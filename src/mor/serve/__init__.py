"""The server: an OpenAI-compatible HTTP API over the engine, and a page that shows depths.

In reading order:

    config          settings of the server
    app             routes, and the way of a request through the middleware:
    log auth limits     a line in the log, API keys, the body's size and time
    openai/         the routes that generate, and all bodies as OpenAI shapes them
    served_model    what all routes share: model, engine, tokenizer, metrics
    text/           texts and conversations to token ids, and back
    async_engine    the thread that runs the engine, and the calls that reach it
    request_stream  the tokens of one client's request on their way back
    engine_state metrics    what `/depths` and `/metrics` tell
    errors          errors in OpenAI's shape
    server connection   the process: socket, signals, graceful end, timeouts
    static/         the page that shows depths
    client          a client of such servers, for `mor chat` and `mor bench serve`

All modules but `client` need the extra `serve`.
"""
