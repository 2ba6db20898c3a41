"""A browser, and a server that shows the page and plays answers from a script."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

STATIC = Path(__file__).parents[1] / "src" / "redwood" / "server" / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
)
_TYPES = {".html": "text/html", ".css": "text/css"}
_TYPES |= dict.fromkeys((".js", ".mjs"), "text/javascript")
_TYPES |= {".svg": "image/svg+xml"}
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,900",
)

Part = str | float | threading.Event | None
"""What a script plays: text is sent, a number of seconds or an event is waited for, None cuts the
connection."""


class Reply:
    """An answer to one request: a status, headers, and the parts of the body."""

    def __init__(self, parts: Sequence[Part], status: int = 200, **headers: str) -> None:
        self.parts, self.status = parts, status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @classmethod
    def error(cls, status: int, message: str, **headers: str) -> Reply:
        """An error as the real server words it."""
        body = {"error": {"message": message, "type": "x", "param": None, "code": None}}
        return cls([json.dumps(body)], status, **headers)


class Script:
    """What the server answers; tests change it while the server runs.

    Attributes: `answer` gets a request's body and returns its reply, `models` likewise without a
    body; `requests` has what came in: (headers, body).
    """

    def __init__(self) -> None:
        self.models: Callable[[], Reply] = lambda: Reply([json.dumps({"data": [{"id": "tiny"}]})])
        self.answer: Callable[[dict[str, Any]], Reply] = lambda body: answer(["Hello", " world"])
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, script: Script, *arguments: Any) -> None:
        self.script = script
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a test that fails says more."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._play(self.script.models())
        name = "index.html" if self.path == "/" else self.path.removeprefix("/static/")
        file = STATIC / name
        if ".." in name or not file.is_file():
            return self._play(Reply.error(404, "not here"))
        self.send_response(200)
        self.send_header("Content-Type", _TYPES[file.suffix])
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.script.requests.append((headers, body))
        self._play(self.script.answer(body))

    def _play(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for part in reply.parts:
                if isinstance(part, float):
                    time.sleep(part)
                elif isinstance(part, threading.Event):
                    part.wait(60)
                elif part is not None:
                    self.wfile.write(part.encode())
                    self.wfile.flush()
        except OSError:
            pass  # the page pressed Stop


def step(
    number: int,
    accepted: Sequence[str],
    bonus: str | None,
    *,
    extra: Sequence[tuple[int, str]] = (),
    generated: int | None = None,
    speed: float = 50.0,
) -> dict[str, Any]:
    """One step: a chain of `accepted` under the root, then `extra` nodes (parent, text)."""
    texts = ["root", *accepted]
    nodes = [{"parent": i - 1, "token": 100 + i, "text": text} for i, text in enumerate(texts)]
    nodes += [{"parent": parent, "token": 7, "text": text} for parent, text in extra]
    return {
        "step": number,
        "nodes": nodes,
        "accepted": list(range(len(texts))),
        "bonus": None if bonus is None else {"token": 9, "text": bonus},
        "seconds": {"prefill": 1.0, "draft": 0.0, "target": number / speed, "verify": 0.0},
        "generated": number * (len(accepted) + (bonus is not None)) if generated is None
        else generated,
    }  # fmt: skip


def random_step(number: int, size: int, *, chance: random.Random) -> dict[str, Any]:
    """A step with a random tree of `size` nodes and a random path."""
    parents = [-1] + [max(0, i - 1 - chance.randrange(min(i, 6))) for i in range(1, size)]
    path = [0]
    while below := [i for i in range(size) if parents[i] == path[-1]]:
        if chance.random() < 0.3:
            break
        path.append(chance.choice(below))
    made = step(number, [], " end", generated=0)
    made["nodes"] = [
        {"parent": parent, "token": i, "text": f" word{i}"} for i, parent in enumerate(parents)
    ]
    made["accepted"] = path
    made.pop("generated")
    return made


def delta(**given: Any) -> str:
    """One event of a stream that adds this to the answer."""
    return chunk(choices=[{"index": 0, "delta": given}])


def call(index: int, arguments: str, name: str | None = None) -> str:
    """One event of a stream: a call begins, where it has a name, or its arguments go on."""
    made: dict[str, Any] = {"index": index, "function": {"arguments": arguments}}
    if name is not None:
        made |= {"id": f"call-{index}", "type": "function"}
        made["function"]["name"] = name
    return delta(tool_calls=[made])


def chunk(text: str = "", redwood: dict[str, Any] | None = None, **more: Any) -> str:
    """One event of a stream."""
    data: dict[str, Any] = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {}}]} | more
    if text:
        data["choices"][0]["delta"]["content"] = text
    if redwood is not None:
        data["redwood"] = redwood
    return f"data: {json.dumps(data)}\n\n"


def answer(texts: Sequence[str], *, pause: float = 0.0, speed: float = 50.0) -> Reply:
    """A whole answer: a step per text, each an accepted token and a bonus token."""
    parts: list[Part] = [chunk(), ": ping\n\n"]
    for number, text in enumerate(texts, start=1):
        half = len(text) // 2
        made = step(number, [text[:half]], text[half:], extra=[(0, " no"), (1, " so")], speed=speed)
        parts += [chunk(text, made), pause]
    parts += [ending(2 * len(texts)), "data: [DONE]\n\n"]
    return Reply(parts)


def ending(tokens: int, reason: str = "stop", **usage: Any) -> str:
    """The last chunks: why it ended, and the usage."""
    end = chunk(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])
    return end + chunk(choices=[], usage={"completion_tokens": tokens, **usage})


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium of the system; the tests are skipped where there is none."""
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    if isinstance(driver, str):
        pytest.skip(driver)
    yield driver
    driver.quit()


def start_browser(profile: Path) -> Any:
    """Returns a driver, or why there is none."""
    try:
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return "selenium is not installed: pip install selenium"
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        return "no Chromium here: install the packages chromium and chromium-driver"
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=Service(driver))


@pytest.fixture
def script() -> Script:
    """What the server of the page will answer."""
    return Script()


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    """A server that shows the page."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


class Page:
    """The page in the browser, as a user sees it."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        browser.get_log("browser")  # what earlier pages said
        browser.get(address)
        self.until(lambda: "Connecting" not in self.text("#server"))

    def all(self, selector: str) -> list[Any]:
        """Returns all elements of a CSS selector."""
        return list(self.browser.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        """Returns the first element."""
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """Returns an element's text, also where it is out of sight."""
        return str(self.one(selector).get_property("textContent"))

    def run(self, code: str, *arguments: Any) -> Any:
        """Returns what JavaScript returns."""
        return self.browser.execute_script(code, *arguments)

    def until(self, condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        """Waits until something is true and returns it."""
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < end, f"not so within {timeout_s} s"
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """Clicks by script: a click at a place would miss what is scrolled away."""
        self.run("arguments[0].click()", self.one(selector))

    def press(self, key: str) -> None:
        """Presses a key wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(key).perform()

    def set(self, selector: str, value: str) -> None:
        """Fills in a field of the settings."""
        code = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
        self.run(code, self.one(selector), value)

    def phone(self, width: int = 360, height: int = 640) -> None:
        """Makes the page as small as a phone's; the window itself cannot be as narrow."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})

    def no_phone(self) -> None:
        """Ends that."""
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def ask(self, question: str = "Hi") -> None:
        """Sends a message and waits for the end of the answer."""
        before = len(self.all(".answer"))
        self.one("#prompt").send_keys(question, "\ue007")
        self.until(lambda: len(self.all(".answer")) > before)
        self.ended()

    def ended(self) -> None:
        """Waits until nothing runs and the last picture is drawn."""
        self.until(lambda: not self.all("body.running"))
        # By the browser's own clock: on a busy machine its timers run late, but in order.
        self.browser.execute_async_script("setTimeout(arguments[0], 150)")

    def button(self, words: str) -> None:
        """Clicks the last button with these words."""
        found = [b for b in self.all("button") if b.get_property("textContent") == words]
        self.run("arguments[0].click()", found[-1])

    def complaints(self) -> list[str]:
        """Returns what the browser's console holds of errors: scripts, policy, missing files.

        A status other than 200 is logged as well; tests ask for those on purpose.
        """
        entries = self.browser.get_log("browser")
        return [e["message"] for e in entries if "the server responded with a status" not in
                e["message"] and "net::ERR" not in e["message"]]  # fmt: skip


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    """The page, open; a test fails if the browser had something to complain about."""
    browser.set_window_size(1440, 900)
    made = Page(browser, address)
    yield made
    assert made.complaints() == []
    browser.get("about:blank")
