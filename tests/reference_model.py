"""A second, naive implementation of the model, which tests compare the real one with.

One sequence at a time, dense (T, T) masks, every token computed at every depth and thrown away
afterwards where it was not selected. Reads only a model's parameters and config.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.model.transformer import MoRModel


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE on (T, H, D) as complex numbers."""
    half = x.shape[-1] // 2
    freqs = theta ** (-torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = torch.arange(x.shape[0]).float()[:, None] * freqs
    turn = torch.complex(angles.cos().to(x.dtype), angles.sin().to(x.dtype))[:, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def matrix(linear: torch.nn.Module, depth: int) -> Tensor:
    """The whole matrix of a layer at a depth."""
    if linear.delta_up is None:
        return linear.weight
    return (
        linear.weight + (linear.delta_up @ linear.delta_down)[min(depth, len(linear.delta_up) - 1)]
    )


def layer(
    model: MoRModel,
    module: torch.nn.Module,
    x: Tensor,
    visible: Tensor,
    kv: Tensor,
    depth: int = 0,
) -> tuple[Tensor, Tensor]:
    """One layer over all T tokens at a depth; keys and values come from the states `kv`.

    Returns the new states and the states that keys and values were computed from.
    """
    heads, groups, dim = model.config.num_heads_and_dim
    attn, eps = module.self_attn, model.config.rms_norm_eps
    h = norm(x, module.input_layernorm.weight, eps)
    source = norm(kv, module.input_layernorm.weight, eps)
    num = x.shape[0]
    q = (h @ matrix(attn.q_proj, depth).T).view(num, heads, dim)
    k = (source @ matrix(attn.k_proj, depth).T).view(num, groups, dim)
    if model.config.qk_norm:
        q, k = norm(q, attn.q_norm.weight, eps), norm(k, attn.k_norm.weight, eps)
    q, k = rotate(q, model.config.rope_theta), rotate(k, model.config.rope_theta)
    v = (source @ matrix(attn.v_proj, depth).T).view(num, groups, dim)
    k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), v)
    x = x + mixed.reshape(num, -1) @ matrix(attn.o_proj, depth).T
    h = norm(x, module.post_attention_layernorm.weight, eps)
    mlp = module.mlp
    inner = F.silu(h @ matrix(mlp.gate_proj, depth).T) * (h @ matrix(mlp.up_proj, depth).T)
    return x + inner @ matrix(mlp.down_proj, depth).T, kv


class Naive:
    """Forward pass of one sequence; `losses` and `selected` are filled on the way.

    Every token takes at least `minimum` and at most `maximum` passes, whatever the router says.
    """

    def __init__(
        self, model: MoRModel, selection: str, minimum: int = 0, maximum: int | None = None
    ) -> None:
        self.model, self.config, self.selection = model, model.config, selection
        self.minimum, self.maximum = minimum, maximum or model.config.num_recursions
        self.losses: dict[str, Tensor] = {}
        self.selected: list[list[int]] = []
        self.kept: dict[int, Tensor] = {}

    def logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(T, V) logits and (T,) recursion counts."""
        model, config = self.model, self.config
        num = len(ids)
        everyone = torch.ones(num, dtype=torch.bool)
        x = model.embed_tokens.weight[ids]
        for module in model.prelude:
            x = layer(model, module, x, self.mask(everyone), x)[0]
        if config.routing == "expert_choice":
            x, counts = self.expert_choice(x)
        elif config.routing == "token_choice":
            x, counts = self.token_choice(x)
        else:
            x, counts = self.recursive(x), torch.full((num,), self.maximum)
        for module in model.coda:
            x = layer(model, module, x, self.mask(everyone), x)[0]
        return norm(x, model.norm.weight, config.rms_norm_eps) @ model.lm_head.weight.T, counts

    def mask(self, present: Tensor) -> Tensor:
        causal = torch.ones(len(present), len(present), dtype=torch.bool).tril()
        return causal & present[None, :]

    def block(self, x: Tensor, depth: int, present: Tensor) -> Tensor:
        for i, module in enumerate(self.model.block):
            x = self.apply(module, i, x, depth, present)
        return x

    def apply(
        self, module: torch.nn.Module, i: int, x: Tensor, depth: int, present: Tensor
    ) -> Tensor:
        shared = self.config.kv_strategy == "shared"
        kv = self.kept[i] if shared and depth > 0 else x
        self.kept[i] = kv
        seen = torch.ones_like(present) if shared else present
        return layer(self.model, module, x, self.mask(seen), kv, depth)[0]

    def recursive(self, x: Tensor) -> Tensor:
        everyone = torch.ones(len(x), dtype=torch.bool)
        depths, modules = range(self.maximum), list(enumerate(self.model.block))
        if self.config.sharing == "cycle":
            order = [(r, i, m) for r in depths for i, m in modules]
        else:
            order = [(r, i, m) for i, m in modules for r in depths]
        for r, i, module in order:
            x = self.apply(module, i, x, r, everyone)
        return x

    def router_logits(self, router: torch.nn.Module, x: Tensor) -> Tensor:
        if hasattr(router, "proj"):
            return x @ router.proj.weight.T
        if hasattr(router, "up"):
            return F.gelu(x @ router.up.weight.T) @ router.down.weight.T
        return router(x, torch.arange(len(x)))

    def expert_choice(self, h: Tensor) -> tuple[Tensor, Tensor]:
        config, num = self.config, len(h)
        present = torch.ones(num, dtype=torch.bool)
        counts = torch.zeros(num, dtype=torch.long)
        for r in range(config.num_recursions):
            z = self.router_logits(self.model.router.routers[r], h / config.router_temperature)[
                :, 0
            ]
            squash = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(config.router_activation)
            g = config.router_alpha * squash(z) if squash else z
            decide = z
            if config.selection_training == "aux_router":
                aux = self.model.router.aux_routers[r]
                decide = self.router_logits(aux, h.detach())[:, 0]
            if self.selection == "topk":
                k = max(1, int(config.capacities[r] * num))
                ranked = sorted(present.nonzero()[:, 0].tolist(), key=lambda t: -g[t].item())
                chosen = torch.zeros(num, dtype=torch.bool)
                chosen[ranked[:k]] = True
                self.account(z, decide, present, chosen)
            else:
                free = r == 0 and config.capacities[0] == 1
                wanted = (decide >= config.thresholds[r]) | free | (r < self.minimum)
                chosen = present & wanted & (r < self.maximum)
            if not chosen.any():
                break
            update = self.block(h, r, chosen)
            update = g[:, None] * update if config.gating == "weighted" else update
            h = torch.where(chosen[:, None], h + update, h)
            counts, present = counts + chosen.long(), chosen
        return h, counts

    def account(self, z: Tensor, decide: Tensor, present: Tensor, chosen: Tensor) -> None:
        self.selected.append(chosen.nonzero()[:, 0].tolist())
        if self.config.selection_training != "none":
            p = torch.sigmoid(decide[present])
            hit = chosen[present]
            bce = -torch.where(hit, p.log(), (1 - p).log()).mean()
            self.losses["sampling_loss"] = self.losses.get("sampling_loss", 0) + bce
        if self.config.z_loss_coeff:
            zloss = (z[present] ** 2).mean()
            self.losses["router_z_loss"] = self.losses.get("router_z_loss", 0) + zloss

    def token_choice(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        z = self.router_logits(self.model.router.router, x0 / config.router_temperature)
        squashed = z.softmax(-1) if config.router_activation == "softmax" else z.sigmoid()
        p = config.router_alpha * squashed
        biased = p + self.model.router.bias if config.balancing == "loss_free" else p
        choice = biased.argmax(-1).clamp(self.minimum - 1, self.maximum - 1)
        h = x0
        for r in range(config.num_recursions):
            present = choice >= r
            if present.any():
                h = torch.where(present[:, None], self.block(h, r, present), h)
        w = p[torch.arange(len(x0)), choice][:, None] if config.gating == "weighted" else 1
        if config.balancing == "loss":
            fractions = torch.bincount(choice, minlength=config.num_recursions) / len(x0)
            self.losses["balancing_loss"] = (p.mean(0) * fractions * config.num_recursions).sum()
        if config.z_loss_coeff:
            self.losses["router_z_loss"] = z.exp().sum(-1).log().pow(2).mean()
        return x0 + w * h, choice + 1
