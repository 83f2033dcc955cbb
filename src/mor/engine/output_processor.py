"""From sampled tokens to what callers get: texts, `TokenOutput`s, `Completion`s, streams.

Lives beside the engine, as vLLM's output processor does: the scheduler and the model runner know
token ids only, and nothing here knows pages or tensors.
"""

from collections import deque
from collections.abc import Generator, Sequence

from mor.engine.plan import CodaOutput, CodaPlan
from mor.engine.request import SequenceState, TokenOutput
from mor.engine.stats import EngineStats
from mor.io.detokenizer import StopDetokenizer
from mor.io.tokenizer import Tokenizer
from mor.model.sampling import Completion, FinishReason


class OutputProcessor:
    """All unfinished requests, as their callers see them.

    Args:
        tokenizer: None for a model without one: completions then have no text.
        stats: counts every generated token.
    """

    def __init__(self, tokenizer: Tokenizer | None, stats: EngineStats) -> None:
        self._tokenizer = tokenizer
        self._stats = stats
        self._requests: dict[str, list[SequenceState]] = {}
        """By request id: its `n` sequences, while one of them is unfinished."""
        self._completions: dict[str, dict[int, Completion]] = {}
        """By request id and index: completions that wait for the other ones of their request."""
        self._detokenizers: dict[SequenceState, StopDetokenizer] = {}
        """Of each unfinished sequence; empty without a tokenizer."""
        self._outputs: list[TokenOutput] = []
        """Outputs that no step has returned; an interrupted step leaves some."""
        self._streams: dict[str, deque[TokenOutput]] = {}
        """By request id: outputs that its open stream has not yielded."""

    # -- requests -------------------------------------------------------------------------------

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a request is unfinished, or an output has not been taken."""
        return bool(self._requests or self._outputs)

    def add_request(self, request_id: str, sequences: Sequence[SequenceState]) -> None:
        """Begin to collect the outputs of a request: `n` sequences with the same prompt."""
        self._requests[request_id] = list(sequences)
        self._completions[request_id] = {}
        if self._tokenizer is not None:
            for sequence in sequences:
                self._detokenizers[sequence] = StopDetokenizer(
                    self._tokenizer, sequence.params.stop, sequence.prompt_token_ids
                )

    def unfinished_sequences(self, request_id: str | None = None) -> list[SequenceState]:
        """The sequences of a request, or of all, that still generate."""
        groups = self._requests.values() if request_id is None else [self._requests[request_id]]
        return [s for group in groups for s in group if s.finish_reason is None]

    def abort(self, request_id: str) -> list[Completion]:
        """End an unfinished request; its completions as far as they came. Outputs are dropped."""
        for sequence in self.unfinished_sequences(request_id):
            self._finish(sequence, "abort")
        self.drop_outputs(request_id)
        return self._forget(request_id)

    def drop_outputs(self, request_id: str) -> None:
        """Drop the outputs of a request that nobody has taken yet."""
        self._outputs = [out for out in self._outputs if out.request_id != request_id]

    # -- outputs --------------------------------------------------------------------------------

    def process_coda(self, plan: CodaPlan, output: CodaOutput) -> Generator[SequenceState]:
        """Record prompt log-probabilities and sampled tokens; yields each sequence that finished.

        One token at a time, so that an interruption between two of them loses neither.
        """
        for found in output.prompt_logprobs:
            chunk = plan.chunks[found.chunk]
            # The token at place p of the chunk predicts the prompt's token at start + p + 1.
            first = chunk.start + chunk.prompt_logprob_range.start + 1
            chunk.sequence.record_prompt_logprobs(first, found.logprobs, found.top_logprobs)
        sampled = output.sampler_output
        for index, token_id, logprob, top_logprobs in zip(
            plan.sampled_chunks,
            sampled.token_ids,
            sampled.logprobs,
            sampled.top_logprobs,
            strict=True,
        ):
            sequence = plan.chunks[index].sequence
            if self.process_token(sequence, token_id, logprob, top_logprobs):
                yield sequence

    def process_token(
        self,
        sequence: SequenceState,
        token_id: int,
        logprob: float,
        top_logprobs: dict[int, float],
    ) -> bool:
        """Append a sampled token to a sequence and make its output; whether that finished it."""
        sequence.append(token_id, logprob, top_logprobs)
        self._stats.count_token(sequence.recursion_counts[-1])
        detokenizer = self._detokenizers.get(sequence)
        is_end = token_id in sequence.stop_token_ids
        is_last = is_end or sequence.num_remaining <= 0
        # A token that ends the text is no part of it. The last token lets go of held-back text,
        # such as half a character, which may complete a stop text.
        text = detokenizer.push(token_id) if detokenizer is not None and not is_end else ""
        if detokenizer is not None and is_last:
            text += detokenizer.flush()
        is_stopped = is_end or (detokenizer is not None and detokenizer.stopped)
        completions = None
        if is_last or is_stopped:
            self._finish(sequence, "stop" if is_stopped else "length")
            if len(self._completions[sequence.request_id]) == sequence.params.n:
                completions = self._forget(sequence.request_id)
        is_first = sequence.num_output_tokens == 1
        self._outputs.append(
            TokenOutput(
                request_id=sequence.request_id,
                index=sequence.index,
                token_id=token_id,
                text=text,
                logprob=logprob,
                # Of the position before: the new token has not entered the model.
                recursion_count=sequence.recursion_counts[-1],
                top_logprobs=sequence.top_logprobs[-1] if sequence.top_logprobs else {},
                prompt=sequence.to_completion("") if is_first else None,
                finish_reason=sequence.finish_reason,
                completions=completions,
            )
        )
        return sequence.finish_reason is not None

    def take_outputs(self) -> list[TokenOutput]:
        """All outputs since the last call; open streams get theirs, too."""
        outputs = list(self._outputs)
        self._outputs.clear()
        for output in outputs:
            if output.request_id in self._streams:
                self._streams[output.request_id].append(output)
        return outputs

    def open_stream(self, request_id: str) -> deque[TokenOutput]:
        """A queue that from now on gets the request's outputs, whoever calls `take_outputs`."""
        self._streams[request_id] = deque()
        return self._streams[request_id]

    def close_stream(self, request_id: str) -> None:
        """Stop filling the request's queue."""
        del self._streams[request_id]

    def check_integrity(self) -> None:
        """Assert that no request or text is lost or kept for too long."""
        assert self._completions.keys() == self._requests.keys(), "completions without a request"
        if self._tokenizer is not None:
            assert self._detokenizers.keys() == set(self.unfinished_sequences()), "texts leaked"

    # -- ends -----------------------------------------------------------------------------------

    def _finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        """Note why a sequence ends, and keep its completion until its request is complete."""
        sequence.finish_reason = reason
        detokenizer = self._detokenizers.pop(sequence, None)
        if detokenizer is not None and reason == "abort":
            detokenizer.flush()
        text = detokenizer.text if detokenizer is not None else ""
        self._completions[sequence.request_id][sequence.index] = sequence.to_completion(text)

    def _forget(self, request_id: str) -> list[Completion]:
        """Drop a request that is over; its completions by index."""
        del self._requests[request_id]
        done = self._completions.pop(request_id)
        return [done[index] for index in sorted(done)]
