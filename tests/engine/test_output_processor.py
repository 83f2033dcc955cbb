"""`OutputProcessor` without an engine: tokens go in, outputs and completions come out."""

import random
from functools import cache

import pytest

from mor.engine.output_processor import OutputProcessor
from mor.engine.plan import CodaOutput, CodaPlan, PromptLogprobs, SamplerOutput, SamplingInput
from mor.engine.request import Chunk, SequenceState, TokenOutput
from mor.engine.stats import EngineStats
from mor.io.tokenizer import Tokenizer
from mor.model.sampling import SamplingParams

PROMPT = [5, 6, 7]


@cache
def tokenizer() -> Tokenizer:
    """Bytes only: every character of a text is a token, an é two of them."""
    return Tokenizer.train(["abc"], 257)


def request(
    processor: OutputProcessor, name: str = "r", params: SamplingParams | None = None
) -> list[SequenceState]:
    """The sequences of a new request; none of its tokens is computed yet."""
    params = params or SamplingParams(max_tokens=4)
    sequences = [
        SequenceState(
            request_id=name,
            index=index,
            arrival_index=0,
            params=params,
            token_ids=list(PROMPT),
            num_prompt_tokens=len(PROMPT),
            min_recursions=0,
            max_recursions=3,
            stop_token_ids=frozenset(params.stop_token_ids),
            rng=random.Random(0),
            unshared_table=None,
            depth_tables=[],
            recursion_counts=[2] * len(PROMPT),
        )
        for index in range(params.n)
    ]
    processor.add_request(name, sequences)
    return sequences


def send(processor: OutputProcessor, sequence: SequenceState, *token_ids: int) -> list[TokenOutput]:
    """Sample these tokens for a sequence, one after another; the outputs of all of them."""
    for token_id in token_ids:
        processor.process_token(sequence, token_id, -0.5, {})
        sequence.recursion_counts.append(1)
    processor.check_integrity()
    return processor.take_outputs()


def send_text(processor: OutputProcessor, sequence: SequenceState, text: str) -> list[TokenOutput]:
    return send(processor, sequence, *tokenizer().encode(text))


def test_each_token_is_an_output_and_the_last_one_brings_the_completion() -> None:
    stats = EngineStats(3)
    processor = OutputProcessor(None, stats)
    (sequence,) = request(processor)
    outputs = send(processor, sequence, 10, 11, 12, 13)
    assert [output.token_id for output in outputs] == [10, 11, 12, 13]
    assert [output.text for output in outputs] == [""] * 4
    assert [output.recursion_count for output in outputs] == [2, 1, 1, 1]  # of the position before
    assert [output.finish_reason for output in outputs] == [None, None, None, "length"]
    assert [output.prompt is None for output in outputs] == [False, True, True, True]
    assert [output.completions is None for output in outputs] == [True, True, True, False]
    (completion,) = outputs[-1].completions or []
    assert completion.token_ids == [10, 11, 12, 13]
    assert completion.logprobs == [-0.5] * 4
    assert stats.depth_histogram == [0, 3, 1, 0]
    assert not processor.has_unfinished_requests


def test_a_stop_token_ends_the_request_and_has_no_text() -> None:
    processor = OutputProcessor(tokenizer(), EngineStats(3))
    a, b = tokenizer().encode("ab")
    (sequence,) = request(processor, params=SamplingParams(max_tokens=9, stop_token_ids=[b]))
    outputs = send(processor, sequence, a, b)
    assert [(output.text, output.finish_reason) for output in outputs] == [
        ("a", None),
        ("", "stop"),
    ]
    assert sequence.finish_reason == "stop"
    assert outputs[-1].completions is not None
    assert outputs[-1].completions[0].text == "a"


def test_a_stop_text_ends_the_request_and_is_not_in_its_text() -> None:
    processor = OutputProcessor(tokenizer(), EngineStats(3))
    (sequence,) = request(processor, params=SamplingParams(max_tokens=9, stop="bc"))
    assert [output.text for output in send_text(processor, sequence, "ab")] == ["a", ""]  # b: held
    assert [output.text for output in send_text(processor, sequence, "ab")] == ["ba", ""]
    (last,) = send_text(processor, sequence, "c")
    assert (last.text, last.finish_reason) == ("", "stop")
    assert last.completions is not None
    assert last.completions[0].text == "aba"


def test_the_last_token_lets_go_of_the_text_that_was_held_back() -> None:
    processor = OutputProcessor(tokenizer(), EngineStats(3))
    (held,) = request(processor, "held", SamplingParams(max_tokens=2, stop="bc"))
    assert [output.text for output in send_text(processor, held, "ab")] == ["a", "b"]
    (half,) = request(processor, "half", SamplingParams(max_tokens=1))
    (output,) = send(processor, half, tokenizer().encode("é")[0])
    assert (output.text, output.finish_reason) == ("\ufffd", "length")


def test_a_request_is_complete_with_its_last_sequence() -> None:
    processor = OutputProcessor(None, EngineStats(3))
    first, second = request(processor, params=SamplingParams(max_tokens=2, n=2))
    assert send(processor, second, 20, 21)[-1].completions is None
    assert processor.unfinished_sequences("r") == [first]
    assert "r" in processor
    last = send(processor, first, 10, 11)[-1]
    assert last.index == 0
    assert [(c.index, c.token_ids) for c in last.completions or []] == [
        (0, [10, 11]),
        (1, [20, 21]),
    ]
    assert "r" not in processor


def test_an_abort_gives_what_there_is_and_drops_what_nobody_took() -> None:
    processor = OutputProcessor(tokenizer(), EngineStats(3))
    first, second = request(processor, "r", SamplingParams(max_tokens=2, n=2))
    (other,) = request(processor, "other")
    a, b = tokenizer().encode("ab")
    for sequence in (first, first, second, other):
        processor.process_token(sequence, a, -0.5, {})
        sequence.recursion_counts.append(1)
    completions = processor.abort("r")
    assert [c.finish_reason for c in completions] == ["length", "abort"]
    assert [c.text for c in completions] == ["aa", "a"]
    assert [output.request_id for output in processor.take_outputs()] == ["other"]
    processor.check_integrity()
    assert processor.unfinished_sequences() == [other]
    assert send(processor, other, b)[-1].text == "b"


def test_a_stream_gets_its_requests_outputs_whoever_takes_them() -> None:
    processor = OutputProcessor(None, EngineStats(3))
    (streamed,) = request(processor, "streamed")
    (other,) = request(processor, "other")
    stream = processor.open_stream("streamed")
    send(processor, other, 1)
    send(processor, streamed, 2, 3)
    assert [output.token_id for output in stream] == [2, 3]
    processor.close_stream("streamed")
    assert [output.token_id for output in send(processor, streamed, 4)] == [4]
    assert len(stream) == 2


@pytest.mark.parametrize("start", [0, 1])
def test_the_output_of_a_coda_goes_to_the_sequences_of_its_plan(start: int) -> None:
    """Chunk 0 has tokens of a prompt that goes on; chunk 1 ends with its sequence's last token."""
    processor = OutputProcessor(None, EngineStats(3))
    params = SamplingParams(max_tokens=1, prompt_logprobs=True, logprobs=1)
    (scored,) = request(processor, "scored", params)
    (sampled,) = request(processor, "sampled", SamplingParams(max_tokens=1))
    scored.record_prompt_logprobs(1, [-9.0] * start, [{}] * start)  # by an earlier chunk
    plan = CodaPlan(
        chunks=(
            Chunk(sequence=scored, start=start, state_slots=[0]),
            Chunk(sequence=sampled, start=0, state_slots=[1, 2, 3]),
        ),
        sampled_chunks=(1,),
        sampling_inputs=(
            SamplingInput(params=sampled.params, uniform=0.0, prompt=(), output=(), forbidden=()),
        ),
    )
    output = CodaOutput(
        sampler_output=SamplerOutput(token_ids=(42,), logprobs=(-1.0,), top_logprobs=({},)),
        prompt_logprobs=(PromptLogprobs(chunk=0, logprobs=(-2.0,), top_logprobs=({3: -1.5},)),),
    )
    assert list(processor.process_coda(plan, output)) == [sampled]  # it has its one token
    assert sampled.output_token_ids == [42]
    assert scored.prompt_logprobs == [None, *[-9.0] * start, -2.0]
    assert scored.prompt_top_logprobs[-1] == {3: -1.5}
    assert [taken.token_id for taken in processor.take_outputs()] == [42]
