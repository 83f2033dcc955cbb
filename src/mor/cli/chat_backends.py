"""Backends of `mor chat`: a model in this process, or one behind an OpenAI-compatible API."""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from mor.engine.llm import LLM
from mor.errors import MissingExtraError, RequestError
from mor.io.tokenizer import Tokenizer
from mor.model.sampling import SamplingParams
from mor.serve.client import Client, read_event

Emit = Callable[[str, int], None]
"""Called with the text of each token as it comes, and with its recursion count."""


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


@runtime_checkable
class ChatBackend(Protocol):
    """A model that answers conversations."""

    name: str
    num_recursions: int
    has_template: bool
    """Whether it has a chat template; otherwise it continues the turns as one text."""

    def answer(self, turns: Sequence[ChatMessage], params: SamplingParams, emit: Emit) -> None:
        """Generate the next turn, and call `emit` for each of its tokens.

        Raises:
            MorError: the turns do not fit the model, or the server cannot be reached.
        """
        ...


def join_text(turns: Sequence[ChatMessage]) -> str:
    """The texts of a conversation's turns, one a line, for a model without a chat template."""
    return "\n".join(turn.text for turn in turns)


class LocalChatBackend:
    """A model on the engine in this process."""

    def __init__(self, name: str, llm: LLM, tokenizer: Tokenizer, template: Any) -> None:
        """`template` is the model's `ChatTemplate`, or None."""
        self.name = name
        self.num_recursions = llm.model_config.num_recursions
        self.has_template = template is not None
        self._llm, self._tokenizer, self._template = llm, tokenizer, template

    def answer(self, turns: Sequence[ChatMessage], params: SamplingParams, emit: Emit) -> None:
        prompt = self._encode(turns)
        room = self._llm.model_config.max_position_embeddings - len(prompt)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(prompt)} tokens, and the model takes "
                f"{self._llm.model_config.max_position_embeddings}: start again with /reset."
            )
        fitting = replace(params, max_tokens=min(params.max_tokens, room))
        with closing(self._llm.stream(prompt, fitting)) as events:  # an interrupt frees its pages
            for event in events:
                emit(event.text, event.recursion_count)

    def _encode(self, turns: Sequence[ChatMessage]) -> list[int]:
        if self._template is None:
            return self._tokenizer.encode(join_text(turns)) or [self._tokenizer.eos_id]
        from mor.serve.errors import HTTPError
        from mor.serve.openai.protocol import Message

        try:
            messages = [Message(role=turn.role, content=turn.text) for turn in turns]
            return self._template.encode(messages, self._tokenizer)
        except HTTPError as error:
            raise RequestError(str(error)) from error


def template_of(tokenizer: Tokenizer) -> Any:
    """The `ChatTemplate` that came with a tokenizer; None if there is none.

    Raises:
        MissingExtraError: there is one, and what reads it is not installed.
        ConfigError: it is not valid.
    """
    try:
        from mor.serve.text.chat_template import ChatTemplate
    except ModuleNotFoundError as error:
        if any("chat_template" in name + text for name, text in tokenizer.sidecar_files.items()):
            raise MissingExtraError(str(error.name), "serve") from error
        return None
    return ChatTemplate.of(tokenizer.sidecar_files)


class RemoteChatBackend:
    """A model behind an OpenAI-compatible API."""

    def __init__(self, client: Client, model: str | None) -> None:
        """Ask the server which models it serves; None takes the first.

        Raises:
            RequestError: it cannot be reached, or serves no such model.
        """
        self._client = client
        card = asyncio.run(client.card(model))
        self.name: str = card["id"]
        self.num_recursions: int = card.get("num_recursions") or 1
        self.has_template = asyncio.run(self._knows_turns())

    async def _knows_turns(self) -> bool:
        body = {"model": self.name, "messages": [{"role": "user", "content": "Hi"}]}
        try:
            await self._client.post("/tokenize", body)
        except RequestError as error:
            return "no chat template" not in str(error)  # another server may not know the route
        return True

    def answer(self, turns: Sequence[ChatMessage], params: SamplingParams, emit: Emit) -> None:
        _run_until_ctrl_c(self._answer(turns, params, emit))

    async def _answer(
        self, turns: Sequence[ChatMessage], params: SamplingParams, emit: Emit
    ) -> None:
        path, body = "/v1/completions", self._body(params)
        if self.has_template:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": t.role, "content": t.text} for t in turns]
        else:
            body["prompt"] = join_text(turns)
        async with aclosing(self._client.stream(path, body)) as events:
            async for data in events:
                for choice in read_event(data).get("choices") or ():
                    for text, count in pieces(choice):
                        emit(text, count)

    def _body(self, params: SamplingParams) -> dict[str, Any]:
        """The request without its prompt; of other servers' unknown fields only those in use."""
        optional = {"seed": params.seed, "max_recursions": params.max_recursions}
        return {
            "model": self.name,
            "stream": True,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "logprobs": True if self.has_template else 0,
            **{name: value for name, value in optional.items() if value is not None},
        }


def _run_until_ctrl_c(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, where Ctrl-C cancels between two steps of the event loop.

    asyncio's own handler cancels at once, even while the loop is setting the very future that the
    task waits for; asyncio then prints "Fatal error".
    """

    async def main() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        if sys.platform != "win32":  # whose loops take no handlers; closing the loop removes it
            loop.add_signal_handler(signal.SIGINT, task.cancel)
        await work

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def pieces(choice: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The text and the recursion count of each token that a streamed choice adds.

    A choice may hold several tokens. They are separated where the tokens' texts in `logprobs` add
    up to the choice's text; otherwise they become one piece with the highest of their counts.
    """
    delta = choice.get("delta") or {}
    text = choice.get("text") or delta.get("content") or ""
    counts = choice.get("recursion_counts") or [1]
    scores = choice.get("logprobs") or {}
    names = scores.get("tokens") or [entry["token"] for entry in scores.get("content") or ()]
    if len(names) == len(counts) and "".join(names) == text:
        return list(zip(names, counts, strict=True))
    return [(text, max(counts))] if text else []
