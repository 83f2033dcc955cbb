"""`MoRForCausalLM`: a MoR model as `transformers` wants it, from `generate` to `Trainer`.

Shape letters: B batch, T new tokens, N present ones of them, E width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from mor.errors import RequestError
from mor.io.hf.cache import MoRCache
from mor.io.hf.configuration import MoRPretrainedConfig
from mor.io.hf.padded_tokens import PaddedTokens
from mor.model.attention import FullSequenceAttention
from mor.model.config import MoRConfig
from mor.model.ragged_batch import RaggedBatch
from mor.model.router import ExpertChoiceRouter, RecursionLimits, Selection
from mor.model.sharing import UNSHARED, LayerKey, block_schedule
from mor.model.transformer import MoRModel, shift_labels
from mor.ops.cross_entropy import IGNORE

_DECODING = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
_RECURSION_KWARGS = ("min_recursions", "max_recursions")


@dataclass
class MoRCausalLMOutput(ModelOutput):
    """What one forward pass returns; None where it was not asked for."""

    loss: Tensor | None = None
    """Mean over the predicted tokens, in nats; in training plus `aux_loss`."""
    logits: Tensor | None = None
    """(B, T, V)."""
    past_key_values: MoRCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """(B, T, E) before each layer at each depth, and after the final norm; zeros at padding. A
    token that has left the block carries what it left with."""
    recursion_counts: Tensor | None = None
    """(B, T) passes of the block that each token took; 0 at padding."""
    aux_loss: Tensor | None = None
    """In training, the sum of the routers' losses, each times its coefficient."""


class CheckpointableModel(MoRModel):
    """The model, with the switch that transformers looks for in every module and sets."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes each layer again instead of keeping activations."""
        return self.activation_checkpointing == "full"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.activation_checkpointing = "full" if enable else "none"


class MoRForCausalLM(PreTrainedModel, GenerationMixin):
    """Vanilla, recursive and Mixture-of-Recursions language models (arXiv 2507.10524).

    In training expert choice selects by `topk` of each sequence, otherwise by the causal
    `threshold` rule. `generate` takes `min_recursions` and `max_recursions`, too.
    """

    config_class = MoRPretrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "model.lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: MoRPretrainedConfig) -> None:
        super().__init__(config)
        self.model = CheckpointableModel(config.to_mor())
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.lm_head = new_embeddings

    # -- forward ----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "b t e"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        min_recursions: int | None = None,
        max_recursions: int | None = None,
        selection: Selection | None = None,
    ) -> Any:
        """Logits and, with labels, the loss; a `MoRCausalLMOutput` or its tuple.

        Args:
            attention_mask: (B, tokens in the cache + T), 0 at padding.
            position_ids: (B, T); None counts the tokens that are no padding.
            past_key_values: a `MoRCache` that knows the tokens before these.
            labels: the ids themselves, shifted in here; -100 and padding do not count.
            logits_to_keep: how many last tokens get logits (0: all), or the (K,) indices of them.
            num_items_in_batch: what the summed loss is divided by; None: predicted tokens.
            min_recursions, max_recursions: bounds on every token's passes of the block.
            selection: of expert choice; None: `topk` in training, otherwise `threshold`.

        Raises:
            RequestError: the arguments do not fit each other or the model.
        """
        if output_attentions:
            raise RequestError("output_attentions=True: this model keeps no attention weights.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise RequestError("give either input_ids or inputs_embeds.")
        cache = self._cache(past_key_values, use_cache)
        tokens = PaddedTokens.find(given, attention_mask, position_ids, cache)
        tokens.check(self.model.config)
        selection = selection or ("topk" if self.training and cache is None else "threshold")
        if selection == "topk" and cache is not None and cache.get_seq_length():
            raise RequestError("selection='topk' needs whole sequences: give no past_key_values.")
        limits = self._limits(min_recursions, max_recursions, selection, tokens.ragged)
        x = tokens.without_padding(given)  # (N,) ids or (N, E) embeddings
        x = self.model.embed_tokens(x) if inputs_embeds is None else x
        hidden, counts, losses, states = self._run(
            x, tokens, cache, selection, limits, output_hidden_states
        )
        # 0 keeps all, since -0 is 0. The loss needs the logits of all tokens in any case.
        where = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = aux_loss = None
        logits = self.model.lm_head(hidden if labels is not None else hidden[:, where])
        if labels is not None:
            loss, aux_loss = self._loss(logits, labels, tokens.present, num_items_in_batch, losses)
            logits = logits[:, where]
        output = MoRCausalLMOutput(loss, logits, cache, states, counts, aux_loss)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _cache(self, given: object, use_cache: bool | None) -> MoRCache | None:
        if given is not None and not isinstance(given, MoRCache):
            raise RequestError(
                f"past_key_values is a {type(given).__name__}, which has no place for depths: give "
                "the MoRCache that an earlier call returned, or None."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return MoRCache(self.model.config) if given is None and use_cache else given

    def _limits(
        self,
        min_recursions: int | None,
        max_recursions: int | None,
        selection: Selection,
        ragged: RaggedBatch,
    ) -> RecursionLimits | None:
        """What the caller says about each token's recursions; None if nothing."""
        config = self.model.config
        for name, value in zip(_RECURSION_KWARGS, (min_recursions, max_recursions), strict=True):
            if value is not None and not 1 <= value <= config.num_recursions:
                raise RequestError(
                    f"{name}={value} must lie in 1..{config.num_recursions}: the model has "
                    f"num_recursions={config.num_recursions}."
                )
            if value not in (None, config.num_recursions) and config.sharing == "sequence":
                raise RequestError(
                    f"{name}={value} needs sharing='cycle': with 'sequence' a token cannot leave "
                    f"after a pass, so only num_recursions={config.num_recursions} works."
                )
        if min_recursions and max_recursions and max_recursions < min_recursions:
            raise RequestError(
                f"max_recursions={max_recursions} must be at least min_recursions={min_recursions}."
            )
        minimum, maximum = min_recursions or 0, max_recursions or config.num_recursions
        if (minimum, maximum) == (0, config.num_recursions) or config.sharing == "sequence":
            return None
        if selection == "topk" and isinstance(self.model.router, ExpertChoiceRouter):
            raise RequestError(
                "min_recursions and max_recursions need selection='threshold': 'topk' sends a "
                "fixed share of the tokens to each depth."
            )
        every = torch.ones_like(ragged.token_indices)
        return RecursionLimits(min_recursions=minimum * every, max_recursions=maximum * every)

    def _run(
        self,
        x: Float[Tensor, "n e"],
        tokens: PaddedTokens,
        cache: MoRCache | None,
        selection: Selection,
        limits: RecursionLimits | None,
        keep_states: bool | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], tuple[Tensor, ...] | None]:
        """(B, T, E) states after the final norm, (B, T) counts, routers' losses, hidden states."""
        if keep_states is None:
            keep_states = self.config.output_hidden_states
        model, hook = self.model, _HiddenStateHook(self.model.config)
        kv = FullSequenceAttention(model.config) if cache is None else cache
        context = model.context(tokens.ragged, kv)
        with ExitStack() as stack:
            for layer in (*model.prelude, *model.block, *model.coda) if keep_states else ():
                stack.enter_context(layer.register_forward_pre_hook(hook))
            x = model.run_prelude(x, context)
            x, counts, record = model.run_recursions(x, context, selection, limits=limits)
            after_block = x
            x = model.norm(model.run_coda(x, context))
        counts, hidden = tokens.with_padding(counts), tokens.with_padding(x)
        if cache is not None:
            cache.advance(tokens.positions, counts)
        if not keep_states:
            return hidden, counts, record.losses, None
        states = (*map(tokens.with_padding, hook.states(after_block)), hidden)
        return hidden, counts, record.losses, states

    def _loss(
        self,
        logits: Float[Tensor, "b t v"],
        labels: Int[Tensor, "b t"],
        present: Bool[Tensor, "b t"],
        num_items: int | Tensor | None,
        losses: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """What training minimizes, or the language-model loss alone; and the routers' part."""
        targets = shift_labels(labels.masked_fill(~present, IGNORE)).masked_fill(~present, IGNORE)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        summed = F.cross_entropy(
            wide.flatten(0, 1), targets.reshape(-1), ignore_index=IGNORE, reduction="sum"
        )
        predicted = (targets != IGNORE).sum().clamp(min=1)
        total = predicted if num_items is None else num_items
        loss = summed / total
        if not self.training or not losses:
            return loss, None
        aux_loss = torch.as_tensor(self.model.scaled_aux_loss(losses))
        # Trainer adds up the losses of a step's micro-batches: each brings its share of the tokens.
        return loss + aux_loss * (predicted / total), aux_loss

    # -- generate ---------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin` does, with `min_recursions` and `max_recursions` as well.

        With `return_dict_in_generate` the result has `recursion_counts`, (B, tokens - 1): passes
        of each position of the sequences; the last token has not been through the model. (Not for
        beam search, whose rows change places.)

        Raises:
            RequestError: a way of generating, or a number of recursions, that the model cannot do.
        """
        out = super().generate(*args, **kwargs)
        if isinstance(out, GenerateDecoderOnlyOutput):
            cache = out.past_key_values
            out["recursion_counts"] = cache.recursion_counts if cache is not None else None
        return out

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of `GenerationMixin`, with causal selection also in training mode."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs.pop("cache_position", None)  # of transformers 4: the cache knows
        return {"selection": "threshold", **inputs}

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        mode = str(generation_config.get_generation_mode().value)
        if mode not in _DECODING:
            raise RequestError(f"generating by {mode} does not work: use {', '.join(_DECODING)}.")
        dials = {name: getattr(generation_config, name, None) for name in _RECURSION_KWARGS}
        return generation_config, {k: v for k, v in dials.items() if v is not None} | model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise RequestError(
                f"cache_implementation={generation_config.cache_implementation!r} has no place for "
                "depths: leave it out, the model brings its own cache."
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = MoRCache(self.model.config)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it would run the layers with a paged cache that knows no depths.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "generate_batch gives wrong tokens for this model: use generate with a padded batch, "
            "or `mor.LLM`, whose batching knows depths."
        )

    init_continuous_batching = generate_batch


class _HiddenStateHook:
    """A forward pre-hook that keeps the input of each layer at each depth."""

    def __init__(self, config: MoRConfig) -> None:
        before, after = config.num_prelude_layers, config.num_coda_layers
        layer_keys = (
            *(LayerKey(UNSHARED, i) for i in range(before)),
            *block_schedule(config.sharing, config.num_block_layers, config.num_recursions),
            *(LayerKey(UNSHARED, before + i) for i in range(after)),
        )
        self._order = {layer_key: number for number, layer_key in enumerate(layer_keys)}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: nn.Module, args: Any) -> None:
        """Keep the rows and the states of the tokens that enter the layer."""
        x, layer_key, context = args
        self._inputs[self._order[layer_key]] = context.ragged.token_indices, x

    def states(self, after_block: Float[Tensor, "n e"]) -> Iterator[Tensor]:
        """(N, E) states before each layer; tokens that left the block keep what they left with."""
        for number in range(len(self._order)):
            if number in self._inputs:
                yield after_block.index_copy(0, *self._inputs[number])
            else:
                yield after_block
