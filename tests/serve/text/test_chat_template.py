"""Chat templates: where they come from, what they may do, and special tokens in messages."""

import json

import pytest
from live_server import LiveServer

from mor.engine.llm import LLM
from mor.errors import ConfigError
from mor.serve.errors import HTTPError
from mor.serve.openai.protocol import Message
from mor.serve.text.chat_template import ChatTemplate


def test_a_special_token_in_a_message_is_text(server: LiveServer, engine: LLM) -> None:
    spelled = "<|endoftext|>"
    messages = [{"role": "user", "content": f"a{spelled}b"}]
    ids = server.post("/tokenize", messages=messages).json()["tokens"]
    assert ids.count(engine.tokenizer.eos_id) == 1, "the template's own"
    assert engine.tokenizer.decode(ids) == f"user: a{spelled}b{spelled}assistant: "


def test_templates_are_read_in_every_form() -> None:
    turns = [{"role": "user", "content": "x"}]
    files: dict[str, str] = {}

    def rendered(given: str | None = None) -> str | None:
        template = ChatTemplate.of(files, given)
        return None if template is None else template.render(turns)

    assert rendered() is None
    files["tokenizer_config.json"] = '{"chat_template": null, "eos_token": "end"}'
    assert rendered() is None
    assert rendered("{{ eos_token }}") == "end"
    several = [{"name": "default", "template": "{{ messages[0].content }}!"}]
    files["tokenizer_config.json"] = json.dumps({"chat_template": several})
    assert rendered() == "x!"
    files["chat_template.jinja"] = "{{ messages[0].content }}?"
    assert rendered() == "x?"
    assert rendered("given") == "given"
    with pytest.raises(ConfigError, match="not valid"):
        rendered("{% if %}")
    files["tokenizer_config.json"] = "{"
    with pytest.raises(ConfigError, match="cannot be read"):
        rendered()


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 // 0 }}", "{{ nothing.at }}"],
)
def test_a_template_that_fails_is_refused(source: str, engine: LLM) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(HTTPError, match="chat template"):
        template.encode([Message(role="user", content="x")], engine.tokenizer)
