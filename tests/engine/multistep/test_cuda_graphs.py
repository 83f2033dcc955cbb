"""What CUDA graphs are recorded from, and when: with stand-ins, as there is no GPU to ask."""

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from mor.engine.multistep.cuda_graphs import CUDAGraphFunction


class Gpu:
    """Notes what a function's runs were for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: int = 0) -> None:
        self.stream = MagicMock(spec=torch.cuda.Stream, device=torch.device("cuda:1"))
        self.runs: list[str] = []
        self.replays = 0
        self._state, self._fails = "", fails
        caller = MagicMock(spec=torch.cuda.Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", {self.stream.device: caller}.__getitem__)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: MagicMock(replay=self._replay))
        monkeypatch.setattr(torch.cuda, "stream", lambda s: self._during("warm-up", s))
        monkeypatch.setattr(torch.cuda, "graph", lambda _, stream: self._during("record", stream))

    def function(self) -> torch.Tensor:
        """What is recorded."""
        self.runs.append(self._state)
        if self._state == "record" and self._fails:
            self._fails -= 1
            raise torch.OutOfMemoryError
        return torch.tensor(len(self.runs))

    def _during(self, state: str, stream: Any) -> Any:
        assert stream is self.stream, "a graph of another device would record nothing"
        self._state = state
        return nullcontext()

    def _replay(self) -> None:
        self.replays += 1


def test_it_runs_once_is_recorded_once_and_replayed_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(monkeypatch)
    recorded = CUDAGraphFunction(gpu.function, gpu.stream)
    assert recorded() == 1, "what was recorded has not run yet"
    assert (gpu.runs, gpu.replays) == (["warm-up", "record"], 0)
    assert [int(recorded()) for _ in range(3)] == [2, 2, 2]
    assert (gpu.runs, gpu.replays) == (["warm-up", "record"], 3)


def test_a_recording_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, fails=1)
    recorded = CUDAGraphFunction(gpu.function, gpu.stream)
    with pytest.raises(torch.OutOfMemoryError):
        recorded()
    assert recorded() == 3
    assert recorded() == 4
    assert (gpu.runs, gpu.replays) == (["warm-up", "record"] * 2, 1)


def test_without_a_stream_it_is_the_function() -> None:
    runs = iter(range(3))
    recorded = CUDAGraphFunction(lambda: torch.tensor(next(runs)))
    assert [int(recorded()) for _ in range(3)] == [0, 1, 2]
