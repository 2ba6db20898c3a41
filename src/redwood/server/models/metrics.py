"""Metrics of several models: what each counts, with a label `model`, and what the server counts.

Models come from the operator, so that nothing that a client sends becomes a label here either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from redwood.server.metrics import Metrics

_P = "redwood:"
_OF_SERVER = {
    f"{_P}{name}"
    for name in (
        "requests",
        "requests_cancelled",
        "connections_dropped",
        "num_requests_preparing",
    )
}


class JoinedMetrics(Metrics):
    """Metrics of a server with several models.

    Args:
        version: of Redwood.
        names: of the models.

    Attributes: `models`: the metrics of each model by its name; `loads`, `unloads`: counted by
    model, and result or reason.
    """

    def __init__(self, version: str, names: tuple[str, ...]) -> None:
        super().__init__(version, names[0])
        self.models: Mapping[str, Metrics] = {name: Metrics(version, name) for name in names}
        for each in self.models.values():
            each.cancelled = self.cancelled
        registry, label = self.registry, ("model",)
        self.loads = Counter(
            _P + "model_loads", "Loads, by result.", ("model", "result"), registry=registry
        )
        self.unloads = Counter(
            _P + "model_unloads", "Unloads, by reason.", ("model", "reason"), registry=registry
        )
        self._loaded = Gauge(_P + "model_loaded", "1 while loaded.", label, registry=registry)
        self._bytes = Gauge(
            _P + "model_memory_bytes", "What its weights take.", label, registry=registry
        )

    def watch_model(
        self, name: str, loaded: Callable[[], float], size: Callable[[], float]
    ) -> None:
        """Has the gauges of a model read at every scrape."""
        self._loaded.labels(name).set_function(loaded)
        self._bytes.labels(name).set_function(size)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        joined = CollectorRegistry()
        joined.register(_Given(list(self._families())))
        return generate_latest(joined)

    def _families(self) -> Iterator[Metric]:
        of_models: dict[str, Metric] = {}
        for name, metrics in self.models.items():
            for family in metrics.registry.collect():
                if family.name in _OF_SERVER:
                    continue
                made = of_models.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "model": name}
                    made.samples.append(sample._replace(labels=labels))
        for family in self.registry.collect():
            if family.name not in of_models:
                yield family
        yield from of_models.values()


class _Given(Collector):
    """A collector of families that are there already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """Returns them."""
        return self._families
