"""A real `vllm serve` on this machine, for as long as a `with` block lasts."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_attentionpack import plugin
from vllm_attentionpack.config import SECTION

_START_SECONDS = 300
_STOP_SECONDS = 20


class ServerError(RuntimeError):
    """The server did not come up; the message ends with the tail of its log."""


@contextlib.contextmanager
def serve(model: str, pack: str | Path, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """Starts `vllm serve MODEL --attention-backend ATTENTIONPACK` and yields its base URL.

    Args:
        model: name or path.
        pack: path of the pack.
        log: file that takes the server's output.
        options: further flags of `vllm serve`.

    Raises:
        ServerError: the server ended or did not answer within five minutes.
    """
    port = _free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--attention-backend", plugin.BACKEND),
        *("--additional-config", json.dumps({SECTION: {"pack": str(pack)}})),
        *options,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, url, log)
        yield f"{url}/v1"
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_healthy(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    ended = process.poll()
    what = "did not answer in time" if ended is None else f"ended with exit code {ended}"
    tail = log.read_text(errors="replace")[-4000:]
    raise ServerError(f"the server {what}. The end of its log:\n{tail}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends the server, and whatever engine processes of its session outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
