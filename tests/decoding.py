"""Random models that decode, and the masked forward pass that they must agree with; tests share them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from natsjax.config import Config, MeshConfig
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.model import sharding
from natsjax.model.attention import RoleSampling
from natsjax.model.cross_entropy import capped
from natsjax.model.inputs import Batch
from natsjax.model.transformer import init_parameters, model_structure
from natsjax.policies.interval import FullAttention
from natsjax.policies.nats import Nats

SMALL = DecodeSettings(chunk=8, segment=4, block=16)


def config(**groups) -> Config:
    """Three layers that differ, with grouped heads."""
    # Untied, or a random model would repeat its last token for ever.
    model = {
        "num_layers": 3,
        "embed_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "tie_embeddings": False,
        "key_shift": True,
        "token_shift": True,  # a chunk's first token, and a row's, has one before it
    }
    return tiny.config(model=model | groups.pop("model", {}), **groups)


def parameters_of(config: Config, seed=0, scorer_scale=1.0):
    """Random ones; the scorer's too."""
    _, parameters = init_parameters(config, tiny.VOCAB_SIZE, jax.random.key(seed))
    parameters["unembedding"] *= 4.0  # likely tokens and unlikely ones
    if config.model.has_roles:
        tiny.spread_scorer(parameters, seed + 1, scorer_scale)
    return parameters


def make_run(path, config: Config, parameters=None):
    """``tiny.make_run`` with such parameters."""
    made = tiny.make_run(path, config)
    placed = jax.tree.map(lambda x: x.sharding, made.parameters)
    parameters = parameters_of(config) if parameters is None else parameters
    return dataclasses.replace(made, parameters=jax.device_put(parameters, placed))


def packed_contexts(length=24):
    """Contexts to measure: packed documents, each row's as one document of the corpus."""
    return tiny.packed_batch(length=length) | {"document_id": np.repeat([[0], [1], [2]], length, axis=1)}


def always(config: Config, role):
    """Parameters whose scorers choose one role for every token: 0 GLOBAL, 1 LOCAL, 2 SLIDING."""
    parameters = parameters_of(config, scorer_scale=0.0)
    scorer = parameters["blocks"]["attention"]["scorer"]
    scorer["bias"] = scorer["bias"].at[..., role].add(9.0)
    return parameters


def check_generated(config: Config, parameters, rows, found, policy=None):
    """Every token is the likeliest one of the masked forward, whose logits are returned, with its log-probability."""
    logits, _ = masked_logits(config, parameters, [a + b for a, b in zip(rows, found.tokens, strict=True)], policy)
    for row, new, logprobs, x in zip(rows, found.tokens, found.logprobs, logits.astype(np.float64), strict=True):
        x = x[len(row) - 1 : len(row) - 1 + len(new)]
        x -= np.log(np.exp(x).sum(-1, keepdims=True))
        assert np.abs(x[np.arange(len(new)), new] - logprobs).max() <= 2e-5 * np.abs(logits).max()
        assert np.all(x.max(-1) - x[np.arange(len(new)), new] <= 1e-4)
    return logits


def decoder(config: Config, parameters, policy=None, settings=SMALL, mesh=None) -> Decoder:
    """On the first device, or on a mesh of ``MeshConfig`` fields."""
    devices = jax.devices()[:1] if mesh is None else jax.devices()
    made = sharding.make_mesh(MeshConfig(**(mesh or {"fsdp": 1})), devices)
    return Decoder(config, model_structure(config, tiny.VOCAB_SIZE), parameters, made, policy, settings)


def prompts(lengths, seed=0) -> list[list[int]]:
    """Random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, tiny.VOCAB_SIZE, length).tolist() for length in lengths]


def padded(rows, length=None):
    """int32 ``[b, t]``, padded behind, and the lengths."""
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), length or max(1, lengths.max())), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = row
    return tokens, lengths


def masked_logits(config: Config, parameters, rows, policy=None, role_ids=None):
    """float32 logits ``[b, t, v]`` of the whole sequences with masks, and the roles int8 ``[l, b, k, t]``.

    A policy of intervals or of roles, or the given roles.
    """
    tokens, lengths = padded(rows)
    structure = model_structure(config, tiny.VOCAB_SIZE).structure

    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    end = np.where(positions < lengths[:, None], lengths[:, None], 0).astype(np.int32)
    if role_ids is not None:
        choice = RoleSampling(role_ids=jnp.asarray(role_ids))
    else:
        policy = policy or (Nats() if config.model.has_roles else FullAttention())
        choice = policy.choice(jnp.asarray(positions), config)

    @jax.jit
    def forward(parameters, batch, choice):
        return nnx.merge(structure, parameters)(batch, choice)

    logits, roles = forward(parameters, Batch(tokens, positions, end), choice)
    return np.asarray(logits), np.asarray(roles.ids)


def chunked_logits(decoder: Decoder, rows, chunk, role_ids=None):
    """The logits by reading chunks into the buffer; rows may be shorter than others. And the cache."""
    tokens, lengths = padded(rows, -(-max(map(len, rows)) // chunk) * chunk)
    padding = tokens.shape[1] - (0 if role_ids is None else role_ids.shape[-1])
    roles = None if role_ids is None else np.pad(role_ids, ((0, 0), (0, 0), (0, 0), (0, padding)))
    cache, found = decoder.start(len(rows), tokens.shape[1]), []
    weight = decoder.parameters["unembedding"]
    for begin in range(0, tokens.shape[1], chunk):
        part = slice(begin, begin + chunk)
        cache, read = decoder.read(
            cache,
            tokens[:, part],
            np.clip(lengths - begin, 0, chunk),
            role_ids=None if roles is None else roles[..., part],
        )
        hidden, weight = (np.asarray(jax.device_get(x), np.float32) for x in (read.hidden, weight))
        logits = np.einsum("btd,vd->btv", hidden, weight)
        found.append(np.asarray(capped(logits, decoder.config.model.final_logit_softcap)))
    return np.concatenate(found, axis=1)[:, : lengths.max()], cache


def error(got, expected, rows) -> float:
    """max |Δ| over max |expected|, where there are tokens."""
    is_token = np.arange(got.shape[1]) < np.array([len(row) for row in rows])[:, None]
    return float(np.abs(got - expected)[is_token].max() / np.abs(expected[is_token]).max())
