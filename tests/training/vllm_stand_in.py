"""A small HTTP server with the endpoints that TRL's client asks of ``vllm serve``; it generates from a checksum.

What needs vLLM itself, on a GPU, is left out: weights come by NCCL there, and by their names alone here.
"""

from __future__ import annotations

import json
import threading
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse


class StandIn(ThreadingHTTPServer):
    """Keeps every request, in ``asked``: path and body."""

    daemon_threads = True

    def __init__(self, vocab_size: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.vocab_size, self.asked = vocab_size, []

    @property
    def port(self) -> int:
        return self.server_address[1]

    def bodies(self, path: str) -> list[dict]:
        return [body for asked, body in self.asked if asked == path]


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urlparse(self.path).path
        self.server.asked.append((path, {}))
        config = {
            "model_config": {"logprobs_mode": "processed_logprobs"},
            "weight_transfer_config": {"backend": "nccl"},
        }
        self._answer(
            {
                "/health": {},
                "/v1/models": {"data": [{"id": "served"}]},
                "/server_info": {"vllm_config": config},
                "/get_world_size": {"world_size": 1},
            }.get(path)
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.server.asked.append((self.path, body))
        if self.path == "/v1/completions":
            choices = [self._choice(prompt, n, body) for prompt in body["prompt"] for n in range(body["n"])]
            self._answer({"choices": choices})
        else:
            known = (
                "/update_weights",
                "/reset_prefix_cache",
                "/start_weight_update",
                "/finish_weight_update",
            )
            self._answer({"success": True} if self.path in known else None)

    def _choice(self, prompt: list[int], number: int, body: dict) -> dict:
        """Completion ``number`` of a prompt: tokens that follow from both, and a log-probability of -6 each."""
        tokens = [
            5 + zlib.crc32(repr((prompt, number, place)).encode()) % (self.server.vocab_size - 5)
            for place in range(body["max_tokens"] - number % 2)
        ]
        names = [f"token_id:{token}" for token in tokens]
        logprobs = {"tokens": names, "token_logprobs": [-6.0] * len(names)}
        logprobs["top_logprobs"] = [{name: -6.0} for name in names]
        return {"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": logprobs}

    def _answer(self, found: dict | None):
        text = json.dumps(found or {}).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def standing_in(vocab_size: int):
    """A server that runs in a thread."""
    server = StandIn(vocab_size)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
