"""OpenVINO GenAI's continuous batching behind a little HTTP: a peer for peers.py.

OpenVINO's own model server is no Python package, so this stands in for it: chats come in as at
OpenAI, join the running batch between two steps, and are streamed, one chunk a step. Only what the
load of peers.py needs is here. Runs in the environment that benchmarks/peers/build.py makes.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openvino_genai as genai

DRAFT, NGRAM = 5, 3  # tokens of a draft and of the longest match, as in benchmarks/peers/genai.py


class Answer:
    """A request on its way; `events` gets its chunks, then None."""

    def __init__(self, messages: list[dict[str, str]], max_tokens: int) -> None:
        self.messages, self.max_tokens = messages, max_tokens
        self.events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.ids: list[int] = []
        self.prompt_tokens, self.sent = 0, ""
        self.handle: Any = None


class Batch:
    """The pipeline, and the thread that steps it."""

    def __init__(self, model: Path, threads: int, lookup: bool) -> None:
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if lookup:
            properties["prompt_lookup"] = True
        config = genai.SchedulerConfig()  # nobody here has a cache of earlier prompts
        config.enable_prefix_caching = False
        self.pipeline = genai.ContinuousBatchingPipeline(str(model), config, "CPU", properties)
        self.tokenizer, self.lookup = self.pipeline.get_tokenizer(), lookup
        self.inbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.running: list[Answer] = []
        self.count = 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            while not self.running or not self.inbox.empty():
                self.begin(self.inbox.get())
            self.pipeline.step()
            self.running = [answer for answer in self.running if not self.deliver(answer)]

    def begin(self, answer: Answer) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.apply_chat_template = answer.max_tokens, False
        config.set_eos_token_id(self.tokenizer.get_eos_token_id())
        if self.lookup:
            config.num_assistant_tokens, config.max_ngram_size = DRAFT, NGRAM
        text = self.tokenizer.apply_chat_template(answer.messages, add_generation_prompt=True)
        ids = self.tokenizer.encode(text, add_special_tokens=False).input_ids
        answer.prompt_tokens, self.count = ids.shape[1], self.count + 1
        answer.handle = self.pipeline.add_request(self.count, ids, config)
        self.running.append(answer)

    def deliver(self, answer: Answer) -> bool:
        """Sends what the step gave; returns whether that was the last of it."""
        before, reason = len(answer.ids), genai.GenerationFinishReason.NONE
        while answer.handle.can_read():
            for part in answer.handle.read().values():
                answer.ids += part.generated_ids
                reason = part.finish_reason
        if len(answer.ids) > before:
            text = self.tokenizer.decode(answer.ids)
            if not text.endswith("\ufffd"):
                delta = {"content": text[len(answer.sent) :]}
                answer.sent = text
                answer.events.put({"choices": [{"index": 0, "delta": delta}]})
        if reason == genai.GenerationFinishReason.NONE:
            return False
        prompt, completion = answer.prompt_tokens, len(answer.ids)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        answer.events.put({"choices": [], "usage": usage})
        answer.events.put(None)
        return True


def handler(batch: Batch) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = Answer(body["messages"], body["max_tokens"])
            batch.inbox.put(answer)
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while (event := answer.events.get()) is not None:
                self.chunk(json.dumps(event, separators=(",", ":"), ensure_ascii=False))
            self.chunk("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def chunk(self, data: str) -> None:
            line = f"data: {data}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class Http(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder that build.py exported")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lookup", action="store_true")
    options = parser.parse_args()
    batch = Batch(options.model, options.threads, options.lookup)
    Http(("127.0.0.1", options.port), handler(batch)).serve_forever()


if __name__ == "__main__":
    main()
