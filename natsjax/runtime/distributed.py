"""Several processes that train as one: how they find each other, fail together and stop together.

    distributed.initialize()           # joins the others; does nothing where there are none
    with distributed.fail_together():  # whatever ends one process ends them all, with its message
        ...

The processes are JAX's own (``jax.distributed``), and so is everything that they compute and save together. What JAX
lacks is a sentence for a person. Its client, when a process is missing, aborts with a stack trace that names nobody,
and a process that fails leaves the others in a collective until a heartbeat has been missed for 100 s, when they abort
as well. So a TCP line from every process to process 0 (``control_channel``), on the port that JAX's coordination
service takes over afterwards, carries the few words that are needed: who is here, who failed and why, who wants to
stop, who is done.

JAX's key-value store could carry these words only when everybody has joined, only through a private client, and not
past the death of a process, when the native client aborts. JAX's notice of preemption
(``multihost_utils.reached_preemption_sync_point``) works on CPU processes too, but it knows SIGTERM alone, looks once a
second, is undone by a Python handler of SIGTERM, and without one swallows the signal wherever nobody asks for the
notice. ``any_process`` keeps its promise, one common step, for whatever reason there is to stop.
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator
from typing import NoReturn

from natsjax.errors import UserError
from natsjax.runtime.control_channel import Hub, Line, Member, end_process

# Variables of launchers that JAX may not detect: then every process would train for itself.
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

_member: Member | None = None


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and saved; where there are several processes, all of them raise it."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the other processes, if this is one of several; to be called before anything touches a device.

    Without arguments, JAX's own detection finds which process this is (Cloud TPU, GKE, Slurm, Open MPI, Kubernetes); a
    process that is alone stays alone. ``num_processes=1`` turns detection off.

    Args:
      coordinator_address: host and port of process 0, ``HOST:PORT``, the same for all.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      UserError: the arguments do not fit, the processes contradict each other, or one did not join in time.
    """
    import jax  # here: a command reads its flags before it imports JAX

    global _member
    if jax.distributed.is_initialized():
        raise UserError(
            "jax.distributed is initialized already; call natsjax.runtime.distributed.initialize in its place."
        )
    place = _place(coordinator_address, num_processes, process_id, timeout)
    if place is None:
        return
    address, count, rank = place
    if rank == 0:
        lines = _gather(address, count, timeout)
        mine, lines[0] = (Line(end) for end in socket.socketpair())
        _member = Member(0, count, mine, Hub(lines))
    else:
        _member = Member(rank, count, _enter(address, count, rank, timeout))
    try:
        jax.distributed.initialize(address, count, rank, initialization_timeout=timeout)
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs it there handles signals
            # JAX's own handler would swallow the signal; the training loop puts a gentler one in place of this.
            signal.signal(signal.SIGTERM, _terminate)
    except BaseException as error:  # the others wait for this process
        _member.fail(error)


def is_main() -> bool:
    """Returns whether this is process 0, which logs and writes for all; touches no device."""
    if _member is not None:
        return _member.rank == 0
    jax = sys.modules.get("jax")
    known = getattr(jax, "distributed", None)  # None: not imported, or being imported
    return jax is None or known is None or not known.is_initialized() or jax.process_index() == 0


def label() -> str:
    """Returns ``"process 1 of 4: "`` where there are several, for lines that each of them logs; else nothing."""
    return "" if _member is None else f"process {_member.rank} of {_member.count}: "


def end(error: BaseException, status: int) -> NoReturn:
    """Ends this process at once, without cleaning up, and all others with it; from any thread.

    Args:
      error: the reason that the others report.
      status: the exit status.
    """
    if _member is not None:
        _member.fail(error)
    end_process(status)


def any_process(flag: bool) -> bool:
    """Returns whether any process has raised its flag: the same in all processes at the same call.

    All processes call it equally often, say once a step. When one of them raises its flag, all are told, and agree on
    the first call that none has made yet, from which on the answer is yes: a call or two later, where devices keep the
    processes in step. Until a flag is raised nothing waits: it costs a lock (a microsecond), no message and no device.

    Args:
      flag: of this process. One process alone gets it back.
    """
    return flag if _member is None else _member.any_process(flag)


def of_main(flag: bool) -> bool:
    """Returns the flag of process 0, in all processes; they wait for each other, and for what their devices do."""
    if _member is None:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.bool_(flag)))


def barrier(what: str) -> None:
    """Waits, however long, until all processes wait for the same thing, what one of them does alone, say.

    Touches no device; a failure of any process ends the wait, and the process. Inside ``fail_together``.

    Args:
      what: what they wait for, as ``"the data"``; reported when they wait for different things.
    """
    if _member is not None:
        _member.barrier(what)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Ends all processes when one of them ends before its time; goes around all that they do.

    The end waits until every process is there. An exception in one is told to the others, and each process ends at once
    (``os._exit``, for the others may sit in a collective) with one line on standard error and the same exit status:
    2 for a ``UserError``, 130 for an interruption, else 1. A process that dies without a word is named. Where all make
    the same mistake, process 0 alone reports it. ``Interrupted`` is no failure: all raise it, and it comes out.

    With one process alone this does nothing.
    """
    member = _member
    if member is None:
        yield
        return
    leaving: BaseException | None = None
    try:
        try:
            yield
        except (Interrupted, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code:
                raise
            leaving = error
        member.finish()
    except BaseException as error:
        member.fail(error)
    if leaving is not None:
        raise leaving


# ---------------------------------------------------------------------------------------------- which process is this


def _place(address: str | None, count: int | None, rank: int | None, timeout: int) -> tuple[str, int, int] | None:
    """Returns ``(coordinator_address, num_processes, process_id)``, or None for a process alone."""
    flags = {"--coordinator_address": address, "--num_processes": count, "--process_id": rank}
    if timeout <= 0:
        raise UserError(f"--initialization_timeout={timeout}: a positive number of seconds was expected.")
    if count is not None and count < 1:
        raise UserError(f"--num_processes={count}: at least one process was expected.")
    if count == 1 and address is None and rank in (None, 0):
        return None
    if all(value is None for value in flags.values()):
        return _detect(timeout)
    missing = [name for name, value in flags.items() if value is None]
    if address is None or count is None or rank is None:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: {', '.join(flags)} belong "
            "together; give all three, or none where JAX detects the cluster."
        )
    _host_and_port(address)
    if not 0 <= rank < count:
        raise UserError(f"--process_id={rank}: with --num_processes={count} it must be from 0 to {count - 1}.")
    return None if count == 1 else (address, count, rank)


def _detect(timeout: int) -> tuple[str, int, int] | None:
    """Detects the cluster as ``jax.distributed.initialize()`` would."""
    import jax
    from jax._src.clusters import ClusterEnv  # private: nothing public detects a cluster without joining it

    advice = (
        "give --coordinator_address=HOST:PORT, --num_processes and --process_id, or --num_processes=1 for a process "
        "that is alone"
    )
    try:
        address, count, rank, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout
        )
    except Exception as error:  # of whatever each kind of cluster asks: metadata servers, Kubernetes, DNS, variables
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"this looks like a cluster, but JAX cannot tell which process this is: {reason}; {advice}."
        ) from error
    if address is not None and count is not None and rank is not None:
        return None if count == 1 else (address, count, rank)
    for name in ("JAX_COORDINATOR_ADDRESS", *_LAUNCHED):
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"{name} = {os.environ[name]}, but JAX {jax.__version__} does not detect what launched this process; "
                f"{advice}."
            )
    return None


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator_address={address!r}: HOST:PORT was expected, as in 10.0.0.1:8476.")
    return host.removeprefix("[").removesuffix("]"), int(port)


# ------------------------------------------------------------------------------------------------------------ joining


def _gather(address: str, count: int, timeout: int) -> dict[int, Line]:
    """Waits, in process 0, for the lines of all others and returns them.

    The port is that of JAX's coordination service, so that a cluster needs no second one; it is free again on return.
    """
    lines: dict[int, Line] = {}
    odd: list[Line] = []
    problem = None
    deadline = time.monotonic() + timeout
    with _listen(address, timeout) as listener:
        while problem is None and len(lines) < count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                line = Line(listener.accept()[0])
            except TimeoutError:
                problem = _missing(set(range(1, count)) - set(lines), address, count, timeout)
                break
            hello = line.first(timeout=2) or {}
            rank, their_count = hello.get("process_id"), hello.get("num_processes")
            if not isinstance(rank, int):
                line.close()  # a port scanner, or a JAX program that is not this one
            elif their_count != count:
                problem = f"process {rank} was started with --num_processes={their_count} and process 0 with {count}."
                odd.append(line)
            elif rank in lines and not lines[rank].is_broken():
                problem = f"two processes were started with --process_id={rank}; each needs its own."
                odd.append(line)
            else:
                lines[rank] = line
    for line in [*lines.values(), *odd]:
        line.send(**({"go": True} if problem is None else {"refused": problem}))
    if problem is not None:
        raise UserError(problem)
    return lines


def _listen(address: str, timeout: float) -> socket.socket:
    """Opens a socket on the port of process 0, on all interfaces as JAX's own."""
    port = _host_and_port(address)[1]
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    give_up = time.monotonic() + min(timeout / 2, 10)  # an earlier run may be just ending
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < give_up:
                time.sleep(0.5)
                continue
            raise UserError(
                f"process 0 cannot listen on port {port} (--coordinator_address={address}): "
                f"{os.strerror(error.errno or 0)}; choose another port, the same for all processes."
            ) from error


def _missing(ranks: Collection[int], address: str, count: int, timeout: int) -> str:
    """Returns the sentence about processes that did not join."""
    names = [str(rank) for rank in sorted(ranks)]
    if len(names) > 8:
        names = [*names[:8], f"{len(names) - 8} more"]
    if len(names) == 1:
        return (
            f"process {names[0]} of {count} did not join within {timeout} s; is it running and can it reach {address}?"
        )
    return (
        f"processes {', '.join(names[:-1])} and {names[-1]} of {count} did not join within {timeout} s; are they "
        f"running and can they reach {address}?"
    )


def _enter(address: str, count: int, rank: int, timeout: int) -> Line:
    """Connects another process than the first to process 0; returns its line when all are there."""
    host_and_port = _host_and_port(address)
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        try:
            end = socket.create_connection(host_and_port, timeout=min(left, 5))
        except OSError:  # not there yet, nor perhaps its name
            time.sleep(min(left, 0.3))
            continue
        line = Line(end)
        if end.getsockname() != end.getpeername():  # a port of this machine that nobody listens on can answer itself
            line.send(process_id=rank, num_processes=count)
            # Process 0 decides when it is too late; it may have started later than this one.
            answer = line.first(timeout + 10) or {}
            if "go" in answer:
                return line
            if "refused" in answer:
                raise UserError(answer["refused"])
        line.close()  # it ended, or it is something else, an earlier run say
        time.sleep(0.3)
    raise UserError(
        f"process 0 of {count} did not answer at {address} within {timeout} s; is it running, and can this machine "
        "reach that address?"
    )


def _terminate(number, frame):
    raise KeyboardInterrupt(signal.Signals(number).name)
