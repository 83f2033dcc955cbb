"""`LLM`: a model that serves many requests at once, offline or step by step."""

import copy
import itertools
import operator
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path

from mor.engine.backend import ExecutionBackend
from mor.engine.config import EngineConfig
from mor.engine.kv_cache import KVCache
from mor.engine.model_runner import ModelRunner
from mor.engine.multistep.device_decoder import DeviceDecoder
from mor.engine.multistep.scheduler import MultiStepScheduler
from mor.engine.pages import PagePool, PageTable
from mor.engine.prefix import PrefixCache
from mor.engine.request import Chunk, SequenceState, TokenOutput
from mor.engine.sampler import make_sampling_input
from mor.engine.scheduler import RecursionSpec, Scheduler
from mor.engine.stats import EngineStats, ProgressBar
from mor.errors import CapacityError, DataError, RequestError
from mor.io.checkpoint import end_token_ids, load, resolve
from mor.io.detokenizer import StopDetokenizer
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer
from mor.model.config import MoRConfig
from mor.model.sampling import (
    Completion,
    FinishReason,
    SamplingParams,
    check_request,
    params_for_each,
)
from mor.model.transformer import MoRModel

Prompt = str | Sequence[int]


class LLM:
    """Generates text with any of this package's models, many requests at a time.

        llm = mor.LLM("dir")
        for completion in llm.generate(["Once", "Twice"], mor.SamplingParams(max_tokens=32)):
            print(completion.text, completion.recursion_counts)

    `generate` and `stream` work through requests of their own. A server calls `add_request`,
    `step`, `abort` itself. Not for several threads at once.

    Args:
        model: a checkpoint's folder, or a model (which then must not change any more).
        config: how to run it.
        tokenizer: for a model in memory; a folder brings its own. Without one, prompts are token
            ids and completions have no text.

    Raises:
        CheckpointError: the folder holds no usable model.
        ConfigError: the settings do not fit the model or this machine.
    """

    def __init__(
        self,
        model: MoRModel | Path | str,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.end_token_ids: tuple[int, ...] = ()  # further ones, from its generation_config.json
        if not isinstance(model, MoRModel):
            folder = resolve(model)
            model = load(folder)
            self.end_token_ids = end_token_ids(folder)
            if tokenizer is None and (folder / TOKENIZER_FILE).is_file():
                tokenizer = Tokenizer.load(folder)
        self.model_config: MoRConfig = model.config
        self.tokenizer = tokenizer
        self.eos_token_id = _end_of_text(model.config, tokenizer)
        """Ends a completion, unless its request ignores it."""
        self.backend = ExecutionBackend.select(model, self.config)
        device, compute = self.backend.device, self.backend.compute_dtype
        if model.embed_tokens.weight.device != device:
            model = copy.deepcopy(model).to(device)  # the caller keeps its own where it is
        self.cache = KVCache(model.config, self.config, compute, device)
        self.pool = PagePool(self.cache.num_pages)
        caches = self.config.enable_prefix_caching
        self.prefix_cache = PrefixCache(self.pool, self.config.block_size) if caches else None
        passes = _recursion_spec(model.config)
        self.scheduler = Scheduler(self.config, passes, self.pool, self.prefix_cache)
        kernels = self.backend.kernels_for(model, self.config, self.cache)
        num_state_slots = self.scheduler.num_state_slots
        self.runner = ModelRunner(model, self.config, self.cache, kernels, num_state_slots)
        self.stats = EngineStats(model.config.num_recursions)
        self.multi_step: MultiStepScheduler | None = None
        if self.backend.num_scheduler_steps > 1:
            steps, recorder = self.backend.num_scheduler_steps, self.backend.capture_stream
            flight = DeviceDecoder(self.runner, passes.max_passes, steps, recorder)
            self.multi_step = MultiStepScheduler(self.scheduler, flight, self.stats, steps)
        self._requests: dict[str, list[SequenceState]] = {}
        self._done: dict[str, dict[int, Completion]] = {}
        self._detokenizers: dict[SequenceState, StopDetokenizer] = {}
        self._order = itertools.count()
        self._events: list[TokenOutput] = []  # that no step has returned yet
        self._streams: dict[str, deque[TokenOutput]] = {}  # of open streams

    def describe(self) -> str:
        """One line: kernels, dtype, memory for keys and values."""
        kv = self.cache.num_pages * self.cache.page_bytes
        weights = self.config.quantization or str(self.backend.weight_dtype).removeprefix("torch.")
        return (
            f"{self.backend.kernels} kernels on {self.backend.device}, {weights} weights, "
            f"{kv / 2**20:,.0f} MiB for keys and values ({self.cache.num_pages} pages of "
            f"{self.cache.page_bytes / 1024:,.0f} KiB)"
        )

    # -- whole requests -------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue every prompt; completions come in the order of the prompts, `n` for each.

        Args:
            prompts: texts, or lists of token ids.
            sampling_params: for all prompts, or one for each; None is greedy.
            progress: show a progress bar on stderr.

        Raises:
            RequestError: a prompt or its parameters cannot be served; then none is.
            CapacityError: a request needs more memory for keys and values than there is.
        """
        if isinstance(prompts, str):
            raise RequestError("generate takes a list of prompts: put the text into a list.")
        params = params_for_each(sampling_params, len(prompts))
        names: list[str] = []
        done: dict[str, list[Completion]] = {}
        try:
            for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
                names.append(self._queue(prompt, each, None, f"prompt {number}"))
            wanted = set(names)
            with ProgressBar(len(names), progress) as bar:
                while len(done) < len(names):
                    for event in self.step():
                        completions = event.completions
                        if completions is not None and event.request_id in wanted:
                            done[event.request_id] = completions
                            bar.advance()
        finally:
            for name in names:
                if name not in done:
                    self.abort(name)
        return [completion for name in names for completion in done[name]]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[TokenOutput]:
        """The tokens of one request as they come; closing the iterator aborts the request."""
        name = self.add_request(prompt, params)
        inbox = self._streams[name] = deque[TokenOutput]()  # other streams' steps fill it, too
        try:
            while inbox or name in self._requests:
                if not inbox:
                    self.step()
                while inbox:
                    yield inbox.popleft()
        finally:
            del self._streams[name]
            self.abort(name)

    # -- step by step ---------------------------------------------------------------------------

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a request; its id.

        Raises:
            RequestError: the model cannot serve it, or the id is in use.
            CapacityError: it could never fit into the memory for keys and values.
        """
        return self._queue(prompt, params or SamplingParams(), request_id, "the prompt")

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether requests are under way."""
        return bool(self._requests or self._events)

    def step(self) -> list[TokenOutput]:
        """One tick: the tokens that came out of it. Nothing happens if there are no requests.

        If it is interrupted, requests and their tokens are still there for the next one.
        """
        if self.scheduler.has_unfinished:
            try:
                with self.stats.time_step(self.runner):
                    self._run_step()
            except BaseException:
                self.scheduler.preempt_all()
                raise
        events = list(self._events)
        self._events.clear()
        for event in events:
            if event.request_id in self._streams:
                self._streams[event.request_id].append(event)
        return events

    def abort(self, request_id: str) -> list[Completion]:
        """Stop a request at once and free its memory; what there is of it (nothing if unknown)."""
        for sequence in self._requests.get(request_id, []):
            if sequence.finish_reason is None:
                self._close(sequence, "abort")
        self._events = [e for e in self._events if e.request_id != request_id]
        return self._forget(request_id)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def check_integrity(self) -> None:
        """Assert that no page, row or request is lost or counted twice."""
        self.scheduler.check_integrity()
        sequences = [*self.scheduler.running, *self.scheduler.waiting]
        known = [t for ts in self._requests.values() for t in ts if t.finish_reason is None]
        assert set(map(id, sequences)) == set(map(id, known)), "requests and sequences disagree"
        assert self._done.keys() == self._requests.keys()

    # -- parts ----------------------------------------------------------------------------------

    def _queue(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, label: str
    ) -> str:
        order = next(self._order)
        name = f"request-{order}" if request_id is None else request_id
        while request_id is None and name in self._requests:  # somebody's own choice
            name += "'"
        if name in self._requests:
            raise RequestError(f"request id {name!r} is in use: choose another.")
        tokens = self._tokens(prompt, label)
        config = self.model_config
        check_request(config, tokens, params, label)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop texts need a tokenizer: use stop_token_ids.")
        maximum = self.cache.max_pages(config, len(tokens) + params.max_tokens - 1)
        if maximum > self.pool.num_pages:
            page = self.cache.page_bytes
            raise CapacityError(
                f"{len(tokens)} prompt tokens and max_tokens={params.max_tokens} may take "
                f"{maximum * page} bytes for keys and values, and kv_cache_memory_bytes is "
                f"{self.pool.num_pages * page}: shorten the request or raise kv_cache_memory_bytes."
            )
        sequences = [self._make_sequence(name, i, order, tokens, params) for i in range(params.n)]
        self._requests[name] = sequences
        self._done[name] = {}
        for sequence in sequences:
            self.scheduler.add(sequence)
            if self.tokenizer is not None:
                self._detokenizers[sequence] = StopDetokenizer(self.tokenizer, params.stop, tokens)
        return name

    def _run_step(self) -> None:
        if self.multi_step is not None and (flying := self.multi_step.schedule()):
            for sequence, token, logprob in self.multi_step.run(flying):
                sequence.append(token, logprob, {})
                self._events.append(self._event(sequence))
            return
        chunks = self.scheduler.schedule_coda()
        if chunks:
            self._finish(chunks)
        entering = self.scheduler.schedule_prelude()
        if entering.chunks or entering.page_copies:
            self.scheduler.update_after_prelude(entering.chunks, self.runner.run_prelude(entering))
        advancing = self.scheduler.schedule_block()
        if advancing.chunks:
            self.stats.block_tokens += sum(len(c.active) for c in advancing.chunks)
            self.scheduler.update_after_block(advancing.chunks, self.runner.run_block(advancing))

    def _tokens(self, prompt: Prompt, label: str) -> list[int]:
        if not isinstance(prompt, str):
            try:
                return [int(operator.index(token)) for token in prompt]
            except TypeError:
                raise RequestError(
                    f"{label} must be a text or a list of token ids, not {prompt!r:.80}."
                ) from None
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer: give token ids instead.")
        return self.tokenizer.encode(prompt)

    def _make_sequence(
        self, name: str, index: int, order: int, tokens: list[int], params: SamplingParams
    ) -> SequenceState:
        config = self.model_config
        minimum, maximum = params.recursion_range(config.num_recursions)
        num_tables = config.kv_policy.num_kv_depths(self.scheduler.recursion_spec.max_passes)
        unshared, block = self.cache.unshared, self.cache.block
        return SequenceState(
            request_id=name,
            index=index,
            arrival_index=order,
            params=params,
            token_ids=list(tokens),
            num_prompt_tokens=len(tokens),
            min_recursions=minimum,
            max_recursions=maximum,
            stop_token_ids=params.end_ids(self.eos_token_id, *self.end_token_ids),
            rng=params.random_numbers(index),
            unshared_table=PageTable(unshared, self.pool) if unshared is not None else None,
            depth_tables=[PageTable(block, self.pool) for _ in range(num_tables)],
        )

    def _finish(self, chunks: list[Chunk]) -> None:
        """Coda, head and sampling for these chunks; events for the caller."""
        sampling = {
            i: make_sampling_input(c.sequence)
            for i, c in enumerate(chunks)
            if c.start + len(c) == len(c.sequence.token_ids)
        }
        result = self.runner.run_coda(chunks, sampling)
        self.scheduler.update_after_coda(chunks)
        for i, (scores, likeliest) in result.prompt_logprobs.items():
            first = chunks[i].start + chunks[i].prompt_logprob_range.start + 1
            chunks[i].sequence.record_prompt_logprobs(first, scores, likeliest)
        sampled = result.sampler_output
        for i, token, logprob, top in zip(
            *(sampling, sampled.tokens, sampled.logprobs, sampled.top_logprobs), strict=True
        ):
            sequence = chunks[i].sequence
            sequence.append(token, logprob, top)
            self._events.append(self._event(sequence))

    def _event(self, sequence: SequenceState) -> TokenOutput:
        """What the caller hears of the token that was just appended."""
        token, text = sequence.token_ids[-1], self._detokenizers.get(sequence)
        self.stats.count_token(sequence.recursion_counts[-1])
        ends = token in sequence.stop_token_ids
        last = (
            ends
            or len(sequence.token_ids) - sequence.num_prompt_tokens >= sequence.params.max_tokens
        )
        delta = text.push(token) if text is not None and not ends else ""
        if text is not None and last:
            delta += text.flush()
        completions = None
        stopped = ends or (text is not None and text.stopped)
        if last or stopped:
            self._close(sequence, "stop" if stopped else "length")
            if len(self._done[sequence.request_id]) == sequence.params.n:
                completions = self._forget(sequence.request_id)
        return TokenOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            token_id=token,
            text=delta,
            logprob=sequence.logprobs[-1],
            recursion_count=sequence.recursion_counts[-1],
            top_logprobs=sequence.top_logprobs[-1] if sequence.top_logprobs else {},
            prompt=sequence.to_completion("")
            if len(sequence.token_ids) == sequence.num_prompt_tokens + 1
            else None,
            finish_reason=sequence.finish_reason,
            completions=completions,
        )

    def _close(self, sequence: SequenceState, reason: FinishReason) -> None:
        """Free what a sequence holds, and keep its completion until the request is complete."""
        sequence.finish_reason = reason
        text = self._detokenizers.pop(sequence, None)
        if text is not None and reason == "abort":
            text.flush()
        completion = sequence.to_completion(text.text if text is not None else "")
        self._done[sequence.request_id][sequence.index] = completion
        self.scheduler.remove(sequence)

    def _forget(self, request_id: str) -> list[Completion]:
        self._requests.pop(request_id, None)
        done = self._done.pop(request_id, {})
        return [done[index] for index in sorted(done)]


def _end_of_text(config: MoRConfig, tokenizer: Tokenizer | None) -> int | None:
    """What the model names, otherwise the tokenizer's."""
    if config.eos_token_id is not None or tokenizer is None:
        return config.eos_token_id
    try:
        return tokenizer.eos_id
    except DataError:
        return None


def _recursion_spec(config: MoRConfig) -> RecursionSpec:
    one = config.sharing == "sequence"
    return RecursionSpec(
        max_passes=1 if one else config.num_recursions,
        recursions_per_pass=config.num_recursions if one else 1,
        shared_kv=not config.kv_policy.writes(1),
        depth_fractions=config.depth_capacities,
    )
