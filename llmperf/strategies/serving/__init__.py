"""The server as a library: one process for I/O and CPU work, another for inference.

    async with Server(model, max_batch=8) as server:
        async for token in server.generate("Once upon a time", max_new_tokens=32):
            print(token.text, end="")

This process tokenises, admits, detokenises and streams; the inference process owns the device and
groups what waits into batches. Every request has exactly one outcome, whatever happens. It is what
the publication recommends in its summary, first and second points.
"""

from llmperf.strategies.serving.answers import RequestFailed, Stream, Token
from llmperf.strategies.serving.server import Server

__all__ = ["RequestFailed", "Server", "Stream", "Token"]
