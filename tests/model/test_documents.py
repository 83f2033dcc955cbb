"""Attention that stays inside documents: each as if it were alone, at no cost of a mask."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mor.model.attention import RotaryEmbedding
from mor.model.ragged_batch import RaggedBatch
from mor.model.transformer import MoRModel
from mor.ops.document_attention import number_documents
from tiny import KINDS, tiny_config

END = 0


def batch_of(lengths: list[list[int]], seed: int = 0) -> Tensor:
    """A row of tokens for each list; every document but a row's last ends with END."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for row in lengths:
        ids = torch.randint(1, 50, (sum(row),), generator=draw)
        ids[torch.tensor(row).cumsum(0)[:-1] - 1] = END
        rows.append(ids)
    return torch.stack(rows)


def build(kind: str, **changes: Any) -> MoRModel:
    torch.manual_seed(1)
    config = tiny_config(kind, vocab_size=50, max_position_embeddings=64, **changes)
    return MoRModel(config).double().eval()


@pytest.fixture
def exact_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE's angles are fp32 in the model, which alone makes 1e-7 of a shifted position."""

    def at(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> RotaryEmbedding:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64)
        angles = positions[:, None] * theta ** (-exponents / head_dim)
        return RotaryEmbedding(angles.cos()[:, None], angles.sin()[:, None])

    monkeypatch.setattr(RotaryEmbedding, "at", at)


LENGTHS = [[5, 1, 17, 9], [32], [1, 1, 2, 28], [16, 16]]


def test_documents_are_numbered_through_the_batch() -> None:
    ids = torch.tensor([[7, END, END, 3, 4], [5, 6, 7, END, 8]])
    assert number_documents(ids, END).tolist() == [1, 1, 2, 3, 3, 4, 4, 4, 4, 5]


@pytest.mark.usefixtures("exact_angles")
@pytest.mark.parametrize("kind", KINDS)
def test_each_document_is_as_if_it_were_alone(kind: str) -> None:
    """Under every causal rule; alone its positions start at 0, and RoPE does not mind."""
    if "random" in kind:
        pytest.skip("a random router looks at the position")
    model = build(kind)
    ids = batch_of(LENGTHS)
    whole, counts, _ = model.hidden_states(ids, "threshold", document_end=END)
    whole, counts = whole.view(*ids.shape, -1), counts.view(ids.shape)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone, alone_counts, _ = model.hidden_states(ids[row : row + 1, part], "threshold")
            torch.testing.assert_close(whole[row, part], alone, rtol=1e-10, atol=1e-10)
            assert torch.equal(counts[row, part], alone_counts)
            start += length
    spanning, _, _ = model.hidden_states(ids, "threshold")
    assert not torch.allclose(whole[0], spanning.view(*ids.shape, -1)[0], atol=1e-4)
    torch.testing.assert_close(whole[1], spanning.view(*ids.shape, -1)[1])


class Masked:
    """The oracle: a (T, T) mask over the whole sequences."""

    def __init__(self, documents: Tensor, shared: bool) -> None:
        self.documents, self.shared = documents, shared
        self.kept: dict[int, tuple[Tensor, Tensor, RaggedBatch]] = {}

    def has_kv(self, layer_key: Any) -> bool:
        return self.shared and layer_key.depth > 0

    def attend(self, layer_key: Any, q: Tensor, k: Any, v: Any, ragged: RaggedBatch) -> Tensor:
        if k is None:
            k, v, of = self.kept[layer_key.layer]
        else:
            of = ragged
            self.kept[layer_key.layer] = (k, v, ragged)
        same = (
            self.documents[ragged.token_indices][:, None] == self.documents[of.token_indices][None]
        )
        seen = same & (of.positions[None] <= ragged.positions[:, None])
        keys, values, queries = (x.transpose(0, 1)[None] for x in (k, v, q))
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)


def one_of(given: Masked, *_: Any) -> Masked:
    return given


@pytest.mark.parametrize("kind", KINDS)
def test_topk_packs_what_it_selects_and_masks_nothing_else(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert choice selects over the window; losses and gradients are those of a dense mask."""
    model = build(kind).train()
    ids = batch_of(LENGTHS, seed=3)
    results = []
    for masked in (False, True):
        if masked:
            shared = model.config.kv_strategy == "shared"
            oracle_kv = Masked(number_documents(ids, END), shared)
            monkeypatch.setattr(
                "mor.model.transformer.FullSequenceAttention", partial(one_of, oracle_kv)
            )
        model.zero_grad()
        torch.manual_seed(0)  # for a random router
        out = model(ids, targets=ids, selection="topk", document_end=END)
        out.total_loss.backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (ours, grads), (oracle, expected) = results
    torch.testing.assert_close(ours.loss, oracle.loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.recursion_counts, oracle.recursion_counts)
    for name, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-11)


@settings(max_examples=3 * settings().max_examples)  # cheap ones
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    kind=st.sampled_from(["vanilla", "expert", "token_shared", "recursive_shared"]),
)
def test_no_token_moves_another_document(data: st.DataObject, rows: int, kind: str) -> None:
    """Whatever the borders: change a token, and only its own document's later states move."""
    model = build(kind)
    ends = data.draw(st.lists(st.booleans(), min_size=20 * rows, max_size=20 * rows))
    ids = torch.randint(1, 50, (rows, 20), generator=torch.Generator().manual_seed(5))
    ids[torch.tensor(ends).view(rows, 20)] = END
    place = data.draw(st.integers(0, 20 * rows - 1))
    changed = ids.clone().view(-1)
    if changed[place] == END:
        return
    changed[place] = 1 + changed[place] % 49
    documents = number_documents(ids, END)
    before, _, _ = model.hidden_states(ids, "threshold", document_end=END)
    after, _, _ = model.hidden_states(changed.view(rows, 20), "threshold", document_end=END)
    moved = (before - after).abs().amax(1) > 1e-10
    own = (documents == documents[place]) & (torch.arange(20 * rows) >= place)
    assert not (moved & ~own).any()
    assert moved[place]


def test_no_square_of_the_window_is_kept() -> None:
    """What a layer keeps grows with the window, not with its square, whatever the documents."""
    torch.manual_seed(1)
    config = tiny_config("vanilla", vocab_size=50, max_position_embeddings=512)
    model, kept = MoRModel(config).train(), list[int]()

    def pack(tensor: Tensor) -> Tensor:
        kept[-1] = max(kept[-1], tensor.numel())
        return tensor

    for documents in (8, 32):
        kept.append(0)
        ids = batch_of([[16] * documents])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, targets=ids, document_end=END, return_logits=False)
    assert kept[1] <= 4 * kept[0]
