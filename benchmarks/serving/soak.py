"""Half an hour of good, bad, slow and vanishing clients, at a quarter of one core.

    nice -n 15 python benchmarks/serving/soak.py --minutes 30
    python benchmarks/serving/soak.py --minutes 1 --share 1 --name soak_short

A client waits with its request while server and clients have used more than `--share` of one core
since the start. Every minute: memory, open files, threads, rows in use, requests by result. At the
end: growth of memory, requests without an answer or a clear error, answers that are not the text of
`engine.generate`. Exit code 1 if there were any of the last two, or something was left over.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from cases import Case, known, user
from raw import Reply, Wire, ask, parse, request
from running import Server, add_server, save, serving, setting

BODY_LIMIT, BODY_S, SEND_S = 65536, 10, 10
SERVER_OPTIONS = f"""--max-rows 8 --capacity 2048 --max-body-bytes {BODY_LIMIT}
    --body-timeout {BODY_S} --send-timeout {SEND_S}""".split()
CHAT = "/v1/chat/completions"
LONG = {"messages": [user("Count up from one.")], "temperature": 0, "max_tokens": 30}
MOST_AT_ONCE = 10
RIGHT, WRONG, LOST, LEFT = "right", "WRONG TEXT", "LOST", "left"


class Clients:
    """All kinds of clients; each method is one request, and returns what came of it."""

    def __init__(
        self, server: Server, cases: Sequence[Case], seed: int, only: Sequence[str] = ()
    ) -> None:
        self.server, self.cases, self.rng = server, cases, random.Random(seed)
        self.tokens = 0
        self.notes: list[str] = []
        self.mix: dict[Callable[[], Awaitable[str]], float] = {
            self.good: 30,
            self.good_stream: 30,
            self.good_twice_on_one_connection: 5,
            self.bad: 30,
            self.vanishing: 20,
            self.slow_reader: 3,
            self.stalled_reader: 1,
            self.slow_sender: 2,
        }
        if only:
            self.mix = {kind: 1 for kind in self.mix if getattr(kind, "__name__", "") in only}

    def pick(self) -> Callable[[], Awaitable[str]]:
        """The next client."""
        return self.rng.choices(list(self.mix), list(self.mix.values()))[0]

    async def good(self) -> str:
        case = self.rng.choice(self.cases)
        return self.judge(case, await ask(self.server, request(self.server, case.path, case.body)))

    async def good_stream(self) -> str:
        case = self.rng.choice(self.cases)
        reply = await ask(self.server, self.streamed(case))
        return self.judge(case, reply)

    async def good_twice_on_one_connection(self) -> str:
        """An error and an answer, pipelined."""
        case, path = self.rng.choice(self.cases), "/v1/completions"
        first = request(self.server, path, b"{", Connection="keep-alive")
        async with asyncio.timeout(120), Wire(self.server) as wire:
            await wire.send(first + request(self.server, case.path, case.body))
            data = await wire.read_all()
        head, _, rest = data.partition(b"\r\n\r\n")
        length = parse(head + b"\r\n\r\n").headers.get("content-length", "0")
        if not head.startswith(b"HTTP/1.1 400"):
            return self.lost("the first of two", parse(data))
        return self.judge(case, parse(rest[int(length) :]))

    def streamed(self, case: Case) -> bytes:
        return request(
            self.server,
            case.path,
            case.changed(stream=True, stream_options={"include_usage": True}),
        )

    async def bad(self) -> str:
        """Something that must be refused, with the right status."""
        good, server = self.rng.choice(self.cases).body, self.server
        large = b" " * (BODY_LIMIT + 1)
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(large), large)
        kinds: list[tuple[int, bytes]] = [
            (400, request(server, CHAT, b'{"messages": [')),
            (400, request(server, CHAT, b"\xff\xfe")),
            (400, request(server, CHAT, {**good, "temperature": "hot"})),
            (400, request(server, CHAT, b'{"messages": [], "temperature": NaN}')),
            (400, request(server, CHAT, {**LONG, "temprature": 1})),
            (400, request(server, CHAT, {**LONG, "max_tokens": -1})),
            (400, request(server, CHAT, {"messages": [user("tree " * 5000)]})),
            (413, request(server, CHAT, large)),
            (413, request(server, CHAT, b"", Content_Length="999999999")),
            (413, request(server, CHAT, chunked, Content_Length="", Transfer_Encoding="chunked")),
            (401, request(server, CHAT, LONG, Authorization="Bearer wrong")),
            (401, request(server, CHAT, LONG, Authorization="")),
            (404, request(server, CHAT, {**LONG, "model": "../../etc/passwd"})),
            (404, request(server, "/v1/embeddings", LONG)),
            (405, request(server, CHAT, b"", method="GET")),
            (415, request(server, CHAT, LONG, Content_Type="text/plain")),
        ]
        status, data = self.rng.choice(kinds)
        reply = await ask(server, data)
        if reply.status == status and reply.complete and reply.error:
            return f"{status} as it should be"
        return self.lost(f"should get {status}", reply)

    async def vanishing(self) -> str:
        """Closes at a random byte of the request or of the answer, or while it waits."""
        stream = self.rng.random() < 0.5
        data = request(self.server, CHAT, {**LONG, "stream": stream})
        where = self.rng.choice(["sending", "waiting", "reading"])
        async with Wire(self.server) as wire:
            if self.rng.random() < 0.5:
                wire.reset()
            if where == "sending":
                await wire.send(data[: self.rng.randrange(len(data))])
                return f"{LEFT}, {where}"
            await wire.send(data)
            if where == "waiting":
                await asyncio.sleep(self.rng.random())
                return f"{LEFT}, {where}"
            left = self.rng.randrange(1, 6000 if stream else 1200)
            async with asyncio.timeout(120):
                while left > 0 and (part := await wire.read(left)):
                    left -= len(part)
        return f"{LEFT}, {where}"

    async def slow_reader(self) -> str:
        """A byte a second for a while, then the rest; it must be right all the same."""
        case, begun = self.rng.choice(self.cases), b""
        async with asyncio.timeout(200), Wire(self.server, 2048) as wire:
            await wire.send(self.streamed(case))
            for _ in range(20):
                begun += await wire.read(1)
                await asyncio.sleep(1)
            return self.judge(case, parse(await wire.read_all(begun)))

    async def stalled_reader(self) -> str:
        """A byte a second of an answer too large for any buffer; the server must end that."""
        body = {**LONG, "max_tokens": 200, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
        start, num = time.monotonic(), 0
        async with Wire(self.server, 1024) as wire:
            await wire.send(request(self.server, CHAT, {**body, "stream": True}))
            try:
                while time.monotonic() - start < 60 and (part := await wire.read(1)):
                    num += len(part)
                    await asyncio.sleep(1)
            except ConnectionError:
                return "dropped by the server"
        return f"{LEFT}, after a minute"

    async def slow_sender(self) -> str:
        """A byte of the body a second: 408."""
        data = request(self.server, CHAT, LONG)
        body = data.index(b"\r\n\r\n") + 4
        received = b""
        async with asyncio.timeout(60), Wire(self.server) as wire:
            await wire.send(data[:body])
            reading = asyncio.ensure_future(wire.read_all())
            try:
                for index in range(body, len(data)):
                    await wire.send(data[index : index + 1])
                    done, _ = await asyncio.wait({reading}, timeout=1)
                    if done:
                        break
            except ConnectionError:
                pass
            received = await reading
        reply = parse(received)
        return "408 as it should be" if reply.status == 408 else self.lost("slow sender", reply)

    def judge(self, case: Case, reply: Reply) -> str:
        """What a good request got."""
        if reply.status != 200 or reply.error:
            if reply.complete and reply.error:
                self.notes.append(f"{reply.status} {reply.error['code']}: {case.body}"[:300])
                return f"refused: {reply.status} {reply.error['code']}"
            return self.lost("a good request", reply)
        if not reply.complete or (reply.json is None and not reply.done):
            return self.lost("a good request", reply)
        usage = (reply.json or reply.events[-1])["usage"]
        self.tokens += usage["completion_tokens"]
        if reply.texts() != case.texts or usage["completion_tokens"] != case.num_tokens:
            self.notes.append(f"{reply.texts()!r} is not {case.texts!r}: {case.body}")
            return WRONG
        return RIGHT

    def lost(self, what: str, reply: Reply) -> str:
        self.notes.append(f"{what}: {reply.status} {reply.headers} {reply.body[-300:]!r}")
        return LOST


class Soak:
    """The run: paces clients, counts results, takes samples."""

    def __init__(
        self, server: Server, clients: Clients, share: float, pause: Path | None = None
    ) -> None:
        self.server, self.clients, self.share = server, clients, share
        self.pause, self.paused_s = pause, 0.0
        self.results: Counter[str] = Counter()
        self.samples: list[dict[str, Any]] = []
        self.start_s, self.start_cpu_s = time.monotonic(), self._cpu_s()

    def _cpu_s(self) -> float:
        return self.server.facts().get("cpu_s", 0.0) + time.process_time()

    @property
    def used(self) -> float:
        """Share of one core so far."""
        passed = time.monotonic() - self.start_s - self.paused_s
        return (self._cpu_s() - self.start_cpu_s) / max(passed, 1.0)

    async def _wait_paused(self) -> None:
        """Waits while the file exists: somebody needs a quiet machine."""
        while self.pause is not None and self.pause.exists():
            start = time.monotonic()
            await asyncio.sleep(1)
            self.paused_s += time.monotonic() - start

    async def run(self, seconds: float) -> None:
        """Sends clients for so long, and waits for all of them."""
        sampling = asyncio.ensure_future(self._sample())
        going: set[asyncio.Task[None]] = set()
        while time.monotonic() - self.start_s - self.paused_s < seconds:
            await self._wait_paused()
            await asyncio.sleep(self.clients.rng.expovariate(1 / 0.3))
            while self.used > self.share or len(going) >= MOST_AT_ONCE:
                await asyncio.sleep(0.2)
            task = asyncio.ensure_future(self._one(self.clients.pick()))
            going.add(task)
            task.add_done_callback(going.discard)
        if going:
            await asyncio.wait(going)
        sampling.cancel()

    async def _one(self, client: Callable[[], Awaitable[str]]) -> None:
        name = getattr(client, "__name__", "client")
        try:
            result = await client()
        except Exception as error:
            self.clients.notes.append(f"{name}: {error!r}")
            result = LOST
        self.results[f"{name}: {result}"] += 1

    async def _sample(self) -> None:
        while True:
            self.note()
            await asyncio.sleep(60)

    def note(self) -> None:
        """Takes a sample."""
        running, waiting = self.server.rows()
        sample = {
            "minute": round((time.monotonic() - self.start_s) / 60, 2),
            **self.server.facts(),
            "running": running,
            "waiting": waiting,
            "cpu_share": round(self.used, 3),
            "requests": self.results.total(),
            "right": sum(n for name, n in self.results.items() if name.endswith(RIGHT)),
        }
        self.samples.append(sample)
        print(" ".join(f"{name}={value}" for name, value in sample.items()), flush=True)

    def growth(self) -> float | None:
        """Memory per minute in KiB, by least squares over the last two thirds."""
        late = [s for s in self.samples if s["minute"] >= self.samples[-1]["minute"] / 3]
        if len(late) < 3 or "rss_mib" not in late[0]:
            return None
        times, sizes = [s["minute"] for s in late], [s["rss_mib"] * 1024 for s in late]
        time_mean, size_mean = sum(times) / len(times), sum(sizes) / len(sizes)
        above = sum((t - time_mean) * (s - size_mean) for t, s in zip(times, sizes, strict=True))
        return round(above / sum((t - time_mean) ** 2 for t in times), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server(parser)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--share", type=float, default=0.25, help="of one core, all together")
    parser.add_argument("--pause", type=Path, help="no new clients while this file exists")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=(), help="kinds of clients; default: all")
    parser.add_argument("--keep-answers", action="store_true", help="the server drafts from them")
    parser.add_argument("--name", default="soak", help="of the result file")
    options = parser.parse_args()
    begun = setting()  # the files may change while it runs
    cases = known(options.target, options.drafter)
    kept = tempfile.TemporaryDirectory()
    more = [*SERVER_OPTIONS]
    if options.keep_answers:
        more += ["--keep-answers", kept.name, "--keep-every", "60"]
    with kept, serving(options, more) as server:
        clients = Clients(server, cases, options.seed, options.only)
        soak = Soak(server, clients, options.share, options.pause)
        asyncio.run(soak.run(options.minutes * 60))
        idle_s = server.idle_within(15)
        time.sleep(6)  # the server closes lingering connections after five seconds
        soak.note()
        facts = {name: value for name, value in server.metrics().items() if "bucket" not in name}
        trouble = server.log_lines("Traceback", " error ", " critical ")
        kept_bytes = sum(f.stat().st_size for f in Path(kept.name).rglob("*") if f.is_file())
    lost = sum(n for name, n in soak.results.items() if name.endswith(LOST))
    wrong = sum(n for name, n in soak.results.items() if name.endswith(WRONG))
    result = {
        "setting": begun,
        "server_options": [word.replace(kept.name, "FOLDER") for word in more],
        "minutes": options.minutes,
        "paused_s": round(soak.paused_s),
        "requests": soak.results.total(),
        "results": dict(sorted(soak.results.items())),
        "lost": lost,
        "wrong_texts": wrong,
        "tokens_compared": clients.tokens,
        "rss_growth_kib_per_minute": soak.growth(),
        "idle_after_s": idle_s,
        "exit_code": server.exit_code,
        "kept_bytes": kept_bytes,
        "cpu_share": round(soak.samples[-1]["cpu_share"], 3),
        "log_trouble": trouble[:20],
        "notes": clients.notes[:40],
        "samples": soak.samples,
        "metrics": facts,
    }
    save(options.name, result)
    for name, count in sorted(soak.results.items()):
        print(f"{count:6} {name}")
    print({k: v for k, v in result.items() if isinstance(v, int | float | str)})
    sys.exit(1 if lost or wrong or idle_s is None else 0)


if __name__ == "__main__":
    main()
