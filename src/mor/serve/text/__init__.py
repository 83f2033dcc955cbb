"""Between texts and token ids.

In reading order: `prompt_processor` (prompts and decoding), `chat_template` (conversations).
"""
