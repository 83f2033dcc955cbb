"""`Experiment`: a grid of variants, sizes, budgets and seeds, each point a training run.

A spec is a YAML file with the keys `about`, `train` (fields common to all runs), `sizes` and
`variants` (fields by name), `budgets`, `seeds`, `random_twins`, `baseline`, and `base`, other specs
that it is merged over.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mor.data.corpus import build_from_documents
from mor.data.stdlib_corpus import stdlib_documents
from mor.errors import ConfigError, DataError, nearest
from mor.model.config import MoRConfig
from mor.report.run_folder import RunFolder
from mor.train.budget import Budget
from mor.train.config import STDLIB, TrainConfig
from mor.train.schedule import resolve_steps, step_flops
from mor.train.trainer import CHANGEABLE_ON_RESUME
from mor.yaml_config import merge, read_yaml

_KEYS = frozenset(
    ("about", "train", "sizes", "variants", "random_twins", "baseline", "budgets", "seeds")
)
_RANDOM = "-random"  # ends the name of a variant's twin with random routing


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of the grid: its place there, and the configs that follow from it."""

    variant: str
    size: str
    """Names, in the spec."""
    budget: str
    seed: int
    config: TrainConfig
    model: MoRConfig

    @property
    def name(self) -> str:
        """The name of its folder, such as `mor_small_1e15-flops_seed0`."""
        parts = (self.variant, self.size, self.budget, f"seed{self.seed}")
        return "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts)

    @property
    def flops(self) -> float:
        """Training FLOPs; wrong for a budget of time, whose number of steps nobody knows before."""
        # Every step counted as the last, so without what a capacity warm-up adds.
        return self.config.steps * step_flops(self.config, self.model, self.config.steps)

    def state(self, folder: Path) -> str:
        """How far the run in `folder` is: `new`, `begun` or `done`.

        Raises:
            ConfigError: the folder holds a run with other settings: the spec has changed.
        """
        if not (folder / "config.yaml").is_file():
            return "new"
        theirs = read_yaml(folder / "config.yaml")
        ours = json.loads(json.dumps(asdict(self.config), default=str))
        # The trainer resolves a budget into steps and writes them into the file.
        skipped = CHANGEABLE_ON_RESUME | ({"steps"} if self.config.budget else set())
        for key, value in ours.items():
            if key not in skipped and key in theirs and theirs[key] != value:
                raise ConfigError(
                    f"{folder} was trained with {key}={theirs[key]!r}, and the spec now says "
                    f"{key}={value!r}: choose another --out, or remove that folder."
                )
        try:
            return "done" if RunFolder.open(folder).finished else "begun"
        except DataError:
            return "begun"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A spec that has been read and checked."""

    name: str
    """The spec's file name without its suffix."""
    about: str
    """What the experiment asks, for people."""
    runs: tuple[PlannedRun, ...]
    """In the order in which they are trained."""
    twins: Mapping[str, str]
    """By variant with learned routing: the variant with random routing to compare it with."""
    baseline: str | None
    """The variant to compare all others with."""

    @classmethod
    def read(cls, path: Path, **changes: Any) -> "Experiment":
        """Read a spec and plan its runs.

        Args:
            **changes: training fields that override those of the spec's `train`.

        Raises:
            ConfigError: the spec, or a run of the grid, cannot work; the message names both.
        """
        spec = _with_base(path)
        for key in spec:
            if key not in _KEYS:
                raise ConfigError(f"{path}: field {key!r} is unknown: {nearest(key, _KEYS)}")
        common = merge(_mapping(path, spec, "train"), changes)
        sizes, variants = (_mapping(path, spec, key) for key in ("sizes", "variants"))
        for name, part in (sizes | variants).items():
            if not isinstance(part, dict):
                raise ConfigError(
                    f"{path}: {name} must be a mapping of training fields, not {part!r}."
                )
        learned = _list(path, spec, "random_twins", [])
        for name in learned:
            if name not in variants:
                raise ConfigError(f"{path}: random_twins: {nearest(str(name), variants)}")
        variants |= {name + _RANDOM: _random_twin(variants[name]) for name in learned}
        baseline = spec.get("baseline")
        if baseline is not None and baseline not in variants:
            raise ConfigError(f"{path}: baseline={baseline!r}: {nearest(str(baseline), variants)}")
        # The last axis changes fastest: all variants are compared with one seed before the next.
        grid = product(
            _list(path, spec, "seeds", [0]),
            sizes.items(),
            _list(path, spec, "budgets"),
            variants.items(),
        )
        runs = [
            _plan_run(path, common, size, variant, str(budget), seed)
            for seed, size, budget, variant in grid
        ]
        twins = {v: v + _RANDOM for v in learned}
        if len(learned) == 1:
            # Its twin serves all variants that send the same share of tokens to each depth.
            twins |= dict.fromkeys(_same_capacity(runs, learned[0]), twins[learned[0]])
        return cls(
            name=path.stem,
            about=str(spec.get("about", "")).strip(),
            runs=tuple(runs),
            twins=twins,
            baseline=baseline,
        )

    def prepare(self, out: Path) -> "Experiment":
        """Build the standard library's corpus in `out`, once per vocabulary size.

        Returns:
            The experiment whose runs read these corpora instead of each building its own.
        """
        vocabularies = {run.model.vocab_size for run in self.runs if run.config.data == STDLIB}
        for size in sorted(vocabularies):
            if not (out / f"data-{size}" / "index.json").is_file():
                build_from_documents(stdlib_documents(), out / f"data-{size}", train_tokenizer=size)

        runs = []
        for run in self.runs:
            if run.config.data == STDLIB:
                data = (out / f"data-{run.model.vocab_size}").resolve()
                run = replace(run, config=replace(run.config, data=str(data)))
            runs.append(run)
        return replace(self, runs=tuple(runs))


def _with_base(path: Path) -> dict[str, Any]:
    """A spec merged over those that its `base` names: one path beside it, or a list of them."""
    spec, merged = read_yaml(path), dict[str, Any]()
    bases = spec.pop("base", [])
    for base in bases if isinstance(bases, list) else [bases]:
        merged = merge(merged, _with_base(path.parent / str(base)))
    return merge(merged, spec)


def _mapping(path: Path, spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = spec.get(key)
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{path}: {key}={value!r} must be a mapping with at least one entry.")
    return dict(value)


def _list(path: Path, spec: Mapping[str, Any], key: str, default: Any = None) -> list[Any]:
    value = spec.get(key, default)
    if not isinstance(value, list) or (not value and default != []):
        raise ConfigError(f"{path}: {key}={value!r} must be a list with at least one entry.")
    return value


def _random_twin(variant: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's fields with a random router, without what trains a learned one."""
    of_training = ("selection_training", "balancing")
    model = {k: v for k, v in variant.get("model", {}).items() if k not in of_training}
    return {**variant, "model": {**model, "router_type": "random"}}


def _same_capacity(runs: list[PlannedRun], variant: str) -> Iterator[str]:
    """Variants with learned routing that send the same share of tokens to each depth as one."""
    first = next(run.model for run in runs if run.variant == variant)
    for run in runs:
        model = run.model
        same = model.routing == first.routing and model.capacities == first.capacities
        if same and model.router_type != "random" and model.num_recursions == first.num_recursions:
            yield run.variant


def _plan_run(
    path: Path,
    common: dict[str, Any],
    size: tuple[str, Any],
    variant: tuple[str, Any],
    budget: str,
    seed: Any,
) -> PlannedRun:
    """The run at one point of the grid; `size` and `variant` are names with training fields."""
    where = f"{path}: {variant[0]}, {size[0]}, {budget}"
    # What is more particular comes later and wins.
    values = merge(common, {"budget": budget, "seed": seed})
    values = merge(merge(values, size[1]), variant[1])
    layers = values.pop("layers", None)  # no training field: a size's way to give a shape
    try:
        Budget.parse(budget)
        if layers is not None:
            values["model"] = _shape_of_layers(values.get("model", {}), layers)
        config = TrainConfig.from_dict(values)
        if "vocab_size" not in config.model:
            raise ConfigError("model.vocab_size is missing, which the FLOPs depend on.")
        model = config.model_config()
        config = resolve_steps(config, model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return PlannedRun(
        variant=variant[0], size=size[0], budget=budget, seed=seed, config=config, model=model
    )


def _shape_of_layers(model: Mapping[str, Any], layers: Any) -> dict[str, Any]:
    """Model fields that share a vanilla model's `layers` over prelude, block and coda.

    As the presets do (middle-cycle): one layer at each end, and R passes of a block that is as long
    as the layers between them divided by R, rounded up. Fields in `model` win.
    """
    if type(layers) is not int or layers < 1:
        raise ConfigError(f"layers={layers!r} must be an integer >= 1.")
    recursions = model.get("num_recursions", 3)
    edge = 0 if recursions == 1 else 1
    ends = {key: model.get(key, edge) for key in ("num_prelude_layers", "num_coda_layers")}
    routing = "none" if recursions == 1 else "expert_choice"
    block = math.ceil((layers - sum(ends.values())) / recursions)
    return {
        **ends,
        "num_block_layers": max(1, block),
        "routing": routing,
        "twin_num_layers": layers,
        **model,
    }
