"""The publication and its audit, its 17 claims, runs compared, and what to choose."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    checks="CANNOT_TELL FAILS HOLDS",
    judging="NOT_TESTABLE Claim Verdict claims judge_all published_verdicts scorecard",
    published="published_records",
    runs="Run latest load_runs published_runs shipped_runs",
    comparing="Pair RunComparison compare_runs",
    sharing="public_model share",
    recommending="Recommendation headline one_at_a_time options recommend",
)
