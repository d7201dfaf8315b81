"""What one GPU can tell in nine minutes: are the kernels right, how fast is attention, which layers learn best.

    python -m benchmarks.accelerator --input=TRAIN --validation_input=VALIDATION --output=FOLDER
    python -m benchmarks.accelerator --corpus=data/novels --output=FOLDER
    python -m benchmarks.accelerator --smallest --input=TRAIN --validation_input=VALIDATION --output=FOLDER    on a CPU

Phases, each in a process of its own with a time limit; one that fails does not stop the next:

1. the attention kernels and the decode attention against oracles in float64 (``benchmarks.accelerator_checks``);
2. attention of 32k tokens beside cuDNN and FlexAttention (contestants of ``benchmarks.attention``);
3. the arms of a study (``benchmarks.study``) on equal tokens: a first round, whose speed tells how many tokens fit in
   the time that is left, and a second one with these.

Text is prepared while the kernels are checked. Every result is in ``--output`` as soon as it is there.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from benchmarks import accelerator_checks as checks
from benchmarks import isolated, study
from benchmarks.accelerator_checks import Check
from benchmarks.attention import race, ratio
from benchmarks.attention_contestants import Case, Contestant, Inputs, inputs, jax_rival, ours, torch_rivals
from natsjax.config import Config
from natsjax.data import Corpus
from natsjax.errors import UserError
from natsjax.runs.workdir import Workdir, read_metrics
from natsjax.runtime.files import append
from natsjax.runtime.flags import Parser, run_command
from pallas_kernels.nats_attention import api, tuning_table
from pallas_kernels.nats_attention.tiling import num_cores

T = TypeVar("T")

KERNELS, TIMES, TRAINING, CURVES = "kernels.jsonl", "times.jsonl", "training.jsonl", "curves.jsonl"
DEVICE, SUMMARY, LOG, ERRORS = "device.json", "summary.txt", "log.txt", "errors.txt"
FILES = (KERNELS, TIMES, TRAINING, CURVES, DEVICE, SUMMARY, LOG, ERRORS)

SECONDS = 540
GRACE = 25
"""Seconds for a check or a race that has begun when the time of its phase is over: what takes longer hangs."""
PHASE_SECONDS = {"device": 60, "pallas_gpu": 75, "xla": 40, "decoding": 30, "times": 80}
VOCAB_SIZE = 8192
PASSES = ("exact", "sampled", "visible")
CASES = (
    Case(32768, 0.05, 64, num_heads=16, num_kv_heads=16, head_dim=64, dtype="bfloat16"),
    Case(32768, 0.05, 64, num_heads=16, num_kv_heads=4, head_dim=64, dtype="bfloat16"),
    Case(8192, 0.05, 64, num_heads=16, num_kv_heads=16, head_dim=64, dtype="bfloat16"),
)
REPEATS = 20
SMALLEST_PASSES = ("visible",)
SMALLEST_CASES = (Case(128, 0.05, 16, num_heads=2, num_kv_heads=1, head_dim=16, dtype="float32"),)
SMALLEST_REPEATS = 2
FIRST_STEPS = 200
USABLE = 5
"""How many times its tolerance an error may be for training to use the backend."""
FRACTION_USED = 0.9
"""Fraction of the remaining time that the second round is planned to take."""
WORTH_IT = 2
"""How many times the steps of the first round the second one must have."""
SMALLEST_STEPS = 2
SMALLEST_FIELDS = {
    "model.dtype": "float32",
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "model.mlp_dim": 16,
    "model.key_shift": False,
    "model.token_shift": False,
    "nats.kv_budget": 0.5,
    "optimizer.name": "adamw",
    "data.context_length": 64,
    "train.batch_size": 2,
    "train.log_every": 1,
    "eval.num_contexts": 4,
    "eval.num_calibration_contexts": 2,
    "eval.batch_size": 2,
}
CURVE_FIELDS = ("step", "cross_entropy", "kv_fraction", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Output:
    """The folder of the results, into which every result goes at once."""

    folder: pathlib.Path

    def say(self, text: str) -> None:
        """Prints lines, and adds them to ``summary.txt``."""
        print(text, flush=True)
        self._append(SUMMARY, text)

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds a record to a file of JSON lines."""
        self._append(name, json.dumps(record))

    def fail(self, phase: str, reason: str, details: str = "") -> None:
        """Reports a failure in one line; its traceback goes to ``errors.txt``."""
        self.say(f"{phase} failed: {reason}" + (f" (traceback in {ERRORS})" if details else ""))
        self._append(ERRORS, f"{phase}: {reason}\n{details}")

    def _append(self, name: str, text: str) -> None:
        with open(self.folder / name, "ab", buffering=0) as file:
            append(file, f"{text}\n".encode())

    def records(self, name: str) -> list[dict[str, Any]]:
        """Reads the records of a file of JSON lines."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@dataclasses.dataclass
class Session:
    """One run of all phases.

    Attributes:
      output: the folder of the results.
      end: ``time.monotonic()`` at which it has to be over.
      smallest: whether everything is as small as it can be, on a CPU.
      failures: phases, arms and checks that did not do what they should.
    """

    output: Output
    end: float
    smallest: bool
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def seconds_for(self, phase: str) -> float:
        """Returns the seconds that a phase may take; a CPU may have other work, and takes what is left."""
        return self.seconds_left if self.smallest else min(PHASE_SECONDS[phase], self.seconds_left)

    def call(self, phase: str, function: Callable[..., T], *arguments: Any, seconds: float) -> T | None:
        """Returns ``function(*arguments)``, computed in a process of its own; None, and a line that says so, if not."""
        try:
            limit = min(seconds, self.seconds_left)
            return isolated.call(function, *arguments, seconds=limit, log=self.output.folder / LOG)
        except isolated.CallFailed as failure:
            self.failures.append(phase)
            self.output.fail(phase, str(failure), failure.details)
            return None


class Verdict(NamedTuple):
    """Outcome of a backend's checks.

    Attributes:
      serves: it computes on this device, and no check hung.
      right: no check failed, and no error is far beyond its tolerance.
    """

    serves: bool
    right: bool


def device() -> dict[str, Any]:
    """Describes the device that JAX uses, and the versions of what computes."""
    first = jax.devices()[0]
    return {
        "platform": jax.default_backend(),
        "device": first.device_kind,
        "compute_capability": getattr(first, "compute_capability", None),
        "devices": jax.device_count(),
        "cpu_cores": num_cores(),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
    }


def check_kernels(session: Session, name: str, listed: Callable[[], list[Check]]) -> Verdict:
    """Runs the checks of a backend, and says what was found."""
    seconds = session.seconds_for(name)

    def run() -> tuple[int, str]:
        try:
            found = listed()
        except NotImplementedError as reason:
            return 0, f"skipped: {reason}"
        left_out = checks.run(found, functools.partial(session.output.add, KERNELS), time.monotonic() + seconds)
        return len(found), f"{left_out} for want of time not run"

    phase = f"checks of {name}"
    ended = session.call(phase, run, seconds=seconds + GRACE)
    records = [record for record in session.output.records(KERNELS) if record["group"] == name]
    if not records:
        if ended is not None:
            session.output.say(f"{phase} {ended[1]}")
        return Verdict(serves=False, right=False)
    wrong = [record for record in records if not record.get("within")]
    largest = ", ".join(f"{what} {error:.1e}" for what, error in _largest_errors(records).items())
    session.output.say(
        f"{phase}: {len(records) - len(wrong)} of {len(records)} within their tolerances"
        + (f", {ended[1]}" if ended else "")
        + f"; largest errors: {largest}"
    )
    for record in wrong:
        what = " ".join(str(record[name]) for name in record if name not in checks.FOUND)
        reason = record.get("refused") or record.get("failed", "").strip().rpartition("\n")[2]
        session.output.say(f"  {what}: {reason or record['errors']}")
    if wrong:
        session.failures.append(phase)
    return Verdict(
        serves=ended is not None and any("errors" in record for record in records),
        right=ended is not None and all(checks.is_close(record, times=USABLE) for record in records),
    )


def _largest_errors(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the largest error of each result, dtype and precision."""
    largest: dict[str, float] = {}
    for record in records:
        for result, error in record.get("errors", {}).items():
            what = f"{result if record['kind'] == 'roles' else record['kind']} {record['dtype']}"
            what += f" ({record['precision']})" if "precision" in record else ""
            largest[what] = float(np.maximum(largest.get(what, 0.0), error))  # NaN too
    return largest


def time_attention(output: Output, smallest: bool, implementation: str, end: float) -> None:
    """Times attention beside its rivals.

    Forward and backward are timed for every gradient of the masked-out pairs; rivals have no roles, so a round has each
    rival once beside all of them. A record is written before FlexAttention, which compiles for long, and with it.
    """
    platform = jax.default_backend()
    for case in SMALLEST_CASES if smallest else CASES:
        given = inputs(case)
        for kinds in (("forward",), SMALLEST_PASSES if smallest else PASSES):
            if time.monotonic() > end:
                return
            failures: dict[str, str] = {}
            contestants: list[Contestant] = []
            for stage in _stages(case, given, kinds, implementation, platform):
                for name, build in stage:
                    contestants += _that_work(name, build, failures)
                output.add(TIMES, _times(case, kinds, contestants, failures, implementation, smallest))


def _stages(
    case: Case, given: Inputs, kinds: Sequence[str], implementation: str, platform: str
) -> Iterator[list[tuple[str, Callable[[], list[Contestant]]]]]:
    """Yields names of contestants and what builds them; a race follows each list."""
    tiling = tuning_table.choose(implementation, api.BACKENDS[implementation], case.problem)

    def own(kind: str) -> list[Contestant]:
        return ours(case, given, kind, {kind: tiling}, implementation)[0]

    def dense() -> list[Contestant]:
        rival = jax_rival(case, given, kinds[0], platform)
        return [] if rival is None else [rival]

    def sparse() -> list[Contestant]:
        return list(torch_rivals(case, given, kinds[0], platform))

    names = ("cudnn", "flex") if platform == "gpu" else ("jax", "torch")
    yield [*((kind, functools.partial(own, kind)) for kind in kinds), (names[0], dense)]
    yield [(names[1], sparse)]


def _that_work(name: str, build: Callable[[], list[Contestant]], failures: dict[str, str]) -> list[Contestant]:
    """Builds contestants and calls each once; of one that cannot be called, ``failures`` gets the traceback."""
    try:
        found = build()
        for contestant in found:
            contestant.call()
        return found
    except Exception:
        failures[name] = traceback.format_exc()
        return []


def _times(
    case: Case,
    kinds: Sequence[str],
    contestants: list[Contestant],
    failures: Mapping[str, str],
    implementation: str,
    smallest: bool,
) -> dict[str, Any]:
    """Times contestants in turn; returns a record with seconds of every round, medians, and ratios rival / ours."""
    seconds = race(contestants, SMALLEST_REPEATS if smallest else REPEATS)
    own = [name for name in seconds if name in kinds]
    rivals = [name for name in seconds if name not in kinds]
    return {
        **case._asdict(),
        "implementation": implementation,
        "pass": "forward" if kinds == ("forward",) else "forward and backward",
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {rival: {name: ratio(seconds[rival], seconds[name]) for name in own} for rival in rivals},
        "rounds": seconds,
        "failures": dict(failures),
    }


def report_times(session: Session) -> None:
    """Says the last record of each case and pass."""
    latest = {}
    for record in session.output.records(TIMES):
        latest[tuple(record[name] for name in (*Case._fields, "pass"))] = record
    for record in latest.values():
        heads = f"{record['num_heads']} heads over {record['num_kv_heads']} of {record['head_dim']}"
        medians = ", ".join(f"{name} {1e3 * x:.3f} ms" for name, x in record["median_seconds"].items())
        ratios = ", ".join(
            f"{rival} / {name} {x:.2f}" for rival, found in record["ratios"].items() for name, x in found.items()
        )
        session.output.say(
            f"{record['implementation']}, {record['length']} tokens, {heads}, {record['dtype']}, {record['pass']}: "
            f"{medians}; {ratios}"
        )
        for name, details in record["failures"].items():
            session.failures.append(f"timing {name}")
            session.output.fail(f"timing {name}", details.strip().rpartition("\n")[2], details)


def affordable_steps(runs: Sequence[Mapping[str, Any]], tokens_per_step: int, seconds: float) -> int:
    """Returns how many steps each arm can take so that all together take ``seconds``.

    Args:
      runs: records of an earlier round, with ``seconds``, ``tokens`` and ``tokens_per_second``. What a run took beside
        its steps (compilation, evaluation) is taken to be the same again.
      tokens_per_step: of every arm.
      seconds: for all arms.
    """
    beside = sum(max(0.0, run["seconds"] - run["tokens"] / run["tokens_per_second"]) for run in runs)
    a_step = sum(tokens_per_step / run["tokens_per_second"] for run in runs)
    return max(0, int((seconds - beside) / a_step))


def train_arms(session: Session, arms: study.Study, refused: Sequence[str], folder: pathlib.Path) -> None:
    """Trains and measures the arms of a study, in two rounds of equal tokens; the smallest has the first alone."""
    steps, trained = SMALLEST_STEPS if session.smallest else FIRST_STEPS, list(arms.arms)
    runs = _train_round(session, arms, trained, 1, steps, refused, folder)
    if session.smallest or not runs:
        return
    config = Config.from_stored(runs[0]["config"])
    tokens_per_step = config.train.batch_size * config.data.context_length
    more = affordable_steps(runs, tokens_per_step, FRACTION_USED * session.seconds_left)
    if more < WORTH_IT * steps:
        session.output.say(f"no second round: {more} steps would fit in the {session.seconds_left:.0f} s left")
        return
    _train_round(session, arms, [run["arm"] for run in runs], 2, more, refused, folder)


def _train_round(
    session: Session,
    arms: study.Study,
    names: Sequence[str],
    number: int,
    steps: int,
    refused: Sequence[str],
    folder: pathlib.Path,
) -> list[dict[str, Any]]:
    """Trains and measures arms for so many steps each; returns the records of those that did not fail."""
    lasting = {"train.num_steps": steps, "optimizer.warmup_steps": steps // 10}
    longer = dataclasses.replace(arms, common={**arms.common, **lasting})
    found = []
    for position, arm in enumerate(names):
        phase = f"training of {arm}, round {number}"
        # In the first round one arm must not take the time of the others; the second is planned.
        seconds = session.seconds_left / (len(names) - position if number == 1 else 1)
        workdir = folder / f"{number}-{position}"
        began = time.monotonic()
        try:
            config = longer.config_of(arm, arms.seeds[0])
        except UserError as error:
            session.failures.append(phase)
            session.output.fail(phase, str(error))
            continue
        ended = session.call(
            phase, _train_arm, arm, arms.seeds[0], config, workdir, refused, folder / "compiled", seconds=seconds
        )
        metrics = Workdir(workdir).metrics_file
        for line in read_metrics(metrics) if metrics.exists() else []:  # also those of a run that was stopped
            curve = {name: line[name] for name in CURVE_FIELDS if name in line}
            session.output.add(CURVES, {"arm": arm, "round": number, **curve})
        record = study.read_record(workdir)
        if not ended or record is None:
            continue
        found.append({**record, "seconds": time.monotonic() - began})
        session.output.add(TRAINING, {"round": number, **found[-1]})
        session.output.say(
            f"{arm}: {record['tokens']:,} tokens in {found[-1]['seconds']:.0f} s with compilation and evaluation, "
            f"{record['tokens_per_second']:,.0f} tokens/s, loss {record['loss']:.4f}, KV {record['kv_fraction']:.2%}"
        )
    if found:
        session.output.say(f"\nRound {number}, {found[0]['tokens']:,} tokens each:")
        for reference in dict.fromkeys([next(iter(arms.arms)), arms.reference]):
            session.output.say(study.table(found, reference))
    return found


def _train_arm(
    arm: str, seed: int, config: Config, workdir: pathlib.Path, refused: Sequence[str], compiled: pathlib.Path
) -> bool:
    """Trains and measures a run without the backends of attention that are refused, in a process of its own."""
    for name in refused:
        del api.BACKENDS[name]
    if jax.default_backend() != "cpu":  # rounds share what they have in common
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    study.run_one(arm, seed, config, workdir)
    return True


class Preparation:
    """A corpus that is there, or is being prepared by another process."""

    def __init__(self, arguments: argparse.Namespace, folder: pathlib.Path, log: pathlib.Path):
        self._process: subprocess.Popen | None = None
        self.corpus: pathlib.Path = arguments.corpus or folder / "corpus"
        if arguments.corpus is not None:
            return
        tokenizer = ["--tokenizer=byte"] if arguments.smallest else [f"--vocab_size={VOCAB_SIZE}"]
        command = [sys.executable, "-m", "natsjax.data.prepare", f"--input={arguments.input}", "--no-progress"]
        command += [f"--validation_input={arguments.validation_input}", f"--output={self.corpus}", *tokenizer]
        with open(log, "ab") as stream:
            # It tokenizes: the GPU is for the others.
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            self._process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)

    def wait(self, seconds: float) -> dict[str, Any]:
        """Returns the fields of ``data`` for the corpus.

        Raises:
          CallFailed: it is not there in time, or cannot be read.
        """
        if self._process is not None:
            try:
                status = self._process.wait(max(seconds, 0))
            except subprocess.TimeoutExpired:
                raise isolated.CallFailed(f"not done after {seconds:.0f} more seconds") from None
            if status:
                raise isolated.CallFailed(f"natsjax.data.prepare ended with exit status {status}; see {LOG}")
        try:
            tokenizer = Corpus.load(self.corpus).tokenizer
        except UserError as error:
            raise isolated.CallFailed(str(error)) from error
        fields = {"data.prepared_dir": str(self.corpus), "data.input": "", "data.tokenizer": tokenizer.kind}
        return fields | {"data.vocab_size": tokenizer.vocab_size}

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="text to train on, as natsjax.data.prepare takes it")
    parser.add_argument("--validation_input", help="text to measure on, likewise")
    parser.add_argument("--corpus", type=pathlib.Path, help="a prepared corpus instead")
    parser.add_argument(
        "--output", type=pathlib.Path, default=os.environ.get("OUT"), help="folder of the results (default: $OUT)"
    )
    parser.add_argument(
        "--study",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "studies" / "accelerator.py",
        help="study file whose arms are trained",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything (default: %(default)s)")
    parser.add_argument("--smallest", action="store_true", help="every phase at its smallest, on a CPU")
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        parser.error("--output: a folder for the results is needed where $OUT is not set")
    if (arguments.corpus is None) == (arguments.input is None or arguments.validation_input is None):
        parser.error("a corpus is needed: either --corpus, or both --input and --validation_input")
    return arguments


def main() -> int:
    """Runs all phases; the exit status is 1 if one of them failed or a kernel is wrong."""
    began = time.monotonic()
    arguments = parse()
    arms = study.read_study(arguments.study)
    if arguments.smallest:
        jax.config.update("jax_platforms", "cpu")
        arms = dataclasses.replace(arms, arms={arm: {**fields, **SMALLEST_FIELDS} for arm, fields in arms.arms.items()})
    # PyTorch and processes beside ours need memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="accelerator-", ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        found = _device(folder)
        if found["platform"] != "gpu" and not arguments.smallest:
            raise UserError(
                f"there is no GPU: JAX computes on {found['device']} ({found['platform']}); --smallest runs every "
                "phase on a CPU, at its smallest."
            )
        output = new_output(arguments.output)
        (output.folder / DEVICE).write_text(json.dumps(found) + "\n", encoding="utf-8")
        output.say(f"{found['device']}, {found['cpu_cores']} CPU cores, Python {found['python']}, jax {found['jax']}")
        session = Session(output, began + arguments.seconds, arguments.smallest)
        preparation = Preparation(arguments, folder, output.folder / LOG)
        try:
            _phases(session, arms, preparation, folder)
        finally:
            preparation.end()
        failures = f"failed: {', '.join(session.failures)}" if session.failures else "nothing failed"
        output.say(f"{time.monotonic() - began:.0f} s; {failures}")
    return 1 if session.failures else 0


def _device(folder: pathlib.Path) -> dict[str, Any]:
    log = folder / LOG
    try:
        return isolated.call(device, seconds=PHASE_SECONDS["device"], log=log)
    except isolated.CallFailed as failure:
        raise UserError(f"there is no device that JAX can use: {failure}.") from failure


def new_output(folder: pathlib.Path) -> Output:
    """Makes the folder of the results.

    Raises:
      UserError: it has results, or cannot be made.
    """
    earlier = [name for name in FILES if (folder / name).exists()]
    if earlier:
        raise UserError(f"--output={folder}: it has results of an earlier run ({earlier[0]}); name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={folder}: it cannot be made ({error.strerror}); name another folder.") from error
    return Output(folder)


def _phases(session: Session, arms: study.Study, preparation: Preparation, folder: pathlib.Path) -> None:
    """Checks, times and trains."""
    smallest = session.smallest
    listed = {
        "pallas_gpu": checks.interpreted_gpu_checks if smallest else checks.gpu_checks,
        "xla": checks.smallest_xla_checks if smallest else checks.xla_checks,
        "decoding": checks.smallest_decode_checks if smallest else checks.decode_checks,
    }
    found = {name: check_kernels(session, name, listed_checks) for name, listed_checks in listed.items()}
    gpu = found["pallas_gpu"]
    implementation = "pallas_gpu" if gpu.serves and not smallest else "xla"
    refused = [] if gpu.right or smallest else ["pallas_gpu"]
    for name in refused:
        session.output.say(f"training does without {name}; attention is timed with {implementation}")
    seconds = session.seconds_for("times")
    end = time.monotonic() + seconds
    session.call("times", time_attention, session.output, smallest, implementation, end, seconds=seconds + GRACE)
    report_times(session)
    try:
        fields = preparation.wait(session.seconds_left)
    except isolated.CallFailed as failure:
        session.failures.append("the corpus")
        session.output.fail("the corpus", str(failure))
        return
    arms = dataclasses.replace(arms, common={**arms.common, **fields})
    train_arms(session, arms, refused, folder)


if __name__ == "__main__":
    run_command(main)
