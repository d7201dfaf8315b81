"""Grouped-query attention of one layer, and the function that reads a whole batch with masks.

``Attention`` makes queries, keys and values and maps the heads' results back to the residual stream. In between, an
``AttentionFunction`` reads keys: ``MaskedAttention`` in training and masked evaluation, ``BufferAttention`` of
``natsjax.decode.step`` in decoding.

Nothing is mutated in a call: noise keys go in, roles and their lifetimes come out. Under a mesh (``jax.set_mesh``)
weights are gathered where they are used, and attention runs on each device's heads and rows.

Axis letters as in ``natsjax.model.transformer``.
"""

import functools
import typing
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from natsjax.config import ROLE_LAYER_TYPES, Config, NatsConfig
from natsjax.kv_fraction import roles_at_start
from natsjax.model.gated import gated_attention, gates
from natsjax.model.head_roles import SHIFT, hard_concrete, probability_of_full
from natsjax.model.inputs import Batch
from natsjax.model.layers import (
    RMSNorm,
    gathered,
    matrix_param,
    residual_gain,
    rotary_size,
    rotate,
    scaled_frequencies,
    vector_param,
)
from natsjax.model.roles import (
    TokenRoles,
    choose_roles,
    lifetime_sum,
    lifetimes,
    scorer_bias,
    straight_through,
)
from natsjax.model.selective import least_masked_end, maskable, masks, selection, selective_attention
from natsjax.model.sharding import Axes, compute_sharding, from_first, psum, reshard, sequence_axis, shard_map
from pallas_kernels.nats_attention import (
    GLOBAL,
    LOCAL,
    NO_END,
    SLIDING,
    MaskGradient,
    Sampled,
    Visible,
    interval_attention,
    key_end_from_roles,
    nats_attention,
)

_OUT_OF_REACH = -1e9
"""Logit of a role that a layer does not have."""

ROLES = "nats_roles"
"""Name under which every remat policy saves the sampled roles."""


class Roles(NamedTuple):
    """Roles that a forward pass chose, and their lifetimes.

    Attributes:
      ids: int8 ``[l, b, k, s]``, the role of each token; all GLOBAL in a "dense" or "selective" layer, SLIDING in a
        "sliding" one.
      key_end: int32 ``[l, b, k, s]``, the first query that cannot read each key; 0 where padded.
      lifetime: float32 ``[l, k]``, sum of all lifetimes in key-query pairs, differentiable.
      entropy: float32 ``[l, k]``, sum over tokens of the entropy of the scorer's softmax, without noise or role bias,
        nats.
    """

    ids: jax.Array
    key_end: jax.Array
    lifetime: jax.Array
    entropy: jax.Array


class RoleSampling(NamedTuple):
    """Rule by which one layer's roles are chosen; without any field, by the largest logit.

    Attributes:
      noise_key: key of the Gumbel noise (training).
      bias: float32 ``[r]``, added to the logits (the role bias).
      key_end: int32, broadcast against ``[b, k, s]``: no roles, but these ends, as positions in the key's document
        (``NO_END`` everywhere is full attention); a "sliding" layer's window stays.
      role_ids: int8 ``[b, k, s]`` (for the whole model ``[l, b, k, s]``): these roles, whatever the logits are. With a
        noise key, rivals of learned roles have no use for these and the bias.
      temperature: float32 scalar, of the straight-through softmax; None: ``nats.temperature``.
      noise: float32 scalar, scale of the Gumbel noise; None: 1.
      num_keys: int32 scalar, 1 or more: the most keys that a query of a "selective" layer finds beside its own, of
        those that ``key_end`` leaves; None: all.
    """

    noise_key: jax.Array | None = None
    bias: jax.Array | None = None
    key_end: jax.Array | None = None
    role_ids: jax.Array | None = None
    temperature: jax.Array | None = None
    noise: jax.Array | None = None
    num_keys: jax.Array | None = None

    def perturb(self, logits: jax.Array) -> jax.Array:
        """Adds noise and bias to logits ``[b, k, s, r]``."""
        if self.noise_key is not None:
            # Drawn for the whole batch: every mesh draws the same.
            sharding = compute_sharding(*_BY_HEAD, None)
            noise = jax.random.gumbel(self.noise_key, logits.shape, jnp.float32, out_sharding=sharding)
            logits += noise if self.noise is None else self.noise * noise
        return logits if self.bias is None else logits + self.bias

    def choose(self, logits: jax.Array, is_first: jax.Array) -> jax.Array:
        """Returns int8 ``[b, k, s]``: the given roles, or those of ``choose_roles``."""
        ids = choose_roles(logits, is_first)
        return ids if self.role_ids is None else self.role_ids.astype(jnp.int8)


class Scorer(nnx.Module):
    """Linear map to the logits of the roles, per token and KV head (docs/method.md 2).

    Of "head_roles" layers it is a constant, and in them and in "gated" ones LOCAL is out of reach.

    Its weights start at zero and its biases at the logarithm of ``kv_fraction.roles_at_start``: at step 0 the sampled
    roles have just those fractions in every head (with ``nats.noise = 1``).
    """

    def __init__(self, config: Config):
        model = config.model
        self.kind = model.role_layer_type
        shape = (model.embed_dim, model.num_kv_heads, config.nats.num_roles)
        if self.kind != "head_roles":
            self.weight = vector_param(jnp.zeros(shape, jnp.float32), ("embed", "kv_heads", None), "scorer")
        bias = scorer_bias(tuple(max(fraction, 1e-6) for fraction in roles_at_start(config)))
        if self.kind == "head_roles":  # so that the fraction of GLOBAL is that of draws above 0
            bias = bias.at[GLOBAL].add(SHIFT)
        self.bias = vector_param(jnp.broadcast_to(bias, shape[1:]), ("kv_heads", None), "scorer")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[b, s, d]`` to float32 ``[b, k, s, r]``."""
        bias = gathered(self.bias, jnp.float32)
        if self.kind == "head_roles":
            shape = (x.shape[0], bias.shape[0], x.shape[1], bias.shape[1])
            logits = jnp.broadcast_to(bias[:, None, :], shape, out_sharding=compute_sharding(*_BY_HEAD, None))
        else:
            logits = bias[:, None, :] + jnp.einsum(
                "bsd,dkr->bksr",
                x.astype(jnp.float32),
                gathered(self.weight, jnp.float32),
                precision=jax.lax.Precision.HIGHEST,  # accelerators would multiply float32 in bfloat16 or TF32
            )
        if self.kind != "nats":
            logits = jnp.where(jnp.arange(logits.shape[-1]) == LOCAL, _OUT_OF_REACH, logits)
        return logits


class AttentionFunction(Protocol):
    """Chooses which keys the queries of a layer read, and reads them."""

    def __call__(
        self, attention: "Attention", x: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Reads keys.

        Args:
          attention: the layer's, for its scorer and config.
          x: ``[b, t, d]``, normalized input of the layer.
          query: ``[b, t, k, g, h]``.
          key, value: ``[b, t, k, h]``.

        Returns:
          ``(out, result)``: ``[b, t, k, g, h]``, and whatever else comes of it.
        """
        ...


_SHIFTED = 0.95
"""Fraction of the token before in the keys of every other KV head, at step 0 (``model.key_shift``)."""


class Attention(nnx.Module):
    """Grouped-query attention; weights keep their head axes."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        d, k, h = model.embed_dim, model.num_kv_heads, model.head_dim
        g = model.num_heads // k
        self.config = config

        def matrix(shape, axes, fan_in, **options):
            return matrix_param(rngs.params(), shape, axes, fan_in, "attention", dtype=model.param_dtype, **options)

        self.query = matrix((d, k, g, h), ("embed", "kv_heads", None, None), d)
        self.key = matrix((d, k, h), ("embed", "kv_heads", None), d)
        self.value = matrix((d, k, h), ("embed", "kv_heads", None), d)
        self.output = matrix((k, g, h, d), ("kv_heads", None, None, "embed"), k * g * h, gain=residual_gain(model))
        if model.qkv_bias:
            # At zero the query's and the key's bias would be a saddle point of their product.
            self.query_bias = matrix((k, g, h), ("kv_heads", None, None), 1, weight_decay=False)
            self.key_bias = matrix((k, h), ("kv_heads", None), 1, weight_decay=False)
            value_bias = jnp.zeros((k, h), model.param_dtype)
            self.value_bias = vector_param(value_bias, ("kv_heads", None), "attention", is_wide=False)
        if model.attention_gate:
            self.gate = matrix((d, k, g, h), ("embed", "kv_heads", None, None), d)
        if model.attention_sinks:
            # Far below the logits a sink would have no weight, and with it no gradient. Logits start around 0.
            self.sink = vector_param(jnp.zeros((k, g), jnp.float32), ("kv_heads", None), "attention")
        if model.key_shift:
            fraction = jnp.where(jnp.arange(k) % 2 == 0, _SHIFTED, 1 - _SHIFTED) if k > 1 else jnp.full(1, 0.5)
            fraction = jnp.broadcast_to(fraction[:, None], (k, h)).astype(jnp.float32)
            self.key_shift = vector_param(fraction, ("kv_heads", None), "attention")
        if model.qk_norm:
            self.query_norm = RMSNorm(h, model.norm_eps)
            self.key_norm = RMSNorm(h, model.norm_eps)
        if model.has_roles:  # in all layers, which are stacked; those of other kinds have no use for theirs
            self.scorer = Scorer(config)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: AttentionFunction,
        *,
        before: jax.Array | None = None,
        is_rotary: bool | jax.Array = True,
    ) -> tuple[jax.Array, Any]:
        """Maps ``[b, t, d]`` to ``[b, t, d]``.

        Args:
          x: normalized input of the layer.
          positions: int32 ``[b, t]``, distance to the start of the document.
          attend: reads the keys.
          before: ``[b, k, h]``, with ``model.key_shift`` what ``projected_key`` gives of the token before the first
            one; None where every sequence begins here.
          is_rotary: whether queries and keys get the rotary embedding; bool, or a bool scalar.

        Returns:
          ``(out, result)``, the latter from ``attend``.
        """
        out, result = attend(self, x, *self.qkv_proj(x, positions, before=before, is_rotary=is_rotary))
        if self.config.model.attention_gate:
            out *= jax.nn.sigmoid(jnp.einsum("btd,dkgh->btkgh", x, self._cast(self.gate)))
        return self.out_proj(out), result

    @property
    def sink_logits(self) -> jax.Array | None:
        """The attention sinks, float32 ``[k, g]``; None without any."""
        return gathered(self.sink, jnp.float32) if self.config.model.attention_sinks else None

    def qkv_proj(
        self,
        x: jax.Array,
        positions: jax.Array,
        *,
        before: jax.Array | None = None,
        is_rotary: bool | jax.Array = True,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Projects ``x [b, t, d]`` to queries ``[b, t, k, g, h]``, keys and values ``[b, t, k, h]``, with positions."""
        model = self.config.model
        query = jnp.einsum("btd,dkgh->btkgh", x, self._cast(self.query))
        key = self.projected_key(x)
        value = jnp.einsum("bsd,dkh->bskh", x, self._cast(self.value))
        if model.qkv_bias:
            query, value = query + self._cast(self.query_bias), value + self._cast(self.value_bias)
        if model.key_shift:
            key = self._shifted(key, positions, before)
        if model.qk_norm:  # each head's own norm: of what the scale below multiplies, nothing can grow
            query, key = self.query_norm(query), self.key_norm(key)
        if is_rotary is False:
            return query, key, value
        scaled, size = functools.partial(scaled_frequencies, model=model), rotary_size(model)
        turned = [rotate(y, positions, model.rope_theta, scaled=scaled, size=size) for y in (query, key)]
        if is_rotary is not True:
            turned = [jnp.where(is_rotary, y, plain) for y, plain in zip(turned, (query, key), strict=True)]
        return turned[0], turned[1], value

    def projected_key(self, x: jax.Array) -> jax.Array:
        """Projects ``x [b, s, d]`` to keys ``[b, s, k, h]``, before shift, norm and rotary embedding."""
        key = jnp.einsum("bsd,dkh->bskh", x, self._cast(self.key))
        return key + self._cast(self.key_bias) if self.config.model.qkv_bias else key

    def _shifted(self, key: jax.Array, positions: jax.Array, before: jax.Array | None) -> jax.Array:
        """Mixes into each of ``key [b, s, k, h]`` that of the token before, 0 before a document's first one."""

        def behind(key, before):
            first, axis = jnp.zeros_like(key[:, :1]) if before is None else before[:, None], sequence_axis()
            if axis is not None:  # a device's first key comes behind the last one of the device before
                ring = [(number, number + 1) for number in range(jax.lax.axis_size(axis) - 1)]
                first = jax.lax.ppermute(key[:, -1:], axis, ring)
            return jnp.concatenate([first, key[:, :-1]], axis=1)

        previous = shard_map(behind, (_KEY, ("batch", "kv_heads", None)), _KEY)(key, before)
        previous = jnp.where((positions > 0)[..., None, None], previous, 0)
        return key + self._cast(self.key_shift) * (previous - key)

    def out_proj(self, out: jax.Array) -> jax.Array:
        """Projects the heads' results ``[b, t, k, g, h]`` to ``[b, t, d]``."""
        out_sharding = compute_sharding("batch", "sequence", None)
        return jnp.einsum("btkgh,kghd->btd", out, self._cast(self.output), out_sharding=out_sharding)

    def _cast(self, parameter: nnx.Param) -> jax.Array:
        return gathered(parameter, self.config.model.dtype)


class MaskedAttention(NamedTuple):
    """An ``AttentionFunction`` over a whole batch: a mask stands for the keys that are gone.

    Its result is ``Roles`` of the layer, without the axis ``l``.

    Attributes:
      batch: the documents.
      sampling: how roles are chosen.
      kind: of the layer, one of ``config.LAYER_TYPES``.
    """

    batch: Batch
    sampling: RoleSampling
    kind: str

    def __call__(self, attention, x, query, key, value) -> tuple[jax.Array, Roles]:
        """See ``AttentionFunction``."""
        if self.kind == "selective":
            return self._selectively(attention, query, key, value)
        if self.kind not in ROLE_LAYER_TYPES or self.sampling.key_end is not None:
            return self._by_interval(attention, query, key, value)
        if self.kind != "nats" and self.sampling.noise_key is not None:
            return self._softly(attention, x, query, key, value)
        return self._by_roles(attention, x, query, key, value)

    def _by_roles(self, attention, x, query, key, value):
        nats, batch, sampling = attention.config.nats, self.batch, self.sampling
        logits = attention.scorer(x)
        entropy = _entropy(jax.lax.stop_gradient(logits), batch.is_token)
        logits = sampling.perturb(logits)
        ids = checkpoint_name(sampling.choose(logits, batch.is_first), ROLES)
        one_hot = straight_through(logits, ids, batch.is_first, self._temperature(nats))
        key_end, lifetime = self._lifetimes(nats, ids, one_hot)

        def attend(query, key, value, one_hot, document_end, sample_key, sink):
            found = nats_attention(
                _merge_heads(query),
                key,
                value,
                one_hot,
                window=nats.sliding_windows,
                document_end=document_end,
                mask_gradient=_mask_gradient(nats, trained=sample_key is not None),
                sample_key=sample_key,
                return_lse=sink is not None,
                axis_name=sequence_axis(),
            )
            return below_sink(found, sink).reshape(query.shape)

        axes = (_QUERY, _KEY, _KEY, (*_BY_HEAD, None), ("batch", "sequence"), (), SINK_AXES)
        sample_key = None if sampling.noise_key is None else jax.random.fold_in(sampling.noise_key, 1)
        sink = attention.sink_logits
        out = shard_map(attend, axes, _QUERY)(query, key, value, one_hot, batch.document_end, sample_key, sink)
        return out, Roles(ids, key_end, lifetime, entropy)

    def _temperature(self, nats: NatsConfig) -> float | jax.Array:
        return nats.temperature if self.sampling.temperature is None else self.sampling.temperature

    def _lifetimes(self, nats: NatsConfig, ids, one_hot) -> tuple[jax.Array, jax.Array]:
        """Returns ``Roles.key_end`` and ``Roles.lifetime`` of a layer, read off whole sequences of O(L) integers."""

        def local(ids, one_hot, document_end):
            key_end = key_end_from_roles(ids, window=nats.sliding_windows, document_end=document_end)
            roles = TokenRoles(ids, one_hot, key_end)
            lifetime = lifetime_sum(roles, document_end, nats.sliding_windows, nats.kv_penalty_gradient)
            return key_end, psum(lifetime, "batch")

        whole: Axes = ("batch", "kv_heads", None)
        mapped = shard_map(local, (whole, (*whole, None), ("batch", None)), [whole, ("kv_heads",)])
        key_end, lifetime = mapped(ids, one_hot, self.batch.document_end)
        return reshard(key_end, *_BY_HEAD), lifetime

    def _softly(self, attention, x, query, key, value):
        """Trains a rival of learned roles; the roles that it would be served with come along."""
        nats, batch, noise_key = attention.config.nats, self.batch, typing.cast(jax.Array, self.sampling.noise_key)
        logits, temperature, window = attention.scorer(x), self._temperature(nats), nats.sliding_windows[0]
        ids = checkpoint_name(choose_roles(logits, batch.is_first), ROLES)
        key_end, lifetime = self._lifetimes(nats, ids, straight_through(logits, ids, batch.is_first, temperature))
        if self.kind == "gated":

            def attend(query, key, value, gate, document_end, sink):
                return gated_attention(query, key, value, gate, window=window, document_end=document_end, sink=sink)

            axes = (_QUERY, _KEY, _KEY, _BY_HEAD, ("batch", "sequence"), SINK_AXES)
            gate = gates(logits, batch.is_first, temperature)
            out = shard_map(attend, axes, _QUERY)(query, key, value, gate, batch.document_end, attention.sink_logits)
        else:
            bias = gathered(attention.scorer.bias, jnp.float32)
            log_alpha = bias[:, GLOBAL] - bias[:, SLIDING]
            far, index = batch.document_end, jnp.arange(key.shape[1], dtype=jnp.int32)
            # First tokens of documents are GLOBAL whatever the head's role is.
            near = jnp.where(batch.is_first, far, jnp.minimum(far, index + min(window, key.shape[1]) + 1))
            read = [self._read(attention, query, key, value, end[:, None, :]) for end in (far, near)]
            full = hard_concrete(log_alpha, noise_key)[:, None, None]
            out = (full * read[0][0] + (1 - full) * read[1][0]).astype(query.dtype)
            probability = probability_of_full(log_alpha)
            lifetime = probability * read[0][2] + (1 - probability) * read[1][2]
        return out, Roles(ids, key_end, lifetime, _entropy(jax.lax.stop_gradient(logits), batch.is_token))

    def _by_interval(self, attention, query, key, value):
        s = key.shape[1]
        index = jnp.arange(s, dtype=jnp.int32)
        end, role = self._given_end(), GLOBAL
        if self.kind == "sliding":  # whatever else is asked for: such a layer has never read more
            role = SLIDING
            windows = np.minimum(attention.config.model.head_windows, s).astype(np.int32)
            end = jnp.minimum(end, index + windows[:, None] + 1)
        out, end, lifetime = self._read(attention, query, key, value, end)
        return out, Roles(jnp.full_like(end, role, jnp.int8), end, lifetime, jnp.zeros_like(lifetime))

    def _given_end(self):
        """Returns the ends that ``sampling.key_end`` gives, and documents: int32 ``[b, 1 or k, s]``."""
        end = self.batch.document_end[:, None, :]
        if self.sampling.key_end is None:
            return end
        start = (jnp.arange(end.shape[-1], dtype=jnp.int32) - self.batch.positions)[:, None, :]
        given = self.sampling.key_end
        return jnp.minimum(end, jnp.where(given >= NO_END - start, NO_END, given + start))

    def _selectively(self, attention, query, key, value):
        b, s, k, _ = key.shape
        batch, given = self.batch, self._given_end()
        if given.shape[1] > 1:  # a key that the masking head has lost could not be masked any more
            raise ValueError('"selective" layers keep the same keys in all heads.')

        def attend(query, key, value, end, positions, is_first, num_keys, sink):
            index = jnp.arange(s, dtype=jnp.int32)
            causal, index = index[None, :] <= index[:, None], index[:, None]
            # The layer's first head is the first device's; the others need its query and key to know the masks.
            first_query, first_key = (from_first(x, "kv_heads") for x in (query[:, :, 0, 0], key[:, :, 0]))
            is_read = causal & (index < end[:, None, :])
            masked, after = masks(selection(first_query, first_key, maskable(positions, positions, is_read)))
            if num_keys is not None:
                end = least_masked_end(after, end, is_first, num_keys)
                is_read = causal & (index < end[:, None, :])
            return selective_attention(query, key, value, masked, is_read[:, None], sink), end

        tokens: Axes = ("batch", None)
        heads: Axes = (*tokens, "kv_heads", None)
        axes = ((*heads, None), heads, heads, tokens, tokens, tokens, (), SINK_AXES)
        arrays = (query, key, value, given[:, 0], batch.positions, batch.is_first)
        mapped = shard_map(attend, axes, [(*heads, None), tokens])
        out, end = mapped(*arrays, self.sampling.num_keys, attention.sink_logits)
        out = reshard(out, *_QUERY)
        end = jnp.broadcast_to(end[:, None, :], (b, k, s), out_sharding=compute_sharding(*_BY_HEAD))
        lifetime = self._lifetime(end)
        return out, Roles(jnp.full_like(end, GLOBAL, jnp.int8), end, lifetime, jnp.zeros_like(lifetime))

    def _lifetime(self, end):
        """Sums the lifetimes of keys ``[b, k, s]``: float32 ``[k]``."""
        return jnp.sum(lifetimes(end, self.batch.document_end), axis=(0, 2), dtype=jnp.float32)

    def _read(self, attention, query, key, value, end):
        """Reads keys up to given ends, which ``[b, 1 or k, s]`` may be shared by heads.

        Returns:
          ``(out [b, t, k, g, h], ends int32 [b, k, s], lifetimes float32 [k])``.
        """
        b, s, k, _ = key.shape
        end = jnp.broadcast_to(end, (b, k, s), out_sharding=compute_sharding(*_BY_HEAD)).astype(jnp.int32)

        def attend(query, key, value, end, sink):
            heads, with_lse = _merge_heads(query), sink is not None
            found = interval_attention(heads, key, value, end, return_lse=with_lse, axis_name=sequence_axis())
            return below_sink(found, sink).reshape(query.shape)

        axes = (_QUERY, _KEY, _KEY, _BY_HEAD, SINK_AXES)
        out = shard_map(attend, axes, _QUERY)(query, key, value, end, attention.sink_logits)
        return out, end, self._lifetime(end)


def below_sink(found: jax.Array | tuple[jax.Array, jax.Array], sink: jax.Array | None) -> jax.Array:
    """Adds sinks to the denominators of softmaxes that are done, by their log-sum-exps.

    Args:
      found: ``out [b, t, n, h]``, or with sinks ``(out, lse float32 [b, t, n])``.
      sink: float32 ``[k, g]``, or None.

    Returns:
      ``[b, t, n, h]`` in the dtype of ``out``.
    """
    if sink is None:
        return typing.cast(jax.Array, found)
    out, lse = found
    return (out * jax.nn.sigmoid(lse - sink.reshape(-1))[..., None]).astype(out.dtype)


def _mask_gradient(nats: NatsConfig, trained: bool) -> MaskGradient | str:
    if nats.mask_gradient != "sampled":
        return nats.mask_gradient
    # Without noise nothing is trained and no gradient asked for: then there is no key to draw with either.
    return Sampled(nats.sampled_fraction) if trained else Visible()


def _entropy(logits: jax.Array, is_token: jax.Array) -> jax.Array:
    """Sums the entropy over tokens that are not padding: float32 ``[k]`` from ``[b, k, s, r]`` and ``[b, s]``."""
    log_fraction = jax.nn.log_softmax(logits, axis=-1)
    of_token = -jnp.sum(jnp.exp(log_fraction) * log_fraction, axis=-1)
    return jnp.sum(jnp.where(is_token[:, None], of_token, 0), axis=(0, 2))


_QUERY: Axes = ("batch", "sequence", "kv_heads", None, None)
_KEY: Axes = ("batch", "sequence", "kv_heads", None)
_BY_HEAD: Axes = ("batch", "kv_heads", "sequence")
SINK_AXES: Axes = ("kv_heads", None)


def _merge_heads(query: jax.Array) -> jax.Array:
    """Reshapes ``[b, t, k, g, h]`` to ``[b, t, n, h]``: on each device's own heads, where nothing divided is merged."""
    b, t, k, g, h = query.shape
    return query.reshape(b, t, k * g, h)
