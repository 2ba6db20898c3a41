"""Metrics for Prometheus. Nothing that a client sends becomes a label.

The four counters of speculation have the names and meanings of vLLM's, so that its dashboards can
be used after changing the prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

if TYPE_CHECKING:  # it imports torch, and the router of replicas needs none
    from redwood.engine.request import Step

CONTENT_TYPE = CONTENT_TYPE_LATEST
_P = "redwood:"
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All metrics of one server, in a registry of their own. Thread-safe.

    Args:
        version: of Redwood.
        model: name under which it is served.
    """

    def __init__(self, version: str, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._watched: list[Gauge] = []

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(_P + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(_P + name, text, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests by route and status.", ("route", "code"))
        self.cancelled = counter("requests_cancelled", "Requests cut short.", ("reason",))
        self.dropped = counter(
            "connections_dropped", "Connections closed to make room, or refused.", ("reason",)
        )
        self.engine_errors = counter("engine_errors", "Failures in the engine.", ("kind",))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens taken in.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.prediction_accepted = counter(
            "prediction_tokens_accepted", "Tokens of predicted outputs that were right."
        )
        self.prediction_rejected = counter(
            "prediction_tokens_rejected", "Tokens of predicted outputs that were wrong."
        )
        self._drafts = counter("spec_decode_num_drafts", "Steps that had something drafted.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by their position in the step.",
            ("position",),
        )
        self._tree_nodes = histogram(
            "spec_decode_tree_nodes", "Nodes scored in a step, the root included.", _SIZES
        )
        self.queue_s = histogram("request_queue_time_seconds", "Waiting for a row.", _LONG)
        self.first_token_s = histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _LONG
        )
        self.token_s = histogram(
            "inter_token_latency_seconds", "Between steps, per token of the step.", _SHORT
        )
        self.request_s = histogram("e2e_request_latency_seconds", "Whole requests.", _LONG)
        info = Gauge(_P + "build_info", "Always 1.", ("version", "model"), registry=registry)
        info.labels(version, model).set(1)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is read at every scrape."""
        made = Gauge(_P + name, text, registry=self.registry)
        made.set_function(value)
        self._watched.append(made)

    def unwatch(self) -> None:
        """Takes away what `watch` added: what it read is gone. Counters stay."""
        for made in self._watched:
            self.registry.unregister(made)
        self._watched.clear()

    def count_step(self, step: Step) -> None:
        """Counts the tokens of a step."""
        self.generation_tokens.inc(len(step.token_ids))
        nodes = len(step.tree)
        self._tree_nodes.observe(nodes)
        if nodes > 1:
            self._drafts.inc()
            self._draft_tokens.inc(nodes - 1)
        if step.num_accepted:
            self._accepted.inc(step.num_accepted)
        for position in range(step.num_accepted):
            self._accepted_at.labels(str(position)).inc()

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
