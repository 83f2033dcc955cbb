"""`mor info`, and the configs that come with mor."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Mor, TinyRun, one_sentence

from mor import MoRModel, load
from mor.cli.info import find_config
from mor.cli.train import load_train_config
from mor.model import cost

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
PRESETS = {"135m": 576, "360m": 960, "730m": 1536, "1.7b": 2048}
KEYS = {
    *("parameters", "parameters_non_embedding", "flops_per_token", "flops_per_token_by_depth"),
    *("training_flops_per_token", "kv_bytes_per_token", "num_hidden_layers"),
    *("depth_capacities", "context"),
}


def as_json(mor: Mor, *args: object) -> dict[str, Any]:
    called = mor("info", *args, "--json")
    assert (called.status, called.err) == (0, "")
    (line,) = called.out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_its_model(path: Path) -> None:
    train = load_train_config(path)
    model = train.model_config()
    if path.stem == "smoke":
        return
    size, kind = path.stem.split("-")
    assert model.hidden_size == PRESETS[size]
    assert model.num_recursions == {"vanilla": 1, "mor2": 2, "mor3": 3, "mor4": 4}[kind]
    assert model.routing == ("none" if kind == "vanilla" else "expert_choice")
    assert train.steps * train.tokens_per_step == pytest.approx(20e9, rel=1e-3)
    assert (train.lr, train.schedule, train.precision) == (3e-3, "trapezoid", "bf16")
    assert train.sequence_length == 2048
    split = re.search(r"(\d+) \+ (\d+) \+ (\d+) layers", path.read_text())
    layers = (model.num_prelude_layers, model.num_block_layers, model.num_coda_layers)
    assert kind == "vanilla" or (split and tuple(map(int, split.groups())) == layers)


def test_there_is_a_config_for_every_size() -> None:
    stems = {path.stem for path in CONFIGS}
    assert stems >= {f"{s}-{kind}" for s in PRESETS for kind in ("vanilla", "mor2", "mor3", "mor4")}


@pytest.mark.parametrize(("recursions", "millions"), [(2, 167), (3, 118), (4, 98)])
def test_the_papers_parameter_counts(mor: Mor, recursions: int, millions: int) -> None:
    path = next(path for path in CONFIGS if path.stem == f"360m-mor{recursions}")
    found = as_json(mor, path)
    assert set(found) == {*KEYS, "vanilla"}
    assert set(found["vanilla"]) == KEYS
    assert round(found["parameters_non_embedding"] / 1e6) == millions
    assert round(found["vanilla"]["parameters_non_embedding"] / 1e6) == 315
    assert found["vanilla"]["num_hidden_layers"] == 32
    shares = [(recursions - r) / recursions for r in range(recursions)]
    assert found["depth_capacities"] == pytest.approx(shares)
    assert as_json(mor, "360m", "--num-recursions", recursions) == found


def test_flops_by_depth_and_context(mor: Mor) -> None:
    found = as_json(mor, "360m", "--context", 1024)
    by_depth = found["flops_per_token_by_depth"]
    assert len(by_depth) == 3
    assert by_depth == sorted(by_depth)
    flops = cost.sequence_flops(find_config("360m"), 1024)
    assert by_depth == pytest.approx([flops.for_recursions(count) for count in (1, 2, 3)])
    assert found["flops_per_token"] == pytest.approx(flops.mean)
    assert by_depth[0] < found["flops_per_token"] < by_depth[2]
    assert found["training_flops_per_token"] == pytest.approx(3 * found["flops_per_token"])
    whole = as_json(mor, "360m")
    assert (found["context"], whole["context"], whole["vanilla"]["context"]) == (1024, 2048, 2048)
    assert whole["flops_per_token"] > found["flops_per_token"]
    # 2 bytes, keys and values, 5 heads of 64: 1,280 bytes a layer; 2 + 10 * (1 + 2/3 + 1/3) of 32.
    assert found["kv_bytes_per_token"] == pytest.approx(1280 * 22)
    assert found["vanilla"]["kv_bytes_per_token"] == 1280 * 32


def test_a_run_a_checkpoint_and_their_config(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    model = load(tiny.run)
    found = as_json(mor, tiny.run)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parameters_non_embedding"] == found["parameters"] - 32 * model.config.vocab_size
    assert found["num_hidden_layers"] == 4
    checkpoint = next((tiny.run / "checkpoints").glob("step-*6"))
    assert as_json(mor, checkpoint) == found
    twin = MoRModel(model.config.vanilla_twin())
    assert found["vanilla"]["parameters"] == sum(p.numel() for p in twin.parameters())

    fresh = tmp_path / "fresh"  # a run that has saved nothing yet
    fresh.mkdir()
    (fresh / "config.yaml").write_text((tiny.run / "config.yaml").read_text())
    of_yaml = as_json(mor, fresh)
    assert of_yaml["parameters_non_embedding"] == found["parameters_non_embedding"]
    assert as_json(mor, tiny.config) == of_yaml


def test_a_config_that_starts_from_a_checkpoint(
    mor: Mor, tiny: TinyRun, zero_head: Path, tmp_path: Path
) -> None:
    path = tmp_path / "more.yaml"
    path.write_text(f"init_from: {tiny.run}")
    assert as_json(mor, path) == as_json(mor, tiny.run)
    path.write_text(f"init_from: {zero_head}\nmodel: {{preset: 135m}}")
    found = as_json(mor, path)
    assert found["num_hidden_layers"] == 32
    embedding = found["parameters"] - found["parameters_non_embedding"]
    assert embedding == 576 * load(zero_head).config.vocab_size


def test_a_vanilla_preset_is_its_own_twin(mor: Mor) -> None:
    found = as_json(mor, "1.7B", "--num-recursions", 1)
    twin = found.pop("vanilla")
    assert found == twin
    assert found["num_hidden_layers"] == 24


def test_what_people_read(mor: Mor) -> None:
    status, out, err = mor("info", "360m")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert re.search(r"^ +this +vanilla +ratio$", out, re.MULTILINE)
    assert re.search(r"^parameters without embedding +118M +314.6M +0.375$", out, re.MULTILINE)
    assert re.search(r"^  of a token at 3 of 3 +810.1M +0.954$", out, re.MULTILINE)
    assert "1 + 10 + 1 layers" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["360n"], ["'360n'", "did you mean '360m'?"]),
        (["no/such/folder"], ["no/such/folder"]),
        (["no-such.yaml"], ["no-such.yaml"]),
        (["360m", "--num-recursions", 0], ["--num-recursions=0"]),
        (["360m", "--context", 0], ["--context=0", "2048"]),
        (["360m", "--context", 4096], ["--context=4096", "2048"]),
    ],
)
def test_what_is_wrong_is_named(mor: Mor, args: list[object], words: list[str]) -> None:
    message = one_sentence(mor("info", *args), status=1)
    assert all(word in message for word in words)


def test_recursions_are_for_presets(mor: Mor, tiny: TinyRun) -> None:
    called = mor("info", tiny.run, "--num-recursions", 2)
    assert "--num-recursions=2" in one_sentence(called, status=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: {preset: 360m}", ["'modle'", "did you mean 'model'?"]),
        ("model: {preset: 360m, num_recursion: 2}", ["did you mean 'num_recursions'?"]),
        ("model: {preset: 360}", ["'360'", "did you mean '360m'?"]),
        ("model: [360m]", ["model"]),
        ("model: {preset: 360m", ["line 1"]),
    ],
)
def test_a_config_with_a_mistake(mor: Mor, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    message = one_sentence(mor("info", path), status=1)
    assert all(word in message for word in words)
