"""A headless Chromium that a test drives as a person would, through the DevTools protocol on two pipes.

No package is needed for it. `find()` says where Chromium is, or None.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}


def find() -> str | None:
    """Chromium's path: `$CHROMIUM`, or the first that is installed."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in one browser. problems: errors and warnings of its scripts; requests: all that it asked for."""

    def __init__(self, path: str, profile: Path, size: tuple[int, int]):
        read_theirs, write_ours = os.pipe()
        read_ours, write_theirs = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
        ]
        command = [path, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]

        def wire() -> None:  # Chromium reads commands from descriptor 3 and answers on 4
            os.dup2(read_theirs, 103)
            os.dup2(write_theirs, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(3, 4), preexec_fn=wire
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self._in, self._out, self._rest, self._number = write_ours, read_ours, b"", 0
        self._session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")
        self.resize(*size)

    def resize(self, width: int, height: int) -> None:
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, dark: bool) -> None:
        """What the page is told that its reader prefers."""
        value = "dark" if dark else "light"
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def open(self, url: str) -> None:
        self._send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"].get("exception", {}).get("description", answer))
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 10.0) -> None:
        """Until an expression is true."""
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < until, f"still not so after {seconds} s: {condition}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        """Clicks the middle of an element, which must be in sight and on top there."""
        found = self.run(
            f"""(() => {{ const found = document.querySelector({json.dumps(selector)});
            if (!found) return null;
            found.scrollIntoView({{block: 'nearest'}});
            const r = found.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;
            const top = document.elementFromPoint(x, y);
            return {{x, y, covered: top !== found && !found.contains(top)}}; }})()"""
        )
        assert found is not None, f"no {selector}"
        assert not found["covered"], f"{selector} is covered"
        self.click_at(found["x"], found["y"])

    def click_at(self, x: float, y: float, count: int = 1) -> None:
        self._mouse("mouseMoved", x, y)
        for click in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self._mouse(kind, x, y, button="left", clickCount=click)
        self.settle()

    def drag(self, x: float, y: float, dx: float, dy: float) -> None:
        self._mouse("mousePressed", x, y, button="left", clickCount=1)
        self._mouse("mouseMoved", x + dx, y + dy, button="left")
        self._mouse("mouseReleased", x + dx, y + dy, button="left", clickCount=1)
        self.settle()

    def wheel(self, x: float, y: float, delta: float) -> None:
        self._mouse("mouseWheel", x, y, deltaX=0, deltaY=delta)
        self.settle()

    def key(self, name: str) -> None:
        code, number, text = KEYS.get(name, (name, ord(name[0].upper()), name))
        event = {"key": code, "windowsVirtualKeyCode": number, "text": text}
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, **event)
        self.settle()

    def type(self, text: str) -> None:
        self._send("Input.insertText", text=text)
        self.settle()

    def settle(self) -> None:
        """Until two frames are drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def screenshot(self, path: Path) -> None:
        self.settle()
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        try:
            session, self._session = self._session, None
            self._send("Browser.close")
        except (AssertionError, OSError):
            self._process.kill()
            self._session = session
        os.close(self._in)
        os.close(self._out)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._note(answer)
        raise AssertionError(f"Chromium has ended, at {method}")

    def _messages(self, seconds: float = 60.0) -> Iterator[dict[str, Any]]:
        while True:
            *whole, self._rest = self._rest.split(b"\0", 1) if b"\0" in self._rest else (self._rest,)
            if whole:
                yield json.loads(whole[0])
                continue
            ready, _, _ = select.select([self._out], [], [], seconds)
            assert ready, f"Chromium said nothing for {seconds} s"
            piece = os.read(self._out, 1 << 20)
            if not piece:
                return
            self._rest += piece

    def _note(self, event: dict[str, Any]) -> None:
        name, given = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif name == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in given["args"]))
        elif name == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.problems.append(given["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])


@contextmanager
def chromium(profile: Path, size: tuple[int, int] = (1280, 800)) -> Iterator[Browser]:
    """A browser with one empty page of this size; `profile` is a folder of its own."""
    path = find()
    assert path is not None, "no Chromium"
    browser = Browser(path, profile, size)
    try:
        yield browser
    finally:
        browser.close()
