"""How long does a token take? NAtS against its own full cache, and that against the greedy loop of `transformers`.

    python -m benchmarks.decode --output=docs         the tables of docs/decode.md, and docs/decode.json
    python -m benchmarks.decode --batch=1 --contexts=1024,4096

The model has SmolLM-135M's shape (30 layers, width 576, 9 heads over 3 KV heads of 64, float32) with random parameters,
and the caches are filled with random keys: speed depends on neither. Contestants, timed in turn, once a round:

* ``full``: our loop, every key kept;
* ``nats``: our loop, a buffer with ``--live`` of the context's keys in every head;
* ``transformers``: ``model.generate`` greedy with its default cache, where `transformers` and PyTorch are installed.

Each draws ``--tokens`` tokens for every sequence of the batch, behind a context that is in the cache. A ratio is the
median over rounds. The curve is of batch 1, by context, for a fixed number of live keys and for all of them.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside XLA's

import jax
import jax.numpy as jnp
import numpy as np

from natsjax import capacity, decode_loop, kv_buffer, partition
from natsjax.config import Config, MeshConfig
from natsjax.decode_loop import Loop
from natsjax.decoder import NO_LIMIT, Decoder, DecodeSettings
from natsjax.model import init_parameters, model_structure
from natsjax.policies import FullAttention, Nats
from natsjax.sampling import Sampling
from pallas_kernels.nats_attention import NO_END
from pallas_kernels.nats_attention.tiling import num_cores

VOCAB_SIZE = 49152
TRANSFORMERS_LEAST = 1.0
"""The smallest seconds of ``transformers`` over those of ``full``."""
NATS_LEAST = 2.5
"""The smallest seconds of ``full`` over those of ``nats``."""


def config(num_layers: int = 30) -> Config:
    """SmolLM-135M's shape; the scorer makes every token SLIDING."""
    return Config.from_dict(
        {
            "model": {
                "num_layers": num_layers,
                "width": 576,
                "num_heads": 9,
                "num_kv_heads": 3,
                "head_dim": 64,
                "mlp_width": 1536,
            },
            "nats": {"initial_roles": (0.1, 0.1, 0.8), "window": 64},
            "data": {"source": "recall"},
        }
    )


def filled_loop(decoder: Decoder, batch: int, context: int, live: int, slots: int, seed: int = 0) -> Loop:
    """A loop behind ``context`` tokens of which every head keeps ``live``, at random indices; ``slots`` of a head."""
    rng = np.random.default_rng(seed)
    layers, heads = decoder.config.model.num_layers, decoder.config.model.num_kv_heads
    with jax.set_mesh(decoder.mesh):
        buffer = decoder.allocate([layers], [slots], batch)

        @jax.jit
        def fill(buffer, position, key):
            (group,) = buffer
            arrays = tuple(
                jax.random.normal(jax.random.fold_in(key, n), x.shape, x.dtype) for n, x in enumerate(group.storage.arrays)
            )
            used = jnp.arange(group.capacity) < live
            group = kv_buffer.LayerGroup(
                dataclasses.replace(group.storage, arrays=arrays),
                jnp.broadcast_to(position, group.key_end.shape),
                jnp.broadcast_to(jnp.where(used, NO_END, 0), group.key_end.shape).astype(jnp.int32),
                jnp.full_like(group.length, live),
            )
            return (jax.tree.map(lambda x: partition.reshard(x, *kv_buffer.AXES[x.ndim]), group),)

        position = np.zeros(slots, np.int32)
        position[:live] = np.sort(rng.choice(context, live, replace=False))
        buffer = fill(buffer, position, jax.random.key(seed))
        rows = np.ones(batch, np.int64)
        return Loop(
            buffer,
            decoder.put_rows(0 * rows),
            decoder.put_rows(context * rows),
            decoder.put_rows(np.arange(batch)),
            decoder.put_rows(2**30 * rows),
            decoder.put_rows(0 * rows).astype(bool),
            decoder.put(np.zeros((layers, batch, heads)), None, "batch", "kv_heads"),
            decoder.put_rows(0 * rows).astype(jnp.float32),
        )


class OurLoop:
    """Draws ``tokens`` tokens a call."""

    def __init__(self, decoder: Decoder, loop: Loop, tokens: int):
        self.decoder, self.loop, self.tokens = decoder, loop, tokens
        self.sampling = Sampling()

    def __call__(self) -> None:
        """Waits until they are there."""
        with jax.set_mesh(self.decoder.mesh):
            self.loop, segment = decode_loop.decode_segment(
                self.decoder.parameters,
                self.loop,
                self.decoder.policy,
                self.sampling.numbers,
                np.zeros(0, np.int32),
                None,
                jnp.int32(NO_LIMIT),
                structure=self.decoder.structure,
                kind=self.sampling.kind,
                length=self.tokens,
            )
            if np.any(np.asarray(segment.num_drawn) != self.tokens):
                raise RuntimeError("the loop stopped early: its buffer is too small for so many rounds.")


def our_loop(shape: Config, parameters: Any, batch: int, context: int, live: int, tokens: int, rounds: int) -> OurLoop:
    """``live == context``: every key is kept."""
    policy = FullAttention() if live == context else Nats()
    mesh = partition.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    model = model_structure(shape, VOCAB_SIZE)
    decoder = Decoder(shape, model, parameters, mesh, policy, DecodeSettings())
    drawn = tokens * (rounds + 1)  # one to compile
    window = shape.nats.window + 1
    need = live + (drawn if live == context else min(drawn, window))
    loop = filled_loop(decoder, batch, context, live, capacity.round_up(need, decoder.settings.block))
    return OurLoop(decoder, loop, tokens)


def race(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one a round of each contestant; each is called once before."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    import sys
    rounds=3
    shape=config(); _,parameters=init_parameters(shape,VOCAB_SIZE,jax.random.key(0))
    b,ctx,live=8,8192,819
    c={"full":our_loop(shape,parameters,b,ctx,ctx,8,rounds),"nats":our_loop(shape,parameters,b,ctx,live,8,rounds)}
    for k,v in c.items(): print(k,[g.capacity for g in v.loop.buffer])
    t=time.time(); s=race(c,rounds); print(time.time()-t)
    for k,v in s.items(): print(k,[round(x/8*1e3,1) for x in v],"ms/token")
