"""Experiments: a grid of variants, sizes, budgets and seeds, each cell an ordinary training run."""

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
_RANDOM = "-random"


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of the grid, as planned."""

    variant: str
    size: str
    budget: str
    seed: int
    config: TrainConfig
    model: MoRConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = (self.variant, self.size, self.budget, f"seed{self.seed}")
        return "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts)

    @property
    def flops(self) -> float:
        """Training FLOPs as planned, where the number of steps is known before."""
        return self.config.steps * step_flops(self.config, self.model, self.config.steps)

    def state(self, folder: Path) -> str:
        """`new`, `begun` or `finish_tile`.

        Raises:
            ConfigError: the folder holds a run with other settings: the spec has changed.
        """
        if not (folder / "config.yaml").is_file():
            return "new"
        theirs = read_yaml(folder / "config.yaml")
        ours = json.loads(json.dumps(asdict(self.config), default=str))
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
    """A spec, read and checked."""

    name: str
    about: str
    cells: tuple[PlannedRun, ...]
    twins: Mapping[str, str]
    """The variant with random routing that each learned one is compared with."""
    baseline: str | None
    """The variant that all others are compared with."""

    @classmethod
    def read(cls, path: Path, **changes: Any) -> "Experiment":
        """Read a spec.

        Args:
            **changes: training fields that override the spec's.

        Raises:
            ConfigError: the spec, or a cell of the grid, cannot work; the message names both.
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
        grid = product(
            _list(path, spec, "seeds", [0]),
            sizes.items(),
            _list(path, spec, "budgets"),
            variants.items(),
        )  # a whole comparison first, then the next seed
        cells = [
            _cell(path, common, size, variant, str(budget), seed)
            for seed, size, budget, variant in grid
        ]
        twins = {v: v + _RANDOM for v in learned}
        if len(learned) == 1:
            twins |= dict.fromkeys(_alike(cells, learned[0]), twins[learned[0]])
        return cls(
            name=path.stem,
            about=str(spec.get("about", "")).strip(),
            cells=tuple(cells),
            twins=twins,
            baseline=baseline,
        )

    def prepare(self, out: Path) -> "Experiment":
        """Build the standard library's corpus once for all runs that want it."""
        vocabularies = {c.model.vocab_size for c in self.cells if c.config.data == STDLIB}
        for size in sorted(vocabularies):
            if not (out / f"data-{size}" / "index.json").is_file():
                build_from_documents(stdlib_documents(), out / f"data-{size}", train_tokenizer=size)

        def placed(cell: PlannedRun) -> PlannedRun:
            if cell.config.data != STDLIB:
                return cell
            data = (out / f"data-{cell.model.vocab_size}").resolve()
            return replace(cell, config=replace(cell.config, data=str(data)))

        return replace(self, cells=tuple(map(placed, self.cells)))


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
    """The same with routers that know nothing, and so with nothing to train them on."""
    trained = ("selection_training", "balancing")
    model = {k: v for k, v in variant.get("model", {}).items() if k not in trained}
    return {**variant, "model": {**model, "router_type": "random"}}


def _alike(cells: list[PlannedRun], variant: str) -> Iterator[str]:
    """Learned variants that drop the same share of tokens as one."""
    first = next(c.model for c in cells if c.variant == variant)
    for cell in cells:
        model = cell.model
        same = model.routing == first.routing and model.capacities == first.capacities
        if same and model.router_type != "random" and model.num_recursions == first.num_recursions:
            yield cell.variant


def _cell(
    path: Path,
    common: dict[str, Any],
    size: tuple[str, Any],
    variant: tuple[str, Any],
    budget: str,
    seed: Any,
) -> PlannedRun:
    where = f"{path}: {variant[0]}, {size[0]}, {budget}"
    values = merge(common, {"budget": budget, "seed": seed})
    values = merge(merge(values, size[1]), variant[1])
    layers = values.pop("layers", None)
    try:
        Budget.parse(budget)
        if layers is not None:
            values["model"] = _shaped(values.get("model", {}), layers)
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


def _shaped(model: Mapping[str, Any], layers: Any) -> dict[str, Any]:
    """`layers` of a vanilla model as prelude, block and coda, as the presets do (middle-cycle)."""
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
