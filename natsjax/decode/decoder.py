"""A model that reads sequences chunk by chunk into a KV buffer, whose capacity follows what its heads need.

The capacity is known in advance for a policy that fixes lifetimes from indices; else it grows with the need of the
heads from the smallest size upward. Layers with different needs get capacities of their own.

Axis letters: ``b`` batch, ``t`` token, ``l`` layer, ``k`` KV head.
"""

import dataclasses
import functools
import inspect
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from natsjax.config import Config, ModelConfig
from natsjax.config_fields import did_you_mean
from natsjax.decode import allocation, loop
from natsjax.decode.allocation import Layout
from natsjax.decode.buffer import KVBuffer, occupancy
from natsjax.decode.step import Chunk, Reads
from natsjax.errors import UserError
from natsjax.model import sharding
from natsjax.model.sharding import compute_spec
from natsjax.model.transformer import ModelStructure, model_structure
from natsjax.policies.base import DecodingPolicy, Eviction, unsuited
from natsjax.policies.eviction import EVICTIONS
from natsjax.policies.interval import FullAttention
from natsjax.policies.nats import Nats
from natsjax.runs.load import LoadedRun
from pallas_kernels.decode_attention import storage_format

_PREFILL_GROWTH = 1.5
"""While a prompt is read, capacities grow in large steps: few programs are compiled, and ``compact`` comes after."""

_WORTH_COMPILING = 1.25
"""A layout that is known is taken unless it allocates this many times as much as is wanted."""

_MOST_GROUPS = 16
"""Each is compiled by itself."""

NO_LIMIT = int(np.iinfo(np.int32).max)
"""Slots of a head, or tokens of a sequence, where nothing limits them."""


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """Settings of decoding on a machine.

    Generated tokens depend on ``max_kv`` alone, and with it on ``chunk``: the tokens of a chunk read the keys kept
    before it and the chunk's own, and eviction comes after the chunk.

    Attributes:
      chunk: prompt tokens of a sequence that are read at once.
      segment: tokens that are drawn before the host, which streams, compacts and grows the buffer, is asked again.
      block: capacities are multiples of it (slots); on a CPU of a part of it for sequences shorter than eight blocks,
        so that none takes more than full attention would (``allocation.slots_for``).
      max_groups: layers are divided into at most so many groups of one capacity each (more where the kinds of layers
        alternate, up to 16).
      max_kv: the most keys that a head keeps, hard (a query reads these and its own); None: what the policy keeps.
      eviction: rule where ``max_kv`` is reached (``policies.EVICTIONS``).

    Raises:
      UserError: a number below 1, or an unknown eviction.
    """

    chunk: int = 512
    segment: int = 16
    block: int = 128
    max_groups: int = 4
    max_kv: int | None = None
    eviction: str = "soonest_end"

    def __post_init__(self):
        for name in ("chunk", "segment", "block", "max_groups", "max_kv"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} = {value}: it must be 1 or more.")
        if self.eviction not in EVICTIONS:
            known = ", ".join(map(repr, EVICTIONS))
            meant = did_you_mean(self.eviction, EVICTIONS)
            raise UserError(f"eviction = {self.eviction!r}: one of {known} was expected{meant}.")


class Cache(NamedTuple):
    """Sequences that have been read.

    Attributes:
      buffer: their live keys.
      num_tokens: int32 ``[b]``, of each.
      last: int32 ``[b]``, the last token of each that has any.
      evicted: int32 ``[num_layers, b, k]``, live keys that were evicted.
      most: tokens that a sequence will have, at most.
    """

    buffer: KVBuffer
    num_tokens: jax.Array
    last: jax.Array
    evicted: jax.Array
    most: int = NO_LIMIT

    @property
    def capacities(self) -> list[int]:
        """Slots of a head, by layer."""
        return [group.capacity for group in self.buffer for _ in range(group.num_layers)]


class Decoder:
    """A model and a policy, ready to read; ``natsjax.decode.generation.generate`` generates with it.

    Args:
      config: of the run.
      model: its structure.
      parameters: nested dict of arrays.
      mesh: on which to decode: batch over ``data`` and ``fsdp``, KV heads over ``tensor``.
      policy: decides how long keys live; None: the model's roles, or full attention for a dense model.
      settings: of decoding.

    Raises:
      UserError: the model's layers cannot follow the policy, or the mesh divides sequences.

    Example:
      >>> decoder = Decoder.of_run(natsjax.load("runs/quickstart"), Nats(role_bias=-0.3))
    """

    def __init__(
        self,
        config: Config,
        model: ModelStructure,
        parameters: Any,
        mesh: Mesh,
        policy: DecodingPolicy | None = None,
        settings: DecodeSettings | None = None,
    ):
        self.config, self.structure, self.mesh = config, model.structure, mesh
        self.vocab_size = model.parameters["embedding"].shape[0]
        self.policy = policy if policy is not None else Nats() if config.model.has_roles else FullAttention()
        self.settings = DecodeSettings() if settings is None else settings
        if (why := unsuited(self.policy, config.model)) is not None:
            raise UserError(f"policy = {self.policy}: {why}.")
        check_mesh(mesh)
        self._format = storage_format(mesh.devices.flat[0].platform)
        self._layouts: list[Layout] = []  # after prompts so far
        # A dense layer between two with roles would give both its capacity.
        kinds = config.model.all_layer_types
        runs = 1 + sum(a != b for a, b in itertools.pairwise(kinds))
        self._max_groups = max(self.settings.max_groups, min(runs, _MOST_GROUPS) if runs > 1 else 1)
        self.eviction, self._limits = _eviction(self.policy, self.settings, config.model)
        self.parameters = decode_parameters(parameters, model, config, mesh)

    @classmethod
    def of_run(
        cls, run: LoadedRun, policy: DecodingPolicy | None = None, settings: DecodeSettings | None = None
    ) -> "Decoder":
        """Makes the decoder of a trained run, on its mesh."""
        model = model_structure(run.config, run.data.vocabulary.vocab_size)
        return cls(run.config, model, run.parameters, run.mesh, policy, settings)

    @property
    def shards(self) -> int:
        """Batches are multiples of it."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    # --- reading ---

    def start(self, batch: int, length: int | None = None, most: int = NO_LIMIT) -> Cache:
        """Makes an empty cache.

        Args:
          batch: sequences, a multiple of ``shards``.
          length: tokens of a sequence that the capacity is for, where that is known.
          most: tokens that a sequence will have, at most.
        """
        layers, heads = self.config.model.num_layers, self.config.model.num_kv_heads
        slots = None
        if self.policy.eviction is not None:  # it evicts when all has been read
            slots = length
        elif self.evicts_in_loop:  # not before the limit
            slots = self.limit if length is None else min(length, self.limit)
        elif length is not None:
            slots = self.policy.most_live(length, heads)
        slots = self._size(self.settings.block if slots is None else slots, most)
        with jax.set_mesh(self.mesh):
            evicted = self.put(np.zeros((layers, batch, heads), np.int32), None, "batch", "kv_heads")
            num_tokens, last = (self.put_rows(np.zeros(batch)) for _ in range(2))
            return Cache(self.allocate([layers], [slots], batch), num_tokens, last, evicted, most)

    def read(
        self,
        cache: Cache,
        tokens: np.ndarray,
        count: np.ndarray,
        *,
        observed_from: np.ndarray | None = None,
        role_ids: np.ndarray | None = None,
        count_live: bool = False,
        evict: bool = True,
    ) -> tuple[Cache, Reads]:
        """Reads a chunk and keeps the keys that live on; the buffer grows where they need more slots.

        Args:
          cache: of the tokens before; its buffer is used up.
          tokens: int ``[b, t]``; those of a row are at its front.
          count: int ``[b]``, tokens of each row.
          observed_from: int ``[b]``, index of the first query whose attention counts; None: 0.
          role_ids: int8 ``[num_layers, b, k, t]``, instead of the model's own.
          count_live: True to get ``Reads.live``.
          evict: False to keep all keys.
        """
        with jax.set_mesh(self.mesh):
            observed_from = np.zeros(len(count)) if observed_from is None else observed_from
            roles = None if role_ids is None else self.put(role_ids, None, "batch", "kv_heads", None)
            rows = self.put_rows(count), cache.num_tokens, cache.last, self.put_rows(observed_from)
            chunk = Chunk(self.put(tokens, "batch", "sequence"), *rows, roles)
            read = loop.read_chunk(
                self.parameters, cache.buffer, chunk, self.policy, structure=self.structure, count_live=count_live
            )
            eviction, need = self.eviction if evict else None, np.asarray(read.need)
            need = need if eviction is None else np.minimum(need, self._limits)
            if np.any(need > cache.capacities):
                cache = self.grow(cache, need, _PREFILL_GROWTH)
            buffer, evicted = loop.write_chunk(cache.buffer, read.new, chunk.next_index, eviction, self.limits)
            cache = cache._replace(
                buffer=buffer, num_tokens=chunk.next_index, last=chunk.last, evicted=cache.evicted + evicted
            )
            return cache, read

    def read_tokens(self, cache: Cache, tokens: np.ndarray, count: np.ndarray) -> tuple[Cache, jax.Array, jax.Array]:
        """Reads a chunk as it would be generated: token by token, evicting after each, in one program.

        Args:
          cache: of the tokens before, with as many slots as ``limit``, or one for each token; its buffer is used up.
          tokens, count: as in ``read``.

        Returns:
          The cache, without what was evicted being counted; ``hidden [b, t, d]``; and ``live``, int32
          ``[num_layers, b, k, t]``, as in ``Reads``.
        """
        with jax.set_mesh(self.mesh):
            rows = self.put_rows(count), cache.num_tokens, cache.last, 0 * cache.num_tokens
            chunk = Chunk(self.put(tokens, "batch", "sequence"), *rows)
            buffer, hidden, live = loop.read_tokens(
                self.parameters,
                cache.buffer,
                chunk,
                self.policy,
                self.eviction,
                self.limits,
                structure=self.structure,
            )
            return cache._replace(buffer=buffer, num_tokens=chunk.next_index, last=chunk.last), hidden, live

    # --- capacity ---

    def grow(self, cache: Cache, need: np.ndarray, growth: float = 1.0) -> Cache:
        """Gives larger capacities to the groups with a layer that needs them; everything is kept.

        Groups of the same capacity grow together, so that shapes stay few.

        Args:
          cache: its buffer is used up.
          need: int ``[num_layers]``, slots of each layer's fullest head.
          growth: the least factor of a capacity that grows.
        """
        layers = [group.num_layers for group in cache.buffer]
        old = [group.capacity for group in cache.buffer]
        most = [int(np.max(part)) for part in np.split(np.asarray(need), np.cumsum(layers)[:-1])]
        slots = dict.fromkeys(old, 0)
        for before, wanted in zip(old, most, strict=True):
            if wanted > before:
                slots[before] = max(slots[before], self._grown(max(wanted, int(growth * before)), cache.most))
        new = [slots[before] or before for before in old]
        if any(after < wanted for after, wanted in zip(new, most, strict=True)):  # the loop would stop here for ever
            raise RuntimeError(f"{new} slots were to hold {most} keys.")
        return self.move(cache, layers, new)

    def compact(self, cache: Cache, need: np.ndarray, num_tokens: int) -> Cache:
        """Chooses groups and capacities for the tokens after the prompt; those of an earlier batch where they suffice.

        Args:
          cache: after the prompt, live slots in front; its buffer is used up.
          need: int ``[num_layers]``, slots of each layer's fullest head.
          num_tokens: tokens that a sequence will still read, at most.
        """
        if self.policy.most_live(1, self.config.model.num_kv_heads) is not None:
            return cache  # the capacity was known from the start
        # Evicting begins where there is no free slot: that must not be before the limit.
        if self.evicts_in_loop:
            need = np.minimum(need + num_tokens, self._limits)
        else:  # also where few tokens come: a later batch may need a little more
            need = np.array([self._grown(int(n), cache.most) for n in need])
        return self.with_slots(cache, need)

    def with_slots(self, cache: Cache, slots: np.ndarray) -> Cache:
        """Moves to the ``layout`` for these slots by layer; the buffer of ``cache`` is used up.

        Args:
          cache: as in ``move``.
          slots: int ``[num_layers]``, of a head.
        """
        layout = self.layout(slots, cache.most)
        return self.move(cache, list(layout.layers), list(layout.slots))

    def slots_ahead(self, live: np.ndarray, length: int, num_new: int, most: int) -> np.ndarray:
        """Returns the slots to give a head, by layer, so that a sequence can go on for a while, or to its end.

        Args:
          live: int ``[num_layers]``, live slots of each layer's fullest head.
          length: tokens read so far.
          num_new: tokens to come, at most.
          most: tokens that any sequence in the buffer will have, at most.
        """
        known = None
        if self.policy.eviction is None:
            known = self.policy.most_live(length + num_new, self.config.model.num_kv_heads)
        if self.evicts_in_loop:  # not before the limit
            ahead = np.minimum(live + num_new, self._limits)
            ahead = ahead if known is None else np.minimum(ahead, known)
        elif known is not None:
            ahead = np.full_like(live, known)
        else:
            ahead = np.array([self._grown(int(n), most) for n in live])
        return np.maximum(ahead, live)

    def layout(self, need: np.ndarray, most: int) -> Layout:
        """Returns groups and capacities for these slots by layer: known ones, unless they waste too much.

        Args:
          need: int ``[num_layers]``, slots of a head.
          most: tokens that a sequence will have, at most.
        """
        size = functools.partial(self._size, most=most)
        wanted = Layout.of(need, self._max_groups, size)
        fits = (known for known in self._layouts if max(known.slots) <= size(most))
        enough = [known for known in fits if np.all(known.by_layer >= need)]
        close = [known for known in enough if known.total <= _WORTH_COMPILING * wanted.total]
        if close:
            return min(close, key=lambda known: known.total)
        if self._layouts:  # one that holds what the last one held, so that there are soon no new ones
            both = Layout.of(np.maximum(need, self._layouts[-1].by_layer), self._max_groups, size)
            wanted = both if both.total <= _WORTH_COMPILING * wanted.total else wanted
        self._layouts.append(wanted)
        return wanted

    def evict(self, cache: Cache) -> Cache:
        """Evicts down to the limit; the buffer of ``cache`` is used up."""
        with jax.set_mesh(self.mesh):
            buffer, evicted = loop.compact(cache.buffer, cache.num_tokens, self.eviction, self.limits)
            return cache._replace(buffer=buffer, evicted=cache.evicted + evicted)

    def resized(self, cache: Cache, slots: int) -> Cache:
        """Moves to a buffer of so many slots a head, not fewer than are live; the buffer of ``cache`` is used up."""
        return self.move(cache, [self.config.model.num_layers], [self._size(slots, cache.most)])

    def copied(self, cache: Cache) -> Cache:
        """Copies the cache, buffer and all."""
        with jax.set_mesh(self.mesh):
            return cache._replace(buffer=_copied(cache.buffer))

    def required_capacity(self, cache: Cache) -> np.ndarray:
        """Counts the live slots of each layer's fullest head, int ``[num_layers]``."""
        with jax.set_mesh(self.mesh):
            return np.asarray(_need(cache.buffer, cache.num_tokens))

    @property
    def limit(self) -> int:
        """The most keys that a head keeps, in the layer that keeps the most."""
        return int(self._limits.max())

    @property
    def limits(self) -> jax.Array:
        """The most keys that a head keeps, for ``loop``: int32 scalar, or ``[num_layers, 1]`` where layers differ."""
        if np.ptp(self._limits) == 0:
            return jnp.int32(self.limit)
        return jnp.asarray(self._limits[:, None], jnp.int32)

    @property
    def evicts_in_loop(self) -> bool:
        """True where keys are evicted while tokens are generated."""
        return self.eviction is not None and self.policy.every_token

    @property
    def eviction_in_loop(self) -> tuple[Eviction | None, jax.Array]:
        """The rule and the limits for ``loop.decode_segment``; no rule where nothing is evicted in it."""
        return (self.eviction, self.limits) if self.evicts_in_loop else (None, jnp.int32(NO_LIMIT))

    def _size(self, need: int, most: int) -> int:
        """Returns the slots of a head that needs so many, in a sequence of at most ``most`` tokens."""
        any_block = self._format == "transposed"
        return allocation.slots_for(need, self.settings.block, most, any_block=any_block)

    def _grown(self, need: int, most: int) -> int:
        """Returns the slots of a head that will need more than ``need`` soon."""
        slots = self._size(allocation.with_headroom(need), most)
        if not self.evicts_in_loop:
            return slots
        # Where evicting continues, no head needs more than the limit, but while a prompt is read that is evicted by.
        return min(slots, self._size(max(self.limit, need), most))

    def move(self, cache: Cache, layers: list[int], slots: list[int]) -> Cache:
        """Moves everything to groups of so many layers and slots; where these are the same, nothing moves.

        Args:
          cache: ``length`` nowhere above what its layer gets; its buffer is used up.
          layers, slots: of each group.
        """
        if np.array_equal(np.repeat(slots, layers), cache.capacities) and len(layers) == len(cache.buffer):
            return cache
        with jax.set_mesh(self.mesh):
            target = self.allocate(layers, slots, cache.num_tokens.shape[0])
            moved = cache._replace(buffer=_regroup(cache.buffer, target))
        for array in jax.tree.leaves(cache.buffer):
            array.delete()  # as soon as it has been read
        return moved

    def allocate(self, layers: list[int], slots: list[int], batch: int) -> KVBuffer:
        """Makes an empty buffer from layers and slots of each group, and sequences."""
        model = self.config.model
        if self._format == "plain":  # the library takes a layer as an array of its own
            slots = [c for number, c in zip(layers, slots, strict=True) for _ in range(number)]
            layers = [1] * len(slots)
        return _empty(
            tuple(layers),
            tuple(slots),
            batch=batch,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            format=self._format,
            block=self.settings.block,
            adds_up=self.policy.observes_attention or model.has_masks,
            shifts_keys=model.key_shift,
        )

    # --- from the host ---

    def put(self, values: np.ndarray, *axes: str | None) -> jax.Array:
        """Puts an array of ints, or of float32, on the devices, divided along its axes."""
        values = np.asarray(values)
        values = values if values.dtype in (np.int8, np.float32) else values.astype(np.int32)
        return jax.make_array_from_callback(values.shape, self.sharding(*axes), lambda index: values[index])

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns the sharding of an array with these axes."""
        return NamedSharding(self.mesh, sharding.compute_spec(axes))

    def fetch(self, tree: Any) -> Any:
        """Fetches the values, whole, to the host of every process."""
        with jax.set_mesh(self.mesh):
            return jax.device_get(_replicate(tree))

    def put_rows(self, values: np.ndarray) -> jax.Array:
        """Puts one number for each sequence on the devices, int32 ``[b]``."""
        return self.put(values, "batch")


_replicate = jax.jit(sharding.replicate)
_need = jax.jit(lambda buffer, at: sharding.replicate(loop.fullest(occupancy(buffer, at))))
_copied = jax.jit(lambda buffer: jax.tree.map(jnp.copy, buffer))
_regroup = jax.jit(allocation.regroup, donate_argnames=("target",))
_empty = jax.jit(allocation.empty, static_argnames=tuple(inspect.signature(allocation.empty).parameters))


def _eviction(
    policy: DecodingPolicy, settings: DecodeSettings, model: ModelConfig
) -> tuple[Eviction | None, np.ndarray]:
    """Returns the rule by which keys are evicted, and the most keys that it leaves a head, int ``[num_layers]``.

    Raises:
      UserError: the policy has a limit, and the settings have another.
    """
    if policy.eviction is None:
        limit = NO_LIMIT if settings.max_kv is None else min(settings.max_kv, NO_LIMIT)
        return None if settings.max_kv is None else EVICTIONS[settings.eviction], np.full(model.num_layers, limit)
    if settings.max_kv is not None:
        raise UserError(f"max_kv = {settings.max_kv}: it and {policy} are two limits; choose one.")
    limit = min(policy.most_of_a_head(model.num_kv_heads), NO_LIMIT)
    return policy.eviction, np.where(policy.limited_layers(model), limit, NO_LIMIT)


def check_mesh(mesh: Mesh) -> None:
    """Checks that decoding runs on the mesh.

    Raises:
      UserError: it divides sequences.
    """
    if mesh.shape["context"] > 1:
        raise UserError(
            f"mesh.context = {mesh.shape['context']}: decoding divides batch and heads, not sequences; make it 1."
        )


def decode_parameters(parameters: Any, model: ModelStructure, config: Config, mesh: Mesh) -> Any:
    """Gathers and rounds parameters as in ``decode_layout``, once: every step of decoding uses all of them."""
    layout = decode_layout(model, config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, layout)
    cast = jax.jit(lambda p: jax.tree.map(lambda x, like: x.astype(like.dtype), p, layout), out_shardings=shardings)
    with jax.set_mesh(mesh):
        return cast(parameters)


def decode_layout(model: ModelStructure, config: Config, mesh: Mesh) -> Any:
    """Returns layout and dtype of parameters in decoding: those of the forward pass.

    Returns:
      Nested dict of ``jax.ShapeDtypeStruct`` with shardings.
    """

    def place(x, axes, is_wide):
        dtype = "float32" if is_wide else config.model.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, compute_spec(axes)))

    return jax.tree.map(place, model.parameters, model.axes, model.wide)
