"""Text from a trained run, streamed while it is sampled, and the size of its KV cache.

    python -m natsjax.generate --workdir=DIR --prompt=TEXT [--role_bias=F] [--max_kv=N] [--mesh=data=2,tensor=4]

A prompt is read as documents began in training: BOS, then its tokens. Prompts and their continuations go to standard
output, in the order of the prompts; warnings and the closing line go to standard error.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, cast

import jax

from natsjax.config import Config, MeshConfig
from natsjax.config_fields import real_path
from natsjax.data import Tokenizer
from natsjax.decode import generation
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.decode.generation import Generation
from natsjax.decode.sampling import Sampling
from natsjax.errors import UserError
from natsjax.generate.flags import READING_TEMPERATURE
from natsjax.generate.text_stream import Printer
from natsjax.policies.base import DecodingPolicy, Policy
from natsjax.runs.load import LoadedRun, load
from natsjax.runs.workdir import Workdir
from natsjax.runtime import signals
from natsjax.runtime.files import check_files, make_folder, unwritable


@dataclasses.dataclass(frozen=True)
class Generated:
    """Results of ``run``.

    Attributes:
      prompts: token ids of each prompt, BOS included.
      texts: the continuation of each prompt, without the prompt; None where tokens stand for no text.
      total: tokens, log-probabilities, times and sizes; numbers are those of all batches (``total``).
      batches: the same for each batch.
      policy: how long keys lived.
      notes: warnings, a sentence each.
    """

    prompts: list[list[int]]
    texts: list[str] | None
    total: Generation
    batches: list[Generation]
    policy: Policy
    notes: list[str]

    def summary(self) -> str:
        """Returns the closing line."""
        found, batches = self.total, f" in {len(self.batches)} batches" if len(self.batches) > 1 else ""
        num_new = sum(map(len, found.tokens))
        text = (
            f"{_count(len(self.prompts), 'prompt')}{batches}, {_count(found.prompt_tokens, 'prompt token')}, "
            f"{_count(num_new, 'output token')}; first token after {found.first_token_seconds:.3g} s"
        )
        if found.steady_tokens:
            speed = found.steady_tokens / found.steady_seconds
            text += f", {speed:,.1f} tokens/s after that (less what had to be compiled)"
        elif num_new > len(self.prompts):  # one segment, which compiles: its speed means nothing
            text += f", the last after {found.seconds:.3g} s"
        numbers = "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in self.policy.setting.items())
        text += f"; KV under {self.policy.method}{numbers}: "
        if not math.isnan(found.kv_live):
            text += f"{found.kv_live:.1f} live keys a head on average, at most {found.kv_live_max:,}; "
        largest = max(batch.kv_allocated_bytes for batch in self.batches)
        text += (
            f"{found.kv_allocated:,} slots allocated ({_bytes(largest)}{' at a time' if batches else ''}) where full "
            f"attention would hold {found.kv_full:,} ({100 * found.kv_allocated / found.kv_full:,.1f} %)"
        )
        if found.evicted:
            text += f"; {_count(found.evicted, 'live key')} evicted"
        if found.transfers:
            text += f"; {_count(found.transfers, 'transfer')} to larger buffers"
        return f"{text}."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(size: int) -> str:
    unit = min(int(math.log2(max(size, 1))) // 10, 3)
    return f"{size / 1024**unit:.3g} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def total(batches: Sequence[Generation]) -> Generation:
    """Adds up batches that ran one after another.

    Times, tokens, slots, bytes, evicted keys and transfers are sums, ``kv_live`` is the mean over all queries,
    ``kv_live_max`` and ``capacities`` are the largest, and ``first_token_seconds`` is the first batch's.
    """
    sums = (
        "prompt_tokens",
        "seconds",
        "steady_seconds",
        "steady_tokens",
        "kv_allocated",
        "kv_allocated_bytes",
        "kv_full",
        "evicted",
        "transfers",
    )
    queries = [sum(len(tokens) - 1 for tokens in batch.tokens) for batch in batches]
    read = sum(batch.kv_live * count for batch, count in zip(batches, queries, strict=True) if count)
    values: dict[str, Any] = {name: sum(getattr(batch, name) for batch in batches) for name in sums}
    return Generation(
        tokens=[tokens for batch in batches for tokens in batch.tokens],
        logprobs=[logprobs for batch in batches for logprobs in batch.logprobs],
        first_token_seconds=batches[0].first_token_seconds,
        kv_live=read / sum(queries) if sum(queries) else math.nan,
        kv_live_max=max(batch.kv_live_max for batch in batches),
        capacities=[max(layer) for layer in zip(*(batch.capacities for batch in batches), strict=True)],
        **values,
    )


def run(
    workdir: str | os.PathLike[str],
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(temperature=READING_TEMPERATURE),  # noqa: B008 (frozen)
    stop_tokens: Sequence[int] = (),
    ignore_eos: bool = False,
    policy: DecodingPolicy | None = None,
    settings: DecodeSettings | None = None,
    batch_size: int = 8,
    mesh_config: MeshConfig | None = None,
    prepared_dir: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    stream: TextIO | None = None,
    echo: bool = True,
    warn: Callable[[str], None] | None = None,
    loaded: LoadedRun | None = None,
    checkpoint: str | int = "newest",
) -> Generated:
    """Continues prompts with a checkpoint of a run.

    Args:
      workdir: of the run, or an export.
      prompts: texts, which get BOS before them; or token ids, which are taken as they are.
      max_new_tokens: tokens to sample for each prompt, at most.
      sampling: the rule; ``Sampling()`` is greedy. A prompt's tokens do not depend on the batches.
      stop_tokens: a prompt is done after one of these ids, or after EOS.
      ignore_eos: continue after EOS.
      policy: how long keys live; None: the model's roles, or full attention for a dense model.
      settings: of decoding.
      batch_size: prompts at a time.
      mesh_config: devices; None: as the run was trained, where that is possible.
      prepared_dir: folder of the prepared corpus; None: beside the run, or where the run had it.
      output: a file to write: a JSON object a line and prompt, with its text, ids and log-probabilities.
      stream: gets text while it is sampled (ids where there is no text); None: nothing is written.
      echo: whether a prompt is written before its continuation.
      warn: called with each of ``Generated.notes``, before anything is sampled.
      loaded: the run, when it is in memory already.
      checkpoint: "newest", "best" or a step, as in ``natsjax.load``.

    Raises:
      UserError: there is no run, a prompt or a number does not fit, or there are several processes.

    Example:
      >>> from natsjax import generate
      >>> from natsjax.policies import Nats
      >>> found = generate.run("runs/quickstart", ["Fellow citizens"], policy=Nats(role_bias=-0.3))
      >>> print(found.texts[0], found.summary())
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} = {value}: it is too small; choose 1 or more.")
    if jax.process_count() > 1:
        raise UserError(f"there are {jax.process_count()} processes, and natsjax.generate runs as one; start one.")
    if output is not None and not os.path.exists(os.path.expanduser(output)):
        check_files(f"--output={os.fspath(output)}", [output])
    this = loaded
    if this is None:
        mesh_config = default_mesh(Workdir(workdir).read_config()) if mesh_config is None else mesh_config
        this = load(workdir, prepared_dir=prepared_dir, mesh_config=mesh_config, checkpoint=checkpoint)
    tokenizer = this.tokenizer if isinstance(this.tokenizer, Tokenizer) else None
    ids = [_token_ids(this, number, prompt) for number, prompt in enumerate(prompts, 1)]
    if not ids:
        raise UserError("prompts = []: there is no prompt; give one or several.")
    _check_ids("stop_tokens", stop_tokens, this.tokenizer.vocab_size)
    stop = {*stop_tokens, *(() if tokenizer is None or ignore_eos else (tokenizer.eos_id,))}
    decoder = Decoder.of_run(this, policy, settings)
    notes = _notes(ids, max_new_tokens, this.config.data.context_length)
    batches = []
    with (
        _writer(output) as write,
        Printer(stream, tokenizer, ids, stop, max_new_tokens, echo, output is not None) as printer,
    ):
        if warn is not None:
            for note in notes:
                warn(note)
        printer.begin()
        for first in range(0, len(ids), batch_size):
            part = slice(first, first + batch_size)
            with _sentence_where_memory_ends():
                found = generation.generate(
                    decoder,
                    ids[part],
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    stop_tokens=sorted(stop),
                    on_tokens=printer.of_batch(first),
                    first_sequence=first,
                )
            batches.append(found)
            write(_records(tokenizer, prompts[part], ids[part], found))
    texts = None if tokenizer is None else [tokenizer.decode(tokens) for batch in batches for tokens in batch.tokens]
    return Generated(ids, texts, total(batches), batches, cast(Policy, decoder.policy), notes)


@contextlib.contextmanager
def _sentence_where_memory_ends() -> Iterator[None]:
    """Replaces JAX's report of full memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the memory of the devices is too small for this; make --batch_size, --max_new_tokens or --chunk smaller, "
            "keep fewer keys (--role_bias, --max_kv), or take more devices (--mesh)."
        ) from error


def default_mesh(config: Config) -> MeshConfig | None:
    """Returns None, the mesh of training, unless that divides sequences, which decoding does not."""
    return None if config.mesh.context == 1 else MeshConfig()


def _token_ids(this: LoadedRun, number: int, prompt: str | Sequence[int]) -> list[int]:
    tokenizer = this.tokenizer
    if not isinstance(prompt, str):
        if not len(prompt):
            raise UserError(f"prompt {number}: it has no token; give at least the one that begins a document.")
        _check_ids(f"prompt {number}", prompt, tokenizer.vocab_size)
        return [int(token) for token in prompt]
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(
            f"prompt {number}: {this.workdir.path} is a recall run, whose tokens stand for no text; give ids, as in "
            "--prompt_tokens=0,5,7."
        )
    ids = signals.interruptible(lambda: tokenizer.encode(prompt))  # a library takes minutes for a prompt of many MB
    return [tokenizer.bos_id, *ids.tolist()]


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: there is no id {token}; the vocabulary has the ids 0 … {vocab_size - 1}.")


def _notes(prompts: list[list[int]], num_new: int, trained: int) -> list[str]:
    """Returns at most one warning: text will be longer than the contexts of training."""
    longest = max(range(len(prompts)), key=lambda n: len(prompts[n]))
    length = len(prompts[longest])
    if length + num_new <= trained:
        return []
    more = "" if length > trained else f" and may get {num_new:,} more"
    return [
        f"prompt {longest + 1} has {_count(length, 'token')}{more}, but the run was trained on contexts of {trained:,} "
        "(data.context_length): beyond that, nobody knows how good the text is."
    ]


@contextlib.contextmanager
def _writer(output: str | os.PathLike[str] | None) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Gives a function that writes objects to the file, a line each, and at once."""
    if output is None:
        yield lambda _: None
        return
    try:
        make_folder(real_path(output).parent)
        file = open(os.path.expanduser(output), "w", encoding="utf-8")  # noqa: SIM115 (closed below; only opening fails)
    except OSError as error:
        raise unwritable(f"--output={os.fspath(output)}", error) from error

    def write(records: list[dict[str, Any]]) -> None:
        try:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what is still in its buffer would fail again
                file.close()
            raise unwritable(f"--output={os.fspath(output)}", error) from error

    with file:
        yield write


def _records(
    tokenizer: Tokenizer | None, prompts: Sequence[str | Sequence[int]], ids: list[list[int]], found: Generation
) -> list[dict[str, Any]]:
    """Returns the objects of ``output``."""

    def text_of(tokens: list[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(tokens)

    return [
        {
            "prompt": prompt if isinstance(prompt, str) else text_of(prompt_tokens),
            "prompt_tokens": prompt_tokens,
            "text": text_of(tokens),
            "tokens": tokens,
            "logprobs": logprobs,
        }
        for prompt, prompt_tokens, tokens, logprobs in zip(prompts, ids, found.tokens, found.logprobs, strict=True)
    ]
