"""Time per decoded token: NAtS against its own full cache, and that against the greedy loop of `transformers`.

    python -m benchmarks.decode --output=docs           the tables of docs/decode.md, and docs/decode.json
    python -m benchmarks.decode --contexts=             without the curve
    python -m benchmarks.decode --no_transformers       ours alone

The model has SmolLM-135M's shape (30 layers, width 576, 9 heads over 3 KV heads of 64, tied embeddings of 49152 tokens,
float32) with random parameters, and caches hold random keys: speed depends on neither. Contestants:

* ``full``: our loop, every key kept;
* ``nats``: our loop, of which every head keeps the fraction ``--live`` of the context's keys, the window's
  among them;
* ``transformers``: ``model.generate``, greedy, with its default cache, where `transformers` is installed
  (``benchmarks.decode_transformers``); it has the parameters and the keys of ``full`` and must draw the same tokens
  with the same log-probabilities, or the program stops;
* ``static``: the same with its ``StaticCache``, which is not copied at every step.

A call generates ``--tokens`` tokens for every sequence of the batch after ``--context`` of them; the time of a step is
a call's over its steps, each of one token for every sequence. Every round times each contestant once, so that whatever
else the machine does hits all of them; a ratio is the median over rounds. Between calls the generated tokens are
removed.

The curve is of batch 1: ``full`` and ``nats`` by context, with the same number of live keys and with the same fraction.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside XLA's

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import ratio
from benchmarks.train_step import OtherLoad
from natsjax.config import Config, MeshConfig
from natsjax.decode import allocation
from natsjax.decode.buffer import AXES, LayerGroup, by_shard
from natsjax.decode.decoder import NO_LIMIT, Decoder
from natsjax.decode.loop import Loop, Segment, decode_segment
from natsjax.decode.sampling import Sampling
from natsjax.model import sharding
from natsjax.model.transformer import init_parameters, model_structure
from natsjax.policies.interval import FullAttention
from natsjax.policies.nats import Nats
from natsjax.runtime.files import try_files, unwritable
from natsjax.runtime.flags import Parser, run_command
from pallas_kernels.nats_attention import NO_END
from pallas_kernels.nats_attention.tiling import num_cores

VOCAB_SIZE = 49152

SIZES = {"layers": 30, "batch": 8, "context": 8192, "live": 0.1}
"""Sizes that ``BARS`` hold for."""

BARS = {"transformers / full": 1.0, "full / nats": 2.5, "transformers / nats": 2.5}
"""The least ratios of seconds that the project allows itself at ``SIZES``."""

MAX_DIFFERENCE = 1e-4
"""Largest difference of the log-probabilities of the tokens that ``full`` and its rivals draw."""


def config(num_layers: int) -> Config:
    """Returns SmolLM-135M's shape; a new scorer makes every token SLIDING, so that a key lives for the window."""
    return Config.from_dict(
        {
            "model": {
                "num_layers": num_layers,
                "embed_dim": 576,
                "num_heads": 9,
                "num_kv_heads": 3,
                "head_dim": 64,
                "mlp_dim": 1536,
            },
            "nats": {"initial_roles": (0.1, 0.1, 0.8), "window": 64},
            "data": {"source": "recall"},
        }
    )


class Row(NamedTuple):
    """The measurements of a contestant.

    Attributes:
      name: of it.
      batch: sequences.
      context: tokens of each before the call.
      live: keys that a head keeps.
      seconds: of a step, by round.
      cache_bytes: keys, values and what lies beside them; of ours what ``jax.live_arrays()`` gained.
      temporary_bytes: of our compiled segment, by its ``memory_analysis()``; None for others.
    """

    name: str
    batch: int
    context: int
    live: int
    seconds: list[float]
    cache_bytes: int
    temporary_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


class Contestant(Protocol):
    """A loop that generates tokens in a call; ``reset`` is called before each and is not timed."""

    def reset(self) -> None:
        """Frees the slots that were free."""
        ...

    def __call__(self) -> None:
        """Generates tokens: see ``Contestant``."""
        ...


def decoders(shape: Config) -> dict[str, Decoder]:
    """Builds the decoders of ``full`` and ``nats``, with the same parameters."""
    _, parameters = init_parameters(shape, VOCAB_SIZE, jax.random.key(0))
    # Less of the token in the stream and more of what was computed: else each would be followed by itself.
    parameters["embedding"] *= 0.1
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    model = model_structure(shape, VOCAB_SIZE)
    found = {policy.method: Decoder(shape, model, parameters, mesh, policy) for policy in (FullAttention(), Nats())}
    found["nats"].parameters = found["full"].parameters  # once in memory
    return found


def filled_loop(decoder: Decoder, batch: int, context: int, live: int, tokens: int, seed: int = 0) -> Loop:
    """Builds a loop after ``context`` tokens, of which every head keeps ``live``: at random indices, and the last ones.

    With ``Nats`` the last ones end one by one as new ones come, so that there are always as many.
    """
    rng, window = np.random.default_rng(seed), decoder.config.nats.window
    model = decoder.config.model
    shape = (batch, model.num_kv_heads)
    is_full = isinstance(decoder.policy, FullAttention)
    recent = min(live, context if is_full else window)
    position = np.sort(rng.choice(context - recent, live - recent, replace=False))
    position = np.concatenate([position, np.arange(context - recent, context)])
    end = np.full(live, NO_END)
    if not is_full:
        end[live - recent :] = position[live - recent :] + window + 1
    slots = allocation.round_up(live + (tokens if is_full else 1), decoder.settings.block)
    with jax.set_mesh(decoder.mesh):
        padded = [np.pad(x.astype(np.int32), (0, slots - live)) for x in (position, end)]
        groups = enumerate(decoder.allocate([model.num_layers], [slots], batch))
        buffer = tuple(_fill(group, *padded, live, jax.random.fold_in(jax.random.key(seed), n)) for n, group in groups)
        rows, by_head = np.ones(batch), np.zeros((model.num_layers, *shape))
        evicted = decoder.put(by_head, None, "batch", "kv_heads")
        return Loop(
            buffer,
            *(decoder.put_rows(rng.integers(0, VOCAB_SIZE, batch)) for _ in range(2)),
            decoder.put_rows(context * rows),
            decoder.put_rows(np.arange(batch)),
            decoder.put_rows(2**30 * rows),
            decoder.put_rows(0 * rows).astype(bool),
            evicted,
            0.0 * evicted,
            0 * evicted,
        )


@functools.partial(jax.jit, donate_argnames=("group",))
def _fill(group: LayerGroup, position: jax.Array, end: jax.Array, live: jax.Array, key: jax.Array) -> LayerGroup:
    """Fills every slot with random keys; the first ``live`` are used; int32 ``position`` and ``end`` are ``[c]``."""
    _, b, k, c, h = group.storage.shape

    @by_shard
    def set_layer(storage, number, both):
        return storage.set_layer(number, *both)

    def layer(number, storage):
        return set_layer(storage, number, jax.random.normal(jax.random.fold_in(key, number), (2, b, k, c, h)))

    storage = jax.lax.fori_loop(0, group.num_layers, layer, group.storage)
    numbers = (jnp.broadcast_to(x, group.key_end.shape) for x in (position, end))
    numbers = (sharding.reshard(x, *AXES[4]) for x in numbers)
    position, end = numbers
    length = jnp.full_like(group.length, live)
    return dataclasses.replace(group, storage=storage, key_position=position, key_end=end, length=length)


def live_bytes() -> int:
    """Returns the bytes of all live arrays of JAX."""
    return sum(x.nbytes for x in jax.live_arrays())


class Ours:
    """Our loop after a filled buffer; arguments as in ``filled_loop``."""

    def __init__(self, decoder: Decoder, batch: int, context: int, live: int, tokens: int):
        self.decoder, self.tokens, self.sizes = decoder, tokens, (batch, context, live)
        gc.collect()
        before = live_bytes()
        self.loop = filled_loop(decoder, batch, context, live, tokens)
        self.cache_bytes = live_bytes() - before
        self.start = jax.tree.map(jnp.copy, _without_storage(self.loop))
        self.segment: Segment | None = None

    def reset(self) -> None:
        """Slots that were free are free again."""
        stored = [group.storage for group in self.loop.buffer]
        loop = jax.tree.map(jnp.copy, self.start)
        pairs = zip(loop.buffer, stored, strict=True)
        buffer = tuple(dataclasses.replace(group, storage=storage) for group, storage in pairs)
        self.loop = jax.block_until_ready(loop._replace(buffer=buffer))

    def __call__(self) -> None:
        """See ``Contestant``."""
        arguments, static = self._arguments()
        with jax.set_mesh(self.decoder.mesh):
            self.loop, self.segment = decode_segment(*arguments, **static)
            if np.any(np.asarray(self.segment.num_drawn) != self.tokens):
                raise RuntimeError(f"{self.segment.num_drawn} tokens were generated; {self.tokens} were expected.")

    def layers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Returns keys and values of each layer without free slots, ``[b, k, c, h]``, for a rival."""
        live = self.sizes[-1]
        for group in self.loop.buffer:
            for number in range(group.num_layers):
                keys, values = (np.asarray(x)[:, :, :live] for x in group.storage.layer(jnp.int32(number)))
                yield keys, values

    def temporary_bytes(self) -> int:
        """Returns the bytes that the compiled segment allocates besides arguments and results."""
        arguments, static = self._arguments()
        with jax.set_mesh(self.decoder.mesh):
            return decode_segment.lower(*arguments, **static).compile().memory_analysis().temp_size_in_bytes

    def row(self, name: str, seconds: list[float], temporary_bytes: int | None = None) -> Row:
        """Builds the row of a race."""
        return Row(name, *self.sizes, [x / self.tokens for x in seconds], self.cache_bytes, temporary_bytes)

    def _arguments(self) -> tuple[tuple, dict[str, Any]]:
        decoder, sampling = self.decoder, Sampling()
        static = {"structure": decoder.structure, "kind": sampling.kind, "length": self.tokens}
        stop, limit = np.zeros(0, np.int32), jnp.int32(NO_LIMIT)
        return (decoder.parameters, self.loop, decoder.policy, sampling.numbers, stop, None, limit), static


def _without_storage(loop: Loop) -> Loop:
    return loop._replace(buffer=tuple(dataclasses.replace(group, storage=None) for group in loop.buffer))


def race(contestants: Mapping[Any, Contestant], rounds: int) -> dict[Any, list[float]]:
    """Times each contestant's call in each round, in seconds; each has been called before."""
    seconds: dict[Any, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            contestant.reset()
            began = time.perf_counter()
            contestant()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def rivals(full: Ours) -> dict[str, Any]:
    """Builds ``transformers`` and ``static`` with the keys of ``full``, which has been called once; or none.

    Raises:
      SystemExit: they draw other tokens than ``full`` did, or with other probabilities.
    """
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        print(f"{', '.join(absent)}: not installed, transformers is not timed.")
        return {}
    from benchmarks import decode_transformers as theirs

    theirs.torch.set_num_threads(num_cores())
    batch, context, _ = full.sizes
    model, first = full.decoder.config.model, np.asarray(full.start.token)
    module = theirs.llama(model, VOCAB_SIZE, context + full.tokens)
    theirs.take_over(module, jax.tree.map(np.asarray, full.decoder.parameters))
    found = {}
    for name, static in (("transformers", False), ("static", True)):
        found[name] = theirs.Greedy(module, full.layers(), first, full.tokens, static=static)
        difference, same = compare(full, *found[name].check())
        equal = f"{same} of {batch * full.tokens} tokens as full generates them"
        print(f"{name}: {equal}, log-probabilities within {difference:.1e}")
        if not difference <= MAX_DIFFERENCE:
            raise SystemExit(
                f"log-probabilities of full and {name} differ by {difference:.1e}: their times would not be of the "
                "same work."
            )
    return found


def compare(full: Ours, tokens: np.ndarray, logprobs: np.ndarray) -> tuple[float, int]:
    """Returns the largest difference of log-probabilities of the same tokens, and the number of equal tokens."""
    own = full.segment
    same = np.asarray(own.tokens) == tokens
    follows = np.cumprod(np.pad(same, ((0, 0), (1, 0)), constant_values=True), axis=1)[:, :-1].astype(bool)
    return float(np.abs(np.asarray(own.logprobs) - logprobs)[follows].max()), int(same.sum())


def measure(arguments: argparse.Namespace, by_policy: dict[str, Decoder]) -> list[Row]:
    """Measures the rows of the table."""
    batch, context, tokens = arguments.batch, arguments.context, arguments.tokens
    live = {"full": context, "nats": number_of(context, arguments.live)}
    ours = {name: Ours(by_policy[name], batch, context, live[name], tokens) for name in live}
    for contestant in ours.values():
        contestant()  # compiles
    others = {} if arguments.no_transformers else rivals(ours["full"])
    seconds = race(ours | others, arguments.rounds)
    rows = [loop.row(name, seconds[name], loop.temporary_bytes()) for name, loop in ours.items()]
    for name, rival in others.items():
        a_step = [x / tokens for x in seconds[name]]
        rows.append(Row(name, batch, context, context, a_step, rival.cache_bytes))
    return rows


def curve(arguments: argparse.Namespace, by_policy: dict[str, Decoder]) -> list[Row]:
    """Measures ``full`` and ``nats`` by context, batch 1: with the table's number of keys, and with its fraction."""
    constant = number_of(arguments.context, arguments.live)
    contestants = {}
    for context in arguments.contexts:
        for name, live in (
            ("full", context),
            ("constant", min(constant, context)),
            ("share", number_of(context, arguments.live)),
        ):
            decoder = by_policy["full" if name == "full" else "nats"]
            contestants[name, context] = Ours(decoder, 1, context, live, arguments.tokens)
            contestants[name, context]()  # compiles
    seconds = race(contestants, arguments.rounds)
    return [loop.row(name, seconds[name, context]) for (name, context), loop in contestants.items()]


def number_of(context: int, live: float) -> int:
    """Returns the number of keys of a fraction."""
    return max(1, round(live * context))


def ratios_of(rows: list[Row]) -> dict[str, float]:
    """Returns the ratios of seconds of two contestants: medians over rounds."""
    seconds = {row.name: row.seconds for row in rows}
    pairs = itertools.product(("transformers", "static", "full"), ("full", "nats"))
    return {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in pairs if a != b and a in seconds}


def verdict(name: str, value: float, sizes: Mapping[str, float]) -> str:
    """Formats a ratio, with its bar if there is one."""
    if name not in BARS or sizes != SIZES:
        return f"{value:.2f}"
    return f"{value:.2f} (≥ {BARS[name]:g}: {'met' if value >= BARS[name] else 'missed'})"


def print_table(rows: list[Row], sizes: Mapping[str, float]) -> None:
    """Prints the table as Markdown."""
    print("\n| contestant | keys of a head | ms a step | tokens/s | cache, MiB | temporaries, MiB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        temporary = "" if row.temporary_bytes is None else f"{row.temporary_bytes / 2**20:.1f}"
        cells = (row.name, row.live, f"{1e3 * row.median:.1f}", f"{row.batch / row.median:.1f}")
        print("|", *(f"{x} |" for x in (*cells, f"{row.cache_bytes / 2**20:.0f}", temporary)))
    print("\n| ratio of seconds | median |\n|---|---|")
    for name, value in ratios_of(rows).items():
        print(f"| {name} | {verdict(name, value, sizes)} |")


def print_curve(rows: list[Row]) -> None:
    """Prints milliseconds of a step, and the keys of a head, as Markdown."""
    by_name = {(row.name, row.context): row for row in rows}
    print("\n| tokens seen | full | nats, the same number live | nats, the same fraction live |\n|---|---|---|---|")
    for context in dict.fromkeys(row.context for row in rows):
        cells = [by_name[name, context] for name in ("full", "constant", "share")]
        print(f"| {context} |", *(f"{1e3 * row.median:.1f} ({row.live} keys) |" for row in cells))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(x) for x in text.split(",") if x]  # noqa: E731
    parser.add_argument("--layers", type=int, default=SIZES["layers"], help="of the model")
    parser.add_argument("--batch", type=int, default=SIZES["batch"], help="sequences")
    parser.add_argument("--context", type=int, default=SIZES["context"], help="tokens that each has in the cache")
    parser.add_argument("--live", type=float, default=SIZES["live"], help="fraction of them whose keys nats keeps")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate in a call, for each sequence")
    parser.add_argument("--rounds", type=int, default=7)
    contexts = [1024 * 2**n for n in range(6)]
    parser.add_argument("--contexts", type=numbers, default=contexts, help="of the curve; none: no curve")
    parser.add_argument("--no_transformers", action="store_true", help="ours alone")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="folder for decode.json")
    arguments = parser.parse_args(argv)
    for name in ("layers", "batch", "context", "tokens", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: it must be at least 1.")
    if min(arguments.contexts, default=1) < 1:
        parser.error(f"--contexts={min(arguments.contexts)}: a context has at least 1 token.")
    if not 0 < arguments.live <= 1:
        parser.error(f"--live={arguments.live}: it must be above 0, and at most 1.")
    if arguments.output is not None and not arguments.output.is_dir():
        parser.error(f"--output={arguments.output}: there is no such folder.")
    if arguments.output is not None:
        try:
            try_files([arguments.output / "decode.json"])
        except OSError as error:
            parser.error(str(unwritable(f"--output={arguments.output}", error)))
    return arguments


def versions() -> dict[str, str]:
    """Returns the versions of the contestants' libraries."""
    names = ("jax", "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name) is not None}


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    arguments = parse(argv)
    sizes = {name: getattr(arguments, name) for name in SIZES}
    about = {
        "device": jax.devices()[0].device_kind,
        "cpu_cores": num_cores(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **versions(),
        **sizes,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    by_policy = decoders(config(arguments.layers))
    load = OtherLoad()
    rows = measure(arguments, by_policy)
    print_table(rows, sizes)
    points = curve(arguments, by_policy) if arguments.contexts else []
    if points:
        print_curve(points)
    others, peak = load.share(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    share = "?" if others is None else f"{100 * others:.0f} %"
    print(f"\nOthers' share of the CPU: {share}. Most memory: {peak:.1f} GiB.")
    if arguments.output is not None:
        table = {"rows": rows, "curve": points}
        about |= {"others": others, "peak_gib": peak, "ratios": ratios_of(rows)}
        about |= {name: [row._asdict() for row in rows] for name, rows in table.items()}
        (arguments.output / "decode.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
