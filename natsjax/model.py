"""The transformer: decoder-only, pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One ``lax.scan`` runs over the layers, whose parameters carry a leading axis ``l``. Nothing is mutated in a call:
noise keys go in, roles and what they cost come out. Under a mesh (``jax.set_mesh``) arrays are divided as
``natsjax.partition`` says: weights are gathered where they are used, attention runs on each device's heads and rows.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``n = k·g``, ``h`` head
dim, ``d`` width, ``f`` MLP width, ``v`` vocabulary, ``l`` layer.
"""

import math
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from natsjax import partition, token_types
from natsjax.config import Config, ModelConfig, NatsConfig
from natsjax.layers import MLP, RMSNorm, matrix, residual_gain, rotate, vector, weight
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


class Scorer(nnx.Module):
    """Three logits per token and KV head, one for each role (METHOD.md 2).

    Its weights start at zero and its biases at the logarithm of ``nats.initial_roles``: at step 0 the sampled roles
    have just those fractions in every head.
    """

    def __init__(self, model: ModelConfig, nats: NatsConfig):
        shape = (model.width, model.num_kv_heads, token_types.NUM_ROLES)
        self.weight = vector(jnp.zeros(shape, jnp.float32), ("width", "kv_heads", None))
        bias = token_types.scorer_bias(nats.initial_roles)
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
        d, k, h = model.width, model.num_kv_heads, model.head_dim
        g = model.num_heads // k
        self.config = config
        self.query = matrix(rngs.params(), (d, k, g, h), ("width", "kv_heads", None, None), d)
        self.key = matrix(rngs.params(), (d, k, h), ("width", "kv_heads", None), d)
        self.value = matrix(rngs.params(), (d, k, h), ("width", "kv_heads", None), d)
        output_axes = ("kv_heads", None, None, "width")
        self.output = matrix(rngs.params(), (k, g, h, d), output_axes, k * g * h, gain=residual_gain(model))
        if model.qkv_bias:
            # At zero the query's and the key's bias would be a saddle point of their product.
            query_axes, key_axes = ("kv_heads", None, None), ("kv_heads", None)
            self.query_bias = matrix(rngs.params(), (k, g, h), query_axes, 1, weight_decay=False)
            self.key_bias = matrix(rngs.params(), (k, h), key_axes, 1, weight_decay=False)
            self.value_bias = vector(jnp.zeros((k, h), jnp.float32), key_axes)
        if model.attention == "nats":
            self.scorer = Scorer(model, config.nats)

    def __call__(self, x, inputs: Inputs, choice: "RoleChoice") -> tuple[jax.Array, Roles]:
        """``x [b, t, d]`` → ``(out [b, t, d], roles)`` of this layer (without the axis ``l``)."""
        query, key, value = self.project(x, inputs.positions)
        if self.config.model.attention == "nats" and choice.key_end is None:
            out, roles = self._attend_by_roles(query, key, value, x, inputs, choice)
        else:
            out, roles = self._attend_by_interval(query, key, value, inputs, choice.key_end)
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
        return rotate(query, positions, model.rope_base), rotate(key, positions, model.rope_base), value

    def merge(self, out: jax.Array) -> jax.Array:
        """What the heads read, ``[b, t, k, g, h]`` → ``[b, t, d]``."""
        out_sharding = partition.compute_sharding("batch", "sequence", None)
        return jnp.einsum("btkgh,kghd->btd", out, self._cast(self.output), out_sharding=out_sharding)

    def choose_roles(self, logits: jax.Array, first: jax.Array, choice: "RoleChoice") -> jax.Array:
        """int8 ``[b, k, s]``: the roles that are given, or those of the largest logit, GLOBAL where ``first``."""
        ids = token_types.choose_roles(logits, first)
        return ids if choice.role_ids is None else choice.role_ids.astype(jnp.int8)

    def _attend_by_roles(self, query, key, value, x, inputs, choice):
        nats = self.config.nats
        logits = self.scorer(x)
        if choice.noise_key is not None:
            # Drawn for the whole batch: every mesh draws the same.
            sharding = partition.compute_sharding(*_BY_HEAD, None)
            logits += jax.random.gumbel(choice.noise_key, logits.shape, jnp.float32, out_sharding=sharding)
        if choice.bias is not None:
            logits += choice.bias
        first = token_types.first_of_document(inputs.positions)
        ids = checkpoint_name(self.choose_roles(logits, first, choice), ROLES)
        roles = token_types.straight_through(logits, ids, first, nats.temperature)

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
                axis_name=partition.sequence_axis(),
            ).reshape(query.shape)

        def lifetime_sum(roles, document_end):
            lifetime = token_types.lifetime_sum(roles, document_end, nats.window, nats.price_gradient)
            return partition.psum(lifetime, "batch")

        axes = (_QUERY, _KEY, _KEY, (*_BY_HEAD, None), ("batch", "sequence"), ())
        out = partition.shard_map(attend, axes, _QUERY)(
            query,
            key,
            value,
            roles,
            inputs.document_end,
            None if choice.noise_key is None else jax.random.fold_in(choice.noise_key, 1),
        )
        # Lifetimes are read off the whole sequence, as O(L) integers.
        whole = (("batch", "kv_heads", None, None), ("batch", None))
        lifetime = partition.shard_map(lifetime_sum, whole, ("kv_heads",))(roles, inputs.document_end)
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
        end = jnp.minimum(end, inputs.document_end[:, None, :])
        end = jnp.broadcast_to(end, (b, k, s), out_sharding=partition.compute_sharding(*_BY_HEAD)).astype(jnp.int32)

        def attend(query, key, value, end):
            heads = _merge_heads(query)
            out = interval_attention(heads, key, value, end, axis_name=partition.sequence_axis())
            return typing.cast(jax.Array, out).reshape(query.shape)

        out = partition.shard_map(attend, (_QUERY, _KEY, _KEY, _BY_HEAD), _QUERY)(query, key, value, end)
        lifetime = jnp.sum(token_types.lifetimes(end, inputs.document_end), axis=(0, 2), dtype=jnp.float32)
        return out, Roles(jnp.full_like(end, token_types.GLOBAL, jnp.int8), lifetime)

    def _cast(self, parameter: nnx.Param) -> jax.Array:
        return weight(parameter, self.config.model.dtype)


_QUERY: partition.Axes = ("batch", "sequence", "kv_heads", None, None)
_KEY: partition.Axes = ("batch", "sequence", "kv_heads", None)
_BY_HEAD: partition.Axes = ("batch", "kv_heads", "sequence")


def _merge_heads(query: jax.Array) -> jax.Array:
    """``[b, t, k, g, h]`` → ``[b, t, n, h]``: on each device's own heads, where nothing divided is merged."""
    b, t, k, g, h = query.shape
    return query.reshape(b, t, k * g, h)


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
      role_ids: int8 ``[b, k, s]`` (for the whole model ``[l, b, k, s]``): these roles, whatever the logits say.
    """

    noise_key: jax.Array | None = None
    bias: jax.Array | None = None
    key_end: jax.Array | None = None
    role_ids: jax.Array | None = None


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
        shape, axes = (vocab_size, model.width), ("vocab", "width")
        self.embedding = matrix(rngs.params(), shape, axes, model.width, weight_decay=False)
        if not model.tie_embeddings:
            self.unembedding = matrix(rngs.params(), shape, axes, model.width, weight_decay=False)
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
        x, roles = self.hidden(inputs, choice)
        return jnp.einsum("btd,vd->btv", x, self.output_weight(), preferred_element_type=jnp.float32), roles

    def hidden(self, inputs: Inputs, choice: RoleChoice | None = None) -> tuple[jax.Array, Roles]:
        """What the output layer reads, ``[b, t, d]`` (a loss need not have all logits at once), and ``Roles``."""
        choice = RoleChoice() if choice is None else choice
        model = self.config.model
        structure, layers = nnx.split(self.blocks)
        noise_keys = None if choice.noise_key is None else jax.random.split(choice.noise_key, model.num_layers)

        def layer(x, scanned):
            state, noise_key, role_ids = scanned
            return nnx.merge(structure, state)(x, inputs, choice._replace(noise_key=noise_key, role_ids=role_ids))

        scanned = (layers, noise_keys, choice.role_ids)
        x, roles = jax.lax.scan(_remat(layer, model.remat), self.embed(inputs.tokens), scanned)
        return self.final_norm(x), roles

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 ``[b, t]`` → what the first layer reads, ``[b, t, d]``."""
        model = self.config.model
        sharding = partition.compute_sharding("batch", "sequence", None)
        x = weight(self.embedding, model.dtype).at[tokens].get(out_sharding=sharding)
        return x * jnp.asarray(math.sqrt(model.width), model.dtype)

    def output_weight(self) -> jax.Array:
        """Of the output layer, ``[v, d]``."""
        model = self.config.model
        return weight(self.embedding if model.tie_embeddings else self.unembedding, model.dtype)


def _remat(function, policy: str):
    """The layer under a named rematerialisation policy; every one saves the roles, none the gathered weights."""
    if policy == "none":
        return (
            jax.checkpoint(function, policy=_all_but_gathered, prevent_cse=False) if partition.gathers() else function
        )
    saved = jax.checkpoint_policies.save_only_these_names(ROLES)
    if policy == "dots":
        matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        saved = jax.checkpoint_policies.save_from_both_policies(matmuls, saved)
    return jax.checkpoint(function, policy=saved, prevent_cse=False)


def _all_but_gathered(primitive, *_, **__) -> bool:
    """What a block leaves for its backward where weights are gathered; else a device would keep those of all layers."""
    return primitive.name != "reshard"


def init_parameters(config: Config, vocab_size: int, key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    """A fresh model, taken apart.

    Returns:
      ``(structure, parameters)``: what ``nnx.merge`` puts together; the parameters are nested dicts of float32
      arrays.
    """
    structure, state = nnx.split(Transformer(config, vocab_size, nnx.Rngs(params=key)))
    return structure, nnx.to_pure_dict(state)


class ModelStructure(NamedTuple):
    """The model without values; the last three are nested dicts alike.

    Attributes:
      structure: what ``nnx.merge`` makes a model of, with parameters.
      parameters: ``jax.ShapeDtypeStruct``.
      axes: the names of each parameter's axes (``natsjax.partition``).
      decayed: whether weight decay applies.
    """

    structure: nnx.GraphDef
    parameters: Any
    axes: Any
    decayed: Any


def model_structure(config: Config, vocab_size: int) -> ModelStructure:
    """The model without values: nothing is computed."""
    abstract = nnx.eval_shape(lambda: Transformer(config, vocab_size, nnx.Rngs(0)))
    structure, state = nnx.split(abstract)

    def read(function):
        parameters = jax.tree.map(function, state, is_leaf=lambda x: isinstance(x, nnx.Param))
        return nnx.to_pure_dict(parameters)

    def axes(parameter) -> partition.Axes:
        named = parameter.get_metadata("axes")
        return (None,) * (len(parameter.get_value().shape) - len(named)) + named  # the layers' axis comes first

    return ModelStructure(
        structure, nnx.to_pure_dict(state), read(axes), read(lambda parameter: parameter.get_metadata("weight_decay"))
    )
