"""A running server as tests see it: chats, its worker, its metrics."""

import json
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "reference-vlm"
MAX_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: without the `/v1`.
        log: what it wrote so far.
        pack: what it serves from.
        client: of the OpenAI library.
    """

    url: str
    log: Path
    pack: Path
    client: Any

    def ask(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """A greedy completion of one chat."""
        options = {"max_tokens": MAX_ANSWER_TOKENS, "temperature": 0.0, **options}
        return self.client.chat.completions.create(model=NAME, messages=messages, **options)

    def answer(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.ask(messages, **options).choices[0].message.content

    def worker(self, method: str) -> Any:
        """Calls a method of `tests.support.worker_extension.Inspection` in the only worker."""
        (result,) = json.loads(self._post("/collective_rpc", {"method": method}))["results"]
        return result

    def forget(self) -> None:
        """Empties the prefix cache: a cached prompt is read from codes, a new one is exact."""
        self._post("/reset_prefix_cache", {})

    def metrics(self, *names: str) -> list[float]:
        """The sums over all label values of some metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        return [
            sum(map(float, re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M)))
            for name in names
        ]

    def load(self) -> list[float]:
        """Running requests, waiting requests, share of the KV cache that requests hold."""
        return self.metrics(
            "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
        )

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()
