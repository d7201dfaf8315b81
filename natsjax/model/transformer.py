"""The transformer: decoder-only, pre-norm RMSNorm, rotary positions, grouped-query attention, a gated MLP.

One ``lax.scan`` runs over the layers, or over repeats of their pattern (``model.layer_types``, ``model.nope``); their
parameters carry a leading axis ``l``. Nothing is mutated in a call: noise keys go in, roles and their lifetimes come
out. Under a mesh (``jax.set_mesh``) arrays are divided as in ``model.sharding``: weights are gathered where they are
used, attention runs on each device's heads and rows.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``n = k·g``, ``h`` head
dim, ``d`` embedding dim, ``f`` MLP dim, ``v`` vocabulary, ``l`` layer.
"""

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from natsjax.config import Config
from natsjax.model.attention import ROLES, Attention, AttentionFunction, MaskedAttention, Roles, RoleSampling
from natsjax.model.cross_entropy import capped
from natsjax.model.inputs import Batch
from natsjax.model.layers import MLP, RMSNorm, dropout, gathered, matrix_param, vector_param
from natsjax.model.sharding import Axes, compute_sharding, gathers

_DROPOUT = 0x64726F70
"""Folded into the noise key for dropout; the roles' keys are its splits, by a layer's number."""


_FIRST_SHIFT = 0.5
"""Factor of the token before, at step 0 (``model.token_shift``)."""


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream.

    Training, masked evaluation and decoding run it; they differ in the attention function alone.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.dropout = model.dropout
        self.attention_norm = RMSNorm(model.embed_dim, model.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(model.embed_dim, model.norm_eps)
        self.mlp = MLP(model, rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: AttentionFunction,
        *,
        before: jax.Array | None = None,
        is_rotary: bool | jax.Array = True,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Maps ``[b, t, d]`` to ``[b, t, d]``; arguments and results as in ``Attention``.

        Args:
          x: input of the layer.
          positions: of the tokens.
          attend: reads the keys.
          before: with ``model.key_shift``, of the token before the first one.
          is_rotary: whether the layer has the rotary embedding.
          dropout_key: PRNG key of ``model.dropout``; None: without it.
        """
        keys = [None, None] if dropout_key is None else list(jax.random.split(dropout_key))
        out, result = self.attention(self.attention_norm(x), positions, attend, before=before, is_rotary=is_rotary)
        x = x + self._dropped(out, keys[0])
        return x + self._dropped(self.mlp(self.mlp_norm(x)), keys[1]), result

    def _dropped(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return x if key is None else dropout(x, key, self.dropout)


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
        # Stored in the scale of an output layer, so that it can be tied; as input it is multiplied by sqrt(d) (unless
        # model.embedding_scale says otherwise) to unit size, which the blocks' outputs have too.
        shape = (vocab_size, model.embed_dim)

        def matrix(part):
            key, axes = rngs.params(), ("vocab", "embed")
            return matrix_param(key, shape, axes, model.embed_dim, part, weight_decay=False, dtype=model.param_dtype)

        self.embedding = matrix("embedding")
        if model.token_shift:
            self.shift = vector_param(jnp.full(model.embed_dim, _FIRST_SHIFT, jnp.float32), ("embed",), "embedding")
        if not model.tie_embeddings:
            self.unembedding = matrix("unembedding")
        structure = nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
        keys = jax.random.split(rngs.params(), model.num_layers)
        self.blocks = nnx.merge(structure, jax.vmap(lambda key: nnx.state(Block(config, nnx.Rngs(key))))(keys))
        self.final_norm = RMSNorm(model.embed_dim, model.norm_eps)

    def __call__(self, batch: Batch, sampling: RoleSampling | None = None) -> tuple[jax.Array, Roles]:
        """Computes logits for the next token.

        Args:
          batch: of ``[b, t]``; targets are not read.
          sampling: how roles are chosen; one noise key serves all layers (it is split).

        Returns:
          ``(logits, roles)``: float32 ``[b, t, v]`` and ``Roles``.
        """
        x, roles = self.hidden(batch, sampling)
        return self.logits(x), roles

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps results of ``hidden``, ``[…, d]``, to float32 ``[…, v]``."""
        logits = jnp.einsum("...d,vd->...v", x, self.output_weight(), preferred_element_type=jnp.float32)
        return capped(logits, self.config.model.final_logit_softcap)

    def hidden(
        self, batch: Batch, sampling: RoleSampling | None = None, *, is_training: bool = False
    ) -> tuple[jax.Array, Roles]:
        """Computes the output layer's input, ``[b, t, d]`` (a loss need not have all logits at once), and ``Roles``.

        Args:
          batch: of ``[b, t]``.
          sampling: how roles are chosen.
          is_training: True for ``model.dropout``, whose noise follows from ``sampling.noise_key``. (Evaluation samples
            roles with a key too.)
        """
        sampling = RoleSampling() if sampling is None else sampling
        model = self.config.model
        structure, layers = nnx.split(self.blocks)
        noise_keys = None if sampling.noise_key is None else jax.random.split(sampling.noise_key, model.num_layers)
        pattern = model.layer_period
        embedded, dropout_keys = self.embed(batch.inputs, batch.previous if model.token_shift else None), None
        if is_training and model.dropout and sampling.noise_key is not None:
            key = jax.random.fold_in(sampling.noise_key, _DROPOUT)
            dropout_keys = jax.random.split(key, model.num_layers)
            embedded = dropout(embedded, jax.random.fold_in(key, model.num_layers), model.dropout)

        def layer(kind, is_rotary):
            def run(x, scanned):
                state, noise_key, dropout_key, role_ids = scanned
                own = sampling._replace(noise_key=noise_key, role_ids=role_ids)
                attend = MaskedAttention(batch, own, kind)
                block = nnx.merge(structure, state)
                return block(x, batch.positions, attend, is_rotary=is_rotary, dropout_key=dropout_key)

            return _remat(run, model.remat)

        def period(x, scanned):
            found = []
            for place, kind in enumerate(pattern):
                x, roles = layer(*kind)(x, jax.tree.map(operator.itemgetter(place), scanned))
                found.append(roles)
            return x, jax.tree.map(lambda *values: jnp.stack(values), *found)

        def by_period(values):
            return values.reshape(-1, len(pattern), *values.shape[1:])

        scanned = (layers, noise_keys, dropout_keys, sampling.role_ids)
        if len(pattern) == 1:
            x, roles = jax.lax.scan(layer(*pattern[0]), embedded, scanned)
        else:
            x, roles = jax.lax.scan(period, embedded, jax.tree.map(by_period, scanned))
            roles = jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), roles)
        return self.final_norm(x), roles

    def embed(self, tokens: jax.Array, previous: jax.Array | None = None) -> jax.Array:
        """Maps tokens to the first layer's input, ``[b, t, d]``.

        Args:
          tokens: int32 ``[b, t]``.
          previous: int32 ``[b, t]``, with ``model.token_shift`` the token before each, -1 where there is none.
        """
        model = self.config.model
        weight, sharding = gathered(self.embedding, model.dtype), compute_sharding("batch", "sequence", None)
        x = weight.at[tokens].get(out_sharding=sharding)
        if model.token_shift:
            assert previous is not None
            before = weight.at[jnp.maximum(previous, 0)].get(out_sharding=sharding)
            shift = gathered(self.shift, model.dtype)
            x += jnp.where((previous >= 0)[..., None], shift * before, 0)
        return x * jnp.asarray(model.embedding_scale or math.sqrt(model.embed_dim), model.dtype)

    def output_weight(self) -> jax.Array:
        """Returns the weight of the output layer, ``[v, d]``."""
        model = self.config.model
        return gathered(self.embedding if model.tie_embeddings else self.unembedding, model.dtype)


def _remat(function, policy: str):
    """Wraps a layer in a named rematerialization policy; every one saves the roles, none the gathered weights."""
    if policy == "none":
        return jax.checkpoint(function, policy=_all_but_gathered, prevent_cse=False) if gathers() else function
    saved = jax.checkpoint_policies.save_only_these_names(ROLES)
    if policy == "dots":
        matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        saved = jax.checkpoint_policies.save_from_both_policies(matmuls, saved)
    return jax.checkpoint(function, policy=saved, prevent_cse=False)


def _all_but_gathered(primitive, *_, **__) -> bool:
    """Saves everything for a block's backward but gathered weights: a device would keep those of all layers."""
    return primitive.name != "reshard"


def init_parameters(config: Config, vocab_size: int, key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    """Draws a fresh model, taken apart.

    Returns:
      ``(structure, parameters)``: what ``nnx.merge`` puts together; the parameters are nested dicts of arrays of
      ``model.param_dtype`` (float32 where it is no choice).
    """
    structure, state = nnx.split(Transformer(config, vocab_size, nnx.Rngs(params=key)))
    return structure, nnx.to_pure_dict(state)


class ModelStructure(NamedTuple):
    """A model without values; all but the first are nested dicts alike.

    Attributes:
      structure: what ``nnx.merge`` makes a model of, with parameters.
      parameters: ``jax.ShapeDtypeStruct``.
      axes: the names of each parameter's axes (``natsjax.model.sharding``).
      parts: the part of each parameter, one of ``parameters.PARTS``.
      wide: True where it is float32 in use, whatever ``model.dtype`` is.
      decayed: True where weight decay applies.
      num_input_axes: axes of each matrix, behind that of the layers, which its inputs are summed over; 0 elsewhere.
    """

    structure: nnx.GraphDef
    parameters: Any
    axes: Any
    parts: Any
    wide: Any
    decayed: Any
    num_input_axes: Any


def model_structure(config: Config, vocab_size: int) -> ModelStructure:
    """Returns the model without values: nothing is computed."""
    abstract = nnx.eval_shape(lambda: Transformer(config, vocab_size, nnx.Rngs(0)))
    structure, state = nnx.split(abstract)

    def read(function):
        parameters = jax.tree.map(function, state, is_leaf=lambda x: isinstance(x, nnx.Param))
        return nnx.to_pure_dict(parameters)

    def axes(parameter) -> Axes:
        named = parameter.get_metadata("axes")
        return (None,) * (len(parameter.get_value().shape) - len(named)) + named  # the layers' axis comes first

    names = ("part", "is_wide", "weight_decay", "num_input_axes")
    return ModelStructure(
        structure,
        nnx.to_pure_dict(state),
        read(axes),
        *(read(operator.methodcaller("get_metadata", name)) for name in names),
    )
