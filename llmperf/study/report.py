"""The HTML report of a run: one file that opens without a network, the verdict first."""

from __future__ import annotations

import html
from pathlib import Path

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 0 }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1.25rem 6rem }
nav { background: #f3f5f7; padding: .75rem 1rem; border-radius: 8px }
nav li { margin: .15rem 0 }
h1 { line-height: 1.2 } section { border-top: 3px solid #d0d7de; margin-top: 3rem }
img { max-width: 100%; height: auto }
pre { background: #f6f8fa; padding: .6rem .8rem; border-radius: 6px; overflow-x: auto;
  font-size: 13px }
table { border-collapse: collapse; margin: .8rem 0; font-size: 14px; display: block;
  overflow-x: auto }
th, td { border: 1px solid #d0d7de; padding: .25rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left }
.failed { color: #a40e26; font-weight: 600 }
.anchor-link, .jp-InputPrompt, .prompt { display: none }
.lead { font-size: 1.25rem; margin: .3rem 0 }
.card :is(th, td) { text-align: left; vertical-align: top }
.card td:nth-child(2) { font-weight: 600 }
.holds { color: #0b6b3a } .fails { color: #a40e26 } .open { color: #57606a }
details > summary { cursor: pointer; color: #57606a; font-size: 13px }
"""


def write(folder: Path, state) -> Path:
    """Write `report.html` in a run's folder: the verdict, then every executed notebook."""
    links, sections = [], []
    for stem in state.steps:
        outcome = state.done.get(stem, "not run")
        note = "" if outcome == "ok" else f' <span class="failed">{html.escape(outcome)}</span>'
        links.append(f'<li><a href="#{stem}">{stem}</a>{note}</li>')
        path = folder / "notebooks" / f"{stem}.ipynb"
        body = _body(path) if path.exists() else ""
        sections.append(f'<section id="{stem}">{note}{body}</section>')
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>llmperf: {html.escape(state.profile)}</title><style>{STYLE}</style></head><body>"
        "<main><h1>What decides how fast a language model answers on this machine</h1>"
        f"{_verdict(folder)}"
        f"<p>Profile <b>{html.escape(state.profile)}</b>, started {html.escape(state.started)}.</p>"
        f"<nav><ol start='0'>{''.join(links)}</ol></nav>{''.join(sections)}</main></body></html>"
    )
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def _verdict(folder: Path) -> str:
    """The first screen: the answer, the machine, one figure, and the scorecard."""
    from llmperf import findings
    from llmperf.show import overview

    try:
        (run,) = findings.load_runs([folder / "records.jsonl"])
    except ValueError as error:
        return f'<p class="lead">Nothing to judge yet: {html.escape(str(error))}.</p>'
    said = findings.judge_all(run.records)
    dirty = "".join(f'<p class="failed">Not clean: {html.escape(x)}</p>' for x in run.dirty)
    return (
        f'<p class="lead">{html.escape(findings.headline(run.records))}</p>'
        f"<p>Measured on {html.escape(run.caption)}.</p>{dirty}"
        f"{_image(overview.figure(run.records))}{_scorecard(said)}"
    )


def _image(figure) -> str:
    """A figure as a PNG inside the page; nothing when there is none."""
    import base64
    import io

    import matplotlib.pyplot as plt

    if figure is None:
        return ""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="Throughput and waiting of every strategy" src="data:image/png;base64,{data}">'
    )


CLASSES = {"holds": "holds", "does not hold": "fails"}


def _scorecard(verdicts) -> str:
    """How many of the published findings hold, then each, what could be judged first."""
    words = ("holds", "does not hold", "cannot tell", "not testable here")
    count = {word: sum(v.verdict == word for v in verdicts) for word in words}
    rows = "".join(
        f"<tr><td>{html.escape(v.claim)}</td>"
        f'<td class="{CLASSES.get(v.verdict, "open")}">{v.verdict}</td>'
        f"<td>{html.escape('. '.join((v.figures, *v.warnings)))}</td>"
        f"<td>{html.escape(v.here)}</td></tr>"
        for v in sorted(verdicts, key=lambda v: words.index(v.verdict))
    )
    return (
        f"<h2>Does the published study hold here?</h2><p>Of its {len(verdicts)} findings,"
        f" on this machine: {count['holds']} × holds, {count['does not hold']} × does not hold,"
        f" {count['cannot tell']} × cannot tell (more repeats may), {count['not testable here']} ×"
        " not testable here (needs another machine or notebook).</p>"
        "<table class='card'><thead><tr><th>Finding</th>"
        "<th>Verdict</th><th>Figures, or what is lacking</th><th>What this machine shows of it"
        f" (never counts)</th></tr></thead>{rows}</table>"
    )


def _body(path: Path) -> str:
    """One notebook as HTML without scripts: prose and outputs; the code stays in the notebook."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if _is_static(o)]
    exporter = HTMLExporter(template_name="basic", embed_images=True, exclude_input=True)
    exporter.exclude_output_prompt = True
    return exporter.from_notebook_node(notebook)[0]


def _is_static(output) -> bool:
    """Progress bars and controls need a kernel; a report has none."""
    if output.output_type == "stream":
        return output.name == "stdout"
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
