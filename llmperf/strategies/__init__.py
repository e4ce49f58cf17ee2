"""When and where requests run: one file a strategy, each listed in `table`."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    strategy="Strategy",
    table="STRATEGIES check",
    served="kept_server session",
    server="Server ServerFailed",
)
