"""Settings of the engine: each that cannot work is refused with its name and what would."""

from typing import Any

import pytest
import torch

from engine_helpers import shared_model
from mor.engine.backend import ExecutionBackend
from mor.engine.config import EngineConfig
from mor.engine.kv_cache import KVCache, free_memory
from mor.engine.llm import LLM
from mor.errors import CapacityError, ConfigError
from tiny import KINDS, tiny_config, tiny_model


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes=0 must be an integer >= 1"),
        ({"kv_cache_memory_bytes": 1e9}, r"kv_cache_memory_bytes=1000000000.0 must be an integer"),
        ({"block_size": True}, "block_size=True must be an integer >= 1"),
        ({"max_num_seqs": None}, "max_num_seqs=None must be an integer"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 must be an integer >= 1"),
        (
            {"max_num_batched_tokens": 8},
            "max_num_batched_tokens=8 is below max_num_seqs=64: .* raise the one or lower",
        ),
        ({"chunked_prefill_size": -1}, "chunked_prefill_size=-1 must be an integer >= 1"),
        ({"min_exit_tokens": 65}, "min_exit_tokens=65 .* max_num_seqs=64: make it smaller"),
        ({"num_scheduler_steps": 0}, "num_scheduler_steps=0 must be an integer >= 1"),
        ({"max_exit_wait_steps": -1}, "max_exit_wait_steps=-1 must be an integer >= 0"),
        ({"num_threads": 0}, "num_threads=0 must be an integer >= 1"),
        ({"batching": "depths"}, "batching='depths' is not a choice: did you mean 'depth'"),
        ({"batching": None}, "batching=None is not a choice"),
        ({"dtype": "fp32"}, "dtype='fp32' is not a choice"),
        ({"dtype": ["float32"]}, "dtype=.* is not a choice"),
        ({"quantization": "int4"}, "quantization='int4' is not a choice: did you mean 'int8'"),
        ({"quantization": "int8", "dtype": "bfloat16"}, "quantization='int8' .*dtype='bfloat16'"),
        ({"kernels": "cuda"}, "kernels='cuda' is not a choice"),
        ({"device": 0}, "device=0 must be a text"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching='yes' must be true or false"),
    ],
)
def test_bad_settings_are_named_with_what_would_do(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**fields)


def test_settings_make_the_round_trip() -> None:
    config = EngineConfig(block_size=32, dtype="bfloat16", enable_prefix_caching=False)
    assert EngineConfig.from_dict(config.to_dict()) == config
    assert EngineConfig.from_dict({}) == EngineConfig()
    with pytest.raises(ConfigError, match="'block_sise' is unknown: did you mean 'block_size'"):
        EngineConfig.from_dict({"block_sise": 1})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"device": "cuda"}, "device='cuda': torch sees no GPU here; use 'cpu'"),
        ({"device": "gpu"}, "device='gpu' .*'cpu' or 'cuda'"),
        ({"device": "meta"}, "device='meta' is not supported: use 'cpu' or 'cuda'"),
        ({"kernels": "triton"}, "kernels='triton' needs device='cuda'"),
        ({"kernels": "cpu"}, r"kernels='cpu' needs .* multiples of 16; .*Use kernels='reference'"),
        ({"kernels": "cpu", "dtype": "float32"}, r"kernels='cpu' needs .*float32, 24, 40, 6, 16"),
        ({"quantization": "int8"}, "quantization='int8' needs .*'reference': leave it out"),
    ],
)
def test_settings_that_do_not_fit_model_or_machine(fields: dict[str, Any], words: str) -> None:
    if torch.cuda.is_available() and fields.get("device") == "cuda":
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=words):
        LLM(shared_model("expert"), EngineConfig(kv_cache_memory_bytes=2**20, **fields))


def test_the_fastest_that_fits_is_chosen() -> None:
    def chosen(model_fields: dict[str, Any], own: torch.dtype, **fields: Any) -> ExecutionBackend:
        model = tiny_model("vanilla", **model_fields).to(own)
        return ExecutionBackend.select(model, EngineConfig(**fields))

    wide = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    for dtype, kernels, compute in (
        (torch.float32, "cpu", torch.float32),
        (torch.bfloat16, "cpu", torch.float32),
        (torch.float64, "reference", torch.float64),
        (torch.float16, "reference", torch.float16),
    ):
        found = chosen(wide, dtype)
        assert (found.kernels, found.weight_dtype, found.compute_dtype) == (kernels, dtype, compute)
    assert chosen(wide, torch.float64, dtype="float32").kernels == "cpu"
    assert chosen(wide, torch.float32, kernels="reference").kernels == "reference"
    assert chosen(wide, torch.float32, block_size=8).kernels == "reference"
    assert chosen({**wide, "head_dim": 6}, torch.float32).kernels == "reference"
    assert chosen(wide, torch.float32).device == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_runs_in_another_dtype(dtype: str) -> None:
    llm = LLM(shared_model("expert"), EngineConfig(dtype=dtype, kv_cache_memory_bytes=2**20))
    (done,) = llm.generate([[1, 2, 3]])
    assert len(done.token_ids) == 64
    assert all(-20 < logprob <= 0 for logprob in done.logprobs)
    assert llm.cache.kv.k.dtype == getattr(torch, dtype)


# -- memory ---------------------------------------------------------------------------------------


def cache_of(kind: str, config: EngineConfig, **overrides: Any) -> KVCache:
    return KVCache(tiny_config(kind, **overrides), config, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_kv_memory_is_kept_and_used(kind: str) -> None:
    for memory in (100_000, 1_000_000):
        found = cache_of(kind, EngineConfig(kv_cache_memory_bytes=memory))
        taken = found.kv.k.nbytes + found.kv.v.nbytes
        assert taken == found.num_pages * found.page_bytes
        assert memory - found.page_bytes < taken <= memory


def test_too_little_or_too_much_memory_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"kv_cache_memory_bytes=9000 hold 1 pages .*147456: raise it"
    ):
        cache_of("expert", EngineConfig(kv_cache_memory_bytes=9000))
    with pytest.raises(CapacityError, match="lower kv_cache_memory_bytes"):
        cache_of("expert", EngineConfig(kv_cache_memory_bytes=2**60))


def test_without_kv_memory_there_is_room_for_all_sequences_of_full_length() -> None:
    found = cache_of("expert", EngineConfig(max_num_seqs=3, max_num_batched_tokens=9))
    full = found.max_pages(tiny_config("expert"), 96)
    assert full == 6 + 3 * 6
    assert found.num_pages == 3 * full
    assert 0 < free_memory(torch.device("cpu")) < 2**50


def test_memory_of_a_machine_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mor.engine.kv_cache.free_memory", lambda device: 200_000)
    with pytest.raises(
        ConfigError, match=r"half of the free memory .*set kv_cache_memory_bytes yourself"
    ):
        cache_of("expert", EngineConfig())
    monkeypatch.setattr("mor.engine.kv_cache.free_memory", lambda device: 2_000_000)
    found = cache_of("expert", EngineConfig())
    assert found.num_pages == 1_000_000 // found.page_bytes


def test_pages_are_copied_whole_and_in_order() -> None:
    found = cache_of("expert", EngineConfig(kv_cache_memory_bytes=100_000, block_size=4))
    height = found.layers_per_page
    for number, cells in enumerate((found.kv.k, found.kv.v)):
        cells.copy_(torch.arange(cells.numel()).view(cells.shape) + number)
    k, v = found.kv.k.clone(), found.kv.v.clone()
    found.copy_pages([(0, 3), (3, 5), (1, 0)])
    for cells, old in ((found.kv.k, k), (found.kv.v, v)):
        pages, before = cells.unflatten(0, (-1, height)), old.unflatten(0, (-1, height))
        for target, source in ((3, 0), (5, 0), (0, 1), (1, 1), (2, 2), (4, 4)):
            assert torch.equal(pages[target], before[source])
