"""The experiment that uptrains a donor, at a size of seconds."""

import json
from pathlib import Path

import torch
import yaml
from cli_helpers import Mor, TinyRun

from mor import MoRConfig, MoRModel, Tokenizer, load, save

SPEC = Path(__file__).parents[2] / "configs" / "experiments" / "uptrain_tiny.yaml"


def test_uptraining_starts_from_a_donor(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    """The tiny twin of the experiment with SmolLM2, whole."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    layers = {"num_prelude_layers": 0, "num_block_layers": 6, "num_coda_layers": 0}
    torch.manual_seed(0)
    donor = MoRModel(
        MoRConfig(
            **{"vocab_size": 300, "max_position_embeddings": 32, **shape, **layers},
            num_recursions=1,
            routing="none",
        )
    )
    save(donor, tmp_path / "donor", Tokenizer.load(tiny.corpus))

    train = {"init_from": str(tmp_path / "donor"), "data": str(tiny.corpus), "device": "cpu"}
    spec = tmp_path / "uptrain.yaml"
    spec.write_text(yaml.safe_dump({"base": str(SPEC), "train": train}))
    called = mor("experiment", spec, "--out", tmp_path / "out")
    assert called.status == 0, called.err
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    found = {r["name"].split("_")[0]: r for r in runs}
    variants = ("vanilla", "recursive-2", "relaxed-2", "mor-2", "mor-relaxed-2", "mor-2-random")
    assert sorted(found) == sorted(variants)
    for variant, result in found.items():
        model = load(tmp_path / "out" / "runs" / result["name"])
        assert model.config.relaxation_rank == (16 if "relaxed" in variant else 0)
        middle = [donor.block[1 + i].mlp.up_proj.weight for i in (0, 2)]  # of block layer 0
        start = donor.block[0] if variant == "vanilla" else None
        meant = start.mlp.up_proj.weight if start is not None else sum(middle) / 2
        moved = (model.block[0].mlp.up_proj.weight - meant).norm() / meant.norm()
        assert 0 < moved < 0.3, variant  # three steps away from where it started
