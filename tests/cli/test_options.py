"""Options made from configs: the flag is the field, the help its docstring."""

import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest
import torch
from cli_helpers import Mor, TinyRun, one_sentence

from mor.cli.options.config_options import add_field_options, field_docs, field_values, flag
from mor.cli.options.engine_options import add_engine_options, engine_config, select_device
from mor.cli.options.parser import Parser, parser
from mor.cli.options.sampling_options import add_sampling_options, sampling_params
from mor.engine.config import EngineConfig
from mor.errors import ConfigError, RequestError
from mor.model.config import MoRConfig
from mor.model.sampling import SamplingParams
from mor.serve.config import ServeConfig
from mor.train.config import TrainConfig
from mor.validation import Range

CONFIGS = [MoRConfig, TrainConfig, EngineConfig, ServeConfig, SamplingParams]
SAMPLING = [f.name for f in fields(SamplingParams)]


def new_parser() -> Parser:
    return parser("test", "A verb.", ["mor test"])


def engine(*args: object, **settings: Any) -> EngineConfig:
    p = new_parser()
    add_engine_options(p)
    return engine_config(p.parse_args([str(arg) for arg in args]), **settings)


def sampling(*args: object, **values: Any) -> SamplingParams:
    p = new_parser()
    add_sampling_options(p, SAMPLING, stop=[], stop_token_ids=[])
    return sampling_params(p.parse_args([str(arg) for arg in args]), **values)


@dataclass(frozen=True)
class Example:
    """Kinds of fields that the two real configs do not both have."""

    share: Annotated[float, Range(ge=0, le=1)] = 0.5
    """At most 100% of it."""
    kind: Literal["a", "b"] = "a"
    """Which of
    the two."""
    size: int | None = None
    """Its size. None: as large as can be."""
    undocumented: bool = False


def test_without_options_the_fields_keep_their_defaults() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert engine() == EngineConfig(device=device)
    assert sampling() == SamplingParams()


def test_every_option_is_its_field() -> None:
    values: dict[str, Any] = {
        "kv_cache_memory_bytes": 10**6,
        "block_size": 8,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "chunked_prefill_size": 7,
        "batching": "sequence",
        "min_exit_tokens": 3,
        "max_exit_wait_steps": 0,
        "num_scheduler_steps": 2,
        "dtype": "bfloat16",
        "device": "cpu",
        "kernels": "reference",
        "num_threads": 1,
    }
    args = [part for name, value in values.items() for part in (flag(name), value)]
    expected = EngineConfig(**values, enable_prefix_caching=False)
    assert engine(*args, "--no-enable-prefix-caching") == expected
    assert engine(*args, "--no-enable-prefix-caching", block_size=16).block_size == 16
    assert set(values) | {"enable_prefix_caching", "quantization"} == {
        f.name for f in fields(EngineConfig)
    }


def test_lists_and_switches() -> None:
    found = sampling("--stop", "a", "b", "--stop-token-ids", 3, 4, "--ignore-eos", "--n", 2, n=1)
    assert found == SamplingParams(stop=("a", "b"), stop_token_ids=(3, 4), ignore_eos=True)


@pytest.mark.parametrize(
    ("given", "dtype"), [("auto", None), ("half", "float16"), ("float", "float32")]
)
def test_dtypes_have_the_names_of_vllm_too(given: str, dtype: str | None) -> None:
    assert engine("--dtype", given).dtype == dtype


@pytest.mark.parametrize("name", [f.name for f in fields(EngineConfig)])
def test_an_error_names_the_field_that_was_typed(name: str) -> None:
    if name == "enable_prefix_caching":
        pytest.skip("a switch takes no value")
    with pytest.raises(ConfigError, match=f"^{name}="):
        engine(flag(name), "-1")


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "n", "min_recursions"])
def test_an_error_of_sampling_names_the_field_that_was_typed(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}=-1.* must be "):
        sampling(flag(name), "-1")


def test_a_value_of_the_wrong_type_names_the_flag(mor: Mor, tiny: TinyRun) -> None:
    said = one_sentence(mor("serve", tiny.run, "--max-num-seqs", "many"), 2)
    assert "--max-num-seqs='many' must be of type int." in said


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    p = new_parser()
    add_field_options(p, Example, ("share", "kind", "size"), helps={"size": "How large."})
    assert field_values(p.parse_args(["--size", "3"]), Example) == {
        "share": 0.5,
        "kind": "a",
        "size": 3,
    }
    with pytest.raises(SystemExit):
        p.parse_args(["--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--share SHARE At most 100% of it. (type: float, default: 0.5)" in shown
    assert "--kind KIND Which of the two. Choices: a, b. (default: a)" in shown
    assert "--size SIZE How large. (type: int | null, default: null)" in shown
    assert dict(field_docs(Example)) == {
        "share": "At most 100% of it.",
        "kind": "Which of the two.",
        "size": "Its size. None: as large as can be.",
    }


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_has_a_docstring(config_class: type) -> None:
    assert set(field_docs(config_class)) == {f.name for f in fields(config_class)}


def test_the_choice_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert select_device(None) == select_device("auto") == expected
        assert select_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device='cuda': torch sees no GPU here"):
        select_device("cuda")
    with pytest.raises(ConfigError, match="device='tpu' is unknown: use auto, cpu or cuda"):
        select_device("tpu")
