"""Specs: those of this project, bases, shapes from a number of layers, mistakes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment_spec import SPEC
from mor.errors import ConfigError
from mor.experiments import experiment as grid
from mor.experiments.experiment import Experiment
from mor.model.config import MoRConfig

SPECS = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_the_specs_of_this_project_can_work(path: Path) -> None:
    experiment = Experiment.read(path)
    assert len({run.name for run in experiment.runs}) == len(experiment.runs) > 1
    assert experiment.about
    for run in experiment.runs:
        assert run.config.steps > 0
        assert run.model.vocab_size == run.config.model["vocab_size"]
        assert run.config.sequence_length <= run.model.max_position_embeddings
    routed = {r.variant for r in experiment.runs if r.model.router_type != "random"}
    routed &= {r.variant for r in experiment.runs if r.model.routing != "none"}
    assert not routed or set(experiment.twins) & routed, "no random routing to compare with"


def test_equal_flops_are_equal() -> None:
    """To half a step of the largest model."""
    for path in SPECS:
        for run in Experiment.read(path).runs:
            if "flops" in str(run.config.budget):
                wanted = float(run.budget.split()[0])
                assert run.flops == pytest.approx(wanted, rel=0.6 / run.config.steps), run.name


def test_a_base_is_merged_under_the_spec(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "all.yaml").write_text(SPEC.format(data="corpus"))
    (tmp_path / "base" / "more.yaml").write_text("budgets: [7 steps]\ntrain: {batch_size: 2}\n")
    bases = ["base/all.yaml", "base/more.yaml"]
    own = {"base": bases, "train": {"lr": 0.5}, "seeds": [7]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    runs = Experiment.read(tmp_path / "own.yaml", data="elsewhere").runs
    assert {(r.seed, r.config.lr, r.config.batch_size) for r in runs} == {(7, 0.5, 2)}
    assert {r.config.steps for r in runs} == {7}
    assert {r.config.data for r in runs} == {"elsewhere"}


def test_layers_are_shared_out_as_in_the_presets() -> None:
    """A preset's shape from its number of layers alone."""
    for recursions in (1, 2, 3, 4):
        preset = MoRConfig.preset("360m", num_recursions=recursions)
        shape = grid._shape_of_layers({"num_recursions": recursions}, 32)
        assert {k: getattr(preset, k) for k in shape} == shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizez": {}}, "'sizez' is unknown: did you mean 'sizes'?"),
        ({"variants": {}}, "variants={} must be a mapping with at least one entry"),
        ({"variants": {"mor-2": 3}}, "mor-2 must be a mapping of training fields, not 3"),
        ({"budgets": ["6 stepz"]}, "6 stepz: budget='6 stepz' is no amount with a unit"),
        ({"budgets": "6 steps"}, "budgets='6 steps' must be a list"),
        ({"seeds": []}, r"seeds=\[\] must be a list with at least one entry"),
        ({"seeds": ["x"]}, "seed='x' must be an integer"),
        ({"random_twins": ["mor"]}, "random_twins: did you mean 'mor-2'"),
        ({"baseline": "vanila"}, "baseline='vanila': did you mean 'vanilla'"),
        ({"sizes": {"tiny": {"layers": 0}}}, "mor-2, tiny, 6 steps: layers=0 must be an integer"),
        (
            {"sizes": {"tiny": {"lr": -1}}},
            "mor-2, tiny, 6 steps: lr=-1 must be a finite number > 0",
        ),
        ({"train": {"model": {}}}, "model.vocab_size is missing"),
    ],
)
def test_a_spec_with_a_mistake(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    values = yaml.safe_load(SPEC.format(data="corpus")) | change
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=f"wrong.yaml.*{words}"):
        Experiment.read(tmp_path / "wrong.yaml")
