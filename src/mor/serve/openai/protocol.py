"""Bodies of requests and answers: OpenAI's fields, and the recursion counts.

A field that is not listed here is refused by name: nothing that a client asks for is ignored. The
ranges of sampling fields are those of `SamplingParams`; where the API's differ, it is written here.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mor.model.sampling import SamplingParams
from mor.validation import range_of

FinishReason = Literal["stop", "length", "abort"]
INT_LIMIT = 2**31
"""Integers of a request are below it, so that they fit 32 bits."""
TokenId = Annotated[int, Field(ge=0, lt=INT_LIMIT)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Absent = Field(default=None, exclude_if=lambda value: value is None)
"""Default of a field that is left out where it is None; other fields are null, as OpenAI's are."""
MAX_N = 128
MAX_STOPS = 64


def sampling_range(name: str, **bounds: float) -> Any:
    """The range of a field of `SamplingParams` as pydantic's `Field`; `bounds` replace its own."""
    limits = replace(range_of(SamplingParams, name), **bounds)
    return Field(ge=limits.ge, gt=limits.gt, le=limits.le, lt=limits.lt)


class RequestModel(BaseModel):
    """Base of requests: unknown fields are errors, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ResponseModel(BaseModel):
    """Base of answers."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(RequestModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Whether a last chunk, without choices, holds the usage."""


class SamplingRequest(RequestModel):
    """Fields that `/v1/completions` and `/v1/chat/completions` share."""

    model: str | None = None
    """The served model's name; may be left out."""
    n: Annotated[int, sampling_range("n", le=MAX_N)] = 1
    seed: Annotated[int, sampling_range("seed")] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, sampling_range("temperature")] = 1.0
    """0 is greedy."""
    top_p: Annotated[Number, sampling_range("top_p")] = 1.0
    top_k: Annotated[int, sampling_range("top_k", ge=-1, lt=INT_LIMIT)] = 0
    """0 and -1 keep all tokens."""
    min_p: Annotated[Number, sampling_range("min_p")] = 0.0
    presence_penalty: Annotated[Number, sampling_range("presence_penalty")] = 0.0
    frequency_penalty: Annotated[Number, sampling_range("frequency_penalty")] = 0.0
    repetition_penalty: Annotated[Number, sampling_range("repetition_penalty")] = 1.0
    ignore_eos: bool = False
    """Go on after the end of the text."""
    min_tokens: Annotated[int, sampling_range("min_tokens", lt=INT_LIMIT)] = 0
    """Nothing ends the request before so many tokens."""
    max_recursions: Annotated[int, sampling_range("max_recursions", lt=INT_LIMIT)] | None = None
    """No token takes more passes of the block."""
    min_recursions: Annotated[int, sampling_range("min_recursions", lt=INT_LIMIT)] | None = None
    """Every token takes at least so many passes; with the same `max_recursions` exactly so many."""

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the request."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


Prompts = str | list[str] | list[TokenId] | list[list[TokenId]]


class CompletionRequest(SamplingRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompts
    """A text, several texts, token ids, or several lists of token ids."""
    max_tokens: Annotated[int, sampling_range("max_tokens", ge=0, lt=INT_LIMIT)] | None = 16
    """null: what fits the model. 0 with `echo` scores a prompt."""
    echo: bool = False
    """Give the prompt back, in front of the text; with `logprobs` its log-probabilities, too."""
    logprobs: Annotated[int, sampling_range("logprobs")] | None = None
    """Likeliest tokens to report in each place, beside the chosen one."""


class TextPart(RequestModel):
    """A part of a message's content; texts are the only kind."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatRequest(SamplingRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, sampling_range("max_tokens", lt=INT_LIMIT)] | None = None
    """null: what fits the model."""
    max_tokens: Annotated[int, sampling_range("max_tokens", lt=INT_LIMIT)] | None = None
    """The older name of `max_completion_tokens`."""
    logprobs: bool = False
    top_logprobs: Annotated[int, sampling_range("logprobs")] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true.")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same: give one.")
        return self


class TokenizeRequest(RequestModel):
    """Body of `POST /tokenize`: a text, or messages as the chat template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them.")
        return self


class DetokenizeRequest(RequestModel):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


# -- responses ----------------------------------------------------------------------------------


class ErrorDetail(ResponseModel):
    """An error: its sentence, kind and field."""

    message: str
    type: str
    param: str | None = None
    """The request's field that is wrong."""
    code: str | None = None


class ErrorResponse(ResponseModel):
    """Body of every error."""

    error: ErrorDetail


class Usage(ResponseModel):
    """Tokens of a request, and what routing saved."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    mean_recursions: float | None
    """Of the generated tokens; null where there are none."""
    flops_saved: float
    """1 - FLOPs of prompt and output / FLOPs if all their tokens had taken all recursions."""


class CompletionLogprobs(ResponseModel):
    """Log-probabilities of a completion; each list has one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """A completion, or the part of one that a chunk adds."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int]
    recursion_counts: list[int]
    """For each of `token_ids`, the recursions of the position that produced it."""
    prompt_token_ids: list[int] | None = Absent
    """Only with `echo`."""
    prompt_recursion_counts: list[int] | None = Absent
    """Only with `echo`: recursions of each token of the prompt."""


class CompletionResponse(ResponseModel):
    """Response of `/v1/completions`, or a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(ResponseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A chosen token with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class ChatMessage(ResponseModel):
    """The message that the model generated."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(ResponseModel):
    """One of the `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    token_ids: list[int]
    recursion_counts: list[int]


class ChatResponse(ResponseModel):
    """Response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(ResponseModel):
    """The part of the model's turn that a chunk adds."""

    role: Literal["assistant"] | None = Absent
    content: str | None = Absent


class ChatChunkChoice(ResponseModel):
    """The part of a choice that a chunk adds."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int]
    recursion_counts: list[int]


class ChatChunk(ResponseModel):
    """A chunk of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(ResponseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mor"
    max_model_len: int
    num_recursions: int
    vocab_size: int


class ModelList(ResponseModel):
    """Response of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(ResponseModel):
    """Response of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Absent


class DetokenizeResponse(ResponseModel):
    """Response of `/detokenize`."""

    prompt: str


class VersionResponse(ResponseModel):
    """Response of `/version`."""

    version: str


class DepthsResponse(ResponseModel):
    """Answer of `/depths`: the state of the engine."""

    model: str
    num_recursions: int
    tokens_by_depth: list[int]
    """Tokens generated so far by their recursion count, from 0 to num_recursions."""
    kv_pages_by_depth: list[int]
    """Pages that running requests hold at each depth of the block."""
    kv_pages_unshared: int
    """Pages that running requests hold for prelude and coda."""
    kv_pages_cached: int
    """Pages that only the prefix cache holds."""
    kv_pages_used: int
    """The sum of the three above."""
    kv_pages_total: int
    tokens_per_s: float
    """Generated tokens per second over the last five seconds."""
    running: int
    waiting: int
