"""An inference process as the server sees it."""

from __future__ import annotations

import asyncio
import contextlib

from llmperf.machine.child import Child

BATCHING = ("groups", "slots")


class InferenceProcess:
    """Its `on_event(process, event)` runs in the event loop; `died` is the last event."""

    def __init__(self, place: int, on_event):
        loop = asyncio.get_running_loop()
        self.place, self.quiet_ticks, self.load_s = place, 0, None
        self.outstanding: set[int] = set()  # keys that it has and has not finished
        self.reply: asyncio.Future | None = None  # what its next reply is given to
        self.child: Child | None = None

        def hear(message: dict | None) -> None:  # in the child's reading thread
            event = message or {"event": "died", "reason": self.child.obituary()}
            with contextlib.suppress(RuntimeError):  # a closed loop: nobody is left to tell
                loop.call_soon_threadsafe(on_event, self, event)

        self.child = Child(
            "llmperf.strategies.inference", name="inference process", on_message=hear
        )


def check_limits(window_s: float = 0.0, batching: str = "groups", **counts) -> None:
    """Raise ValueError, in one sentence, for limits of a server that cannot be."""
    for name in ("processes", "rows", "max_queue"):
        if counts.get(name, 1) < 1:
            raise ValueError(f"{name} is {counts[name]}: it must be at least 1")
    if not 0 <= window_s < 60:
        raise ValueError(f"window_s is {window_s}: it must be at least 0 and under 60 seconds")
    if batching not in BATCHING:
        raise ValueError(f"batching is {batching!r}: choose {' or '.join(BATCHING)}")
