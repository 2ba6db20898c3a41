"""Metrics and health of all replicas, gathered on one page each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from starlette.responses import Response

from redwood.server.metrics import CONTENT_TYPE
from redwood.server.responses import json_response

Page = tuple[str, int, bytes]
"""A replica's name, and status and body of its response."""
_SAMPLE = re.compile(rb"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")


class Counts:
    """A router's own counters."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._lost = Counter(
            "redwood:replica_lost_requests",
            "Requests whose engine was lost; before an answer they are asked again.",
            ("answer",),
            registry=self._registry,
        )

    def note(self, *, answered: bool) -> None:
        """Counts an engine lost during a request.

        Args:
            answered: a part of the answer had been sent, so that the request failed.
        """
        self._lost.labels("begun" if answered else "none").inc()

    def text(self) -> bytes:
        """Returns the counters in Prometheus's text format."""
        return generate_latest(self._registry)


def state_page(pages: Sequence[Page], *, draining: bool) -> Response:
    """Returns the states of all replicas, with status 200 if at least one of them is healthy."""
    well = any(status == 200 for _, status, _ in pages)
    status = "shutting_down" if draining else "ok" if well else "no_replica"
    replicas = {name: json.loads(body) for name, _, body in pages}
    return json_response({"status": status, "replicas": replicas}, 200 if status == "ok" else 503)


def metrics_page(pages: Sequence[Page], router: str, counts: Counts) -> Response:
    """Returns the metrics of all replicas, each with a label `replica`.

    Counters are not summed: a sum would fall when a replica ends.
    """
    texts = [(name, body) for name, status, body in pages if status == 200]
    families: dict[bytes, tuple[list[bytes], list[bytes]]] = {}
    for name, text in [*texts, (router, counts.text())]:
        comments, samples = families.setdefault(b"", ([], []))
        for line in text.splitlines():
            if line.startswith(b"# HELP "):
                comments, samples = families.setdefault(line.split(b" ", 3)[2], ([], []))
            if line.startswith(b"#"):
                if line not in comments:
                    comments.append(line)
            elif line:
                samples.append(_labelled(line, name.encode()))
    lines = [line for comments, samples in families.values() for line in (*comments, *samples)]
    return Response(b"\n".join([*lines, b""]), media_type=CONTENT_TYPE)


def _labelled(line: bytes, name: bytes) -> bytes:
    found = _SAMPLE.fullmatch(line)
    if found is None:
        return line
    metric, labels, value = found.groups()
    both = b",".join(part for part in (labels, b'replica="' + name + b'"') if part)
    return metric + b"{" + both + b"} " + value
