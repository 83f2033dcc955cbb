"""Two models' training steps in turns: time and memory against what the cost model predicts.

`mor.bench.train_step` compares MoR with vanilla. Here are two more comparisons:

`twin`      the demo's MoR against its vanilla twin: the step's time against the ratio of FLOPs.
`dropping`  135M, R = 3, expert choice, batch 2 x 512, against the same model with all
            capacities 1: time and activation memory against the ratio of FLOPs.
"""

import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mor.bench.timing import paired
from mor.model.config import MoRConfig
from mor.model.cost import activation_values_per_token, training_flops
from mor.model.transformer import MoRModel
from mor.train.config import TrainConfig
from mor.train.distributed import World
from mor.train.optim import build_optimizer
from mor.train.parallelize import parallelize


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models A and B that train on batches of the same shape, and the bars of their ratios."""

    name: str
    a: MoRConfig
    b: MoRConfig
    batch_size: int
    sequence_length: int
    time_bar: float
    """Bar of (A's time / B's) / (A's FLOPs / B's)."""
    memory_bar: float | None
    """Bar of (A's activation memory / B's) / (A's FLOPs / B's); None has no bar."""
    rounds_factor: int = 1
    """Multiplies the number of rounds; short steps need more of them for a steady median."""


def comparisons() -> tuple[Comparison, ...]:
    """The comparisons `twin` and `dropping`."""
    demo = MoRConfig.preset("demo", num_recursions=3, vocab_size=4096)
    large = MoRConfig.preset("135m", num_recursions=3)
    return (
        Comparison(
            name="twin",
            a=demo,
            b=demo.vanilla_twin(),
            batch_size=4,
            sequence_length=256,
            time_bar=1.10,
            memory_bar=None,
            rounds_factor=5,
        ),
        Comparison(
            name="dropping",
            a=large,
            b=dataclasses.replace(large, capacities=(1.0, 1.0, 1.0)),
            batch_size=2,
            sequence_length=512,
            time_bar=1.05,
            memory_bar=1.05,
        ),
    )


class Stepper:
    """A model with its optimizer and one random batch, which it trains on again and again."""

    def __init__(
        self,
        config: MoRConfig,
        batch_size: int,
        sequence_length: int,
        settings: TrainConfig | None = None,
    ) -> None:
        torch.manual_seed(0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = MoRModel(config).train().to(device)
        settings = settings or TrainConfig(sequence_length=sequence_length, batch_size=batch_size)
        parallelize(self.model, settings, World(kind="none", rank=0, size=1, device=device))
        self.optimizer = build_optimizer(self.model, settings)
        batch = torch.randint(config.vocab_size, (batch_size, sequence_length + 1))
        self.batch = batch.to(device)

    def loss(self) -> Tensor:
        """Forward pass; the total loss."""
        batch = self.batch
        out = self.model(batch[:, :-1], targets=batch[:, 1:], return_logits=False)
        return out.total_loss

    def step(self) -> None:
        """One optimizer step: forward, backward, clip gradients, update, clear gradients."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def activation_bytes(self) -> int:
        """Bytes that the forward pass saves for the backward pass, without the parameters."""
        return saved_bytes(self.loss, exclude=self.model.parameters())


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> int:
    """Bytes of storages that autograd saves during `forward`, each once, without `exclude`'s."""
    ignored = {p.untyped_storage().data_ptr() for p in exclude}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address would come back as another one's

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(kept.values())
    del loss, alive
    return total


def compare(comparison: Comparison, *, rounds: int) -> dict[str, Any]:
    """Measure one comparison; the result is a JSON object."""
    shape = (comparison.batch_size, comparison.sequence_length)
    a, b = Stepper(comparison.a, *shape), Stepper(comparison.b, *shape)
    times = paired(a.step, b.step, rounds=rounds * comparison.rounds_factor)
    seconds = (statistics.median(times.a), statistics.median(times.b))
    length = comparison.sequence_length
    flops = [
        training_flops(c, length, depth_fractions(c, length)) for c in (comparison.a, comparison.b)
    ]
    flops_ratio = flops[0] / flops[1]
    memory = a.activation_bytes() / b.activation_bytes()
    values = [activation_values_per_token(c) for c in (comparison.a, comparison.b)]
    result: dict[str, Any] = {
        "name": comparison.name,
        "time": times.as_dict(),
        "flops_ratio": flops_ratio,
        "time_over_flops": times.ratio / flops_ratio,
        "time_bar": comparison.time_bar,
        "time_ok": times.ratio <= comparison.time_bar * flops_ratio,
        "activation_bytes": [a.activation_bytes(), b.activation_bytes()],
        "activation_ratio": memory,
        "activation_ratio_of_cost_model": values[0] / values[1],
        "tokens_per_step": comparison.batch_size * length,
        "gflops": [f * shape[0] * length / s / 1e9 for f, s in zip(flops, seconds, strict=True)],
    }
    if comparison.memory_bar is not None:
        result["memory_over_flops"] = memory / flops_ratio
        result["memory_bar"] = comparison.memory_bar
        result["memory_ok"] = memory <= comparison.memory_bar * flops_ratio
    del a, b
    gc.collect()
    return result


def depth_fractions(config: MoRConfig, length: int) -> tuple[float, ...]:
    """Share of tokens at each depth that `topk` selects: capacities in whole tokens."""
    return tuple(max(1, int(c * length)) / length for c in config.depth_capacities)
