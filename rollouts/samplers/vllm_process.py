"""A vLLM server that Espalier starts, watches and stops: on loopback, in a process of its own.

Always true: when this returns a server, it is ready; one that ends by itself is started again on the same port, a
bounded number of times and with growing pauses; it ends with the process that started it, however that ends (on Linux;
elsewhere when it ends in order).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from .base import SamplerError
from .vllm_limits import of_a_launcher

START_SECONDS = 900.0
STOP_SECONDS = 20.0
LOOK_SECONDS = 0.5
RESTARTS = 5
FIRST_PAUSE_SECONDS = 1.0
PROBE_SECONDS = 30.0
"""For one token of a server that is suspected to hang, or for any token of those that it works on."""

COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
LARGEST_METRICS = 4_000_000
LOG_TAIL = 2000
"""Characters of the server's log that an error quotes at most."""

_DIES_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that wanted this server is gone")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


class VllmProcess:
    """The server. `url` is where it answers; `restarts` how often it was started again, `hangs` how often because it
    hung.
    """

    def __init__(self, base: Path, options: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it for the model in `base` with command-line `options`, output to `log`, and wait until it is ready.

        Raises `SamplerError` when it ends before that, or is not ready after `START_SECONDS`.
        """
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.restarts = 0
        self.hangs = 0
        self._log = log
        self._command = [
            *(sys.executable, "-c", _DIES_WITH_PARENT, str(os.getpid())),
            *("vllm.entrypoints.openai.api_server", "--model", str(base)),
            *("--host", "127.0.0.1", "--port", str(self.port), *options),
        ]
        inherited = {name: value for name, value in os.environ.items() if not of_a_launcher(name)}
        self._environment = {**inherited, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", **environment}
        self._base = str(base)
        self._stopping = threading.Event()
        self._probing = threading.Lock()
        self._ready = False  # the server that runs now
        self._process: subprocess.Popen[bytes] | None = None
        # the kernel ends the server with the *thread* that started it, so that must live as long as we do
        self._watcher = threading.Thread(target=self._watch, name="espalier-vllm-watch", daemon=True)
        self._watcher.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int | None:
        """Of the server as it runs now."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """End it. Stopping twice is allowed."""
        self._stopping.set()
        self._watcher.join(STOP_SECONDS)
        if self._process is None:
            return
        if self._process.poll() is None:
            _signal_group(self._process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        _signal_group(self._process, signal.SIGKILL)  # children that it left
        self._process.wait(STOP_SECONDS)

    def suspect(self) -> None:
        """Find out, in the background, whether the server hangs; if so it is ended, and started again."""
        if self._probing.acquire(blocking=False):
            threading.Thread(target=self._probe, name="espalier-vllm-probe", daemon=True).start()

    def _probe(self) -> None:
        try:
            process = self._process
            if process is None or not self._ready:
                return
            before = _progress(self.url)
            if _answers(self.url, self._base):
                return
            after = _progress(self.url)
            if (after is None or after == before) and process is self._process and not self._stopping.is_set():
                self.hangs += 1
                _signal_group(process, signal.SIGKILL)  # which the watcher sees
        finally:
            self._probing.release()

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if _healthy(self.url):
                return
            if not self._watcher.is_alive():
                raise SamplerError(f"the vLLM server ended before it was ready; its log ends: {self._tail()}")
            time.sleep(LOOK_SECONDS)
        raise SamplerError(f"the vLLM server was not ready after {START_SECONDS:g} s; its log: {self._log}")

    def _watch(self) -> None:
        process = self._process = self._spawn()
        ever = False
        while not self._stopping.wait(LOOK_SECONDS):
            if process.poll() is None:
                self._ready = self._ready or _healthy(self.url)
                ever = ever or self._ready
                continue
            self._ready = False
            _signal_group(process, signal.SIGKILL)
            # one that never was ready would not be the second time either
            if not ever or self.restarts >= RESTARTS:
                return
            if self._stopping.wait(FIRST_PAUSE_SECONDS * 2**self.restarts):
                return
            self.restarts += 1
            process = self._process = self._spawn()

    def _tail(self) -> str:
        try:
            return " ".join(self._log.read_text("utf-8", "replace")[-LOG_TAIL:].split())
        except OSError as error:
            return f"(unreadable: {error})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _answers(url: str, model: str) -> bool:
    """Whether the server answers a request for one token within `PROBE_SECONDS`, be it by an error. One that is busy
    may not: the token waits its turn.
    """
    body = json.dumps({"model": model, "prompt": [0], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        return True
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False


def _progress(url: str) -> str | None:
    """The server's counters of tokens, which change while it works; None when it does not say."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5.0) as answer:
            text = answer.read(LARGEST_METRICS).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return None
    return "\n".join(line for line in text.splitlines() if line.startswith(COUNTERS))


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
