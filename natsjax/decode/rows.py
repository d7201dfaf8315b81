"""Continuous batching: sequences come and go in the rows of one decode loop, and none depends on the others.

    rows = Rows(Decoder.of_run(run), num_rows=8, most=4096)
    row = rows.begin(RowRequest(prompt, max_new_tokens=64))
    while not row.is_done:
        for drawn in rows.advance():
            print(drawn.row.number, drawn.tokens)

A prompt is read into a buffer of its own, chunk by chunk between the segments of the loop, and its live keys are then
copied into a row that is free. Tokens are those of ``generation.generate``: the draws of a sequence depend on its own
seed and number, and what is computed of it on its own keys.

Axis letters: ``b`` row, ``t`` token of a chunk, ``m`` stop token.
"""

import collections
import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from natsjax.decode import allocation, loop
from natsjax.decode.decoder import Cache, Decoder
from natsjax.decode.generation import Prefill, grown, is_wasteful
from natsjax.decode.loop import Loop, RowStart, Segment
from natsjax.decode.sampling import Likeliest, Sampling, by_row
from natsjax.decode.step import Reads
from natsjax.errors import UserError

MAX_LIKELIEST = 5
"""Likeliest tokens that a row can have beside each one; the loop finds as many where any row wants one."""

_SMALLEST_CHUNK = 32
"""Tokens of a prompt that are read at once, at least: few programs are compiled for prompts of all lengths."""

_WORTH_SHRINKING = 2
"""A buffer moves to a smaller one where it has this many times the slots that its sequences want."""

_NAN = "the model's logits are not numbers (NaN): its parameters or activations have overflowed."


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """A sequence to generate.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: tokens to draw, at most; 0 to read the prompt alone.
      sampling: the rule by which they are drawn.
      sequence: the number of the sequence, for its draws.
      stop_tokens: the sequence ends after one of them.
      num_likeliest: likeliest tokens to return beside each one, up to ``MAX_LIKELIEST``.
      scores_prompt: True to return the log-probabilities of the prompt's tokens, too.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    sequence: int = 0
    stop_tokens: tuple[int, ...] = ()
    num_likeliest: int = 0
    scores_prompt: bool = False


class Row:
    """A sequence in a row of the loop.

    Attributes:
      request: the sequence.
      number: of the row.
      num_drawn: tokens that have been drawn.
      is_done: True when nothing more will come.
      error: why it ended early, as a sentence; None where it did not.
      live: live keys, over all layers and heads, when it was last looked at.
      evicted: live keys that were evicted, over all layers and heads.
    """

    def __init__(self, request: RowRequest, number: int):
        self.request, self.number = request, number
        self.num_drawn, self.is_done, self.error = 0, False, None  # type: int, bool, str | None
        self.live, self.evicted = 0, 0
        self.evicted_in_prompt = 0
        self.reading: Prefill | None = None
        self.num_scored = 0


class Drawn(NamedTuple):
    """Tokens of a row that are new.

    Attributes:
      row: whose they are.
      tokens: ids. There may be none among the last ones.
      logprobs: the log-probability that the model gave each, at temperature 1 and before any filter.
      likeliest: ``num_likeliest`` tokens with their log-probabilities for each one, the likeliest first; empty where
        none are asked for.
      of_prompt: True where these are tokens of the prompt, from its second one on.
      is_last: True where nothing comes after them.
    """

    row: Row
    tokens: list[int]
    logprobs: list[float]
    likeliest: list[dict[int, float]]
    of_prompt: bool = False
    is_last: bool = False


class Rows:
    """Rows of one decode loop; a sequence begins in one that is free, and frees it when it is done.

    Args:
      decoder: whose model.
      num_rows: sequences at a time; rounded up to a multiple of ``decoder.shards``.
      most: tokens of a sequence, prompt and new ones together, at most.

    Attributes:
      num_rows: sequences at a time.
      most: tokens of a sequence, at most.
      transfers: moves to another buffer so far.
      evicted: live keys that were evicted so far, over all layers, sequences and heads.
    """

    def __init__(self, decoder: Decoder, num_rows: int, most: int):
        self.decoder, self.most = decoder, most
        self.num_rows = -(-num_rows // decoder.shards) * decoder.shards
        self.transfers, self.evicted = 0, 0
        self._policy = decoder.policy.after_prompt()
        self.reset()

    def reset(self) -> None:
        """Ends all sequences and gives up the buffer."""
        for row in getattr(self, "_rows", []):
            if row is not None:
                row.is_done = True
        self._rows: list[Row | None] = [None] * self.num_rows
        self._reading: collections.deque[Row] = collections.deque()
        self._active: dict[int, Row] = {}  # in the loop
        self._to_clear: set[int] = set()
        self._in_flight: collections.deque[tuple[int, Segment, dict[int, Row]]] = collections.deque()
        self._loop: Loop | None = None
        self._num_dispatched = self._changed_at = 0
        self._may_shrink, self._arguments = False, None  # type: bool, tuple | None

    # --- what callers look at ---

    @property
    def num_busy(self) -> int:
        """Rows with a sequence."""
        return sum(row is not None for row in self._rows)

    @property
    def num_free(self) -> int:
        """Rows without a sequence."""
        return self.num_rows - self.num_busy

    @property
    def is_idle(self) -> bool:
        """True where ``advance`` has nothing to do: no sequence, and no buffer of ones that are gone."""
        return not self.num_busy and self._loop is None

    @property
    def live(self) -> int:
        """Live keys of all sequences in the loop, over layers and heads, when they were last looked at."""
        return sum(row.live for row in self._active.values())

    @property
    def allocated(self) -> tuple[int, int]:
        """Slots and bytes of the buffers, over all layers, rows and heads."""
        buffers = [] if self._loop is None else [self._loop.buffer]
        buffers += [row.reading.cache.buffer for row in self._reading if row.reading is not None]
        return sum(map(allocation.allocated_slots, buffers)), sum(map(allocation.allocated_bytes, buffers))

    # --- sequences ---

    def begin(self, request: RowRequest) -> Row:
        """Gives a sequence a free row; there must be one.

        Raises:
          UserError: the prompt is empty, has an unknown token, or the sequence is too long.
        """
        vocab_size, prompt = self.decoder.vocab_size, request.prompt
        if not prompt:
            raise UserError("the prompt has no token: give at least the one that begins a document.")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(f"the prompt has a token outside 0 … {vocab_size - 1}.")
        if len(prompt) + request.max_new_tokens > self.most:
            raise UserError(
                f"the prompt has {len(prompt):,} tokens and may get {request.max_new_tokens:,}: a sequence has at most "
                f"{self.most:,}."
            )
        # A device reads the prompt that its own row gets.
        number = next(number for number, row in enumerate(self._rows) if row is None)
        row = self._rows[number] = Row(request, number)
        self._reading.append(row)
        return row

    def release(self, row: Row) -> None:
        """Ends a sequence at once; its row is free. One that is done stays as it is."""
        if self._rows[row.number] is not row:
            return
        row.is_done = True
        self._rows[row.number] = None
        if self._active.pop(row.number, None) is not None:
            self._to_clear.add(row.number)
            self._arguments = None
        else:
            self._reading.remove(row)
            row.reading = None

    def advance(self, prompt_tokens: int | None = None) -> list[Drawn]:
        """Reads parts of prompts, and draws up to ``settings.segment`` tokens for each sequence that has begun.

        The next segment is under way when this returns the tokens of the one before.

        Args:
          prompt_tokens: of prompts, which are read before the loop goes on; None: ``settings.chunk``.
        """
        with jax.set_mesh(self.decoder.mesh):
            found = self._read_prompts(self.decoder.settings.chunk if prompt_tokens is None else prompt_tokens)
            if self._active:
                self._clear()
                self._dispatch()
            last, number = None, 0
            while len(self._in_flight) > (1 if self._active else 0):
                number, last = self._receive(found)
            if last is not None and last.lacks_capacity.any():
                while self._in_flight:  # some may have gone on, for rows were freed in between
                    number, last = self._receive(found)
                if self._active and last.lacks_capacity.any():
                    assert self._loop is not None
                    self._loop = grown(self.decoder, self._loop, self.most, last)
                    self.transfers += 1
                    self._changed_at = self._num_dispatched
            elif last is not None and self._active and number >= self._changed_at:
                self._tidy(last)
            if not self._active and self._loop is not None:
                self._loop = None  # the slots of nobody
                self._to_clear.clear()
        return found

    # --- prompts ---

    def _read_prompts(self, budget: int) -> list[Drawn]:
        found: list[Drawn] = []
        while self._reading and budget > 0:
            row = self._reading[0]
            if row.reading is None:
                row.reading = self._start_reading(row)
            read = row.reading.read()
            budget -= row.reading.chunk
            if row.request.scores_prompt:
                found += self._scores(row, read)
            if row.reading.is_done and not row.is_done:
                found.append(self._begin(row, row.reading))
            if row.reading.is_done or row.is_done:
                self._reading.popleft()
                row.reading = None
        return found

    def _shard(self, row: Row) -> int:
        return row.number // (self.num_rows // self.decoder.shards)

    def _start_reading(self, row: Row) -> Prefill:
        """Prepares the buffer that a prompt is read into: with one row for each device, the row's own is filled."""
        prompts: list[tuple[int, ...]] = [()] * self.decoder.shards
        prompts[self._shard(row)] = row.request.prompt
        length = len(row.request.prompt)
        room = min(1 << (length - 1).bit_length(), self.most) - length  # few sizes, few compilations
        return Prefill(self.decoder, prompts, room, self.most, _SMALLEST_CHUNK)

    def _scores(self, row: Row, read: Reads) -> list[Drawn]:
        """Returns the log-probabilities of the prompt's tokens that follow those of the chunk."""
        decoder, prompt = self.decoder, row.request.prompt
        shard, begin = self._shard(row), row.num_scored
        following = np.zeros(read.hidden.shape[:2], np.int32)
        tokens = prompt[begin + 1 : begin + 1 + following.shape[1]]
        following[shard, : len(tokens)] = tokens
        row.num_scored += following.shape[1]
        if not tokens:
            return []
        given = decoder.put(following, "batch", "sequence")
        count = self._num_likeliest([row])
        scored = loop.prompt_logprobs(
            decoder.parameters, read.hidden, given, structure=decoder.structure, num_likeliest=count
        )
        logprobs, likeliest = decoder.fetch(scored)
        own = logprobs[shard, : len(tokens)]
        if np.isnan(own).any():
            return [self._failed(row)]
        return [self._drawn(row, np.array(tokens), own, likeliest, shard, of_prompt=True)]

    def _begin(self, row: Row, reading: Prefill) -> Drawn:
        """Draws the first token behind a prompt, and puts the sequence into the loop unless it ends there."""
        decoder, request, shard = self.decoder, row.request, self._shard(row)
        row.evicted_in_prompt = row.evicted = int(np.asarray(decoder.fetch(reading.cache.evicted)).sum())
        self.evicted += row.evicted
        if not request.max_new_tokens:
            self._finish(row)
            return Drawn(row, [], [], [], is_last=True)
        drawn = loop.first_token(
            decoder.parameters,
            reading.hidden,
            decoder.put_rows(np.full(decoder.shards, request.sequence)),
            reading.cache.num_tokens,
            request.sampling.numbers,
            structure=decoder.structure,
            kind=request.sampling.kind,
            num_likeliest=self._num_likeliest([row]),
        )
        tokens, logprobs, likeliest = decoder.fetch(drawn)
        found = self._take(row, tokens[shard, None], logprobs[shard, None], _with_axis(likeliest), shard)
        if not row.is_done:
            self._insert(row, reading, int(tokens[shard]))
        return found

    def _insert(self, row: Row, reading: Prefill, token: int) -> None:
        """Copies the keys of a prompt into the row, and its state into the loop."""
        decoder, cache, request = self.decoder, reading.cache, row.request
        live, length = decoder.required_capacity(cache), len(request.prompt)
        slots = decoder.slots_ahead(live, length, request.max_new_tokens - 1, self.most)
        state = self._with_room(slots)
        groups = [group.num_layers for group in state.buffer]
        cache = decoder.move(cache, groups, [group.capacity for group in state.buffer])
        of_shard = np.full(decoder.shards, -1)
        of_shard[self._shard(row)] = row.number % (self.num_rows // decoder.shards)
        is_row = np.arange(self.num_rows) == row.number
        values = (token, request.prompt[-1], length, request.sequence, request.max_new_tokens - 1)
        start = RowStart(*(decoder.put_rows(np.full(self.num_rows, value)) for value in values))
        self._loop = loop.insert_rows(
            state, cache.buffer, decoder.put_rows(of_shard), decoder.put_rows(is_row).astype(bool), start
        )
        self._to_clear.discard(row.number)
        self._active[row.number] = row
        self._arguments, self._changed_at = None, self._num_dispatched

    # --- the loop ---

    def _with_room(self, slots: np.ndarray) -> Loop:
        """Returns the state of the loop with at least so many slots by layer; there may be none yet."""
        decoder = self.decoder
        if self._loop is None:
            layout, model = decoder.layout(slots, self.most), decoder.config.model
            shape = (model.num_layers, self.num_rows, model.num_kv_heads)
            evicted = decoder.put(np.zeros(shape, np.int32), None, "batch", "kv_heads")
            buffer = decoder.allocate(list(layout.layers), list(layout.slots), self.num_rows)
            self._loop = Loop(
                buffer=buffer,
                token=decoder.put_rows(np.zeros(self.num_rows)),
                before=decoder.put_rows(np.zeros(self.num_rows)),
                at=decoder.put_rows(np.zeros(self.num_rows)),
                sequence=decoder.put_rows(np.zeros(self.num_rows)),
                remaining=decoder.put_rows(np.zeros(self.num_rows)),
                done=decoder.put_rows(np.ones(self.num_rows)).astype(bool),
                evicted=evicted,
                read=0.0 * evicted,
                most=0 * evicted,
            )
            return self._loop
        cache = self._cache(self._loop)
        if np.any(slots > cache.capacities):
            self._move_to(np.maximum(slots, cache.capacities))
        return self._loop

    def _cache(self, state: Loop) -> Cache:
        return Cache(state.buffer, state.at, state.before, state.evicted, self.most)

    def _move_to(self, slots: np.ndarray) -> None:
        assert self._loop is not None
        cache = self.decoder.with_slots(self._cache(self._loop), slots)
        self._loop = self._loop._replace(buffer=cache.buffer)
        self.transfers += 1
        self._changed_at = self._num_dispatched

    def _clear(self) -> None:
        """Frees the slots of sequences that are gone."""
        if self._to_clear and self._loop is not None:
            is_cleared = np.isin(np.arange(self.num_rows), list(self._to_clear))
            self._loop = loop.clear_rows(self._loop, self.decoder.put_rows(is_cleared).astype(bool))
            self._to_clear.clear()
            self._may_shrink, self._changed_at = True, self._num_dispatched

    def _dispatch(self) -> None:
        """Starts the next segment and does not wait."""
        assert self._loop is not None
        decoder = self.decoder
        if self._arguments is None:
            self._arguments = self._of_rows()
        kind, numbers, stop, num_likeliest = self._arguments
        self._loop, segment = loop.decode_segment(
            decoder.parameters,
            self._loop,
            self._policy,
            numbers,
            stop,
            *decoder.eviction_in_loop,
            structure=decoder.structure,
            kind=kind,
            length=decoder.settings.segment,
            num_likeliest=num_likeliest,
        )
        self._in_flight.append((self._num_dispatched, segment, dict(self._active)))
        self._num_dispatched += 1

    def _of_rows(self) -> tuple:
        """Returns the kind of program for the rows, their numbers, stop tokens ``[b, m]``, and the likeliest tokens."""
        decoder, rows = self.decoder, list(self._active.values())
        kind, _ = by_row([row.request.sampling for row in rows])
        every = [self._active[n].request.sampling if n in self._active else Sampling() for n in range(self.num_rows)]
        numbers = jax.tree.map(lambda x: decoder.put(x, "batch"), by_row(every)[1])
        width = 1 << (max(1, *(len(row.request.stop_tokens) for row in rows)) - 1).bit_length()  # few shapes
        stop = np.full((self.num_rows, width), -1)
        for row in rows:
            stop[row.number, : len(row.request.stop_tokens)] = row.request.stop_tokens
        return kind, numbers, decoder.put(stop, "batch", None), self._num_likeliest(rows)

    def _num_likeliest(self, rows: list[Row]) -> int:
        wanted = any(row.request.num_likeliest for row in rows)
        return min(MAX_LIKELIEST, self.decoder.vocab_size) if wanted else 0

    def _receive(self, found: list[Drawn]) -> tuple[int, Segment]:
        """Waits for the oldest segment; adds its tokens to ``found``."""
        number, on_device, rows = self._in_flight.popleft()
        segment: Segment = self.decoder.fetch(on_device)
        for place, row in rows.items():
            if row.is_done:  # released meanwhile
                continue
            row.live = int(segment.live[place])
            evicted = row.evicted_in_prompt + int(segment.evicted[place])
            self.evicted += evicted - row.evicted
            row.evicted = evicted
            if count := int(segment.num_drawn[place]):
                tokens, logprobs = segment.tokens[place, :count], segment.logprobs[place, :count]
                found.append(self._take(row, tokens, logprobs, segment.likeliest, place))
        return number, segment

    def _take(self, row: Row, tokens, logprobs, likeliest: Likeliest | None, place: int) -> Drawn:
        """Counts the tokens of a row; it is done after its last one."""
        if np.isnan(logprobs).any():
            return self._failed(row)
        row.num_drawn += len(tokens)
        if row.num_drawn >= row.request.max_new_tokens or int(tokens[-1]) in row.request.stop_tokens:
            self._finish(row)
        return self._drawn(row, tokens, logprobs, likeliest, place)

    def _failed(self, row: Row) -> Drawn:
        """Ends a row whose logits are not numbers."""
        row.error = _NAN
        self._finish(row)
        return Drawn(row, [], [], [], is_last=True)

    def _drawn(self, row: Row, tokens, logprobs, likeliest: Likeliest | None, place: int, of_prompt=False) -> Drawn:
        """Makes the result of arrays of a row; ``likeliest`` is that of all rows."""
        count, wanted = len(tokens), row.request.num_likeliest
        best: list[dict[int, float]] = []
        if likeliest is not None and wanted:
            pairs = zip(
                likeliest.tokens[place, :count, :wanted], likeliest.logprobs[place, :count, :wanted], strict=True
            )
            best = [dict(zip(ids.tolist(), values.tolist(), strict=True)) for ids, values in pairs]
        return Drawn(row, tokens.tolist(), logprobs.tolist(), best, of_prompt, row.is_done)

    def _finish(self, row: Row) -> None:
        row.is_done = True
        self._rows[row.number] = None
        if self._active.pop(row.number, None) is not None:
            self._to_clear.add(row.number)
            self._arguments = None

    def _tidy(self, segment: Segment) -> None:
        """Compacts slots where attention reads many free ones, and moves to a smaller buffer where that is enough."""
        assert self._loop is not None
        shrinks = False
        if self._may_shrink:
            self._may_shrink = False
            wanted, has = self._wanted(np.asarray(segment.need)), self._cache(self._loop).capacities
            shrinks = _WORTH_SHRINKING * int(wanted.sum()) <= sum(has)
        if not shrinks and not is_wasteful(segment, self.decoder.settings.block):
            return
        buffer, _ = loop.compact(self._loop.buffer, self._loop.at)
        self._loop = self._loop._replace(buffer=buffer)
        self._changed_at = self._num_dispatched
        if shrinks:
            self._move_to(self._wanted(self.decoder.required_capacity(self._cache(self._loop))))

    def _wanted(self, live: np.ndarray) -> np.ndarray:
        """Returns the slots by layer that the sequences in the loop want, where their fullest heads have ``live``."""
        found = []
        for row in self._active.values():
            length, left = len(row.request.prompt) + row.num_drawn, row.request.max_new_tokens - row.num_drawn
            found.append(self.decoder.slots_ahead(live, length, left, self.most))
        return np.max(found, axis=0)


def _with_axis(likeliest: Likeliest | None) -> Likeliest | None:
    """Adds the axis of tokens to ``[b, n]``."""
    return None if likeliest is None else Likeliest(*(x[:, None] for x in likeliest))
