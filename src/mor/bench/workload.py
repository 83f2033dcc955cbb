"""Models and requests to measure an engine with."""

import random
import time
from dataclasses import dataclass

import torch

from mor.engine.config import EngineConfig
from mor.engine.layer_stack import CpuStack
from mor.engine.llm import LLM
from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.cost import (
    decode_flops,
    depth_fractions_of,
    num_layer_matrix_parameters,
    sequence_flops,
)
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel
from mor.train.calibrate import calibrate


def random_model(config: MoRConfig, length: int, seed: int = 0) -> MoRModel:
    """Random weights; the thresholds such that each depth keeps the share its capacity says.

    Calibrated on random tokens in sequences of `length`: the depth mix is then the trained one, and
    nothing else of a trained model matters for speed.
    """
    torch.manual_seed(seed)
    model = MoRModel(config).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if config.routing == "expert_choice":
        windows = [torch.randint(config.vocab_size, (4, length + 1)) for _ in range(2)]
        with torch.inference_mode():
            model.set_thresholds(calibrate(model, windows))
    return model


@dataclass(frozen=True, kw_only=True)
class RequestShape:
    """Requests of one size."""

    prompt: int
    output: int


@dataclass(kw_only=True)
class Measurement:
    """What happened in a stretch of time."""

    seconds: float = 0.0
    tokens: int = 0
    """Generated tokens."""
    entered: int = 0
    """Prompt tokens that were computed."""
    steady: float = 0.0
    """Tokens that the same work would have generated in the load's long-run mix with prompts: in a
    short window one prompt more or less counts for much."""

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, in the long-run mix."""
        return self.steady / self.seconds

    def __add__(self, other: "Measurement") -> "Measurement":
        return Measurement(
            seconds=self.seconds + other.seconds,
            tokens=self.tokens + other.tokens,
            entered=self.entered + other.entered,
            steady=self.steady + other.steady,
        )


class SteadyLoad:
    """An engine with a constant number of sequences in flight.

    Staggered, the first requests end at different times, and each is followed by another: prefill
    and decode mix evenly. Otherwise all start together, and none follows.
    """

    def __init__(
        self,
        llm: LLM,
        sequences: int,
        shape: RequestShape,
        *,
        staggered: bool = True,
        seed: int = 0,
    ) -> None:
        self.llm = llm
        self._began = 0.0, 0
        self.shape = shape
        self._random = random.Random(seed)
        self._computed = 0
        self._decode = decode_flops(llm.model_config, shape.prompt + shape.output // 2).mean
        prefill = sequence_flops(llm.model_config, shape.prompt)
        self._prefill = prefill.mean - prefill.head  # of one prompt token
        self._staggered = staggered
        for number in range(sequences):
            self._add(1 + number * shape.output // sequences if staggered else shape.output)
        while llm.scheduler.waiting or any(
            s.num_unscheduled_tokens > 1 for s in llm.scheduler.running
        ):
            self._step()
        self.reset()

    def reset(self) -> None:
        """Start to count anew."""
        self.llm.stats.reset()
        stack = self.llm.runner.block
        if isinstance(stack, CpuStack):
            stack.clock[:] = 0
            self._began = time.perf_counter(), stack.cycles()

    def product_rate(self) -> float | None:
        """FLOP/s of the block's matrix products since `reset`; None where nothing counts them."""
        stack = self.llm.runner.block
        if not isinstance(stack, CpuStack) or not stack.clock[0]:
            return None
        elapsed = time.perf_counter() - self._began[0]
        per_second = (stack.cycles() - self._began[1]) / elapsed
        layer = 2 * num_layer_matrix_parameters(self.llm.model_config)
        flops = self.llm.stats.block_tokens * stack.num_layers * layer
        return flops * per_second / int(stack.clock[0])

    def _add(self, output: int) -> None:
        vocabulary = self.llm.model_config.vocab_size
        prompt = [self._random.randrange(vocabulary) for _ in range(self.shape.prompt)]
        self.llm.add_request(prompt, SamplingParams(max_tokens=output, ignore_eos=True))
        self._computed += self.shape.prompt

    def _step(self) -> int:
        events = self.llm.step()
        for event in events:
            if event.finish_reason is not None and self._staggered:
                self._add(self.shape.output)
        return len(events)

    def run(self, seconds: float) -> Measurement:
        """Keep going for about so long, a tick at least.

        Raises:
            ConfigError: the last request ended before.
        """
        before, began, tokens, elapsed = self._computed, time.perf_counter(), 0, 0.0
        while not elapsed or elapsed < seconds:
            if not self.llm.has_unfinished_requests:
                raise ConfigError(
                    f"all requests ended after {self.shape.output} tokens, before the clock did: "
                    "raise --output, or lower --seconds or --rounds."
                )
            tokens += self._step()
            elapsed = time.perf_counter() - began
        entered = self._computed - before
        each = self._decode  # FLOPs that stand behind a generated token
        if self._staggered:
            each += self._prefill * self.shape.prompt / self.shape.output
        steady = (tokens * self._decode + entered * self._prefill) / each
        return Measurement(seconds=elapsed, tokens=tokens, entered=entered, steady=steady)


def request_flops(
    config: MoRConfig, shape: RequestShape, histogram: list[int] | None = None
) -> float:
    """FLOPs of one request by the cost model: its prompt without the head, its output with it.

    Args:
        histogram: measured tokens by recursion count, from 0 on; None takes the capacities.
    """
    depth_fractions = depth_fractions_of(config, histogram)
    prefill = sequence_flops(config, shape.prompt, depth_fractions=depth_fractions)
    decode = decode_flops(config, shape.prompt + shape.output // 2, depth_fractions=depth_fractions)
    head_once = prefill.head
    return (
        (prefill.mean - prefill.head) * shape.prompt + head_once + decode.mean * (shape.output - 1)
    )


def engine(model: MoRModel, sequences: int, **settings: object) -> LLM:
    """An engine for so many sequences, without prefix caching: prompts are random anyway."""
    values = {"max_num_seqs": sequences, "max_num_batched_tokens": max(512, 2 * sequences)}
    return LLM(
        model, EngineConfig.from_dict({**values, "enable_prefix_caching": False, **settings})
    )
