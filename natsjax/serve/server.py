"""The server from its beginning to its end: a run is loaded, requests are answered, and a signal stops it."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import jax
import uvicorn

from natsjax.config import MeshConfig
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.decode.rows import Rows
from natsjax.errors import UserError
from natsjax.generate.texts import default_mesh
from natsjax.policies.base import LARGEST, DecodingPolicy
from natsjax.runs.load import LoadedRun, load
from natsjax.runs.workdir import Workdir
from natsjax.runtime import distributed
from natsjax.runtime.log import logger
from natsjax.serve.app import STOPPING, Service
from natsjax.serve.engine import Engine
from natsjax.serve.metrics import Metrics

_LAST_SECONDS = 5.0
"""Time for what is cut off to end by itself."""


def run(
    workdir: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 8,
    max_queue: int = 64,
    max_length: int | None = None,
    max_body: int = 1 << 20,
    segment: int = 8,
    grace_seconds: float = 30.0,
    api_key: str | None = None,
    model_name: str | None = None,
    policy: DecodingPolicy | None = None,
    settings: DecodeSettings | None = None,
    mesh_config: MeshConfig | None = None,
    prepared_dir: str | os.PathLike[str] | None = None,
    checkpoint: str | int = "newest",
    loaded: LoadedRun | None = None,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serves completions of a run until SIGINT or SIGTERM comes; the main thread must call it.

    Args:
      workdir: of the run, or an export.
      host: address to listen on.
      port: 0: any that is free.
      rows: sequences that are generated at a time.
      max_queue: sequences that wait; with more, requests get status 429.
      max_length: tokens of a sequence, prompt and new ones; None: ``data.context_length``.
      max_body: bytes of a request.
      segment: tokens that are drawn before new requests are looked at, and streamed together.
      grace_seconds: time that running requests get at the end.
      api_key: that clients must give; None: none.
      model_name: by which clients ask for the run; None: the name of its folder.
      policy: how long keys live; None: the model's roles, or full attention for a dense model.
      settings: of decoding, whose ``segment`` is not used.
      mesh_config: devices; None: as the run was trained, where that is possible.
      prepared_dir: folder of the prepared corpus; None: beside the run, or where the run had it.
      checkpoint: "newest", "best" or a step, as in ``natsjax.load``.
      loaded: the run, when it is in memory already.
      on_start: called with the server's URL when it listens.

    Raises:
      UserError: there is no run, a number does not fit, or the address cannot be used.

    Example:
      >>> from natsjax import serve
      >>> serve.run("runs/quickstart", port=8000)
    """
    counts = {"rows": rows, "max_body": max_body, "segment": segment, "max_length": max_length}
    for name, value in counts.items():
        if value is not None and not 1 <= value < LARGEST:
            raise UserError(f"{name} = {value}: choose a number from 1 to {LARGEST - 1}.")
    if not 0 <= max_queue < LARGEST:
        raise UserError(f"max_queue = {max_queue}: choose 0 or more.")
    if not 0 <= grace_seconds < 1e6:
        raise UserError(f"grace_seconds = {grace_seconds}: choose 0 or more.")
    if jax.process_count() > 1:
        raise UserError(f"there are {jax.process_count()} processes, and natsjax.serve runs as one; start one.")
    with contextlib.closing(_bound(host, port)) as listener:
        this = loaded
        if this is None:
            mesh_config = default_mesh(Workdir(workdir).read_config()) if mesh_config is None else mesh_config
            this = load(workdir, prepared_dir=prepared_dir, mesh_config=mesh_config, checkpoint=checkpoint)
        settings = dataclasses.replace(DecodeSettings() if settings is None else settings, segment=segment)
        trained = this.config.data.context_length
        most = trained if max_length is None else max_length
        if most > trained:
            logger.warning(
                f"warning: max_length = {most:,}, but the run was trained on contexts of {trained:,} "
                "(data.context_length): beyond that, nobody knows how good the text is."
            )
        if api_key is None and not _is_loopback(listener):
            logger.warning(f"warning: {host} can be reached from other machines, and no key is asked for.")
        decoder = Decoder.of_run(this, policy, settings)
        metrics = Metrics()
        engine = Engine(Rows(decoder, rows, most), max_queue, metrics)
        name = this.workdir.path.resolve().name if model_name is None else model_name
        with _sentence_of_address(host, port):  # another server may have come to listen there meanwhile
            listener.listen()
        asyncio.run(_serve(this, engine, metrics, name, api_key, max_body, listener, grace_seconds, on_start))
    if not engine.join(_LAST_SECONDS):  # inside a library, where nothing reaches it
        distributed.end(KeyboardInterrupt("stopped"), 0)


async def _serve(
    this: LoadedRun,
    engine: Engine,
    metrics: Metrics,
    name: str,
    api_key: str | None,
    max_body: int,
    listener: socket.socket,
    grace_seconds: float,
    on_start: Callable[[str], None] | None,
) -> None:
    service = Service(this, engine, metrics, name, api_key, max_body)
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    server = _Server(
        uvicorn.Config(
            service.app(),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace_seconds + _LAST_SECONDS) + 1,
        )
    )
    engine.start()
    loop = asyncio.get_running_loop()

    def cut() -> None:
        service.is_cut.set()
        engine.cut(STOPPING)

    def stop(which: signal.Signals) -> None:
        if server.should_exit:  # the second one
            cut()
            return
        logger.info(f"{which.name}: no more requests are taken; running ones get {grace_seconds:g} s.")
        engine.stop()
        server.should_exit = True
        loop.call_later(grace_seconds, cut)

    for which in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(which, stop, which)
    url = _url(listener)
    kv = engine.rows.decoder.policy
    logger.info(
        f"serving {name} (step {this.step:,}, {kv.method}) at {url}/v1: {engine.rows.num_rows} rows, "
        f"{engine.max_queue} places to wait, sequences of up to {engine.rows.most:,} tokens."
    )
    if on_start is not None:
        on_start(url)
    try:
        await server.serve(sockets=[listener])
    finally:
        cut()
    logger.info("stopped.")


class _Server(uvicorn.Server):
    """uvicorn's, without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket with the address; nobody can connect yet."""
    if not 0 <= port < 2**16:
        raise UserError(f"port = {port}: choose one from 0 to {2**16 - 1}; 0 is any that is free.")
    with _sentence_of_address(host, port), contextlib.ExitStack() as opened:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = opened.enter_context(socket.socket(family, kind, protocol))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        opened.pop_all()
    return listener


@contextlib.contextmanager
def _sentence_of_address(host: str, port: int) -> Iterator[None]:
    """Raises what the system refuses as a sentence about the address."""
    try:
        yield
    except (OSError, UnicodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"host = {host}, port = {port}: nobody can listen there ({reason}); choose others.") from error


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
