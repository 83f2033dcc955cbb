"""A tiny model with a chat template, one server of it for all tests, and its engine in-process."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from live_server import KEY, MODEL_LEN, LiveServer

import mor
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.io.tokenizer import Tokenizer
from tiny import tiny_model

TEXT = "the cat sat on the mat, the cat ate the rat; naïve café 猫が座った。😀🎉 user assistant "
TEMPLATE = (
    "{%- for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}"
    "{% endif %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose model talks wildly, with a tokenizer and a chat template."""
    tokenizer = Tokenizer.train([TEXT * 3], 300)
    network = tiny_model(
        "expert",
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=MODEL_LEN,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("serve") / "model"
    mor.save(network, folder, tokenizer)
    values = {
        "chat_template": TEMPLATE,
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",  # for lm-eval, which reads it through this
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that asks for a key."""
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(2**24))
    running = LiveServer(model, log, *options)
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of that server."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def engine(model: Path) -> LLM:
    """The same engine in this process."""
    return LLM(model, EngineConfig(kv_cache_memory_bytes=2**24, dtype="float64"))
