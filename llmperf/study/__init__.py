"""Profiles, papermill, the answer and its card, the report, and the command line."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    profile="Profile check_parameters load_profile notebooks parameters_of plan profiles read_yaml",
    study="SKIPPED State load_state run start write_report",
    answer="of_run write_card",
)
