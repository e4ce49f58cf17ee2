"""Figures, widgets, and what only a lesson needs."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    side_by_side="replay_ends strategies_figure",
    replaying="replay replay_svg",
    static_calculator="calculator_page",
    exercises="check race",
    diagrams="lock_lanes named_times positions slots",
)
