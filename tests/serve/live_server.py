"""`LiveServer`: `mor serve` in a process of its own, and the calls that tests make."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

KEY = "sesame-open-1234"
NAME = "tiny"
MODEL_LEN = 256
_START_TIMEOUT_S = 90
_PORT = re.compile(r"is served at http://[^:]+:(\d+)")


class LiveServer:
    """`mor serve` in a process of its own."""

    def __init__(self, model: Path, log: Path, *options: str, key: str | None = KEY) -> None:
        self.log_file = log
        environment = {k: v for k, v in os.environ.items() if k != "MOR_API_KEY"}
        if key is not None:
            environment["MOR_API_KEY"] = key
        fixed = ("--port", "0", "--served-model-name", NAME, "--dtype", "float64")
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mor", "serve", str(model), *fixed, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                env={**environment, "OMP_NUM_THREADS": "1"},
            )
        self.url = f"http://127.0.0.1:{self._port()}"
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def _port(self) -> int:
        end = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < end:
            found = _PORT.search(self.log)
            if found is not None:
                return int(found[1])
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"the server did not start:\n{self.log}")

    def post(self, path: str, **body: Any) -> httpx.Response:
        """The answer to a JSON body."""
        return self.http.post(path, json=body)

    def get(self, path: str) -> Any:
        """The JSON value at a path."""
        answer = self.http.get(path)
        answer.raise_for_status()
        return answer.json()

    def metric(self, name: str, **labels: str) -> float:
        """A sample of `/metrics`."""
        wanted = {"model_name": NAME, **labels}
        for line in self.http.get("/metrics").text.splitlines():
            found = re.fullmatch(r"([\w:]+)\{(.*)\} (\S+)", line)
            if found and found[1] == name and dict(_labels(found[2])) == wanted:
                return float(found[3])
        raise AssertionError(f"no sample {name} {wanted}")

    def idle(self, seconds: float = 60) -> Mapping[str, Any]:
        """The engine's state once nothing is under way; it must come to that."""
        end = time.monotonic() + seconds
        while True:
            state = self.get("/depths")
            if state["running"] == state["waiting"] == 0:
                return state
            assert time.monotonic() < end, state
            time.sleep(0.05)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Ask it to end; its exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def _labels(text: str) -> list[tuple[str, str]]:
    return re.findall(r'(\w+)="([^"]*)"', text)
