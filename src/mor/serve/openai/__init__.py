"""OpenAI's API: the routes that generate, and the bodies of all requests and responses.

In reading order: `protocol` (the bodies), `completions` and `chat` (the two routes), `stream`
(responses, whole or as events), `logprobs` and `usage` (parts of the responses).
"""
