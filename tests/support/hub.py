"""Imitate the Hugging Face hub on this machine, with one answer to every request."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest


class Hub:
    """Serve an answer that the test sets: status code, the hub's name of the error, body and content type."""

    def __init__(self, patch: pytest.MonkeyPatch, cache: object):
        self.code, self.error, self.body, self.kind = 404, "RepoNotFound", b"", "application/json"
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(hub.code)
                self.send_header("Content-Type", hub.kind)
                self.send_header("Content-Length", str(len(hub.body)))
                if hub.error:
                    self.send_header("X-Error-Code", hub.error)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(hub.body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # The client read the environment when it was imported.
        patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
