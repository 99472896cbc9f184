"""A page in headless Chromium, driven over its debugging pipe."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

# The browser reads descriptor 3 and writes to 4.
LAUNCH = """
import os, sys
ours = [os.dup(os.dup(os.dup(int(fd)))) for fd in sys.argv[1:3]]
for fd, to in zip(ours, (3, 4)):
    os.dup2(fd, to)
os.execv(sys.argv[3], sys.argv[3:])
"""
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The program, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page: `run` evaluates JavaScript, `wait` until something is so, `png` is what is seen."""

    def __init__(self, send, receive):
        self._send, self._receive, self._count, self._buffer = send, receive, 0, b""
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **params: Any) -> Any:
        self._count += 1
        message: dict[str, Any] = dict(id=self._count, method=method, params=params)
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._count:
                assert "error" not in found, found
                return found["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], 60)
            assert ready, "Chromium says nothing"
            self._buffer += os.read(self._receive, 1 << 20)
        data, self._buffer = self._buffer.split(b"\0", 1)
        found = json.loads(data)
        if found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(found["params"]["exceptionDetails"]))
        if found.get("method") == "Log.entryAdded":
            entry = found["params"]["entry"]
            # A refused request is one, which is shown on the page.
            if entry["level"] == "error" and entry["source"] != "network":
                self.errors.append(entry["text"])
        return found

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        tried = f"(() => {{ try {{ return Boolean({condition}) }} catch {{ return false }} }})()"
        while not self.run(tried):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"))
            time.sleep(0.05)

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "rawKeyDown" else {}
            kind = "keyDown" if text else kind
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=code, **text,
            )  # fmt: skip

    def png(self, *, whole: bool = False) -> bytes:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])


@contextlib.contextmanager
def page():
    """A page in a browser of its own."""
    program = chromium()
    assert program is not None
    to_them, our_send = os.pipe()
    our_receive, from_them = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", "--mute-audio",
        ]  # fmt: skip

        # `preexec_fn` would fork this process, whose threads are many.
        command = [sys.executable, "-c", LAUNCH, str(to_them), str(from_them), *arguments]
        browser = subprocess.Popen(
            command, pass_fds=(to_them, from_them), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            os.close(to_them)
            os.close(from_them)
            yield Page(our_send, our_receive)
        finally:
            browser.terminate()
            browser.wait(20)
            os.close(our_send)
            os.close(our_receive)
