"""A study: notebooks run one after another through papermill into a folder, and resumed."""

import ast
import asyncio
import datetime
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from llmperf import REFERENCE, RUNS
from llmperf.study import profile as profiles
from llmperf.study.profile import Profile

SKIPPED = "skipped"  # a notebook whose runs do not fit this machine


@dataclass
class State:
    """What `run.yaml` holds: enough to go on after a kill."""

    profile: str
    steps: dict  # notebook → parameters
    timeout_s: int
    done: dict = field(default_factory=dict)  # notebook → ok, SKIPPED and why, or the error
    started: str = ""
    seconds: dict = field(default_factory=dict)  # notebook → how long it took

    def save(self, folder: Path) -> None:
        text = yaml.safe_dump(self.__dict__, sort_keys=False, allow_unicode=True)
        scratch = folder / "run.yaml.part"  # a folder that was removed is not made again
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(folder / "run.yaml")  # whole or not at all


def start(profile: Profile, only=(), overrides=None, out: Path | str | None = None) -> Path:
    """Check everything, then make the run's folder with its state; nothing has run yet.

    Raises ValueError before any work for what cannot work.
    """
    steps = profiles.plan(profile, profiles.notebooks(only), overrides)
    now = datetime.datetime.now()
    name = f"{now:%Y-%m-%d-%H%M%S}-" + re.sub(r"[^\w-]+", "-", profile.name)[:60]
    folder = Path(out) if out else RUNS / name
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the output folder {folder!r} is not UTF-8 text: name another") from None
    if (folder / "run.yaml").exists():
        raise ValueError(f"{folder.name} already holds a run: use --resume, or another --out")
    state = State(profile.name, steps, profile.timeout_s, started=f"{now:%Y-%m-%d %H:%M}")
    try:
        (folder / "notebooks").mkdir(parents=True, exist_ok=True)
        state.save(folder)
    except OSError as error:
        why = f"cannot write to the output folder {folder} ({error.strerror})"
        raise ValueError(f"{why}: choose one that you may write to with --out") from None
    return folder.resolve()


def load_state(folder: Path | str) -> State:
    """The state of a run's folder, checked: only the kit's own notebooks, with parameters that they
    have. Raises ValueError when there is none, or it is damaged."""
    path = Path(folder) / "run.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no run.yaml): name a folder under data/runs")
    what = f"{path.parent.name}/run.yaml"
    state = profiles.from_data(State, profiles.read_yaml_file(path, what), what)
    profiles.check_steps(state.steps)
    kept = (state.done, str), (state.seconds, (int, float))
    if not all(isinstance(x, kind) for values, kind in kept for x in values.values()):
        raise ValueError(f"{what} is damaged: remove the folder, or start the study in another one")
    return state


def run(folder: Path, *, use_notebooks: bool = True, say: Callable[[str], None] = print) -> State:
    """Run what is left of the study in `folder`, then write its card and its report.

    Left are notebooks that did not end, and those with runs that failed. A notebook that fails is
    noted and the others go on. Ctrl-C leaves a state that `--resume` reads. Raises ValueError while
    another process runs this study; its lock ends with it.
    """
    from llmperf.study import answer

    load_state(folder)
    try:
        lock = FileLock(folder / "run.lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process runs the study in {folder.name}: wait for it") from None
    with lock:
        state = load_state(folder)
        failed: tuple[str, ...] = ()
        with suppress(ValueError):  # no records yet
            failed = tuple(r.experiment for r in answer.failures(answer.load(folder).records))
        left = [s for s in state.steps if state.done.get(s) != "ok" or s.startswith(failed)]
        profiles.check_values({stem: state.steps[stem] for stem in left})
        past = _past_seconds()
        for i, stem in enumerate(left):
            say(f"[{i + 1}/{len(left)}] {stem}{_time_left(left[i:], state.seconds, past)}")
            began = time.monotonic()
            state.done[stem] = _run_one(folder, stem, state, use_notebooks)
            took = time.monotonic() - began
            state.seconds[stem] = round(state.seconds.get(stem, 0) + took, 1)
            state.save(folder)
            said = f"    {took:.0f} s, {state.done[stem]}."
            with suppress(ValueError):  # no notebook kept records yet
                said += f" {answer.of_notebook(answer.load(folder), stem)}"
            say(said.rstrip())
        if use_notebooks:
            write_report(folder)
    return state


def _past_seconds() -> dict[str, float]:
    """Notebook → how long it took in the last run under data/runs, else in a shipped one."""
    past: dict[str, float] = {}
    for folder in (REFERENCE / "runs", RUNS):
        for path in sorted(folder.glob("*/run.yaml")):
            with suppress(ValueError):
                past |= load_state(path.parent).seconds
    return past


def _time_left(stems: list[str], taken: Mapping, past: Mapping) -> str:
    """By past runs, at the pace of the notebooks that this run has `taken`; nothing for a notebook
    that never ran. 00 and 01 set no pace: what they download and measure stays in the cache."""
    if not past.keys() >= set(stems):
        return ""
    both = {stem for stem in taken.keys() & past.keys() if stem >= "02"}
    known = sum(past[s] for s in both)
    pace = sum(taken[s] for s in both) / known if known else 1.0
    return f", about {pace * sum(past[s] for s in stems) / 60:.1f} min left"


def _run_one(folder: Path, stem: str, state: State, use_notebooks: bool) -> str:
    parameters = {**state.steps[stem], "records": str(folder / "records.jsonl")}
    source = profiles.NOTEBOOKS / f"{stem}.ipynb"
    try:
        if use_notebooks:
            import papermill
            from nbclient.output_widget import OutputWidget

            # It tells the kernel what a widget shows. In a few of a thousand cells that message
            # swallowed the kernel's answer, and the study waited until the cell's time limit.
            OutputWidget.sync_state = lambda self: None
            target = folder / "notebooks" / source.name
            form = "    {bar:40} {n_fmt} of {total_fmt} cells"  # cells differ too much for a rate
            bar = sys.stderr.isatty() and {"bar_format": form, "leave": False}
            how = {"cwd": source.parent, "kernel_name": "python3", "progress_bar": bar}
            how["execution_timeout"] = state.timeout_s
            how["shutdown_kernel"] = "immediate"  # to free torch takes seconds; children end too
            how["extra_arguments"] = ["--log-level=CRITICAL"]  # no "TCP without encryption"
            papermill.execute_notebook(source, target, parameters, **how)
        else:
            _execute_without_jupyter(source, parameters)
    except Exception as error:  # papermill's own, a time-out, a dead kernel: the study goes on
        if getattr(error, "ename", type(error).__name__) == "DoesNotFit":
            return f"{SKIPPED}: {getattr(error, 'evalue', error)}"
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # its last line is the exception
        return f"{type(error).__name__}: {text.splitlines()[-1] if text else 'no message'}"
    return "ok"


def _execute_without_jupyter(notebook: Path, parameters: Mapping) -> None:
    """The cells tagged `parameters` and `measure`: the same records, without prose and plots."""
    namespace: dict = {"__name__": "__main__", "display": lambda *_: None}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        tags = {"parameters", "measure"} & set(cell["metadata"].get("tags", []))
        if cell["cell_type"] != "code" or not tags:
            continue
        source = "".join(cell["source"])
        code = compile(source, notebook.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, namespace))  # noqa: S307 - the kit's own notebook
        else:
            exec(code, namespace)  # noqa: S102
        if "parameters" in tags:
            namespace.update(parameters)


def write_report(folder: Path | str) -> Path:
    """One HTML file, opening without a network, from a run's executed notebooks. That of a run that
    came with the kit is written under data/runs."""
    from llmperf.study import report

    folder, state = Path(folder).resolve(), load_state(folder)
    target = RUNS / folder.name if folder.is_relative_to(REFERENCE) else folder
    target.mkdir(parents=True, exist_ok=True)
    return report.write(folder, state, target)
