"""The HTML report of a run: one file that opens without a network. A run may come from a stranger:
names are escaped, outputs are cleaned, and no script runs.
"""

import html
import io
import re
from pathlib import Path
from string import Template

import bleach
import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

from llmperf import ROOT, findings, show
from llmperf.study import answer as answers

PAGE = Template((Path(show.__file__).parent / "web" / "report.html").read_text(encoding="utf-8"))
SHOWN = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/jpeg"}
TAGS = (
    "a b blockquote br code dd del details div dl dt em h1 h2 h3 h4 hr i img li ol p pre s span"
    " strong sub summary sup table tbody td th thead tr ul"
).split()
ATTRIBUTES = ("alt", "class", "colspan", "href", "id", "rowspan")
PROTOCOLS = ("http", "https", "data")
LINK = re.compile(r'(<a\b[^>]*?) href="(?!https?:)([^"#]*)#?([^"]*)"')
GLOSSARY = ROOT / "notebooks" / "glossary.md"
CODE_ONLY = re.compile(r"<!-- code -->.*?<!-- /code -->", re.DOTALL)  # prose that points to code


def write(folder: Path, state, target: Path | None = None) -> Path:
    """Write the report and the card of a study's folder into it, or into `target`: the answer, then
    every notebook."""
    target = target or folder
    try:
        run = answers.load(folder)
        first = _first_screen(target, run)
    except ValueError as error:
        run = None
        first = f'<p class="lead">Nothing to judge yet: {html.escape(str(error))}.</p>'
    links, sections = [], []
    for stem in state.steps:
        outcome = state.done.get(stem, "not run")
        note = "" if outcome == "ok" else f' <span class="failed">{html.escape(outcome)}</span>'
        links.append(f'<li><a href="#{stem}">{stem}</a>{note}</li>')
        said = html.escape(answers.of_notebook(run, stem)) if run else ""
        sections.append(_section(folder, stem, note, said))
    glossary = markdown2html(GLOSSARY.read_text(encoding="utf-8"))
    sections.append(_folded("glossary", "", "The words that are used here.", glossary))
    page = PAGE.substitute(
        first_screen=first,
        profile=html.escape(state.profile),
        started=html.escape(state.started),
        contents="".join(links),
        sections="".join(sections),
    )
    path = target / "report.html"
    path.write_text(_with_links_inside(page), encoding="utf-8")
    return path


def _with_links_inside(page: str) -> str:
    """The page with links to notebooks and the glossary as links to their sections. A link to what
    is not in the page is text."""
    ids = set(re.findall(r' id="([^"]+)"', page))

    def inside(link: re.Match) -> str:
        name = re.sub(r"\.(ipynb|md)$", "", link[2]) or link[3]
        return f'{link[1]} href="#{name}"' if name in ids else link[1]

    return LINK.sub(inside, page)


def _first_screen(target: Path, run: findings.Run) -> str:
    """The card, one figure, and the findings."""
    lines = answers.of_run(run)
    card, _ = answers.write_card(target, run, lines)
    notes = "".join(f'<p class="failed">Note: {html.escape(text)}</p>' for text in run.notes)
    figure, drawn = show.strategies_figure(run.records), io.BytesIO()
    if figure is not None:
        figure.savefig(drawn, format="png", dpi=110)
    return (
        f"{answers.image(card.read_bytes(), ' '.join(lines))}"
        f"<p>Measured on {html.escape(run.caption)}.</p>{notes}"
        f"{answers.image(drawn.getvalue(), 'Throughput and waiting of every strategy')}"
        f"{_findings(findings.scorecard(run.records))}"
    )


def _findings(card: pd.DataFrame) -> str:
    """How many of the published findings hold, those that were judged, and the others folded."""
    count = ", ".join(f"{n} × {word}" for word, n in card.verdict.value_counts().items())
    tested = card.verdict != findings.NOT_TESTABLE
    judged = card[tested].sort_values("verdict", ascending=False)
    return (
        f"<h2>Does the published study hold here?</h2><p>Of its {len(card)} findings, on this"
        f" machine: {count}.</p>{_table(judged)}<details>"
        f"<summary>{findings.NOT_TESTABLE}: {sum(~tested)}</summary>{_table(card[~tested])}"
        "</details>"
    )


def _table(card: pd.DataFrame) -> str:
    if card.empty:
        return ""
    names = {"claim": "Finding", "verdict": "Verdict", "figures": "Figures, or what is lacking",
             "here": "What this machine shows of it (never counts)"}  # fmt: skip
    with pd.option_context("display.max_colwidth", None):
        rows = card[list(names)].rename(columns=names)
        return rows.to_html(index=False, classes="findings", border=0)


def _section(folder: Path, stem: str, note: str, said: str) -> str:
    """One notebook, folded, with its question and what its records say."""
    path, said = folder / "notebooks" / f"{stem}.ipynb", said and f"<p>{said}</p>"
    if not path.is_file():
        return f'<section id="{stem}">{stem}{note}{said}</section>'
    question, body = _body(path)
    return _folded(stem, note, html.escape(question.replace("`", "")), body, said)


def _folded(name: str, note: str, summary: str, body: str, said: str = "") -> str:
    return (
        f'<section id="{name}"><details><summary><b>{name}</b>{note} {summary}</summary>{body}'
        f"</details>{said}</section>"
    )


def _body(path: Path) -> tuple[str, str]:
    """The question of a notebook, and its prose and outputs as HTML; code stays in the notebook."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, OSError, AttributeError, nbformat.ValidationError) as error:
        return "", f"<p class='failed'>It cannot be read: {html.escape(str(error)[:200])}</p>"
    question, heading = "", path.stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = CODE_ONLY.sub("", cell.source)
            question = question or _after(r"\*\*Question\.\*\*", cell.source)
            heading = _after("#+ ", cell.source) or heading
        elif cell.cell_type == "code":
            cell.outputs = [o for o in map(_static, cell.outputs) if o]
            for output in cell.outputs:  # alternative text of the figures
                output.setdefault("metadata", {})["image/png"] = {"alt": f"Figure: {heading}"}
    exporter = HTMLExporter(template_name="basic", embed_images=False, exclude_input=True)
    exporter.exclude_output_prompt = True
    page = exporter.from_notebook_node(notebook)[0]
    page = re.sub(r"<(style|script)\b.*?</\1\s*>", "", page, flags=re.S | re.I)
    how = {"tags": TAGS, "attributes": _harmless, "protocols": PROTOCOLS, "strip": True}
    return question, bleach.clean(page, **how)


def _harmless(tag: str, name: str, value: str) -> bool:
    """Whether an attribute may stay: no handlers, and images from the file itself only."""
    if name == "src":
        return tag == "img" and value.startswith("data:image/")
    return name in ATTRIBUTES and not value.startswith("data:")


def _after(mark: str, source: str) -> str:
    """The paragraph that follows a mark at the start of a line."""
    found = re.search(rf"^{mark}(.+?)(?:\n\n|\n#|\Z)", source, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _static(output):
    """The output without what needs a kernel or a script; None when nothing is left."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type == "error":
        return output
    widget = any("widget" in mime for mime in output.data)
    output.data = {mime: x for mime, x in output.data.items() if mime in SHOWN and not widget}
    return output if output.data else None
