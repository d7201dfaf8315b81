"""Numbers of the server for Prometheus, each declared once."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """The numbers of one server; the attributes are written where things happen, and read by ``/metrics``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "natsjax_requests", "Answers, by path and HTTP status", ["path", "status"], registry=registry
        )
        self.disconnects = Counter(
            "natsjax_disconnects", "Requests whose client left before the end", registry=registry
        )
        self.sequences = Counter(
            "natsjax_sequences",
            "Texts that ended, by reason: stop, length, cancelled, error",
            ["reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter("natsjax_prompt_tokens", "Tokens of prompts that got a row", registry=registry)
        self.tokens = Counter("natsjax_generated_tokens", "Tokens that were drawn", registry=registry)
        self.first_token = Histogram(
            "natsjax_first_token_seconds", "From the request to its first token", buckets=_SECONDS, registry=registry
        )
        self.seconds = Histogram(
            "natsjax_sequence_seconds", "From the request to its last token", buckets=_SECONDS, registry=registry
        )
        self.queue_length = Gauge("natsjax_queue_length", "Sequences that wait for a row", registry=registry)
        self.rows = Gauge("natsjax_rows", "Rows of the decode loop", registry=registry)
        self.rows_busy = Gauge("natsjax_rows_busy", "Rows with a sequence", registry=registry)
        self.kv_live = Gauge("natsjax_kv_live_keys", "Live keys, over all layers, rows and KV heads", registry=registry)
        self.kv_allocated = Gauge("natsjax_kv_allocated_slots", "Slots for keys, over the same", registry=registry)
        self.kv_bytes = Gauge(
            "natsjax_kv_allocated_bytes", "Memory of these slots, on all devices together", registry=registry
        )
        self.kv_evicted = Counter("natsjax_kv_evicted_keys", "Live keys that were evicted", registry=registry)
        self.kv_transfers = Counter(
            "natsjax_kv_transfers", "Moves of the keys to a buffer of another size", registry=registry
        )

    def text(self) -> bytes:
        """Returns all numbers in Prometheus's text format."""
        return generate_latest(self.registry)
