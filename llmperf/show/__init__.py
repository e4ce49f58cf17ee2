"""Figures, widgets, and what only a lesson needs."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    plots="COLORS GREY MARKERS bars caption curve figure gantt ledgers legend levels logarithmic"
    " published_groups roofline stacked",
    side_by_side="strategies_figure",
    replaying="replay replay_svg",
    sentences="agreement_sentence guess_sentence longer_load_sentence"
    " loops_sentence ratio_sentence value_sentence",
    widgets="Question calculator draw_batch draw_memory draw_queue draw_roofline draw_sampling"
    " explore",
    static_calculator="calculator_page",
    anatomy="PHASES split",
    exercises="check race",
    diagrams="lock_lanes named_times positions slots",
    profiling="STEP profile_steps shares",
    other_tools="METRICS TOOLS score_as",
)
