"""Floating-point operations of a step, from the sizes alone."""

from typing import NamedTuple

from natsjax.config import Config
from natsjax.kv_fraction import live_fraction


class Flops(NamedTuple):
    """Floating-point operations of the products in one optimizer step, over all devices.

    Attributes:
      weights: products with weights: forward, backward, and what rematerialisation repeats.
      attention: over the key-query pairs that count, of contexts that are one document each; a tile computes some
        more.
    """

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """Of both."""
        return sum(self)


def step_flops(
    config: Config, vocab_size: int, *, kv_fraction: float | None = None, recomputation: bool = True
) -> Flops:
    """Products of one optimizer step, from the sizes alone; two operations each multiply-and-add.

    ``kv_fraction`` is what was measured, None: ``live_fraction``; without ``recomputation`` these are the model's
    FLOPs.

    A weight costs 2 a token forward and 4 backward; ``model.remat = "full"`` repeats a block's forward but for its last
    product, "dots" only its attention's. Attention costs 2 products of ``head_dim`` forward and 7 backward (both of its
    kernels make the logits and the values' products) for each live pair, and 2 for each pair that the roles' gradient
    looks at (``pallas_kernels/nats_attention``).
    """
    model, train = config.model, config.train
    tokens = train.batch_size * config.data.context_length
    qkvo = model.embed_dim * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    scorer = 3 * model.embed_dim * model.num_kv_heads * model.layer_types.count("nats") / len(model.layer_types)
    mlp = model.embed_dim * model.mlp_dim
    repeated = qkvo + scorer + 2 * mlp if recomputation and model.remat == "full" else 0
    block = 6 * (qkvo + scorer + 3 * mlp) + 2 * repeated
    weights = tokens * (block * model.num_layers + 6 * model.embed_dim * vocab_size)
    length = config.data.context_length
    pairs = train.batch_size * model.num_layers * model.num_heads * length * (length + 1) / 2
    live = live_fraction(config) if kv_fraction is None else kv_fraction
    backward = 7 + (0 if model.remat == "none" else 2) if recomputation else 4
    shares = {"exact": 1.0, "sampled": config.nats.sampled_fraction, "visible": 0.0}
    looked_at = shares[config.nats.mask_gradient] * model.layer_types.count("nats") / len(model.layer_types)
    products = live * (2 + backward) + 2 * looked_at
    return Flops(float(weights), pairs * products * 2 * model.head_dim)
