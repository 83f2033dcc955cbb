"""The server: an OpenAI-compatible API over the engine, and the page that shows depths.

    HTTP -> limits, auth -> app -> completions, chat, tokens -> bridge -> engine's thread
    HTTP <- server-sent events or JSON  <- choices          <- events  <-

All of it but the `client` needs the extra `serve`.
"""
