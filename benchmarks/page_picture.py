"""The picture of the web page in docs/page.md, from a real answer of a running server.

    redwood serve --budget 16
    python benchmarks/page_picture.py --out docs/images/page.png

Needs selenium, Chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

PROMPT = (
    "Correct the spelling and print the whole text again, nothing else: The redwood is the talest "
    "tree on erth. A redwood can be older than two thousand years, and a redwood can be taller "
    "than one hundred meters. Most of them stand in Californa."
)
_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
_QUIET = " --disable-background-networking --disable-component-update --hide-scrollbars"
_LIMIT_S = 300.0


def start(profile: str, scheme: str, width: int, height: int) -> Any:
    """Returns a browser whose page has this size."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in [*(_FLAGS + _QUIET).split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    browser = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    return browser


def wait(browser: Any, code: str) -> None:
    """Waits until JavaScript says true."""
    end = time.monotonic() + _LIMIT_S
    while not browser.execute_script(f"return Boolean({code})"):
        if time.monotonic() > end:
            raise SystemExit(f"error: not so within {_LIMIT_S:.0f} s: {code}")
        time.sleep(0.2)


def play(browser: Any, url: str, prompt: str) -> None:
    """Asks, compares with plain decoding, and goes back to a step that shows much."""
    browser.get(url)
    wait(browser, "document.querySelector('#server.ready')")
    browser.find_element("id", "prompt").send_keys(prompt, "\ue007")
    wait(browser, "document.querySelector('.foot') && !document.querySelector('body.running')")
    browser.find_element("css selector", ".foot button").click()
    wait(
        browser, "document.querySelector('.speed:last-child, .sides div:last-child .speed strong')"
    )
    wait(browser, "!document.querySelector('body.running')")
    browser.execute_script(
        # The step with the most accepted tokens among those that also refused some.
        """
        const rows = [...document.querySelectorAll('#list [role=option]')];
        const worth = (row) => {
            const [drafted, accepted] = [1, 2].map((i) => parseInt(row.children[i].textContent));
            return drafted > accepted ? accepted + Math.min(drafted - accepted, 8) / 2 : -1;
        };
        rows.reduce((best, row) => (worth(row) > worth(best) ? row : best)).click();
        document.activeElement.blur();
        """
    )
    time.sleep(0.5)


def main() -> None:
    """Takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    parser.add_argument("--size", default="1440x800")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    width, height = (int(side) for side in given.size.split("x"))
    with tempfile.TemporaryDirectory() as profile:
        browser = start(profile, given.scheme, width, height)
        try:
            play(browser, given.url, given.prompt)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            browser.save_screenshot(str(given.out))
            print(browser.find_element("css selector", ".verdict").text)
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
