"""The engine and the pages without a process: whatever fails or is cut off in between, each request gets an answer."""

import asyncio
import json
import signal
import socket
import threading

import httpx
import pytest
import tiny
from processes import free_port

from natsjax import serve
from natsjax.data.tokenizers import ByteTokenizer
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.decode.rows import RowRequest, Rows
from natsjax.errors import UserError
from natsjax.serve import app, server
from natsjax.serve.engine import Engine, QueueFullError, StoppingError
from natsjax.serve.metrics import Metrics

MOST = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny.config(data={"source": "none", "context_length": MOST})
    return tiny.make_export(tmp_path_factory.mktemp("serve") / "run", config, ByteTokenizer())


@pytest.fixture(scope="module")
def decoder(run):
    return Decoder.of_run(run, settings=DecodeSettings(chunk=32, segment=4))


class Heard:
    """A job that keeps what it hears."""

    def __init__(self, max_new_tokens=1):
        self.request = RowRequest((256, 97), max_new_tokens)
        self.tokens, self.errors, self.has_ended = [], [], threading.Event()

    def take(self, drawn):
        self.tokens += drawn.tokens
        if drawn.is_last:
            self.has_ended.set()
        return "length" if drawn.is_last else None

    def fail(self, message):
        self.errors.append(message)
        self.has_ended.set()


def started(decoder, num_rows, max_queue, **methods):
    """A running engine; ``methods`` take the place of those of its rows."""
    engine = Engine(Rows(decoder, num_rows, MOST), max_queue, Metrics())
    vars(engine.rows).update(methods)
    engine.start()
    return engine


def ended(engine, jobs):
    """Waits for jobs, and for the end of the engine."""
    for job in jobs:
        assert job.has_ended.wait(240)
    engine.stop()
    assert engine.join(240)
    assert engine.rows.num_busy == engine.rows.live == 0
    assert engine.rows.allocated == (0, 0)


def test_a_job_on_its_way_into_a_row_has_a_place(decoder):
    """While one of two jobs leaves the queue, which has one place beside one row, there is no room for a third."""
    taken = []

    def begin(request):
        if not taken:  # the first one; the second one waits
            try:
                engine.submit([Heard()])
                taken.append(True)
            except QueueFullError:
                taken.append(False)
        raise UserError("it is not needed.")

    engine = started(decoder, 1, 1, begin=begin)
    jobs = [Heard(), Heard()]
    engine.submit(jobs)
    ended(engine, jobs)
    assert taken == [False]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_job_is_lost_where_the_engine_ends(decoder):
    """Two leave the queue together, and the first one ends the engine: the second one is in no list but hears of it."""

    def begin(request):
        raise RuntimeError("as no row ever does")

    engine = started(decoder, 2, 5, begin=begin)
    jobs = [Heard() for _ in range(4)]
    engine.submit(jobs)
    ended(engine, jobs)
    assert [len(job.errors) for job in jobs] == [1] * 4
    assert all("its log has the reason" in job.errors[0] for job in jobs)
    with pytest.raises(StoppingError):
        engine.submit([Heard()])


def test_where_memory_ends_what_runs_gets_a_sentence_and_the_rest_goes_on(decoder):
    def advance():
        del engine.rows.advance  # the next time it is that of the class
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    engine = started(decoder, 2, 5, advance=advance)
    jobs = [Heard() for _ in range(3)]
    engine.submit(jobs)
    ended(engine, jobs)
    assert ["memory of the devices" in "".join(job.errors) for job in jobs] == [True, True, False]
    assert (len(jobs[2].tokens), jobs[2].errors) == (1, [])


# --- pages ---


class Pages:
    """The application of a run, whose engine has ``methods`` in place of those of its rows."""

    def __init__(self, run, decoder, **methods):
        self.engine = started(decoder, 2, 2, **methods)
        self.service = app.Service(run, self.engine, Metrics(), "run", None, 1000)
        self._app = self.service.app()

    async def ask(self, path, **options):
        transport = httpx.ASGITransport(app=self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request("POST" if options else "GET", path, **options)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_cut_off_says_so_though_its_engine_is_busy(run, decoder, stream):
    """A program that is being compiled cannot be interrupted, and takes minutes."""
    is_busy, may_end = threading.Event(), threading.Event()

    def advance():
        is_busy.set()
        may_end.wait(240)
        return []

    pages = Pages(run, decoder, advance=advance)

    async def scenario():
        body = {"prompt": "a", "stream": stream}
        asked = asyncio.ensure_future(pages.ask("/v1/completions", json=body))
        await asyncio.to_thread(is_busy.wait, 240)
        pages.engine.cut(app.STOPPING)
        pages.service.is_cut.set()
        return await asked

    answer = asyncio.run(scenario())
    may_end.set()
    assert pages.engine.join(240)
    if stream:
        error, end, _ = answer.text.split("\n\n")
        assert end == "data: [DONE]"
        found = json.loads(error.removeprefix("data: "))
    else:
        assert answer.status_code == 503
        found = answer.json()
    assert "is being stopped" in found["error"]["message"]


def test_a_body_that_does_not_come_and_a_server_that_stops(run, decoder, monkeypatch):
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.05)
    pages = Pages(run, decoder)

    async def slow_body():
        yield b'{"prompt": '
        await asyncio.sleep(240)

    async def scenario():
        late = await pages.ask("/v1/completions", content=slow_body())
        well = await pages.ask("/health")
        pages.engine.stop()
        return late, well, await pages.ask("/health"), await pages.ask("/v1/completions", json={"prompt": "a"})

    late, well, stopping, refused = asyncio.run(scenario())
    assert (late.status_code, well.status_code, stopping.status_code, refused.status_code) == (408, 200, 503, 503)
    assert "did not come within" in late.json()["error"]["message"]
    assert "is being stopped" in refused.json()["error"]["message"]


# --- the address ---


def test_whoever_hears_of_the_address_can_connect(run, caplog):
    heard = []

    def connect(url):
        heard.append(url)
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 60).close()
        signal.raise_signal(signal.SIGTERM)

    serve.run(run.workdir.path, port=0, loaded=run, on_start=connect)
    (url,) = heard
    assert f"serving run (step 7, nats) at {url}/v1" in caplog.text, "by the name of its folder"


def test_an_address_that_another_takes_while_the_run_is_loaded(run, monkeypatch):
    """Two sockets may be bound to it; who listens first has it."""
    port = free_port()
    with socket.socket() as other:

        def load(*_, **__):
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))
            other.listen()
            return run

        monkeypatch.setattr(server, "load", load)
        with pytest.raises(UserError, match=f"port = {port}: nobody can listen there"):
            serve.run(run.workdir.path, port=port)
