"""Two minutes of 200 streams, a third of which break off: nothing lost, mixed or left behind."""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import pytest
from live_server import KEY, LiveServer

from mor.engine.llm import LLM
from mor.model.sampling import SamplingParams
from mor.serve.client import Client

STREAMS = 200
SECONDS = 120.0
MAX_TOKENS = 60
PROMPTS = 40


class Load:
    """Clients that stream until time is over, and compare what they get."""

    def __init__(self, client: Client, prompts: list[list[int]], want: list[list[int]]) -> None:
        self._client, self._prompts, self._want = client, prompts, want
        self.gaps: list[float] = []
        self.outcomes: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._loop(number, end) for number in range(STREAMS)))

    async def _loop(self, number: int, end: float) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            await self._one(draw)

    async def _one(self, draw: random.Random) -> None:
        which = draw.randrange(PROMPTS)
        leaves_after = draw.randrange(1, MAX_TOKENS) if draw.random() < 1 / 3 else None
        body = {
            "prompt": self._prompts[which],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        ids: list[int] = []
        last: float | None = None
        async with aclosing(self._client.stream("/v1/completions", body)) as events:
            async for data in events:
                now = time.monotonic()
                if last is not None:
                    self.gaps.append(now - last)
                last = now
                ids += json.loads(data)["choices"][0]["token_ids"]
                if leaves_after is not None and len(ids) >= leaves_after:
                    break
        expected = self._want[which]
        assert ids == expected[: len(ids)], "tokens were mixed"
        if leaves_after is None:
            assert ids == expected, "tokens were lost"
        self.outcomes["left" if leaves_after is not None else "whole"] += 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_streams(model: Path, engine: LLM, tmp_path: Path) -> None:
    draw = random.Random(7)
    prompts = [[draw.randrange(1, 300) for _ in range(draw.randint(3, 50))] for _ in range(PROMPTS)]
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    want = [completion.token_ids for completion in engine.generate(prompts, params)]
    options = ("--max-num-seqs", "256", "--kv-cache-memory-bytes", str(2**27))
    server = LiveServer(model, tmp_path / "log", *options)
    try:
        load = Load(Client.of(server.url, KEY), prompts, want)
        asyncio.run(load.run(SECONDS))
        state = server.idle(30)
        assert state["kv_pages_by_depth"] == [0, 0, 0]
        assert state["kv_pages_unshared"] == 0
        assert state["kv_pages_used"] == state["kv_pages_cached"]
        median = statistics.median(load.gaps)
        p99 = statistics.quantiles(load.gaps, n=100)[-1]
        told = f"{dict(load.outcomes)} median {1000 * median:.1f} ms, p99 {1000 * p99:.1f} ms"
        assert load.outcomes["whole"] > STREAMS, told
        assert load.outcomes["left"] > STREAMS / 4, told
        assert p99 <= 4 * median, told
        assert "Traceback" not in server.log
    finally:
        status = server.stop()
    assert status == 0
