"""Low-rank relaxation: what LoRA pairs start from, that they learn, and that nothing else moved."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mor
from mor.errors import CheckpointError, ConfigError
from mor.io.uptrain import init_from_vanilla
from mor.model.config import MoRConfig
from mor.model.sharing import original_layers
from mor.model.transformer import MoRModel
from mor.ops.low_rank import LoRAPair, add_loras
from mor.train.config import TrainConfig
from mor.train.optim import build_optimizer
from reference_model import matrix
from tiny import SHAPE, build, tiny_config, tiny_model

FULL = SHAPE["hidden_size"]
IDS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))


def donor(num_layers: int = 8) -> MoRModel:
    """A plain model whose layers and norms all differ."""
    return build(
        tiny_config("vanilla", num_prelude_layers=0, num_coda_layers=0, num_block_layers=num_layers)
    )


def relaxed(rank: int, init: Any = "average", **fields: Any) -> MoRModel:
    config = tiny_config("recursive", relaxation_rank=rank, **fields)
    return init_from_vanilla(donor(), config, init).eval()


@torch.no_grad()
def distance(model: MoRModel) -> float:
    return float((model(IDS).logits - donor()(IDS).logits).norm())


@pytest.mark.parametrize("init", ["average", "stepwise", "lower", "upper", "random"])
@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_full_rank_is_the_donor(init: Any, sharing: str) -> None:
    """1 + 3 * 2 + 1 layers: each application stands for a layer of its own."""
    assert distance(relaxed(FULL, init, sharing=sharing)) < 1e-9 * distance(relaxed(0, init))


@torch.no_grad()
def test_each_rank_comes_closer() -> None:
    """In the matrices, each with the norm before it."""
    plain, far = donor(), []
    for rank in (0, 4, 12, 20, FULL):
        model, missed = relaxed(rank), 0.0
        for layer_key, i in original_layers("cycle", 2, 3, 1, 7).items():
            ours, theirs = model.block[layer_key.layer], plain.block[i]
            found = matrix(ours.mlp.up_proj, layer_key.depth) * ours.post_attention_layernorm.weight
            wanted = theirs.mlp.up_proj.weight * theirs.post_attention_layernorm.weight
            missed += float((found - wanted).norm())
        far.append(missed)
    assert all(b < 0.95 * a for a, b in pairwise(far)), far
    assert far[-1] < 1e-10


def test_a_truncated_decomposition_is_the_nearest_matrix_of_its_rank() -> None:
    lost = torch.randn(9, 14, generator=torch.Generator().manual_seed(0)).double()
    pair = LoRAPair.truncated(lost, 4)
    missed = (lost - pair.up @ pair.down).norm() ** 2
    left_out = torch.linalg.svdvals(lost)[4:]
    torch.testing.assert_close(missed, left_out.pow(2).sum())  # Eckart and Young


def test_what_a_norm_of_zero_hides_stays_hidden() -> None:
    plain = donor()
    with torch.no_grad():
        for layer in plain.block:
            layer.input_layernorm.weight[3] = 0.0
    model = init_from_vanilla(
        plain, tiny_config("recursive", relaxation_rank=FULL), "average"
    ).eval()
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


def test_applications_stand_for_evenly_spaced_layers() -> None:
    found = original_layers("cycle", 2, 3, 1, 7)
    assert [found[layer_key] for layer_key in sorted(found)] == [1, 2, 3, 4, 5, 6]
    assert list(original_layers("sequence", 2, 2, 1, 5).values()) == [1, 2, 3, 4]
    assert list(original_layers("cycle", 3, 2, 0, 4).values()) == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("kind", ["recursive", "expert", "token", "sequence", "expert_shared"])
def test_a_new_model_is_the_unrelaxed_one(kind: str) -> None:
    """Shared weights and routers are drawn as without LoRA pairs, and these begin at zero."""
    torch.manual_seed(5)
    plain = MoRModel(tiny_config(kind)).eval()
    torch.manual_seed(5)
    model = MoRModel(tiny_config(kind, relaxation_rank=3)).eval()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    drawn = {n: p.abs().max() for n, p in model.named_parameters() if "delta_" in n}
    assert all((value > 0) == name.endswith("down") for name, value in drawn.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["expert", "token", "expert_shared"])
def test_every_delta_learns(kind: str, optimizer: str) -> None:
    model = tiny_model(kind, relaxation_rank=3).float().train()
    if kind == "token":  # all depths are visited
        assert model(IDS).recursion_counts.unique().tolist() == [1, 2, 3]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = build_optimizer(model, TrainConfig(optimizer=optimizer, lr=0.01, weight_decay=0.0))
    total = model(IDS, labels=IDS).total_loss
    assert total is not None
    total.backward()
    step.step()
    for name, value in model.named_parameters():
        if "delta_" in name:
            changed = (value != before[name]).flatten(1).any(1)
            assert changed.all(), f"{name}: {changed.tolist()}"


def test_shared_keys_and_values_have_one_pair() -> None:
    attention = tiny_model("expert_shared", relaxation_rank=3).block[0].self_attn
    lengths = [len(m.delta_up) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert lengths == [3, 1, 1]
    assert attention.k_proj.delta_up.shape == (1, 12, 3)


def test_only_the_block_is_relaxed_and_ranks_end_at_full() -> None:
    model = tiny_model("expert_relaxed", relaxation_rank=20)
    names = [n for n, _ in model.named_parameters() if "delta_" in n]
    assert len(names) == 2 * 2 * 7
    assert all(n.startswith("block.") for n in names)
    assert model.block[0].self_attn.k_proj.delta_down.shape == (3, 12, FULL)  # 12 rows


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("expert_relaxed").float()
    mor.save(model, tmp_path / "model")
    again = mor.load(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.lm_head.weight.data_ptr() == again.embed_tokens.weight.data_ptr()
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert state["block.1.mlp.up_proj.delta_up"].shape == (3, 40, 5)
    assert len([n for n in state if n.endswith("q_proj.weight")]) == 4  # 1 + 2 + 1: still shared


def test_a_checkpoint_from_before_has_no_loras(tmp_path: Path) -> None:
    mor.save(tiny_model("expert").float(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    assert values.pop("relaxation_rank") == 0
    file.write_text(json.dumps(values))
    assert mor.load(tmp_path / "model").config.relaxation_rank == 0
    file.write_text(json.dumps({**values, "relaxation_rank": 4}))
    with pytest.raises(CheckpointError, match=r"lacks 'block\.0\.self_attn\.q_proj\.delta_down'"):
        mor.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relaxation_rank": -1}, "relaxation_rank=-1 must be an integer >= 0"),
        ({"relaxation_rank": 2.5}, "relaxation_rank=2.5 must be an integer"),
        ({"relaxation_rank": 25}, "relaxation_rank=25 must be at most hidden_size=24"),
        ({"relaxation_rank": 4, "num_recursions": 1, "routing": "none"}, "num_recursions >= 2"),
        ({"relax_rank": 4}, "did you mean 'relaxation_rank'"),
    ],
)
def test_what_cannot_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoRConfig.from_dict({**tiny_config("expert").to_dict(), **_unrouted(fields), **fields})


def _unrouted(fields: dict[str, Any]) -> dict[str, Any]:
    """What has to go where nothing is routed."""
    names = ("capacities", "thresholds", "router_activation", "router_alpha", "selection_training")
    return dict.fromkeys(names) if fields.get("routing") == "none" else {}


def test_groups_of_rows_have_their_own_pairs() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, generator=draw).double()
    pairs = [
        LoRAPair(*(torch.randn(s, generator=draw).double() for s in ((2, 5), (4, 2))))
        for _ in range(3)
    ]
    out = add_loras(pairs, (0, 2, 2, 7), x, torch.zeros(6, 4).double())  # 6 rows: one writes not
    for row in range(6):
        pair = pairs[0 if row < 2 else 2]
        torch.testing.assert_close(out[row], pair.up @ pair.down @ x[row])


def test_fused_deltas_are_side_by_side() -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(5, generator=draw).double()
    parts = [
        LoRAPair(*(torch.randn(s, generator=draw).double() for s in ((r, 5), (4, r))))
        for r in (2, 3)
    ]
    both = LoRAPair.fused(parts, torch.float64)
    wanted = torch.cat([part.up @ part.down @ x for part in parts])
    torch.testing.assert_close(both.up @ both.down @ x, wanted)
