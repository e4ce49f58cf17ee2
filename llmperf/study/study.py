"""A study: a profile, the notebooks run one after another through papermill, and one HTML report.

A run's folder holds everything: `run.yaml` (what was asked and how far it came), `records.jsonl`,
the executed `notebooks/` and `report.html`. A killed run goes on with `resume`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from llmperf import DATA, ROOT, RUNS

NOTEBOOKS = ROOT / "notebooks"
PROFILES = DATA / "profiles"
TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}
RESERVED = ("records",)  # parameters that the study itself sets


@dataclass(frozen=True)
class Profile:
    """Papermill parameters: `parameters` for every notebook that has them, `notebooks` for one."""

    name: str
    description: str = ""
    parameters: Mapping = field(default_factory=dict)
    notebooks: Mapping = field(default_factory=dict)
    timeout_s: int = 900  # for one cell


def profiles() -> list[str]:
    """The names of the profiles that come with the kit."""
    return sorted(p.stem for p in PROFILES.glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """A profile by name, or from a YAML file. Raises ValueError for what it does not know."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(
            f"unknown profile {str(name)!r}: choose {', '.join(profiles())}, or a file"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"profile {path.name} is not YAML: {' '.join(str(error).split())}"
        ) from None
    unknown = set(data) - set(Profile.__dataclass_fields__)
    if unknown:
        raise ValueError(f"profile {path.name}: unknown entry {', '.join(sorted(unknown))}")
    return Profile(**{"name": path.stem, **data})


def notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks in order; `only` picks some by number or name."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    picked = []
    for wanted in only:
        number = wanted.zfill(2) if wanted.isdigit() else wanted
        found = [p for p in every if p.stem == number or p.stem[:2] == number]
        if not found:
            names = ", ".join(p.stem for p in every)
            raise ValueError(f"there is no notebook {wanted!r}: choose {names}")
        picked += found
    return sorted(set(picked)) or every


def parameters_of(notebook: Path) -> dict:
    """Name → default value, from the notebook's one `parameters` cell, read as literals."""
    import ast

    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    source = next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    found = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.AnnAssign):
            found[statement.target.id] = ast.literal_eval(statement.value)
        elif isinstance(statement, ast.Assign):
            found[statement.targets[0].id] = ast.literal_eval(statement.value)
    return found


def plan(profile: Profile, paths: Sequence[Path], overrides: Mapping | None = None) -> dict:
    """Notebook → its parameters, everything checked before anything runs.

    Raises ValueError when a parameter is unknown to its notebook (or, if it is for all, to every
    one of them) or has another type than the default that it replaces.
    """
    every = {p.stem: parameters_of(p) for p in notebooks()}
    chosen = [p.stem for p in paths]
    common = {**profile.parameters, **(overrides or {})}
    for stem, own in profile.notebooks.items():
        if stem not in every:
            raise ValueError(f"profile {profile.name}: there is no notebook {stem!r}")
        for name in own:
            _check_known(name, every[stem], f"notebook {stem}")
    for name in common:
        _check_known(name, {k: 0 for p in every.values() for k in p}, "any notebook")
    steps = {}
    for stem in chosen:
        given = {k: v for k, v in common.items() if k in every[stem]}
        given.update(profile.notebooks.get(stem, {}))
        given.update({k: v for k, v in (overrides or {}).items() if k in every[stem]})
        for name, value in given.items():
            _check_type(stem, name, value, every[stem][name])
        steps[stem] = given
    return steps


def _check_known(name: str, known: Mapping, where: str) -> None:
    if name in RESERVED:
        raise ValueError(f"parameter {name!r} is set by the study itself: leave it out")
    if name not in known:
        choice = ", ".join(sorted(k for k in known if k not in RESERVED))
        raise ValueError(f"unknown parameter {name!r} for {where}: choose {choice}")


def _check_type(stem: str, name: str, value, default) -> None:
    if default is None:
        return
    wanted = TYPES[type(default).__name__]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(
            f"parameter {name!r} of notebook {stem} is {value!r}, a {type(value).__name__}:"
            f" it must be a {type(default).__name__}, for instance {default!r}"
        )


@dataclass
class State:
    """What `run.yaml` holds: enough to go on after a kill."""

    profile: str
    steps: dict  # notebook → parameters
    timeout_s: int
    done: dict = field(default_factory=dict)  # notebook → ok or the error's first line
    started: str = ""

    def save(self, folder: Path) -> None:
        text = yaml.safe_dump(self.__dict__, sort_keys=False, allow_unicode=True)
        scratch = folder / "run.yaml.part"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(folder / "run.yaml")  # whole or not at all


def start(profile: Profile, only=(), overrides=None, out: Path | str | None = None) -> Path:
    """Check everything, then make the run's folder with its state; nothing has run yet.

    Raises ValueError before any work for what cannot work.
    """
    steps = plan(profile, notebooks(only), overrides)
    now = datetime.datetime.now()
    folder = Path(out) if out else RUNS / f"{now:%Y-%m-%d-%H%M%S}-{profile.name}"
    if (folder / "run.yaml").exists():
        raise ValueError(f"{folder.name} already holds a run: use --resume, or another --out")
    try:
        (folder / "notebooks").mkdir(parents=True, exist_ok=True)
        State(profile.name, steps, profile.timeout_s, started=f"{now:%Y-%m-%d %H:%M}").save(folder)
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {folder} ({error.strerror}): choose one that you"
            " may write to with --out"
        ) from None
    return folder.resolve()


def load_state(folder: Path | str) -> State:
    """The state of a run's folder; raises ValueError when there is none."""
    path = Path(folder) / "run.yaml"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no run (no run.yaml in it): name a folder under data/runs"
        )
    return State(**yaml.safe_load(path.read_text(encoding="utf-8")))


def run(folder: Path, *, use_notebooks: bool = True) -> State:
    """Run what is left of the study in `folder`, then write its report.

    A notebook that fails is noted and the others go on. Ctrl-C leaves a state that `resume` reads.
    """
    from tqdm import tqdm

    state = load_state(folder)
    left = [stem for stem in state.steps if state.done.get(stem) != "ok"]
    with tqdm(left, desc="study", unit="notebook", position=0) as bar:
        for stem in bar:
            bar.set_postfix_str(stem)
            state.done[stem] = _run_one(folder, stem, state, use_notebooks)
            state.save(folder)
    if use_notebooks:
        write_report(folder)
    return state


def _run_one(folder: Path, stem: str, state: State, use_notebooks: bool) -> str:
    parameters = {**state.steps[stem], "records": str(folder / "records.jsonl")}
    source = NOTEBOOKS / f"{stem}.ipynb"
    try:
        if use_notebooks:
            _papermill(source, folder / "notebooks" / source.name, parameters, state.timeout_s)
        else:
            from llmperf.study import cells

            cells.execute(source, parameters)
    except Exception as error:  # papermill's own, a time-out, a dead kernel: the study goes on
        return _first_line(error)
    return "ok"


def _papermill(source: Path, target: Path, parameters: dict, timeout_s: int) -> None:
    import papermill

    papermill.execute_notebook(
        source,
        target,
        parameters=parameters,
        cwd=source.parent,
        kernel_name="python3",
        execution_timeout=timeout_s,
        progress_bar={"position": 1, "leave": False, "desc": source.stem},
    )


def _first_line(error: Exception) -> str:
    """The last line of a notebook's error is the exception itself."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[-1] if text else 'no message'}"


def write_report(folder: Path | str) -> Path:
    """One HTML file, opening without a network, from a run's executed notebooks."""
    from llmperf.study import report

    return report.write(Path(folder), load_state(folder))
