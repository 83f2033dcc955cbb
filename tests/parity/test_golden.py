"""Logits, losses, selections and every gradient of the reference implementation, to 1e-4."""

from pathlib import Path

import pytest
import torch
from golden import Golden, files
from torch import Tensor

from mor.errors import CheckpointError, ConfigError
from mor.io.reference_checkpoint import from_official, official_names

PATHS = list(files())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a fraction of the largest true value."""
    return float((ours - theirs).detach().abs().max() / theirs.abs().max())


def test_all_ten_are_here() -> None:
    assert len(PATHS) == 10


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_training_pass(path: Path) -> None:
    golden = Golden.read(path)
    model = from_official(golden.under("weight."), golden.llama, golden.cfg).train()
    ids = golden.tensors["input_ids"]
    out = model(ids, labels=ids)
    out.total_loss.backward()
    assert relative(out.logits, golden.tensors["logits"]) < 1e-4
    assert relative(out.loss, golden.tensors["loss"]) < 1e-4
    assert relative(out.total_loss, golden.tensors["total_loss"]) < 1e-4
    for name in ("sampling_loss", "balancing_loss", "router_z_loss"):
        assert (name in golden.tensors) == (name in out.aux_losses)
        if name in golden.tensors:
            assert relative(out.aux_losses[name], golden.tensors[name]) < 1e-4
    selected = golden.under("selected.")
    assert len(selected) == len(out.selected)
    for depth, positions in enumerate(out.selected):
        assert torch.equal(positions, selected[str(depth + 1)])
    if "balancing_ratio" in golden.tensors:
        fractions = model.router.fractions(out.recursion_counts.reshape(-1))
        assert relative(fractions, golden.tensors["balancing_ratio"]) < 1e-6


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_every_gradient(path: Path) -> None:
    golden = Golden.read(path)
    model = from_official(golden.under("weight."), golden.llama, golden.cfg).train()
    ids = golden.tensors["input_ids"]
    model(ids, labels=ids, return_logits=False).total_loss.backward()
    names = official_names(model.config)
    parameters = dict(model.named_parameters())
    grads = golden.under("grad.")
    assert {names(theirs) for theirs in grads} == set(parameters)
    for theirs, grad in grads.items():
        assert relative(parameters[names(theirs)].grad, grad) < 1e-4, theirs


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_evaluation_pass_and_tying(path: Path) -> None:
    golden = Golden.read(path)
    model = from_official(golden.under("weight."), golden.llama, golden.cfg).eval()
    out = model(golden.tensors["input_ids"], selection="topk")
    assert relative(out.logits, golden.tensors["eval_logits"]) < 1e-4
    tied = "lm_head.weight" not in golden.under("weight.")
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def _expert() -> Golden:
    return Golden.read(next(p for p in PATHS if "auxloss" in p.stem))


def test_missing_unexpected_and_misshapen_parameters_are_named() -> None:
    golden = _expert()
    weights = golden.under("weight.")
    router = "model.layers.2.mor_router.router.weight"
    lacking = {k: v for k, v in weights.items() if k != router}
    with pytest.raises(CheckpointError, match=r"lacks .*router\.routers\.1"):
        from_official(lacking, golden.llama, golden.cfg)
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.x"):
        from_official({**weights, "model.layers.9.x": weights[router]}, golden.llama, golden.cfg)
    with pytest.raises(CheckpointError, match="shape"):
        from_official({**weights, router: weights[router][:, :5]}, golden.llama, golden.cfg)


def test_a_checkpoint_that_lost_its_sharing_is_refused() -> None:
    golden = _expert()
    weights = golden.under("weight.")
    name = "model.layers.{}.block.0.self_attn.q_proj.weight"
    copied = {**weights, name.format(2): weights[name.format(1)].clone()}
    from_official(copied, golden.llama, golden.cfg)
    broken = {**weights, name.format(2): weights[name.format(1)] + 1}
    with pytest.raises(CheckpointError, match="lost its weight sharing"):
        from_official(broken, golden.llama, golden.cfg)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("recursive", {"ln_share": False}, "ln_share"),
        ("relaxation", {"enable": True}, "relaxation"),
        ("kv_sharing", {"enable": True, "update_cache": True}, "update_cache"),
        ("recursive", {"sharing": "spiral"}, "spiral"),
    ],
)
def test_what_has_no_counterpart_is_refused(section: str, change: dict, words: str) -> None:
    golden = _expert()
    cfg = {**golden.cfg, section: {**golden.cfg[section], **change}}
    with pytest.raises(ConfigError, match=words):
        from_official(golden.under("weight."), golden.llama, cfg)
