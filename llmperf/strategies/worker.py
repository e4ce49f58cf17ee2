"""One worker process of the strategy `processes`: `python -m llmperf.strategies.worker`.

Pickled messages come in on standard input and go out on what was standard output. It ends when its
input ends, so that it never outlives the process that started it.
"""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress

BEAT_S = 0.25  # while it loads or works, it says so this often


class _Line:
    """The way back: whole messages, from any thread."""

    def __init__(self):
        # Whatever prints must not disturb: the real output moves aside, the name goes to stderr.
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._lock = threading.Lock()

    def send(self, kind: str, value: object = None) -> None:
        with self._lock:
            pickle.dump((kind, value), self._out)
            self._out.flush()


class _Heart:
    """Beats while there is work: the time since the last token goes with each beat."""

    def __init__(self, line: _Line):
        self._line, self._busy = line, threading.Event()
        self.touched = time.perf_counter()
        threading.Thread(target=self._beat, daemon=True).start()

    def touch(self) -> None:
        self.touched = time.perf_counter()

    def __enter__(self) -> None:
        self.touch()
        self._busy.set()

    def __exit__(self, *_) -> None:
        self._busy.clear()

    def _beat(self) -> None:
        with suppress(OSError):
            while self._busy.wait():
                self._line.send("beat", time.perf_counter() - self.touched)
                time.sleep(BEAT_S)


class _Worker:
    """A model, and what the parent asks of it. Each method is one kind of message."""

    def __init__(self, heart: _Heart):
        self.heart, self.model, self.how = heart, None, {}

    def load(self, source, folder, **_):
        """Load the model: its own copy, or over the weights in `folder`."""
        from llmperf import models
        from llmperf.models import mapped

        shared = folder is not None
        self.model = mapped.load(folder, source) if shared else models.load_spec(source)
        return self.model.load_s

    def begin(self, intra_op, **how):
        """A run starts: how to decode, and with how many threads of the processor."""
        import torch

        self.how = how
        torch.set_num_threads(intra_op)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.cpu_s = time.process_time()

    def request(self, request):
        """Answer one request; the rows of its recorder, and the clock's reading at its start."""
        from llmperf import decoding
        from llmperf.decoding.trace import Recorder

        recorder = Recorder([request])
        decoding.run(self.model, [request], recorder, on_step=self.heart.touch, **self.how)
        return recorder.rows(), recorder.origin

    def end(self):
        """What this process holds, and the processor time that the run took."""
        import psutil
        import torch

        cpu_s = time.process_time() - self.cpu_s
        process = psutil.Process()
        found = {"cpu_s": cpu_s, "rss_bytes": process.memory_info().rss}
        try:
            found["uss_bytes"] = process.memory_full_info().uss
        except psutil.AccessDenied:
            found["uss_bytes"] = None
        if torch.cuda.is_initialized():
            found["allocated_bytes"] = torch.cuda.max_memory_allocated()
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        return found


def _listen(inbox: queue.SimpleQueue) -> None:
    """Messages into the queue; when the parent is gone, so is this process, in mid-work too.

    It takes the file of weights along, since nobody else is left to do so.
    """
    folder = None
    while True:
        try:
            kind, values = pickle.load(sys.stdin.buffer)
        except (EOFError, OSError, pickle.UnpicklingError):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        folder = values.get("folder", folder)
        inbox.put((kind, values))


def main() -> None:
    """Do what each message asks, one after another, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent ends this one
    line, inbox = _Line(), queue.SimpleQueue()
    heart = _Heart(line)
    worker = _Worker(heart)
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    while True:
        kind, values = inbox.get()
        try:
            with heart:
                answer = getattr(worker, kind)(**values)
            line.send(kind, answer)
        except Exception as error:  # the parent ends the run and says why
            line.send("failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
