"""`ServedModel`: a model with its engine, tokenizer and metrics, which all routes share."""

import time

from mor.engine.llm import LLM
from mor.errors import ConfigError, RequestError
from mor.model.sampling import SamplingParams
from mor.serve.async_engine import AsyncEngine
from mor.serve.config import ServeConfig
from mor.serve.engine_state import EngineState
from mor.serve.errors import HTTPError, from_engine_error
from mor.serve.metrics import Metrics
from mor.serve.openai.protocol import (
    DepthsResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    SamplingRequest,
    TokenizeRequest,
    TokenizeResponse,
)
from mor.serve.request_stream import Prompt
from mor.serve.text.chat_template import ChatTemplate
from mor.serve.text.prompt_processor import PromptProcessor, context_length_error


class ServedModel:
    """What the routes need of one model.

    Args:
        llm: the engine, which nobody else may use from now on.

    Raises:
        ConfigError: the settings do not fit the model.
    """

    def __init__(self, llm: LLM, config: ServeConfig) -> None:
        self.config = config
        self.model = llm.model_config
        self.max_model_len = config.max_model_len or self.model.max_position_embeddings
        self._check_memory(llm)
        files = llm.tokenizer.sidecar_files if llm.tokenizer is not None else {}
        template = ChatTemplate.of(files, config.chat_template)
        self.prompt_processor = PromptProcessor(llm.tokenizer, template, self.max_model_len)
        self.metrics = Metrics(config.model_names[0], self.model.num_recursions)
        self.engine = AsyncEngine(
            llm,
            self.metrics,
            max_waiting=config.max_waiting,
            seconds=config.request_timeout,
        )
        self.created = int(time.time())
        _warm_up(llm)

    def _check_memory(self, llm: LLM) -> None:
        limit = self.model.max_position_embeddings
        if self.max_model_len > limit:
            raise ConfigError(f"max_model_len={self.max_model_len}: the model takes {limit}.")
        pages = llm.cache.max_pages(self.model, self.max_model_len)
        if pages > llm.pool.num_pages:
            raise ConfigError(
                f"max_model_len={self.max_model_len} may take {pages * llm.cache.page_bytes} bytes "
                f"for keys and values, there are {llm.pool.num_pages * llm.cache.page_bytes}: "
                "lower --max-model-len or raise --kv-cache-memory-bytes."
            )

    @property
    def name(self) -> str:
        """The name of the model in responses."""
        return self.config.model_names[0]

    @property
    def card(self) -> ModelCard:
        """The model as `/v1/models` lists it."""
        return ModelCard(
            id=self.name,
            created=self.created,
            max_model_len=self.max_model_len,
            num_recursions=self.model.num_recursions,
            vocab_size=self.model.vocab_size,
        )

    def check_model(self, name: str | None) -> None:
        """Raise if a request names a model that is not served.

        Raises:
            HTTPError: 404.
        """
        if name is not None and name not in self.config.model_names:
            raise HTTPError(
                404,
                f"model {name!r:.200} is not served here, {self.name!r} is.",
                param="model",
                code="model_not_found",
            )

    def params(
        self,
        request: SamplingRequest,
        prompts: list[list[int]],
        max_tokens: int | None,
        *,
        logprobs: int | None,
        prompt_logprobs: bool = False,
    ) -> SamplingParams:
        """The engine's sampling parameters for a request.

        Args:
            prompts: token ids of all its prompts, which share the parameters.
            max_tokens: None takes what fits; 0 only scores the prompt, for which the engine
                generates a token that nobody sees.
            logprobs: likeliest tokens to report in each place; None reports none.

        Raises:
            HTTPError: 400, a value is out of range or the prompt does not fit.
        """
        longest = max(map(len, prompts))
        room = self.max_model_len - longest
        maximum = max(1, room if max_tokens is None else max_tokens)
        if longest + maximum > self.max_model_len:
            raise context_length_error(longest, maximum, self.max_model_len)
        try:
            return SamplingParams(
                max_tokens=maximum,
                min_tokens=request.min_tokens,
                temperature=request.temperature,
                top_k=max(0, request.top_k),
                top_p=request.top_p,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                seed=request.seed,
                n=request.n,
                stop=request.stops,
                stop_token_ids=tuple(request.stop_token_ids),
                ignore_eos=request.ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                min_recursions=request.min_recursions,
                max_recursions=request.max_recursions,
            )
        except RequestError as error:
            raise from_engine_error(error) from error

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """Answer of `/tokenize`: the token ids of a text or of a conversation.

        Raises:
            HTTPError: 404 for another model, 400 for what cannot be encoded.
        """
        self.check_model(request.model)
        if request.messages is not None:
            ids: Prompt = await self.prompt_processor.encode_messages(request.messages)
        else:
            ids = await self.prompt_processor.encode(request.prompt) if request.prompt else []
        strings = (
            [self.prompt_processor.token_text(i) for i in ids]
            if request.return_token_strs
            else None
        )
        return TokenizeResponse(
            count=len(ids), max_model_len=self.max_model_len, tokens=list(ids), token_strs=strings
        )

    def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """Answer of `/detokenize`: the text of token ids.

        Raises:
            HTTPError: 404 for another model, 400 for an unknown id.
        """
        self.check_model(request.model)
        size = self.prompt_processor.tokenizer.vocab_size
        unknown = [token for token in request.tokens if token >= size]
        if unknown:
            message = f"tokens: {unknown[0]} is not a token id, they end at {size - 1}."
            raise HTTPError(400, message, param="tokens")
        return DetokenizeResponse(prompt=self.prompt_processor.decode(request.tokens))

    async def depths(self) -> DepthsResponse:
        """Answer of `/depths`: what the engine holds now."""
        state = await self.engine.call(EngineState.of)
        return DepthsResponse(
            model=self.name,
            num_recursions=self.model.num_recursions,
            tokens_by_depth=state.tokens_by_depth,
            kv_pages_by_depth=state.pages_by_depth,
            kv_pages_unshared=state.pages_unshared,
            kv_pages_cached=state.pages_cached,
            kv_pages_used=state.pages_used,
            kv_pages_total=state.pages_total,
            tokens_per_s=round(self.metrics.tokens_per_s, 2),
            running=state.running,
            waiting=state.waiting,
        )


def _warm_up(llm: LLM) -> None:
    """Run a few requests so that kernels are compiled before a client waits; leaves no trace."""
    # Greedy and random sampling, with and without log-probabilities, are compiled separately.
    for temperature in (0.0, 1.0):
        llm.generate([[0]], SamplingParams(max_tokens=1, temperature=temperature, logprobs=1))
        llm.generate([[0]], SamplingParams(max_tokens=1, temperature=temperature))
    llm.reset_prefix_cache()
    llm.stats.reset()
