"""Floating-point operations of a step, from the sizes of the model."""

from typing import NamedTuple

from natsjax.config import Config
from natsjax.kv_fraction import live_fraction, trained_fraction


class Flops(NamedTuple):
    """Floating-point operations of the products in one optimizer step, over all devices.

    Attributes:
      weights: products with weights: forward, backward, and repetitions by rematerialization.
      attention: products of attention over live key-query pairs, for contexts of one document each; tiles compute
        more.
    """

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """Sum of both."""
        return sum(self)


def step_flops(
    config: Config, vocab_size: int, *, kv_fraction: float | None = None, recomputation: bool = True
) -> Flops:
    """Counts the operations of the products in one optimizer step; a multiply-add is two operations.

    A weight takes 2 operations per token in the forward pass and 4 in the backward pass. ``model.remat = "full"``
    repeats the forward pass of a block except for its last product, "dots" repeats only attention. Attention takes 2
    products of ``head_dim`` in the forward pass and 7 in the backward pass (both of its kernels compute the logits and
    the products with values) for each live pair, and 2 for each pair that the role gradient is computed from
    (``pallas_kernels/nats_attention``). Layers with arrays of all pairs take 4 in the backward pass, and those of type
    "selective" the logits of one head twice.

    Args:
      config: config of the run.
      vocab_size: size of the vocabulary.
      kv_fraction: measured KV fraction; None: ``live_fraction``.
      recomputation: False to count the model's FLOPs without repetitions.
    """
    model, train = config.model, config.train
    tokens = train.batch_size * config.data.context_length
    by_query_head = 3 if model.attention_gate else 2
    qkvo = model.embed_dim * model.head_dim * (by_query_head * model.num_heads + 2 * model.num_kv_heads)
    learned = sum(model.is_role_layer()) / model.num_layers
    roles = 0 if model.role_layer_type == "head_roles" else config.nats.num_roles
    scorer = roles * model.embed_dim * model.num_kv_heads * learned
    mlp = model.embed_dim * model.mlp_dim
    matrices = 2 if model.activation == "squared_relu" else 3
    repeated = qkvo + scorer + (matrices - 1) * mlp if recomputation and model.remat == "full" else 0
    block = 6 * (qkvo + scorer + matrices * mlp) + 2 * repeated
    weights = tokens * (block * model.num_layers + 6 * model.embed_dim * vocab_size)
    length = config.data.context_length
    pairs = train.batch_size * model.num_layers * model.num_heads * length * (length + 1) / 2
    live = trained_fraction(config, live_fraction(config) if kv_fraction is None else kv_fraction)

    def products_of_a_pair(kernels: int) -> int:
        return 2 + (kernels + (0 if model.remat == "none" else 2) if recomputation else 4)

    # Kernels compute logits again; layers with arrays of all pairs keep them.
    kernels = 4 if model.role_layer_type == "gated" else 7
    selective = model.layer_types.count("selective") / len(model.layer_types)
    one_more = 1 + 1 / (2 * model.num_heads)  # a head's logits are computed once more, as masks
    fractions = {"exact": 1.0, "sampled": config.nats.sampled_fraction, "visible": 0.0}
    masked_out = fractions[config.nats.mask_gradient] * model.layer_types.count("nats") / len(model.layer_types)
    products = (live - selective) * products_of_a_pair(kernels) + 2 * masked_out
    products += selective * one_more * products_of_a_pair(4)
    return Flops(float(weights), pairs * products * 2 * model.head_dim)
