"""A replay: the same requests under several strategies, each text appearing as its user saw it."""

import base64
from collections.abc import Iterator, Mapping
from xml.sax.saxutils import escape, quoteattr

from IPython.display import HTML

from llmperf.decoding.trace import Trace
from llmperf.show.plots import COLORS, GREY

HALF = "\N{REPLACEMENT CHARACTER}"  # of a character whose other bytes come with the next token
LASTS_S = 8.0  # of the slowest strategy's replay
ENDS_S = 4.0  # the end is shown so long, then it begins again
WIDTH, LINE = 440, 19  # pixels of a panel, and of a request's line
WHOLE_S = LASTS_S + ENDS_S
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
    ' font-family="sans-serif" font-size="12"><style>@media (prefers-reduced-motion:reduce)'
    '{{.t{{visibility:visible!important}}}}</style><rect width="100%" height="100%" fill="white"/>'
)


def replay_svg(traces: Mapping[str, Trace], tokenizer, note: str = "") -> str:
    """An animated SVG without a script: one panel a trace, one line a request, one clock for all.

    Where a reader asks for reduced motion, and where SVG is not animated, the end is shown.
    """
    slower = LASTS_S / max(map(_end_s, traces.values()))
    rows = max(len(trace.requests) for trace in traces.values())
    width, height = WIDTH * len(traces), LINE * (rows + 3) + 8
    parts = [HEAD.format(width=width, height=height)]
    for i, (name, trace) in enumerate(traces.items()):
        parts += _panel(name, trace, tokenizer, 12 + WIDTH * i, slower)
    cut = sorted({r.prompt_tokens for trace in traces.values() for r in trace.requests})
    note += f"; shown at {1 / slower:.0%} of the real speed"
    note += f"; prompts end after {' to '.join(map(str, dict.fromkeys((cut[0], cut[-1]))))} tokens"
    note = escape(note + ", so texts may begin in mid-sentence")
    parts.append(f'<text x="12" y="{height - 8}" font-size="10" fill="{GREY}">{note}</text></svg>')
    return "".join(parts)


def replay(traces: Mapping[str, Trace], tokenizer, note: str = "") -> HTML:
    """The SVG as an image, so that it is shown in a saved notebook and in the report too."""
    data = base64.b64encode(replay_svg(traces, tokenizer, note).encode()).decode()
    alt = f"Replay: when each token came, {' and '.join(traces)}"
    return HTML(f'<img alt={quoteattr(alt)} src="data:image/svg+xml;base64,{data}">')


def _end_s(trace: Trace) -> float:
    return max(r.token_s[-1] for r in trace.requests if r.token_s)


def _panel(name: str, trace: Trace, tokenizer, x: int, slower: float) -> Iterator[str]:
    """A title, a bar that fills until the last request has ended, and the requests below."""
    end_s, full = _end_s(trace), WIDTH - 24
    title = escape(f"{name}: {trace.output_tokens} tokens in {end_s:.2f} s")
    yield f'<text x="{x}" y="{LINE}" font-weight="bold">{title}</text>'
    yield f'<rect x="{x}" y="{LINE + 6}" width="{full}" height="4" fill="{COLORS[0]}">'
    yield _animate("width", f"0;{full};{full}", f"0;{end_s * slower / WHOLE_S:.4f};1")
    yield "</rect>"
    yield f'<svg x="{x}" width="{full}">'  # longer texts are cut at its edge
    for row, r in enumerate(trace.requests):
        yield f'<text y="{LINE * (row + 2) + 8}"><tspan fill="{GREY}">{r.id + 1}  </tspan>'
        before = ""
        for n, at in enumerate(r.token_s, start=1):
            said = _line(tokenizer.decode(r.tokens[:n], skip_special_tokens=True).rstrip(HALF))
            before, piece = said, escape(said[len(before) :])
            appears = f"0;{at * slower / WHOLE_S:.4f};1"
            yield f'<tspan class="t" xml:space="preserve">{piece}'
            yield _animate("visibility", "hidden;visible;visible", appears, "discrete")
            yield "</tspan>"
        yield "</text>"
    yield "</svg>"


def _line(text: str) -> str:
    """On one line, and without what XML cannot hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def _animate(what: str, values: str, times: str, mode: str = "linear") -> str:
    return (
        f'<animate attributeName="{what}" values="{values}" keyTimes="{times}" calcMode="{mode}"'
        f' dur="{WHOLE_S:g}s" repeatCount="indefinite"/>'
    )
