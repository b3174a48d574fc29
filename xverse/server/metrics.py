"""WHAT HAPPENS -> NUMBERS. Prometheus metrics, each meaning what vLLM's of that name means."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from xverse.server.messages import Load

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2, 4, 8, 15, 30, 60, 120, 300)
GAPS = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2, 5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000, 200000)


class EngineCounts(Collector):
    """Counters that the engine keeps; they go on where an engine process has been replaced."""

    def __init__(self, model: str) -> None:
        self._model, self._restarts = model, 0
        self._before = Load()
        self.now = Load()

    def set_restarts(self, count: int) -> None:
        """How often an engine process was started anew."""
        self._restarts = count

    def update(self, load: Load) -> None:
        """The engine's latest word; one that counts less is a new engine's."""
        now, before = self.now, self._before
        if load.preempted < now.preempted or load.reused_tokens < now.reused_tokens:
            self._before = Load(
                preempted=before.preempted + now.preempted,
                reused_tokens=before.reused_tokens + now.reused_tokens,
            )
        self.now = load

    def collect(self) -> list[Metric]:
        """For Prometheus."""
        return [
            self._counter("engine_restarts", "Engine processes started anew.", self._restarts),
            self._counter(
                "num_preemptions",
                "Sequences whose pages were taken away for a time.",
                self._before.preempted + self.now.preempted,
            ),
            self._counter(
                "prefix_cache_hits",
                "Prompt tokens found in shared pages instead of computed.",
                self._before.reused_tokens + self.now.reused_tokens,
            ),
        ]

    def _counter(self, name: str, says: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"xverse:{name}", says, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.engine = EngineCounts(model)
        self.registry.register(self.engine)
        self._model = model
        self.running = self._gauge("num_requests_running", "Sequences in the engine's steps.")
        self.waiting = self._gauge("num_requests_waiting", "Sequences in either queue.")
        self.queued_now = self._gauge("num_requests_queued", "Requests in the bounded queue.")
        self.slots_used = self._gauge("num_slots_used", "Sequences let through to the engine.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Used share of KV pages, 0 to 1.")
        self.ready = self._gauge("engine_ready", "1 while requests can be answered.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens read.")
        self.generated = self._counter("generation_tokens", "Tokens of answers.")
        self.queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked for in shared pages."
        )
        self.first_token = self._histogram("time_to_first_token_seconds", SECONDS)
        self.gap = self._histogram("inter_token_latency_seconds", GAPS)
        self.whole = self._histogram("e2e_request_latency_seconds", SECONDS)
        self.queued = self._histogram("request_queue_time_seconds", SECONDS)
        self.prompt_size = self._histogram("request_prompt_tokens", TOKENS)
        self.answer_size = self._histogram("request_generation_tokens", TOKENS)
        self._finished = self._labelled("request_success", "Answers.", "finished_reason")
        self._rejected = self._labelled("request_rejections", "Requests refused.", "reason")
        self._http = Counter(
            "xverse:http_requests",
            "HTTP requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )

    def note_load(self, load: Load, queued: int) -> None:
        """What the engine tells of itself after each step, and how many wait before it."""
        self.engine.update(load)
        self.running.set(load.running)
        self.waiting.set(load.waiting + queued)
        self.kv_usage.set(load.pages_used / load.pages)

    def finished(self, reason: str) -> None:
        """An answer ended so: stop, length or abort."""
        self._finished.labels(self._model, reason).inc()

    def rejected(self, reason: str) -> None:
        """A request was not let in, with this error code."""
        self._rejected.labels(self._model, reason).inc()

    def http(self, route: str, status: int) -> None:
        """A request was answered so."""
        self._http.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, says: str) -> Gauge:
        gauge = Gauge(f"xverse:{name}", says, ["model_name"], registry=self.registry)
        return gauge.labels(self._model)

    def _counter(self, name: str, says: str) -> Counter:
        counter = Counter(f"xverse:{name}", says, ["model_name"], registry=self.registry)
        return counter.labels(self._model)

    def _labelled(self, name: str, says: str, label: str) -> Counter:
        return Counter(f"xverse:{name}", says, ["model_name", label], registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        says = name.replace("_", " ").capitalize() + "."
        histogram = Histogram(
            f"xverse:{name}", says, ["model_name"], buckets=buckets, registry=self.registry
        )
        return histogram.labels(self._model)
