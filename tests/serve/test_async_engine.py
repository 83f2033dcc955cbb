"""`AsyncEngine` and its thread: admission, timeouts, failures, and its end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mor.engine.llm import LLM
from mor.errors import MorError
from mor.model.sampling import SamplingParams
from mor.serve.async_engine import AsyncEngine
from mor.serve.errors import HTTPError
from mor.serve.metrics import Metrics
from mor.serve.request_stream import RequestStream

LONG = SamplingParams(max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


def run_with(llm: LLM, work: Callable[[AsyncEngine], Awaitable[None]], **options: Any) -> None:
    """Run something with an `AsyncEngine`; the engine must be whole and empty afterwards."""
    fields = {"max_waiting": 8, "seconds": 60.0, **options}

    async def main() -> None:
        async_engine = AsyncEngine(llm, Metrics("tiny", 3), **fields)
        async_engine.start()
        try:
            async with asyncio.timeout(60):
                await work(async_engine)
        finally:
            await async_engine.stop()

    asyncio.run(main())
    llm.check_integrity()
    assert not llm.has_unfinished_requests


async def collect(async_engine: AsyncEngine, stream: RequestStream) -> list[int]:
    """The tokens of a request, which is released."""
    try:
        return [output.token_id async for pairs in stream for _, output in pairs]
    finally:
        async_engine.release(stream)


async def status(awaited: Awaitable[Any]) -> HTTPError:
    with pytest.raises(HTTPError) as caught:
        await awaited
    return caught.value


def test_many_requests_at_once_get_their_own_tokens(engine: LLM) -> None:
    prompts = [[5 + i, 7, 9] for i in range(40)]
    want = [c.token_ids for c in engine.generate(prompts, SHORT)]

    async def work(async_engine: AsyncEngine) -> None:
        streams = [await async_engine.submit([p], SHORT) for p in prompts]
        got = await asyncio.gather(*(collect(async_engine, stream) for stream in streams))
        assert list(got) == want

    run_with(engine, work)


def test_no_room_is_429_and_too_much_is_400(engine: LLM) -> None:
    maximum = engine.config.max_num_seqs + 2

    async def work(async_engine: AsyncEngine) -> None:
        streams = [await async_engine.submit([[1]] * maximum, LONG)]
        full = await status(async_engine.submit([[1]], SHORT))
        assert (full.status, full.code) == (429, "queue_full")
        assert 1 <= int(full.headers["Retry-After"]) <= 60
        assert (await status(async_engine.submit([[1]] * (maximum + 1), SHORT))).status == 400
        for stream in streams:
            async_engine.release(stream)
        again = await async_engine.submit([[1]] * maximum, SHORT)
        assert len(await collect(async_engine, again)) == maximum * 3

    run_with(engine, work, max_waiting=2)


def test_what_the_engine_refuses_leaves_nothing_behind(engine: LLM) -> None:
    async def work(async_engine: AsyncEngine) -> None:
        refused = await status(async_engine.submit([[1], [2], [9999]], SHORT))
        assert refused.status == 400
        assert isinstance(refused.__cause__, MorError)
        assert "9999" in str(refused)
        assert await async_engine.call(lambda llm: llm.has_unfinished_requests) is False

    run_with(engine, work)


def test_a_request_that_takes_too_long_is_504(engine: LLM) -> None:
    async def work(async_engine: AsyncEngine) -> None:
        async def served() -> list[int]:
            return await collect(async_engine, await async_engine.submit([[1]] * 16, LONG))

        assert (await status(served())).status == 504

    run_with(engine, work, seconds=0.2)


def test_a_client_that_leaves_while_it_is_accepted_leaves_nothing(engine: LLM) -> None:
    async def work(async_engine: AsyncEngine) -> None:
        for wait in (0, 0, 0.001, 0.005):
            task = asyncio.ensure_future(async_engine.submit([[1], [2]], LONG))
            await asyncio.sleep(wait)
            task.cancel()
            stream = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(stream, RequestStream):
                async_engine.release(stream)
        assert await async_engine.call(lambda llm: llm.has_unfinished_requests) is False

    run_with(engine, work)


def test_draining_takes_nothing_new_and_finishes_the_rest(engine: LLM) -> None:
    async def work(async_engine: AsyncEngine) -> None:
        stream = await async_engine.submit([[1]], LONG)
        async_engine.drain()
        assert (await status(async_engine.submit([[1]], SHORT))).status == 503
        assert len(await collect(async_engine, stream)) == 200

    run_with(engine, work)


def test_stopping_fails_what_is_under_way(engine: LLM) -> None:
    async def work(async_engine: AsyncEngine) -> None:
        stream = await async_engine.submit([[1]] * 16, LONG)
        await async_engine.stop()
        assert (await status(collect(async_engine, stream))).status == 503

    run_with(engine, work)


def test_a_step_that_fails_is_a_500_and_the_next_request_works(
    engine: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(async_engine: AsyncEngine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "run_block", fail)
            stream = await async_engine.submit([[1]], LONG)
            assert (await status(collect(async_engine, stream))).status == 500
        stream = await async_engine.submit([[1]], SHORT)
        assert len(await collect(async_engine, stream)) == 3

    words = " ".join(("a", "private", "prompt"))  # a trace quotes source, so not as one text

    def fail(plan: Any) -> None:
        raise RuntimeError(words)

    with caplog.at_level(logging.INFO, "mor.serve"):
        run_with(engine, work)
    assert "RuntimeError" in caplog.text
    assert words not in caplog.text


def test_an_engine_that_fails_for_good_is_given_up(
    engine: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(async_engine: AsyncEngine) -> None:
        for _ in range(3):
            stream = await async_engine.submit([[1]], LONG)
            assert (await status(collect(async_engine, stream))).status == 500
        with pytest.raises(HTTPError, match="restart the server"):
            async_engine.check_admission()
        assert (await status(async_engine.submit([[1]], SHORT))).status == 503
        assert (
            await status(async_engine.call(lambda llm: llm.has_unfinished_requests))
        ).status == 503

    def fail(plan: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(engine.runner, "run_block", fail)
    run_with(engine, work)
