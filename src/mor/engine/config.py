"""`EngineConfig`: how a model is run. Nothing here changes what it computes, but `dtype`,
`quantization` and the requests' own recursion limits."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from mor.errors import ConfigError, nearest

Batching = Literal["depth", "sequence"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
Quantization = Literal["int8"]
KernelName = Literal["reference", "cpu", "triton"]

_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "batching": get_args(Batching),
        "dtype": get_args(DType),
        "quantization": get_args(Quantization),
        "kernels": get_args(KernelName),
    }
)
_AT_MIN: Mapping[str, int] = MappingProxyType(
    {
        "kv_cache_memory_bytes": 1,
        "block_size": 1,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 1,
        "chunked_prefill_size": 1,
        "min_exit_tokens": 1,
        "max_exit_wait_steps": 0,
        "num_scheduler_steps": 1,
        "num_threads": 1,
    }
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of `mor.LLM`.

    Raises:
        ConfigError: a value is out of its range; the message names what would fit.
    """

    __no_type_check__ = True  # values come from users: __post_init__ checks them

    kv_cache_memory_bytes: int | None = None
    """Bytes for keys and values. None: what `max_num_seqs` of full length take, but at most half
    of the memory that is free."""
    block_size: int = 16
    """S, entries of a page."""
    max_num_seqs: int = 64
    """Sequences in flight at most."""
    max_num_batched_tokens: int = 512
    """Tokens that one pass of the block takes at most; bounds the memory of activations."""
    chunked_prefill_size: int = 256
    """Prompt tokens that one sequence enters per tick at most."""
    batching: Batching = "depth"
    """`depth`: a tick mixes tokens of all depths. `sequence`: all tokens of a tick are at the same
    depth and wait for the deepest; the baseline that shows what `depth` gains."""
    min_exit_tokens: int | None = None
    """Tokens that must have left the block before coda and head run. Their weights are not shared,
    so that few tokens at a time cost as much as many. None: half of the running sequences, but no
    more than 16, which is enough to keep the processor busy while weights come .."""
    max_exit_wait_steps: int = 2
    """.. unless one of them has waited for this many ticks, or nothing else can run."""
    num_scheduler_steps: int | None = None
    """Decode ticks that run in a row before the host looks at what came out: until then routing and
    sampling stay on the device, and the lane of a sequence that has ended idles. 1: it looks after
    each. None: 8 with Triton's kernels on a GPU, otherwise 1."""
    enable_prefix_caching: bool = True
    dtype: DType | None = None
    """Of the weights; None: the model's. On a CPU bfloat16 halves what is read; sums are fp32."""
    quantization: Quantization | None = None
    """`int8`: weights of all layers and the head by channel, inputs rounded on the fly (CPU)."""
    device: str | None = None
    """None: where the model is."""
    kernels: KernelName | None = None
    """None: the fastest for device and dtype."""
    num_threads: int | None = None
    """CPU threads of the compiled kernels; None: as many as torch uses."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            if f.name in _CHOICES and value not in _CHOICES[f.name]:
                hint = nearest(str(value), _CHOICES[f.name])
                raise ConfigError(f"{f.name}={value!r} is not a choice: {hint}")
            if f.name in _AT_MIN:
                minimum = _AT_MIN[f.name]
                if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                    raise ConfigError(f"{f.name}={value!r} must be an integer >= {minimum}.")
        if self.device is not None and not isinstance(self.device, str):
            raise ConfigError(f"device={self.device!r} must be a text: 'cpu', 'cuda' or 'cuda:1'.")
        if not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(
                f"enable_prefix_caching={self.enable_prefix_caching!r} must be true or false."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs="
                f"{self.max_num_seqs}: every sequence needs room for a token; raise the one or "
                "lower the other."
            )
        if self.min_exit_tokens is not None and self.min_exit_tokens > self.max_num_seqs:
            raise ConfigError(
                f"min_exit_tokens={self.min_exit_tokens} can never be reached with "
                f"max_num_seqs={self.max_num_seqs}: make it smaller."
            )
        if self.quantization and self.dtype not in (None, "float32"):
            raise ConfigError(
                f"quantization={self.quantization!r} does not go with dtype={self.dtype!r}: "
                "what is not quantized stays in float32."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EngineConfig":
        """Build from plain data; an unknown key is an error that names the nearest known one."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"engine setting {key!r} is unknown: {nearest(str(key), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal config."""
        return asdict(self)
