"""Random models, and an engine that is kept busy with random requests."""

import random
import time
from dataclasses import dataclass

import torch

from mor.engine.config import EngineConfig
from mor.engine.kernels.cpu_backend import CpuStack
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
    """A model with random weights whose depths keep the shares of tokens that capacities say.

    Thresholds are calibrated on random tokens in sequences of `length`. Depth shares are then those
    of a trained model, and nothing else of training matters for speed.
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
    """The size of all requests of a load."""

    prompt: int
    """Tokens of the prompt."""
    output: int
    """Tokens that are generated."""


@dataclass(kw_only=True)
class Measurement:
    """Tokens that an engine computed in a stretch of time."""

    seconds: float = 0.0
    tokens: int = 0
    """Generated tokens."""
    prompt_tokens: int = 0
    """Prompt tokens of the requests that were added."""
    steady_tokens: float = 0.0
    """Tokens that the same FLOPs would have generated in the load's long-run mix of prompt and
    output; in a short stretch one prompt more or less would change `tokens` a lot."""

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, in the long-run mix."""
        return self.steady_tokens / self.seconds

    def __add__(self, other: "Measurement") -> "Measurement":
        return Measurement(
            seconds=self.seconds + other.seconds,
            tokens=self.tokens + other.tokens,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            steady_tokens=self.steady_tokens + other.steady_tokens,
        )


class SteadyLoad:
    """An engine with so many sequences in flight, whose prompts are computed when it is made.

    Args:
        staggered: the first requests have different lengths, and another request follows each one
            that ends, so that prompts and decoding mix evenly. Otherwise all requests start
            together, and none follows.
    """

    def __init__(
        self,
        llm: LLM,
        num_sequences: int,
        shape: RequestShape,
        *,
        staggered: bool = True,
        seed: int = 0,
    ) -> None:
        self.llm = llm
        self._cycle_start = 0.0, 0  # time and the kernels' cycle counter, both at `reset`
        self.shape = shape
        self._random = random.Random(seed)
        self._prompt_tokens = 0  # of all requests so far
        self._decode_flops = decode_flops(llm.model_config, shape.prompt + shape.output // 2).mean
        prefill = sequence_flops(llm.model_config, shape.prompt)
        self._prefill_flops = prefill.mean - prefill.head  # of one prompt token
        self._staggered = staggered
        for number in range(num_sequences):
            # Staggered, the first requests have 1, .., output tokens, evenly spread.
            output = 1 + number * shape.output // num_sequences if staggered else shape.output
            self._add(output)
        while llm.scheduler.waiting or any(
            s.num_unscheduled_tokens > 1 for s in llm.scheduler.running
        ):
            self._step()
        self.reset()

    def reset(self) -> None:
        """Clear the engine's statistics and start the cycle counter of the CPU kernels."""
        self.llm.stats.reset()
        stack = self.llm.runner.block
        if isinstance(stack, CpuStack):
            stack.clock[:] = 0
            self._cycle_start = time.perf_counter(), stack.cycles()

    def product_rate(self) -> float | None:
        """FLOP/s of the block's matrix products since `reset`; None without the CPU's kernels."""
        stack = self.llm.runner.block
        if not isinstance(stack, CpuStack) or not stack.clock[0]:
            return None
        # The kernels count cycles in products; their length follows from both clocks since `reset`.
        elapsed = time.perf_counter() - self._cycle_start[0]
        cycles_per_s = (stack.cycles() - self._cycle_start[1]) / elapsed
        layer = 2 * num_layer_matrix_parameters(self.llm.model_config)
        flops = self.llm.stats.block_tokens * stack.num_layers * layer
        return flops * cycles_per_s / int(stack.clock[0])

    def _add(self, output: int) -> None:
        """Add a request with a random prompt and so many output tokens."""
        vocab_size = self.llm.model_config.vocab_size
        prompt = [self._random.randrange(vocab_size) for _ in range(self.shape.prompt)]
        self.llm.add_request(prompt, SamplingParams(max_tokens=output, ignore_eos=True))
        self._prompt_tokens += self.shape.prompt

    def _step(self) -> int:
        """Run one step of the engine; the number of generated tokens."""
        outputs = self.llm.step()
        for output in outputs:
            if output.finish_reason is not None and self._staggered:
                self._add(self.shape.output)
        return len(outputs)

    def run(self, seconds: float) -> Measurement:
        """Run steps for about so many seconds, and at least one.

        Raises:
            ConfigError: all requests have ended before.
        """
        before = self._prompt_tokens
        began = time.perf_counter()
        tokens, elapsed = 0, 0.0
        while not elapsed or elapsed < seconds:
            if not self.llm.has_unfinished_requests:
                raise ConfigError(
                    f"all requests ended after {self.shape.output} tokens, before the clock did: "
                    "raise --output, or lower --seconds or --rounds."
                )
            tokens += self._step()
            elapsed = time.perf_counter() - began
        prompt_tokens = self._prompt_tokens - before
        # FLOPs per generated token in the long run: its own, and its share of a prompt.
        each = self._decode_flops
        if self._staggered:
            each += self._prefill_flops * self.shape.prompt / self.shape.output
        spent = tokens * self._decode_flops + prompt_tokens * self._prefill_flops
        return Measurement(
            seconds=elapsed, tokens=tokens, prompt_tokens=prompt_tokens, steady_tokens=spent / each
        )


def request_flops(
    config: MoRConfig, shape: RequestShape, histogram: list[int] | None = None
) -> float:
    """FLOPs of one request by the cost model: prompt tokens without the head, output with it.

    Args:
        histogram: (R + 1,) measured tokens by recursion count, from 0 on; None takes the
            shares that the capacities say.
    """
    depth_fractions = depth_fractions_of(config, histogram)
    prefill = sequence_flops(config, shape.prompt, depth_fractions=depth_fractions)
    decode = decode_flops(config, shape.prompt + shape.output // 2, depth_fractions=depth_fractions)
    # The prompt's last token gives the first output token: the head runs there, too.
    prompt = (prefill.mean - prefill.head) * shape.prompt + prefill.head
    return prompt + decode.mean * (shape.output - 1)


def engine(model: MoRModel, max_num_seqs: int, **options: object) -> LLM:
    """An engine without prefix caching, since prompts are random.

    Args:
        options: further fields of `EngineConfig`; they replace ours.
    """
    fields = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(512, 2 * max_num_seqs),
        "enable_prefix_caching": False,
    }
    return LLM(model, EngineConfig.from_dict(fields | options))
