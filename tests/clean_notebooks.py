"""Take out of notebooks what changes with every run and teaches nothing; outputs stay.

    python tests/clean_notebooks.py [--check] FILES

Outputs, execution counts and cell ids are kept. Timing metadata and widget state go, the kernel is
named as it is called on every machine, and the exact Python version is left out. The file is
written as Jupyter writes it, so that a notebook saved by hand differs in nothing else.
With --check nothing is written, and the exit status is 1 when a file would change.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import nbformat

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
TIMING = ("execution", "papermill")
PROGRESS = re.compile(r"\d+%\|.*\| \d+/\d+")  # as tqdm draws it
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def cleaned(text: str) -> str:
    """The text of a notebook without its volatile parts; cleaning twice changes nothing more.

    Raises ValueError when the text is not a notebook of format 4.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ValueError(f"this is not a notebook, which would be JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("nbformat") != 4 or "cells" not in raw:
        raise ValueError("this is not a notebook of format 4: open and save it in JupyterLab")
    # The reader of format 4 itself: nbformat.reads would also invent missing cell ids.
    nb = nbformat.v4.reads(text)
    _clean_metadata(nb.setdefault("metadata", nbformat.NotebookNode()))
    for cell in nb.cells:
        for key in TIMING:
            cell.metadata.pop(key, None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if _keep(output)]
    # sort_keys stays at nbformat's default, which is what Jupyter and papermill write.
    return nbformat.v4.writes(nb, ensure_ascii=False).rstrip("\n") + "\n"


def _clean_metadata(metadata: nbformat.NotebookNode) -> None:
    for key in (*TIMING, "widgets"):
        metadata.pop(key, None)
    metadata.kernelspec = nbformat.from_dict(KERNELSPEC)
    metadata.get("language_info", {}).pop("version", None)


def _keep(output: nbformat.NotebookNode) -> bool:
    """Whether an output still shows something without a kernel.

    A widget's view does not: a form has a static twin in the next cell, and the text of a progress
    bar is frozen at 0 %, also when it was printed to stderr.
    """
    if output.output_type == "stream" and output.name == "stderr":
        return not PROGRESS.search(output.text)
    return WIDGET_VIEW not in output.get("data", {}) and not PROGRESS.search(
        output.get("data", {}).get("text/plain", "")
    )


def clean(path: Path, check: bool) -> bool:
    """Clean one file in place, or with `check` only look; whether it was clean already.

    Raises OSError when the file cannot be read, ValueError when it is not a notebook.
    """
    # Text mode, so that a checkout with CRLF line ends counts as clean.
    before = path.read_text(encoding="utf-8")
    after = cleaned(before)
    if before != after and not check:
        path.write_text(after, encoding="utf-8", newline="\n")
    return before == after


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 when a file cannot be cleaned or, with --check, is not clean; else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only say")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILES")
    options = parser.parse_args(arguments)
    status = 0
    for path in options.files:
        try:
            if clean(path, options.check):
                continue
            print(f"{path}: {'would be cleaned' if options.check else 'cleaned'}")
            status |= options.check
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            status = 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
