"""Make one study the committed one: its notebooks with their outputs, and its records.

    python -m llmperf run --out RUN && python tests/commit_run.py RUN

Notebooks and records then come from one run: each notebook holds the run's start and the hash of
the records that are shipped with it. Run it with the default profile, which leaves the notebooks'
parameters as they are. Notebook 10 compares shipped runs: run it again by itself afterwards.
"""

import argparse
import base64
import hashlib
import re
import shutil
import sys
from pathlib import Path

import clean_notebooks
import nbformat

from llmperf import REFERENCE, findings
from llmperf.study import study

BUSY_SHARE = 0.05  # of the runs: measured beside other programs, a study is no reference
REPLAYED = "04-coroutines"  # the README shows its replay
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def stamp(records: Path, started: str) -> dict:
    """What each notebook of the run carries in its metadata."""
    return {"run": started, "records": hashlib.sha256(records.read_bytes()).hexdigest()[:16]}


def committed(executed: nbformat.NotebookNode, current: nbformat.NotebookNode, mark: dict):
    """The executed notebook without papermill's cell. Raises ValueError when sources differ."""
    cells = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    if [c.source for c in cells] != [c.source for c in current.cells]:
        raise ValueError("the notebook has changed since the run: run the study again")
    for cell, original in zip(cells, current.cells, strict=True):
        cell.id, cell.metadata = original.id, original.metadata
    executed.cells, executed.metadata = cells, current.metadata
    executed.metadata["llmperf"] = mark
    return executed


def check_quiet(run: findings.Run) -> None:
    """Raise ValueError for a run that was measured beside other programs."""
    busy = sum(any(w.startswith("unstable") for w in r.warnings) for r in run.measured)
    if busy > BUSY_SHARE * len(run.measured):
        runs = f"{busy} of {len(run.measured)} runs were measured on a busy machine"
        raise ValueError(f"{runs}: run the study again when nothing else runs")


def replay_of(notebook: nbformat.NotebookNode) -> bytes:
    """The animated SVG that an executed notebook shows."""
    text = "".join(o.data.get("text/html", "") for c in notebook.cells for o in c.get("outputs", [])
                   if "data" in o)  # fmt: skip
    return base64.b64decode(re.search(r"data:image/svg\+xml;base64,([\w+/=]+)", text)[1])


def commit(run: Path, name: str | None = None) -> None:
    """Write the notebooks of `run` to notebooks/ and its records to data/reference/runs/NAME.

    Raises ValueError when a notebook is missing, failed or has changed, and for a busy machine.
    """
    state, found = study.load_state(run), findings.load_runs([run])[0]
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    wanted = state.steps if name else [p.stem for p in paths]  # another run may have some alone
    if missing := [stem for stem in wanted if state.done.get(stem) != "ok"]:
        raise ValueError(f"not run or failed: {', '.join(missing)}")
    check_quiet(found)
    folder = REFERENCE / "runs" / (name or found.name)
    folder.mkdir(exist_ok=True)
    target = folder / "records.jsonl.gz"
    target.unlink(missing_ok=True)
    findings.share(run, target)
    if name:  # a second run of a machine comes without notebooks
        return
    executed = [nbformat.read(run / "notebooks" / p.name, as_version=4) for p in paths]
    for file in ("card.png", "run.yaml"):  # the first study's time left rests on run.yaml
        shutil.copy(run / file, folder)
    replayed = next(nb for p, nb in zip(paths, executed, strict=True) if p.stem == REPLAYED)
    (REFERENCE / "replay.svg").write_bytes(replay_of(replayed))
    mark = stamp(target, state.started)
    for path, notebook in zip(paths, executed, strict=True):
        current = nbformat.read(path, as_version=4)
        nbformat.write(committed(notebook, current, mark), path)
        clean_notebooks.clean(path, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", help="ship the records alone, as another run of this machine")
    options = parser.parse_args()
    try:
        commit(options.run, options.name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
