"""Profiles, papermill, the report, and the command line."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    {
        "study": "NOTEBOOKS Profile load_profile load_state notebooks parameters_of plan profiles"
        " run start write_report",
    },
)
