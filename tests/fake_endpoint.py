"""An OpenAI-compatible server on the loopback address that can misbehave, and a listener."""

import asyncio
import json
import threading
import time


class _Listening:
    """A TCP server in a thread with an event loop of its own; `_connection` serves one client."""

    def __enter__(self):
        started = threading.Event()

        async def serve():
            self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
            self.server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            started.set()
            await self.stop.wait()
            self.server.close()

        self.thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self.thread.start()
        started.wait(10)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)


class FakeEndpoint(_Listening):
    """Answers `POST /v1/completions` and `/v1/chat/completions` in the way its `mode` says.

    `sent` holds, for each answer, when each of its events left (perf_counter).
    """

    def __init__(
        self,
        mode="good",
        pieces=("All", " cats", " are", " grey."),
        gap_s=0.02,
        error="the cache is full",
    ):
        self.error, self.written = error, 0
        self.mode, self.pieces, self.gap_s = mode, pieces, gap_s
        self.bodies, self.headers, self.sent = [], [], []
        self.connections = 0
        self.refuse = 0  # so many requests get "503 busy" first

    async def _connection(self, reader, writer):
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
                length = int(next(v for k, v in fields.items() if k.lower() == "content-length"))
                self.headers.append(fields)
                self.bodies.append(json.loads(await reader.readexactly(length)))
                await self._answer(writer, chat="chat" in head.decode().split()[1])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer, chat):
        if self.refuse:
            self.refuse -= 1
            await self._plain(writer, 503, "busy")
        elif self.mode == "refuses":
            said = self.error.replace("the cache is full", "bad key ")
            await self._plain(writer, 401, said + self.headers[-1]["Authorization"])
        elif self.mode == "endless error":
            writer.write(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                await self._chunk(writer, b"x" * 65536)
                self.written += 65536
        else:
            await self._streamed(writer, chat)

    async def _streamed(self, writer, chat):
        if self.mode == "hangs":
            await asyncio.sleep(60)
        packed = b"Content-Encoding: gzip\r\n" if self.mode == "compressed" else b""
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            + packed
            + b"Transfer-Encoding: chunked\r\n\r\n"
        )
        self.sent.append([])
        for i, piece in enumerate(self.pieces):
            await asyncio.sleep(self.gap_s)
            if i == 2 and self.mode != "good":
                await self._misbehave(writer)
            text = {"delta": {"content": piece}} if chat else {"text": piece}
            last = "length" if i == len(self.pieces) - 1 else None
            await self._event(writer, {"choices": [text | {"finish_reason": last}]})
            self.sent[-1].append(time.perf_counter())
        await self._event(writer, {"choices": [], "usage": {"completion_tokens": 19}})
        await self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _misbehave(self, writer):
        match self.mode:
            case "not json":
                await self._chunk(writer, b"data: {broken\n\n")
            case "no object":
                await self._chunk(writer, b"data: [1, 2]\n\n")
            case "odd form":
                await self._chunk(writer, b'data: {"choices": "none"}\n\n')
            case "error event":
                await self._event(writer, {"error": {"message": self.error}})
            case "surrogate":
                await self._chunk(writer, b'data: {"choices": [{"text": "\\ud800"}]}\n\n')
            case "not a number":
                await self._chunk(writer, b'data: {"choices": [], "usage": NaN}\n\n')
            case "infinite count":
                await self._chunk(writer, b'data: {"usage": {"completion_tokens": 1e999}}\n\n')
            case "text is a list":
                await self._chunk(writer, b'data: {"choices": [{"text": ["a"]}]}\n\n')
            case "deep":
                await self._chunk(writer, b"data: " + b"[" * 500_000 + b"\n\n")
            case "closes":
                writer.transport.abort()
            case "ends early":
                writer.write(b"0\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(60)
            case "stalls":
                await asyncio.sleep(60)
            case "comments":
                while True:
                    await self._chunk(writer, b": still here\n\n")
                    await asyncio.sleep(0.02)
            case "endless event":
                while True:
                    await self._chunk(writer, b"data: " + b"x" * 65536)
            case "endless text":
                while True:
                    await self._event(writer, {"choices": [{"text": "x" * 100}]})

    async def _event(self, writer, event):
        await self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    async def _chunk(self, writer, data):
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()

    async def _plain(self, writer, status, text):
        writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()


class Tap(_Listening):
    """A listener in between: passes bytes on and notes when each piece of an answer went by."""

    def __init__(self, host, port):
        self.target = host, port
        self.seen = []  # (perf_counter, bytes) of each read from the server

    async def _connection(self, reader, writer):
        up_reader, up_writer = await asyncio.open_connection(*self.target)

        async def upwards():
            while data := await reader.read(65536):
                self.seen.append((time.perf_counter(), data if data.startswith(b"POST") else b""))
                up_writer.write(data)
                await up_writer.drain()
            up_writer.close()

        async def downwards():
            while data := await up_reader.read(65536):
                self.seen.append((time.perf_counter(), data))
                writer.write(data)
                await writer.drain()
            writer.close()

        await asyncio.gather(upwards(), downwards(), return_exceptions=True)
