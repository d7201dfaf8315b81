"""Grouped-query attention of one layer: over learned roles, over everything, or over a sliding window.

Nothing is mutated in a call: noise keys go in, roles and what they cost come out. Under a mesh (``jax.set_mesh``)
weights are gathered where they are used, and attention runs on each device's heads and rows.

Axis letters as in ``natsjax.model``.
"""

import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from natsjax.config import Config, ModelConfig, NatsConfig
from natsjax.model.inputs import Inputs
from natsjax.model.layers import RMSNorm, matrix, residual_gain, rotate, vector, weight
from natsjax.model.roles import (
    NUM_ROLES,
    choose_roles,
    first_of_document,
    lifetime_sum,
    lifetimes,
    scorer_bias,
    straight_through,
)
from natsjax.model.sharding import Axes, compute_sharding, psum, sequence_axis, shard_map
from pallas_kernels.nats_attention import (
    GLOBAL,
    SLIDING,
    MaskGradient,
    Sampled,
    Visible,
    interval_attention,
    nats_attention,
)

ROLES = "nats_roles"
"""Name under which every remat policy saves the sampled roles."""


class Roles(NamedTuple):
    """What a forward pass chose and what it costs.

    Attributes:
      ids: int8 ``[l, b, k, s]``, the role of each token; all GLOBAL in a "dense" layer, SLIDING in a "sliding" one.
      lifetime: float32 ``[l, k]``, sum of all lifetimes in key-query pairs, differentiable.
      entropy: float32 ``[l, k]``, sum over tokens of the entropy of the scorer's softmax, without noise or role bias,
        nats.
    """

    ids: jax.Array
    lifetime: jax.Array
    entropy: jax.Array


class RoleSampling(NamedTuple):
    """How one layer's roles are chosen; without any field, by the largest logit.

    Attributes:
      noise_key: Gumbel noise is drawn with it (training).
      bias: float32 ``[3]``, added to the logits (the role bias).
      key_end: int32, broadcast against ``[b, k, s]``: no roles, these intervals (full attention is ``NO_END``); a
        "sliding" layer's window stays.
      role_ids: int8 ``[b, k, s]`` (for the whole model ``[l, b, k, s]``): these roles, whatever the logits say.
      temperature: float32 scalar, of the straight-through softmax; None: ``nats.temperature``.
    """

    noise_key: jax.Array | None = None
    bias: jax.Array | None = None
    key_end: jax.Array | None = None
    role_ids: jax.Array | None = None
    temperature: jax.Array | None = None


class Scorer(nnx.Module):
    """Three logits per token and KV head, one for each role (docs/method.md 2).

    Its weights start at zero and its biases at the logarithm of ``nats.initial_roles``: at step 0 the sampled roles
    have just those fractions in every head.
    """

    def __init__(self, model: ModelConfig, nats: NatsConfig):
        shape = (model.embed_dim, model.num_kv_heads, NUM_ROLES)
        self.weight = vector(jnp.zeros(shape, jnp.float32), ("embed", "kv_heads", None))
        bias = scorer_bias(nats.initial_roles)
        self.bias = vector(jnp.broadcast_to(bias, shape[1:]), ("kv_heads", None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[b, s, d]`` → float32 ``[b, k, s, 3]``."""
        logits = jnp.einsum(
            "bsd,dkr->bksr",
            x.astype(jnp.float32),
            weight(self.weight, jnp.float32),
            precision=jax.lax.Precision.HIGHEST,  # accelerators would multiply float32 in bfloat16 or TF32
        )
        return logits + weight(self.bias, jnp.float32)[:, None, :]


class Attention(nnx.Module):
    """Grouped-query attention; weights keep their head axes."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        d, k, h = model.embed_dim, model.num_kv_heads, model.head_dim
        g = model.num_heads // k
        self.config = config
        self.query = matrix(rngs.params(), (d, k, g, h), ("embed", "kv_heads", None, None), d)
        self.key = matrix(rngs.params(), (d, k, h), ("embed", "kv_heads", None), d)
        self.value = matrix(rngs.params(), (d, k, h), ("embed", "kv_heads", None), d)
        output_axes = ("kv_heads", None, None, "embed")
        self.output = matrix(rngs.params(), (k, g, h, d), output_axes, k * g * h, gain=residual_gain(model))
        if model.qkv_bias:
            # At zero the query's and the key's bias would be a saddle point of their product.
            query_axes, key_axes = ("kv_heads", None, None), ("kv_heads", None)
            self.query_bias = matrix(rngs.params(), (k, g, h), query_axes, 1, weight_decay=False)
            self.key_bias = matrix(rngs.params(), (k, h), key_axes, 1, weight_decay=False)
            self.value_bias = vector(jnp.zeros((k, h), jnp.float32), key_axes)
        if model.qk_norm:
            self.query_norm = RMSNorm(h, model.norm_eps)
            self.key_norm = RMSNorm(h, model.norm_eps)
        if model.has_roles:  # in all layers, which are stacked; those of other kinds have no use for theirs
            self.scorer = Scorer(model, config.nats)

    def __call__(self, x, inputs: Inputs, choice: RoleSampling, kind: str) -> tuple[jax.Array, Roles]:
        """``x [b, t, d]`` → ``(out [b, t, d], roles)`` of this layer (without the axis ``l``).

        ``kind`` is one of ``config.LAYER_TYPES``.
        """
        query, key, value = self.project(x, inputs.positions)
        if kind == "nats" and choice.key_end is None:
            out, roles = self._attend_by_roles(query, key, value, x, inputs, choice)
        else:
            out, roles = self._attend_by_interval(query, key, value, inputs, choice.key_end, kind)
        return self.merge(out), roles

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``x [b, t, d]``, int32 ``positions [b, t]`` → query ``[b, t, k, g, h]``, key and value ``[b, t, k, h]``."""
        model = self.config.model
        query = jnp.einsum("btd,dkgh->btkgh", x, self._cast(self.query))
        key = jnp.einsum("bsd,dkh->bskh", x, self._cast(self.key))
        value = jnp.einsum("bsd,dkh->bskh", x, self._cast(self.value))
        if model.qkv_bias:
            query, key, value = (
                y + self._cast(bias)
                for y, bias in ((query, self.query_bias), (key, self.key_bias), (value, self.value_bias))
            )
        if model.qk_norm:  # each head's own norm: of what the scale below multiplies, nothing can grow
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, positions, model.rope_theta), rotate(key, positions, model.rope_theta), value

    def merge(self, out: jax.Array) -> jax.Array:
        """What the heads read, ``[b, t, k, g, h]`` → ``[b, t, d]``."""
        out_sharding = compute_sharding("batch", "sequence", None)
        return jnp.einsum("btkgh,kghd->btd", out, self._cast(self.output), out_sharding=out_sharding)

    def choose_roles(self, logits: jax.Array, first: jax.Array, choice: RoleSampling) -> jax.Array:
        """int8 ``[b, k, s]``: the roles that are given, or those of the largest logit, GLOBAL where ``first``."""
        ids = choose_roles(logits, first)
        return ids if choice.role_ids is None else choice.role_ids.astype(jnp.int8)

    def _attend_by_roles(self, query, key, value, x, inputs, choice):
        nats = self.config.nats
        logits = self.scorer(x)
        entropy = _entropy(jax.lax.stop_gradient(logits), inputs.document_end)
        if choice.noise_key is not None:
            # Drawn for the whole batch: every mesh draws the same.
            sharding = compute_sharding(*_BY_HEAD, None)
            logits += jax.random.gumbel(choice.noise_key, logits.shape, jnp.float32, out_sharding=sharding)
        if choice.bias is not None:
            logits += choice.bias
        first = first_of_document(inputs.positions)
        ids = checkpoint_name(self.choose_roles(logits, first, choice), ROLES)
        roles = straight_through(
            logits, ids, first, nats.temperature if choice.temperature is None else choice.temperature
        )

        def attend(query, key, value, roles, document_end, sample_key):
            return nats_attention(
                _merge_heads(query),
                key,
                value,
                roles,
                window=nats.window,
                document_end=document_end,
                mask_gradient=self._mask_gradient(trained=sample_key is not None),
                sample_key=sample_key,
                axis_name=sequence_axis(),
            ).reshape(query.shape)

        def local_lifetime_sum(roles, document_end):
            lifetime = lifetime_sum(roles, document_end, nats.window, nats.kv_penalty_gradient)
            return psum(lifetime, "batch")

        axes = (_QUERY, _KEY, _KEY, (*_BY_HEAD, None), ("batch", "sequence"), ())
        out = shard_map(attend, axes, _QUERY)(
            query,
            key,
            value,
            roles,
            inputs.document_end,
            None if choice.noise_key is None else jax.random.fold_in(choice.noise_key, 1),
        )
        # Lifetimes are read off the whole sequence, as O(L) integers.
        whole = (("batch", "kv_heads", None, None), ("batch", None))
        lifetime = shard_map(local_lifetime_sum, whole, ("kv_heads",))(roles, inputs.document_end)
        return out, Roles(ids, lifetime, entropy)

    def _mask_gradient(self, trained: bool) -> MaskGradient | str:
        nats = self.config.nats
        if nats.mask_gradient != "sampled":
            return nats.mask_gradient
        # Without noise nothing is trained and no gradient asked for: then there is no key to draw with either.
        return Sampled(nats.sampled_fraction) if trained else Visible()

    def _attend_by_interval(self, query, key, value, inputs, key_end, kind):
        b, s, k, _ = key.shape
        role = GLOBAL
        if kind == "sliding":  # whatever else is asked for: such a layer has never read more
            role = SLIDING
            run_out = jnp.arange(s, dtype=jnp.int32) + min(self.config.model.sliding_window, s) + 1
            key_end = run_out if key_end is None else jnp.minimum(key_end, run_out)
        end = inputs.document_end[:, None, :] if key_end is None else key_end
        end = jnp.minimum(end, inputs.document_end[:, None, :])
        end = jnp.broadcast_to(end, (b, k, s), out_sharding=compute_sharding(*_BY_HEAD)).astype(jnp.int32)

        def attend(query, key, value, end):
            heads = _merge_heads(query)
            out = interval_attention(heads, key, value, end, axis_name=sequence_axis())
            return typing.cast(jax.Array, out).reshape(query.shape)

        out = shard_map(attend, (_QUERY, _KEY, _KEY, _BY_HEAD), _QUERY)(query, key, value, end)
        lifetime = jnp.sum(lifetimes(end, inputs.document_end), axis=(0, 2), dtype=jnp.float32)
        return out, Roles(jnp.full_like(end, role, jnp.int8), lifetime, jnp.zeros_like(lifetime))

    def _cast(self, parameter: nnx.Param) -> jax.Array:
        return weight(parameter, self.config.model.dtype)


def _entropy(logits: jax.Array, document_end: jax.Array) -> jax.Array:
    """Sum over tokens that are not padding: float32 ``[k]`` from ``[b, k, s, 3]`` and ``[b, s]``."""
    log_fraction = jax.nn.log_softmax(logits, axis=-1)
    of_token = -jnp.sum(jnp.exp(log_fraction) * log_fraction, axis=-1)
    return jnp.sum(jnp.where((document_end > 0)[:, None], of_token, 0), axis=(0, 2))


_QUERY: Axes = ("batch", "sequence", "kv_heads", None, None)
_KEY: Axes = ("batch", "sequence", "kv_heads", None)
_BY_HEAD: Axes = ("batch", "kv_heads", "sequence")


def _merge_heads(query: jax.Array) -> jax.Array:
    """``[b, t, k, g, h]`` → ``[b, t, n, h]``: on each device's own heads, where nothing divided is merged."""
    b, t, k, g, h = query.shape
    return query.reshape(b, t, k * g, h)
