"""Generation: prompts in chunks into a KV buffer, then one compiled loop that draws tokens.

    decoder = Decoder.of_run(natsjax.load("runs/quickstart"))
    found = generate(decoder, [tokenizer.encode("Fellow citizens")], max_new_tokens=64)

Nothing live is dropped silently: where a head needs more slots than there are, the run moves to a larger buffer with
everything kept, or, with ``max_kv``, a named rule evicts, and what it evicts is counted.

Axis letters: ``b`` batch, ``t`` token, ``d`` width.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.decode import allocation
from natsjax.decode.decoder import NO_LIMIT, Cache, Decoder
from natsjax.decode.loop import Loop, Segment, compact, decode_segment, first_token, last_hidden
from natsjax.decode.sampling import Sampling
from natsjax.decode.step import Reads
from natsjax.errors import UserError
from natsjax.policies.base import LARGEST

OnTokens = Callable[[int, list[int], list[float]], None]
"""``on_tokens(sequence, tokens, log-probabilities)``, called as soon as tokens have been drawn."""

_AHEAD = 1024
"""Tokens that the first buffer has room for, at least; longer sequences move to a larger one on their way."""

_WASTE = 1.25
"""Slots are compacted where attention reads this many times as many as are live."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated tokens, with time and memory.

    Attributes:
      tokens: of each prompt; where a stop token came, it is the last.
      logprobs: the log-probability that the model gave each of them, at temperature 1 and before any filter.
      prompt_tokens: of all prompts together.
      first_token_seconds: until the first token of every sequence was here, compilation included.
      seconds: until the last one.
      steady_seconds, steady_tokens: of the loop without its first segment, and those behind a move to a larger buffer
        or a compaction: they may have to be compiled.
      kv_live: mean live keys of a head that the queries of generated tokens read; NaN where the loop did not run.
      kv_live_max: the most that one of them read of a head.
      kv_allocated: slots that the buffer has in the end, over all layers, sequences and heads.
      kv_allocated_bytes: what it takes in memory, on all devices together.
      kv_full: slots that full attention would fill with the same tokens.
      evicted: live keys that ``max_kv`` or the policy evicted, over all layers, sequences and heads.
      capacities: slots of a head, by layer, in the end.
      transfers: moves to a larger buffer while the run generated.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    prompt_tokens: int
    first_token_seconds: float
    seconds: float
    steady_seconds: float
    steady_tokens: int
    kv_live: float
    kv_live_max: int
    kv_allocated: int
    kv_allocated_bytes: int
    kv_full: int
    evicted: int
    capacities: list[int]
    transfers: int


def unpad(tokens: np.ndarray, is_token: np.ndarray) -> list[np.ndarray]:
    """Takes prompts out of a padded batch, wherever the padding is; ``tokens`` and bool ``is_token`` are ``[b, t]``."""
    return [row[used] for row, used in zip(np.asarray(tokens), np.asarray(is_token, bool), strict=True)]


class Prefill:
    """Prompts on their way into a cache, a chunk at a time; memory grows with the chunk and the live keys.

    A policy that observes attention evicts when the prompts have been read whole, so that nothing depends on the chunk.

    Args:
      decoder: whose model.
      prompts: token ids; a row without any stays without (rows are padded so to whole batches).
      num_new: tokens that the buffer has room for behind each prompt.
      most: tokens that a sequence will have, at most.
      smallest_chunk: tokens of a chunk, at least; a larger one is compiled for fewer lengths.

    Attributes:
      cache: of what has been read.
      hidden: the output layer's input after the last token that each row has read, ``[b, d]``.
      chunk: tokens that are read at once.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        num_new: int = 0,
        most: int = NO_LIMIT,
        smallest_chunk: int = 1,
    ):
        self._decoder, self._prompts = decoder, prompts
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._longest = int(self._lengths.max(initial=1))
        # Few shapes, few compilations.
        self.chunk = min(decoder.settings.chunk, max(smallest_chunk, 1 << (self._longest - 1).bit_length()))
        self._waits = decoder.policy.eviction is not None
        self.cache = decoder.start(len(prompts), self._longest + (0 if self._waits else num_new), most)
        self._observed_from = np.maximum(self._lengths - decoder.policy.observed, 0)
        self._begin = 0
        model = decoder.config.model
        with jax.set_mesh(decoder.mesh):
            hidden = jnp.zeros((len(prompts), model.embed_dim), model.dtype)
            self.hidden = jax.device_put(hidden, decoder.sharding("batch", None))

    @property
    def is_done(self) -> bool:
        """True when the prompts have been read whole."""
        return self._begin >= self._longest

    def read(self, *, count_live: bool = False) -> Reads:
        """Reads the next chunk; ``count_live`` as in ``Decoder.read``."""
        decoder, begin = self._decoder, self._begin
        tokens = np.zeros((len(self._prompts), self.chunk), np.int32)
        for row, prompt in enumerate(self._prompts):
            part = prompt[begin : begin + self.chunk]
            tokens[row, : len(part)] = part
        count = np.clip(self._lengths - begin, 0, self.chunk)
        self.cache, read = decoder.read(
            self.cache,
            tokens,
            count,
            observed_from=self._observed_from,
            count_live=count_live,
            evict=not self._waits,
        )
        with jax.set_mesh(decoder.mesh):
            self.hidden = last_of_chunk(read.hidden, decoder.put_rows(count), self.hidden)
        self._begin += self.chunk
        if self._waits and self.is_done:
            self.cache = decoder.evict(self.cache)
        return read


def prefill(
    decoder: Decoder, prompts: Sequence[Sequence[int]], num_new: int = 0, most: int = NO_LIMIT
) -> tuple[Cache, jax.Array]:
    """Reads prompts whole; arguments as in ``Prefill``, whose ``cache`` and ``hidden`` are returned."""
    reading = Prefill(decoder, prompts, num_new, most)
    while not reading.is_done:
        reading.read()
    return reading.cache, reading.hidden


last_of_chunk = jax.jit(last_hidden)
"""Compiled ``natsjax.decode.loop.last_hidden``."""


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    on_tokens: OnTokens | None = None,
    first_sequence: int = 0,
) -> Generation:
    """Continues every prompt.

    Args:
      decoder: whose model.
      prompts: token ids, at least one each.
      max_new_tokens: of each sequence, 1 or more.
      sampling: None: greedy.
      stop_tokens: a sequence ends after one of them.
      on_tokens: called with the first token of each sequence while the others are being drawn, and so on.
      first_sequence: the number of the first prompt, for its draws: a prompt's tokens do not depend on the batch.

    Raises:
      UserError: no prompt, an empty one, a token outside the vocabulary, or no token to draw.
    """
    started = time.perf_counter()
    sampling = Sampling() if sampling is None else sampling
    new = _checked(decoder, prompts, max_new_tokens)
    run = _Run(decoder, prompts, new, sampling, stop_tokens, on_tokens, first_sequence)
    run.finish()
    return run.result(sum(map(len, prompts)), run.first_token_at - started, time.perf_counter() - started)


def _checked(decoder: Decoder, prompts, max_new_tokens) -> np.ndarray:
    """Checks the prompts; returns the number of tokens to draw for each."""
    if not prompts:
        raise UserError("there is no prompt.")
    vocab_size = decoder.vocab_size
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number + 1} has no token: give at least the one that begins a document.")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(f"prompt {number + 1} has a token outside 0 … {vocab_size - 1}.")
    new = np.broadcast_to(np.asarray(max_new_tokens), (len(prompts),))
    if new.min() < 1:
        raise UserError(f"max_new_tokens={new.min()}: it must be 1 or more.")
    if new.max() >= LARGEST:
        raise UserError(f"max_new_tokens={new.max()}: it must be less than {LARGEST}.")
    return new


def is_wasteful(segment: Segment, block: int) -> bool:
    """Returns True where attention reads many free slots, which come in blocks of ``block``."""
    slack = block * len(segment.need) / 2
    return int(segment.occupied.sum()) > _WASTE * int(segment.need.sum()) + slack


def grown(decoder: Decoder, loop: Loop, most: int, segment: Segment) -> Loop:
    """Moves the groups that lacked capacity in the loop's last segment to a larger buffer; nothing is lost.

    Args:
      decoder: whose loop.
      loop: its state; the buffer is used up.
      most: tokens that a sequence will have, at most.
      segment: the last one.
    """
    lacks = np.repeat(segment.lacks_capacity, [group.num_layers for group in loop.buffer])
    cache = Cache(loop.buffer, loop.at, loop.before, loop.evicted, most)
    need = np.where(lacks, np.asarray(cache.capacities) + 1, segment.need)
    return loop._replace(buffer=decoder.grow(cache, need).buffer)


class _Run:
    """A generation under way: the loop on the devices, and its results on the host."""

    def __init__(self, decoder: Decoder, prompts, new, sampling: Sampling, stop_tokens, on_tokens, first_sequence):
        self.decoder, self.on_tokens, self.num_prompts = decoder, on_tokens, len(prompts)
        self.stop = np.asarray(sorted(set(stop_tokens)), np.int32)
        self.numbers, self.static = sampling.numbers, {"structure": decoder.structure, "kind": sampling.kind}
        self.policy = decoder.policy.after_prompt()
        rows = -(-len(prompts) // decoder.shards) * decoder.shards
        padding = rows - len(prompts)
        new = np.pad(new, (0, padding))
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(rows)]
        self.queries, self.transfers, self.steady_seconds, self.steady_tokens = 0, 0, 0.0, 0

        # Where all is kept, room for as much again as there is; nobody knows when a stop token comes.
        expected = int(new.max()) - 1
        if not decoder.evicts_in_loop:
            expected = min(expected, max(_AHEAD, *map(len, prompts)))
        self.most = max(map(len, prompts)) + int(new.max()) - 1  # the last one is not read
        cache, hidden = prefill(decoder, [*prompts, *[()] * padding], expected, self.most)
        with jax.set_mesh(decoder.mesh):
            sequence = decoder.put_rows(first_sequence + np.arange(rows))
            drawn = first_token(decoder.parameters, hidden, sequence, cache.num_tokens, self.numbers, **self.static)
            token, logprob = (np.asarray(x) for x in decoder.fetch(drawn[:2]))
            self._emit(token[:, None], logprob[:, None], np.minimum(new, 1))
            self.first_token_at = time.perf_counter()
            done = np.isin(token, self.stop) | (new <= 1)
            if not done.all():
                cache = decoder.compact(cache, decoder.required_capacity(cache), int(new.max()) - 1)
            self.loop = Loop(
                buffer=cache.buffer,
                token=decoder.put_rows(token),
                before=cache.last,
                at=cache.num_tokens,
                sequence=sequence,
                remaining=decoder.put_rows(np.maximum(new - 1, 0)),
                done=decoder.put_rows(done).astype(bool),
                evicted=cache.evicted,
                read=0.0 * cache.evicted,
                most=0 * cache.evicted,
            )
        self.done = bool(done.all())

    def finish(self) -> None:
        """Runs the loop to its end; the next segment is under way while the host reads one."""
        if self.done:
            return
        with jax.set_mesh(self.decoder.mesh):
            ahead, since, is_stale = self._dispatch(), None, False  # compilation is not timed
            while True:
                current, ahead = ahead, self._dispatch()
                segment = self._receive(current)
                now = time.perf_counter()
                if since is not None:
                    self.steady_seconds += now - since
                    self.steady_tokens += int(segment.num_drawn[: self.num_prompts].sum())
                since = now
                if segment.all_done:
                    return
                if segment.lacks_capacity.any():
                    self._receive(ahead)  # it stopped before its first step
                    self.loop = grown(self.decoder, self.loop, self.most, segment)
                    self.transfers += 1
                    ahead, since = self._dispatch(), None
                elif not is_stale and is_wasteful(segment, self.decoder.settings.block):
                    buffer, _ = compact(self.loop.buffer, self.loop.at)
                    self.loop = self.loop._replace(buffer=buffer)
                    since, is_stale = None, True
                    continue
                is_stale = False  # the segment under way began before the slots were compacted

    def _dispatch(self) -> Segment:
        """Starts the next segment and does not wait."""
        decoder = self.decoder
        self.loop, segment = decode_segment(
            decoder.parameters,
            self.loop,
            self.policy,
            self.numbers,
            self.stop,
            *decoder.eviction_in_loop,
            length=decoder.settings.segment,
            **self.static,
        )
        return segment

    def _receive(self, segment: Segment) -> Segment:
        """Waits for a segment and hands its tokens on."""
        segment = self.decoder.fetch(segment)
        self._emit(*(np.asarray(x) for x in (segment.tokens, segment.logprobs, segment.num_drawn)))
        self.queries += int(segment.num_drawn.sum())
        return segment

    def _emit(self, tokens: np.ndarray, logprobs: np.ndarray, count: np.ndarray) -> None:
        drawn = np.arange(logprobs.shape[1]) < count[:, None]
        if np.isnan(logprobs[drawn]).any():
            raise UserError("the model's logits are not numbers (NaN): its parameters or activations have overflowed.")
        for row in range(self.num_prompts):
            if count[row]:
                new = tokens[row, : count[row]].tolist(), logprobs[row, : count[row]].tolist()
                self.tokens[row] += new[0]
                self.logprobs[row] += new[1]
                if self.on_tokens is not None:
                    self.on_tokens(row, *new)

    def result(self, prompt_tokens: int, first_token_seconds: float, seconds: float) -> Generation:
        """Sums up the generation, after its end."""
        buffer, model = self.loop.buffer, self.decoder.config.model
        heads = model.num_layers * model.num_kv_heads
        loop = self.loop
        read, most, evicted, index = self.decoder.fetch((loop.read, loop.most, loop.evicted, loop.at))
        return Generation(
            tokens=self.tokens[: self.num_prompts],
            logprobs=self.logprobs[: self.num_prompts],
            prompt_tokens=prompt_tokens,
            first_token_seconds=first_token_seconds,
            seconds=seconds,
            steady_seconds=self.steady_seconds,
            steady_tokens=self.steady_tokens,
            kv_live=float(read.sum()) / (self.queries * heads) if self.queries else float("nan"),
            kv_live_max=int(most.max()),
            kv_allocated=allocation.allocated_slots(buffer),
            kv_allocated_bytes=allocation.allocated_bytes(buffer),
            kv_full=int(index[: self.num_prompts].sum()) * heads,
            evicted=int(evicted.sum()),
            capacities=Cache(buffer, self.loop.at, self.loop.before, self.loop.evicted).capacities,
            transfers=self.transfers,
        )
