"""`LLM`: a model that serves many requests at once, offline or step by step.

It builds the engine's parts and runs their steps: `Scheduler` plans, `ModelRunner` computes,
`OutputProcessor` makes texts and outputs of the tokens.
"""

import copy
import itertools
import operator
from collections.abc import Generator, Sequence
from pathlib import Path

from mor.engine.backend import ExecutionBackend
from mor.engine.config import EngineConfig
from mor.engine.kv_cache import KVCache
from mor.engine.model_runner import ModelRunner
from mor.engine.multistep.device_decoder import DeviceDecoder
from mor.engine.multistep.scheduler import MultiStepScheduler
from mor.engine.output_processor import OutputProcessor
from mor.engine.pages import PagePool, PageTable
from mor.engine.prefix import PrefixCache
from mor.engine.request import SequenceState, TokenOutput
from mor.engine.scheduler import Scheduler
from mor.engine.stats import EngineStats, ProgressBar
from mor.errors import CapacityError, DataError, RequestError
from mor.io.checkpoint import end_token_ids, load, resolve
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer
from mor.model.config import MoRConfig
from mor.model.sampling import Completion, SamplingParams, check_request, params_for_each
from mor.model.sharing import RecursionSpec
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
        self.end_token_ids: tuple[int, ...] = ()
        """Further tokens that end a completion, from the folder's generation_config.json."""
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
        # Memory for keys and values, its bookkeeping, and what plans with it.
        self.cache = KVCache(model.config, self.config, compute, device)
        self.pool = PagePool(self.cache.num_pages)
        caches = self.config.enable_prefix_caching
        self.prefix_cache = PrefixCache(self.pool, self.config.block_size) if caches else None
        recursion_spec = RecursionSpec.of(model.config)
        self.scheduler = Scheduler(self.config, recursion_spec, self.pool, self.prefix_cache)
        # What computes the plans.
        kernels = self.backend.kernels_for(model, self.config, self.cache)
        num_state_slots = self.scheduler.num_state_slots
        self.runner = ModelRunner(model, self.config, self.cache, kernels, num_state_slots)
        self.stats = EngineStats(model.config.num_recursions)
        # What makes texts and outputs of sampled tokens.
        self.output_processor = OutputProcessor(tokenizer, self.stats)
        self.multi_step: MultiStepScheduler | None = None
        num_steps = self.backend.num_scheduler_steps
        if num_steps > 1:
            decoder = DeviceDecoder(
                self.runner, recursion_spec.max_passes, num_steps, self.backend.capture_stream
            )
            self.multi_step = MultiStepScheduler(self.scheduler, decoder, self.stats, num_steps)
        self._arrival_index = itertools.count()

    def describe(self) -> str:
        """One line of text: kernels, device, dtype of weights, memory for keys and values."""
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
                    for output in self.step():
                        completions = output.completions
                        # Requests that were added before run along; their outputs are lost here.
                        if completions is not None and output.request_id in wanted:
                            done[output.request_id] = completions
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
        request_id = self.add_request(prompt, params)
        outputs = self.output_processor.open_stream(request_id)
        try:
            while outputs or request_id in self.output_processor:
                if not outputs:
                    self.step()  # of all requests; another stream's step may fill this one, too
                while outputs:
                    yield outputs.popleft()
        finally:
            self.output_processor.close_stream(request_id)
            self.abort(request_id)

    # -- step by step ---------------------------------------------------------------------------

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a request; returns its id.

        Args:
            params: None is greedy.
            request_id: of the caller's choice; None: a new one.

        Raises:
            RequestError: the model cannot serve it, or the id is in use.
            CapacityError: it could never fit into the memory for keys and values.
        """
        return self._queue(prompt, params or SamplingParams(), request_id, "the prompt")

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether requests are under way, or tokens that no `step` has returned yet."""
        return self.output_processor.has_unfinished_requests

    def step(self) -> list[TokenOutput]:
        """Run one engine step; the tokens that came out of it. Without requests it does nothing.

        If it is interrupted, requests and their tokens are still there for the next one.
        """
        if self.scheduler.has_unfinished:
            try:
                with self.stats.time_step(self.runner):
                    self._run_step()
            except BaseException:
                self.scheduler.preempt_all()  # what is halfway through the model starts again
                self._remove_finished()
                raise
        return self.output_processor.take_outputs()

    def abort(self, request_id: str) -> list[Completion]:
        """Stop a request at once and free its memory; its completions so far ([] if unknown)."""
        if request_id not in self.output_processor:
            self.output_processor.drop_outputs(request_id)
            return []
        sequences = self.output_processor.unfinished_sequences(request_id)
        completions = self.output_processor.abort(request_id)
        for sequence in sequences:
            self.scheduler.remove(sequence)
        return completions

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def check_integrity(self) -> None:
        """Assert that no page, state slot or request is lost or counted twice."""
        self.scheduler.check_integrity()
        self.output_processor.check_integrity()
        scheduled = [*self.scheduler.running, *self.scheduler.waiting]
        known = self.output_processor.unfinished_sequences()
        assert set(map(id, scheduled)) == set(map(id, known)), "requests and sequences disagree"

    # -- parts ----------------------------------------------------------------------------------

    def _run_step(self) -> None:
        """The three phases of a step; where decoding is all there is, several steps in a row.

        A sequence that finishes leaves the scheduler before anything else is planned.
        """
        if self.multi_step is not None and (decode := self.multi_step.schedule()) is not None:
            for sequence, token_id, logprob in self.multi_step.run(decode):
                if self.output_processor.process_token(sequence, token_id, logprob, {}):
                    self.scheduler.remove(sequence)
            return
        coda = self.scheduler.schedule_coda()
        if coda.chunks:
            coda_output = self.runner.run_coda(coda)
            self.scheduler.update_after_coda(coda)
            for sequence in self.output_processor.process_coda(coda, coda_output):
                self.scheduler.remove(sequence)
        prelude = self.scheduler.schedule_prelude()
        if prelude.chunks or prelude.page_copies:
            self.scheduler.update_after_prelude(prelude, self.runner.run_prelude(prelude))
        block = self.scheduler.schedule_block()
        if block.chunks:
            self.stats.block_tokens += block.num_tokens
            self.scheduler.update_after_block(block, self.runner.run_block(block))

    def _remove_finished(self) -> None:
        """Take out sequences that finished just before an interruption."""
        for sequence in list(self.scheduler.waiting):
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)

    def _queue(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, label: str
    ) -> str:
        """Check a request, called `label` in errors, and queue its sequences; its id."""
        arrival_index = next(self._arrival_index)
        name = f"request-{arrival_index}" if request_id is None else request_id
        while request_id is None and name in self.output_processor:
            name += "'"  # somebody gave this very id to a request
        if name in self.output_processor:
            raise RequestError(f"request id {name!r} is in use: choose another.")
        token_ids = self._tokenize(prompt, label)
        check_request(self.model_config, token_ids, params, label)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop texts need a tokenizer: use stop_token_ids.")
        self._check_capacity(len(token_ids), params.max_tokens)
        sequences = [
            self._make_sequence(name, index, arrival_index, token_ids, params)
            for index in range(params.n)
        ]
        self.output_processor.add_request(name, sequences)
        for sequence in sequences:
            self.scheduler.add(sequence)
        return name

    def _check_capacity(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise CapacityError if a sequence of these lengths could never fit into the pages."""
        # The last token that is sampled does not enter the model.
        num_tokens = num_prompt_tokens + max_tokens - 1
        max_pages = self.cache.max_pages(self.model_config, num_tokens)
        if max_pages > self.pool.num_pages:
            page = self.cache.page_bytes
            raise CapacityError(
                f"{num_prompt_tokens} prompt tokens and max_tokens={max_tokens} may take "
                f"{max_pages * page} bytes for keys and values, and kv_cache_memory_bytes is "
                f"{self.pool.num_pages * page}: shorten the request or raise kv_cache_memory_bytes."
            )

    def _tokenize(self, prompt: Prompt, label: str) -> list[int]:
        """Token ids of a prompt, which is called `label` in errors."""
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
        self,
        name: str,
        index: int,
        arrival_index: int,
        token_ids: list[int],
        params: SamplingParams,
    ) -> SequenceState:
        """Completion number `index` of a request, with empty page tables."""
        config = self.model_config
        minimum, maximum = params.recursion_range(config.num_recursions)
        num_tables = config.kv_policy.num_kv_depths(self.scheduler.recursion_spec.max_passes)
        unshared, block = self.cache.unshared, self.cache.block
        return SequenceState(
            request_id=name,
            index=index,
            arrival_index=arrival_index,
            params=params,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            min_recursions=minimum,
            max_recursions=maximum,
            stop_token_ids=params.end_ids(self.eos_token_id, *self.end_token_ids),
            rng=params.random_numbers(index),
            unshared_table=PageTable(unshared, self.pool) if unshared is not None else None,
            depth_tables=[PageTable(block, self.pool) for _ in range(num_tables)],
        )


def _end_of_text(config: MoRConfig, tokenizer: Tokenizer | None) -> int | None:
    """The end-of-text token of the model's config, otherwise of the tokenizer, if it has one."""
    if config.eos_token_id is not None or tokenizer is None:
        return config.eos_token_id
    try:
        return tokenizer.eos_id
    except DataError:
        return None
