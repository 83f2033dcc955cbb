"""`EngineConfig`: how a model is run.

Of its fields only `dtype` and `quantization` change what the model computes. Every field is also an
option of the command line (`mor.cli.options.engine_options`), with its docstring as help.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from mor.errors import ConfigError
from mor.validation import NonNegativeInt, PositiveInt, Rule, check_fields, check_keys

Batching = Literal["depth", "sequence"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
Quantization = Literal["int8"]
KernelName = Literal["reference", "cpu", "triton"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of `mor.LLM`.

    Raises:
        ConfigError: a value is out of its range; the message names what would fit.
    """

    __no_type_check__ = True  # values come from users: __post_init__ checks them

    kv_cache_memory_bytes: PositiveInt | None = None
    """Bytes for keys and values. None: what `max_num_seqs` sequences of full length take, but at
    most half of the free memory."""
    block_size: PositiveInt = 16
    """Tokens whose keys and values a page of the cache holds."""
    max_num_seqs: PositiveInt = 64
    """Sequences that run at the same time, at most."""
    max_num_batched_tokens: PositiveInt = 512
    """Tokens that one pass of the block takes, at most; bounds the memory of activations."""
    chunked_prefill_size: PositiveInt = 256
    """Prompt tokens that one sequence enters per step, at most."""
    batching: Batching = "depth"
    """`depth`: a step mixes tokens of all depths. `sequence`: all tokens of a step are at the same
    depth and wait for the deepest; the baseline that shows what `depth` gains."""
    min_exit_tokens: PositiveInt | None = None
    """Tokens that must have left the block before coda and head run. Their weights are not shared,
    so that few tokens at a time cost as much as many. None: half of the running sequences, but no
    more than 16, which is enough to keep the processor busy while weights come."""
    max_exit_wait_steps: NonNegativeInt = 2
    """Steps that a token waits for `min_exit_tokens` others, at most. It never waits when nothing
    else can run."""
    num_scheduler_steps: PositiveInt | None = None
    """Decode steps that run in a row before the host looks at what came out. Until then routing and
    sampling stay on the device, and a sequence that has ended keeps its place. 1: the host looks
    after each step. None: 8 with Triton's kernels on a GPU, otherwise 1."""
    enable_prefix_caching: bool = True
    """Take keys and values of a prompt's beginning from an earlier request with the same one."""
    dtype: DType | None = None
    """Of the weights. None: the model's. On a CPU bfloat16 halves what is read, and sums are
    float32."""
    quantization: Quantization | None = None
    """`int8`: weights of all layers and the head by channel, inputs rounded on the fly (CPU)."""
    device: Annotated[str, Rule("a text: 'cpu', 'cuda' or 'cuda:1'")] | None = None
    """`cpu`, `cuda` or `cuda:1`. None: where the model is."""
    kernels: KernelName | None = None
    """Kernels that compute the layers. None: the fastest for device and dtype."""
    num_threads: PositiveInt | None = None
    """CPU threads of the compiled kernels. None: as many as torch uses."""

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
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
        check_keys(values, cls, "engine setting", ConfigError)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal config."""
        return asdict(self)
