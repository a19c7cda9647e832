"""A headless Chromium that a test can ask: opened over pipes (its DevTools protocol), so nothing listens on a port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.helpers.patience import patience

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# All text of a page, that in shadow roots and in frames of the same origin included.
TEXT = """(() => {
  const texts = [];
  const walk = (node) => {
    if (node.nodeType === 3) texts.push(node.textContent);
    if (node.shadowRoot) walk(node.shadowRoot);
    try { if (node.contentDocument) walk(node.contentDocument.body); } catch (error) {}
    if (node.nodeName !== 'SCRIPT' && node.nodeName !== 'STYLE') node.childNodes.forEach(walk);
  };
  walk(document.body);
  return texts.join(' ').replace(/\\s+/g, ' ');
})()"""


class Browser:
    """One page of a headless Chromium; a context manager."""

    def __init__(self, folder: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1400,1000",
        ]
        command = [
            str(CHROMIUM),
            *options,
            f"--user-data-dir={folder / 'browser'}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        # the protocol wants its ends to be the descriptors 3 and 4
        script = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._left, self._session = 0, b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        limit = patience()
        end = time.monotonic() + limit
        while True:
            while b"\0" in self._left:
                answer, _, self._left = self._left.partition(b"\0")
                found = json.loads(answer)
                if found.get("id") == self._number:
                    if "error" in found:
                        raise RuntimeError(f"{method}: {found['error']}")
                    return found["result"]
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{method}: the browser did not answer in {limit:.0f} s.")
            self._left += os.read(self._read, 1 << 20)

    def open(self, address: str) -> None:
        """Go to a page."""
        self.ask("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def text_with(self, words: list[str]) -> str:
        """The page's text once it has all `words`; what it is when patience ends if it never has."""
        end = time.monotonic() + patience()
        while True:
            text = str(self.evaluate(TEXT) or "")
            if all(word.lower() in text.lower() for word in words) or time.monotonic() > end:
                return text
            time.sleep(0.2)

    def picture(self, path: Path) -> Path:
        """Write a screenshot."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.ask("Browser.close")
        except (OSError, TimeoutError, RuntimeError):
            self._process.kill()
        os.close(self._write)
        os.close(self._read)
        self._process.wait(timeout=patience())
