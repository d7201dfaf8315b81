"""The transformer: decoder-only, pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One ``lax.scan`` runs over the layers, whose parameters carry a leading axis ``l``. Nothing is mutated in a call:
noise keys go in, roles and what they cost come out.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``n = k·g``, ``h`` head
dim, ``d`` width, ``f`` MLP width, ``v`` vocabulary, ``l`` layer.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from natsjax import token_types
from natsjax.config import Config, ModelConfig, NatsConfig
from pallas_kernels.nats_attention import MaskGradient, Sampled, Visible, interval_attention, nats_attention

ROLES = "nats_roles"
"""Name under which every remat policy saves the sampled roles."""


class Roles(NamedTuple):
    """What a forward pass chose and what it costs.

    Attributes:
      ids: int8 ``[l, b, k, s]``, the role of each token.
      lifetime: float32 ``[l, k]``, sum of all lifetimes in key-query pairs, differentiable.
    """

    ids: jax.Array
    lifetime: jax.Array


class Inputs(NamedTuple):
    """A batch of packed documents, all int32 ``[b, t]`` (``natsjax.data.packing`` has the details).

    Attributes:
      tokens: ids.
      positions: distance to the start of the document piece.
      document_end: index at which the piece ends, exclusive; 0 marks padding.
    """

    tokens: jax.Array
    positions: jax.Array
    document_end: jax.Array


def _matrix(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, *, gain: float = 1.0, weight_decay: bool = True
) -> nnx.Param:
    """A weight of standard deviation ``gain / sqrt(fan_in)``; the optimizer reads whether weight decay applies."""
    value = gain * fan_in**-0.5 * jax.random.normal(key, shape, jnp.float32)
    return nnx.Param(value, weight_decay=weight_decay)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, in float32."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), weight_decay=False)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[…, d]`` → ``[…, d]`` in the dtype of ``x``."""
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...]).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary embedding: the pair ``(x[i], x[i + h/2])`` turns by ``position · base^(-2i/h)``.

    Args:
      x: ``[b, t, …, h]``.
      positions: int32 ``[b, t]``.
      base: of the wavelengths.

    Source: arXiv:2104.09864.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    angle = angle.reshape(*positions.shape, *[1] * (x.ndim - 3), half)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class Scorer(nnx.Module):
    """Three logits per token and KV head, one for each role (METHOD.md 2).

    Its weights start at zero and its biases at the logarithm of ``nats.initial_roles``: at step 0 the sampled roles
    have just those fractions in every head.
    """

    def __init__(self, model: ModelConfig, nats: NatsConfig):
        shape = (model.width, model.num_kv_heads, token_types.NUM_ROLES)
        self.weight = nnx.Param(jnp.zeros(shape, jnp.float32), weight_decay=False)
        bias = token_types.scorer_bias(nats.initial_roles)
        self.bias = nnx.Param(jnp.broadcast_to(bias, shape[1:]), weight_decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[b, s, d]`` → float32 ``[b, k, s, 3]``."""
        logits = jnp.einsum(
            "bsd,dkr->bksr",
            x.astype(jnp.float32),
            self.weight[...],
            precision=jax.lax.Precision.HIGHEST,  # accelerators would multiply float32 in bfloat16 or TF32
        )
        return logits + self.bias[...][:, None, :]


class Attention(nnx.Module):
    """Grouped-query attention; weights keep their head axes."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        d, k, h = model.width, model.num_kv_heads, model.head_dim
        g = model.num_heads // k
        self.config = config
        self.query = _matrix(rngs.params(), (d, k, g, h), d)
        self.key = _matrix(rngs.params(), (d, k, h), d)
        self.value = _matrix(rngs.params(), (d, k, h), d)
        self.output = _matrix(rngs.params(), (k, g, h, d), k * g * h, gain=_residual_gain(model))
        if model.qkv_bias:
            # At zero the query's and the key's bias would be a saddle point of their product.
            self.query_bias = _matrix(rngs.params(), (k, g, h), 1, weight_decay=False)
            self.key_bias = _matrix(rngs.params(), (k, h), 1, weight_decay=False)
            self.value_bias = nnx.Param(jnp.zeros((k, h), jnp.float32), weight_decay=False)
        if model.attention == "nats":
            self.scorer = Scorer(model, config.nats)

    def __call__(self, x, inputs: Inputs, choice: "RoleChoice") -> tuple[jax.Array, Roles]:
        """``x [b, t, d]`` → ``(out [b, t, d], roles)`` of this layer (without the axis ``l``)."""
        model = self.config.model
        b, t, _ = x.shape
        query = jnp.einsum("btd,dkgh->btkgh", x, self._cast(self.query))
        key = jnp.einsum("bsd,dkh->bskh", x, self._cast(self.key))
        value = jnp.einsum("bsd,dkh->bskh", x, self._cast(self.value))
        if model.qkv_bias:
            query, key, value = (
                y + self._cast(bias)
                for y, bias in ((query, self.query_bias), (key, self.key_bias), (value, self.value_bias))
            )
        query = rotate(query, inputs.positions, model.rope_base).reshape(b, t, model.num_heads, model.head_dim)
        key = rotate(key, inputs.positions, model.rope_base)
        if model.attention == "nats" and choice.key_end is None:
            out, roles = self._attend_by_roles(query, key, value, x, inputs, choice)
        else:
            out, roles = self._attend_by_interval(query, key, value, inputs, choice.key_end)
        out = out.reshape(b, t, model.num_kv_heads, -1, model.head_dim)
        return jnp.einsum("btkgh,kghd->btd", out, self._cast(self.output)), roles

    def _attend_by_roles(self, query, key, value, x, inputs, choice):
        nats = self.config.nats
        logits = self.scorer(x)
        if choice.noise_key is not None:
            logits += jax.random.gumbel(choice.noise_key, logits.shape, jnp.float32)
        if choice.bias is not None:
            logits += choice.bias
        first = token_types.first_of_document(inputs.positions)
        ids = checkpoint_name(token_types.choose_roles(logits, first), ROLES)
        roles = token_types.straight_through(logits, ids, first, nats.temperature)
        out = nats_attention(
            query,
            key,
            value,
            roles,
            window=nats.window,
            document_end=inputs.document_end,
            mask_gradient=self._mask_gradient(trained=choice.noise_key is not None),
            sample_key=None if choice.noise_key is None else jax.random.fold_in(choice.noise_key, 1),
        )
        lifetime = token_types.lifetime_sum(roles, inputs.document_end, nats.window, nats.price_gradient)
        return out, Roles(ids, lifetime)

    def _mask_gradient(self, trained: bool) -> MaskGradient | str:
        nats = self.config.nats
        if nats.mask_gradient != "sampled":
            return nats.mask_gradient
        # Without noise nothing is trained and no gradient asked for: then there is no key to draw with either.
        return Sampled(nats.sampled_fraction) if trained else Visible()

    def _attend_by_interval(self, query, key, value, inputs, key_end):
        b, s, k, _ = key.shape
        end = inputs.document_end[:, None, :] if key_end is None else key_end
        end = jnp.broadcast_to(jnp.minimum(end, inputs.document_end[:, None, :]), (b, k, s)).astype(jnp.int32)
        lifetime = jnp.sum(token_types.lifetimes(end, inputs.document_end), axis=(0, 2), dtype=jnp.float32)
        ids = jnp.full((b, k, s), token_types.GLOBAL, jnp.int8)
        return interval_attention(query, key, value, end), Roles(ids, lifetime)

    def _cast(self, parameter: nnx.Param) -> jax.Array:
        return parameter[...].astype(self.config.model.dtype)


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        d, f = model.width, model.mlp_width
        self.gate = _matrix(rngs.params(), (d, f), d)
        self.up = _matrix(rngs.params(), (d, f), d)
        self.down = _matrix(rngs.params(), (f, d), f, gain=_residual_gain(model))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[b, t, d]`` → ``[b, t, d]``."""
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _residual_gain(model: ModelConfig) -> float:
    """Keeps the variance of the residual stream of order 1 at initialisation however many branches add to it."""
    return (2 * model.num_layers) ** -0.5


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.attention_norm = RMSNorm(model.width, model.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(model.width, model.norm_epsilon)
        self.mlp = MLP(model, rngs)

    def __call__(self, x, inputs: Inputs, choice: "RoleChoice") -> tuple[jax.Array, Roles]:
        """``[b, t, d]`` → ``([b, t, d], roles)``."""
        out, roles = self.attention(self.attention_norm(x), inputs, choice)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), roles


class RoleChoice(NamedTuple):
    """How one layer's roles are chosen; without any field, by the largest logit.

    Attributes:
      noise_key: Gumbel noise is drawn with it (training).
      bias: float32 ``[3]``, added to the logits (the dial).
      key_end: int32, broadcast against ``[b, k, s]``: no roles, these intervals (full attention is ``NO_END``).
    """

    noise_key: jax.Array | None = None
    bias: jax.Array | None = None
    key_end: jax.Array | None = None


class Transformer(nnx.Module):
    """The language model.

    Args:
      config: of the run (``model`` and ``nats`` are read).
      vocab_size: v.
      rngs: the stream ``params``.
    """

    def __init__(self, config: Config, vocab_size: int, rngs: nnx.Rngs):
        model = config.model
        self.config = config
        # Stored in the scale of an output layer, so that it can be tied; as input it is multiplied by sqrt(d) to
        # unit size, which the blocks' outputs have too.
        self.embedding = _matrix(rngs.params(), (vocab_size, model.width), model.width, weight_decay=False)
        if not model.tie_embeddings:
            self.unembedding = _matrix(rngs.params(), (vocab_size, model.width), model.width, weight_decay=False)
        structure = nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
        keys = jax.random.split(rngs.params(), model.num_layers)
        self.blocks = nnx.merge(structure, jax.vmap(lambda key: nnx.state(Block(config, nnx.Rngs(key))))(keys))
        self.final_norm = RMSNorm(model.width, model.norm_epsilon)

    def __call__(self, inputs: Inputs, choice: RoleChoice | None = None) -> tuple[jax.Array, Roles]:
        """Logits for the next token.

        Args:
          inputs: ``Inputs`` of ``[b, t]``.
          choice: how roles are chosen; one noise key serves all layers (it is split).

        Returns:
          ``(logits, roles)``: float32 ``[b, t, v]`` and ``Roles``.
        """
        choice = RoleChoice() if choice is None else choice
        model = self.config.model
        structure, layers = nnx.split(self.blocks)
        noise_keys = None if choice.noise_key is None else jax.random.split(choice.noise_key, model.num_layers)

        def layer(x, scanned):
            state, noise_key = scanned
            return nnx.merge(structure, state)(x, inputs, choice._replace(noise_key=noise_key))

        x = self.embedding[...].astype(model.dtype)[inputs.tokens] * jnp.asarray(math.sqrt(model.width), model.dtype)
        x, roles = jax.lax.scan(_remat(layer, model.remat), x, (layers, noise_keys))
        x = self.final_norm(x)
        output = (self.embedding if model.tie_embeddings else self.unembedding)[...].astype(x.dtype)
        return jnp.einsum("btd,vd->btv", x, output, preferred_element_type=jnp.float32), roles


def _remat(function, policy: str):
    """The layer under a named rematerialisation policy; every one saves the roles."""
    if policy == "none":
        return function
    saved = jax.checkpoint_policies.save_only_these_names(ROLES)
    if policy == "dots":
        matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        saved = jax.checkpoint_policies.save_from_both_policies(matmuls, saved)
    return jax.checkpoint(function, policy=saved, prevent_cse=False)


def init_parameters(config: Config, vocab_size: int, key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    """A fresh model, taken apart.

    Returns:
      ``(structure, parameters)``: what ``nnx.merge`` puts together; the parameters are nested dicts of float32
      arrays.
    """
    structure, state = nnx.split(Transformer(config, vocab_size, nnx.Rngs(params=key)))
    return structure, nnx.to_pure_dict(state)


def model_structure(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, Any, Any]:
    """The model without values: nothing is computed.

    Returns:
      ``(structure, parameters, decayed)``: the second as ``jax.ShapeDtypeStruct``; ``decayed`` has the same nesting
      and says of each whether weight decay applies to it.
    """
    abstract = nnx.eval_shape(lambda: Transformer(config, vocab_size, nnx.Rngs(0)))
    structure, state = nnx.split(abstract)
    decayed = jax.tree.map(
        lambda parameter: parameter.get_metadata("weight_decay"), state, is_leaf=lambda x: isinstance(x, nnx.Param)
    )
    return structure, nnx.to_pure_dict(state), nnx.to_pure_dict(decayed)
