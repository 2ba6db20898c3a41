"""Everything around one served engine: worker, queue, metrics, open requests."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from redwood import __version__
from redwood.engine.tables import tables_of
from redwood.server.admission import Admission
from redwood.server.auth import Keys
from redwood.server.errors import ApiError
from redwood.server.generation import Choice, Event, Generation
from redwood.server.kv_capacity import limit_kv_tokens
from redwood.server.logs import Record
from redwood.server.memory import Memory
from redwood.server.metrics import Metrics
from redwood.server.preparing import Preparer
from redwood.server.served import Lease
from redwood.server.settings import Settings
from redwood.server.tables import OwnTables, own_tables
from redwood.server.tokens import TokenTexts
from redwood.server.worker import Worker

if TYPE_CHECKING:
    from redwood.engine.text import Engine


class Service:
    """One engine and everything around it, for one event loop.

    Args:
        engine: from `redwood.load`; used by nothing else from now on.
        settings: names, limits, times.
        keys: API keys; None: every client is served.
        memory: keeps finished answers to draft from; None: they are not kept.
        share: fraction of free memory for keys and values of this engine.
        tables: successor tables, one for each API key. None: made here, in memory, if there
            are several keys and the engine has such a table.
        shared_table: all keys share the engine's one table.
        metrics: of this model; None: new ones.

    Attributes: the parts by name; `draining`: new requests for answers are refused.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        keys: Keys | None = None,
        memory: Memory | None = None,
        share: float = 1.0,
        tables: OwnTables | None = None,
        shared_table: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        self.engine, self.settings = engine, settings
        limit_kv_tokens(engine, settings.kv_tokens, share)
        self.keys = Keys() if keys is None else keys
        per_key = most_per_key(settings, self.keys)
        self.metrics = metrics or Metrics(__version__, settings.model_names[0])
        self.admission: Admission[Choice] = Admission(
            engine.max_rows, settings.max_queue, settings.max_queue_tokens, per_key
        )
        several = len(self.keys) > 1 and not shared_table
        if tables is None and several and tables_of([engine.drafter]):
            tables = own_tables(engine, self.keys.namespace)
        self.tables, self._memory = tables, memory
        self.worker = Worker(
            engine, self.admission, self.metrics, memory, tables, self.keys.namespace
        )
        self.preparer = Preparer(engine, settings)
        self.texts = TokenTexts(engine.tokenizer)
        self.draining = False
        self.created = int(time.time())
        seed = f"{__version__} {settings.model_names[0]} {engine.target.name}"
        self.fingerprint = f"fp_{hashlib.sha256(seed.encode()).hexdigest()[:12]}"
        self._open: set[Generation] = set()
        self._watch()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the engine's thread; its events are posted to `loop`."""
        self.worker.start(loop)

    async def stop(self) -> None:
        """Ends the threads."""
        await asyncio.to_thread(self.worker.stop)
        self.preparer.close()

    @property
    def died(self) -> asyncio.Event:
        """See `Worker.died`."""
        return self.worker.died

    def has(self, name: str) -> bool:
        """True: the one model is there."""
        return True

    def waiting_for(self, name: str) -> Admission[Choice]:
        """The queue's own: nobody waits for the one model."""
        return self.admission

    async def acquire(self, name: str, arrived_s: float) -> Lease:
        """Returns the one model."""
        return Lease(self)

    def state(self) -> dict[str, Any]:
        """Returns what /health says besides the trouble."""
        return {
            "heartbeat_age_s": round(self.worker.heartbeat_age_s, 3),
            "running": self.admission.num_running,
            "waiting": self.admission.num_waiting,
        }

    def described(self, name: str) -> dict[str, Any]:
        """Returns what /v1/models says of one of the model's names."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "redwood",
            "max_model_len": self.engine.target.capacity,
            "redwood": {"template_options": self.preparer.template_options},
        }

    def greeting(self) -> list[str]:
        """Returns lines for the operator: how much can be answered at once."""
        engine = self.engine
        rows = f"up to {engine.max_rows} answers at once"
        if engine.kv_tokens is None:
            return [f"{rows}; their memory is not bounded (--kv-tokens)"]
        return [
            f"{rows}, of {engine.kv_tokens} tokens together with their prompts (--kv-tokens); "
            f"one may have {engine.target.capacity}"
        ]

    def close(self) -> None:
        """Saves what is kept on disk and closes the engine; to be called once nothing runs."""
        for kept in (self._memory, self.tables, self.engine):
            if kept is not None:
                kept.close()

    def trouble(self) -> str | None:
        """See `Worker.trouble`, with the operator's time limit."""
        return self.worker.trouble(self.settings.health_timeout_s)

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return len(self._open)

    @property
    def num_entering(self) -> int:
        """See `Admission.num_entering`."""
        return self.admission.num_entering

    def cut(self, error: ApiError) -> int:
        """Ends all requests with an error; returns how many."""
        cut = list(self._open)
        for generation in cut:
            generation.events.put_nowait(Event(0, error=error))  # the engine may be stuck
            self.worker.cancel(generation)
            self.metrics.cancelled.labels("shutdown").inc()
        return len(cut)

    @contextmanager
    def serving(self, generation: Generation, record: Record) -> Iterator[None]:
        """Submits a generation to the engine; on leaving, cancels it if it has not ended.

        Raises:
            ApiError: 429 or 503 from `Worker.submit`.
        """
        self.worker.submit(generation)
        self._open.add(generation)
        try:
            yield
        finally:
            self._open.discard(generation)
            if not generation.ended:
                self.worker.cancel(generation)
            self._note(generation, record)

    def _note(self, generation: Generation, record: Record) -> None:
        stats = [choice.stats for choice in generation.choices]
        details, arrived = record.details, generation.arrived_s
        details["completion_tokens"] = sum(each.num_generated_tokens for each in stats)
        details["draft_tokens"] = sum(each.num_draft_tokens for each in stats)
        details["accepted_tokens"] = sum(each.num_accepted_tokens for each in stats)
        moments = {"queue_s": generation.started_s, "first_token_s": generation.first_token_s}
        details.update({k: round(at - arrived, 4) for k, at in moments.items() if at is not None})
        if generation.ended:
            self.metrics.request_s.observe(perf_counter() - arrived)

    def _watch(self) -> None:
        admission, watch = self.admission, self.metrics.watch
        watch("num_requests_running", "Answers in the engine.", lambda: admission.num_running)
        watch("num_requests_waiting", "Answers in the queue.", lambda: admission.num_waiting)
        most = self.engine.kv_tokens
        bound = float("inf") if most is None else float(most)
        watch("kv_tokens_limit", "Tokens that all rows may come to hold.", lambda: bound)
        prefixes = self.engine.prefixes
        watch("prefix_cache_query_tokens", "Tokens looked up.", lambda: prefixes.num_tokens)
        watch("prefix_cache_hit_tokens", "Of them, found.", lambda: prefixes.num_hit_tokens)
        watch("prefix_cache_hit_rate", "Share that was found.", lambda: prefixes.hit_rate)
        watch("prefix_cache_pages", "Pages of 64 slots that stay.", lambda: prefixes.num_pages)
        watch("prefix_cache_evictions", "Texts that had to go.", lambda: prefixes.num_evictions)
        watch(
            "num_requests_preparing",
            "Requests that arrive, or are made into tokens.",
            lambda: admission.num_entering,
        )
        watch(
            "engine_heartbeat_age_seconds",
            "Since the engine last began a step or was idle.",
            lambda: self.worker.heartbeat_age_s,
        )
        watch("engine_up", "1 while /health is fine.", lambda: float(self.trouble() is None))


def most_per_key(settings: Settings, keys: Keys) -> int:
    """Returns how many choices of one API key may wait."""
    if settings.max_queue_per_key is not None:
        return settings.max_queue_per_key
    return settings.max_queue if len(keys) < 2 else max(1, settings.max_queue // 2)
