"""Profiles: papermill parameters as plain data, checked before anything runs."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import yaml

from llmperf import DATA, ROOT, decoding, models
from llmperf.machine import DTYPES

NOTEBOOKS = ROOT / "notebooks"
PROFILES = DATA / "profiles"
RESERVED = ("records",)  # parameters that the study itself sets
MOST_CHARACTERS, MOST_DEPTH = 100_000, 8
WORDS = {  # of a parameter, or of the entries of a list
    "device": ("auto", "cpu", "cuda"),
    "dtype": tuple(DTYPES),
    "small_dtype": tuple(DTYPES),
    "weights": models.WEIGHTS,
    "loop": decoding.LOOPS,
    "quantizations": models.QUANTIZATIONS[1:],
}
CHECKED_WHERE_USED = ("slo", "peers", "endpoint")
MAY_BE_ZERO = {("11-verdict", "new_tokens")}


@dataclass(frozen=True)
class Profile:
    """Papermill parameters: `parameters` for every notebook that has them, `notebooks` for one."""

    name: str
    description: str = ""
    parameters: dict = field(default_factory=dict)
    notebooks: dict = field(default_factory=dict)
    timeout_s: int = 900  # for one cell


def from_data(kind: type, data: object, what: str):
    """A dataclass from a mapping as YAML gives it. Raises ValueError for another form."""
    forms = get_type_hints(kind)
    if not isinstance(data, dict) or not data.keys() <= forms.keys():
        found = sorted(data.keys() - forms.keys()) if isinstance(data, dict) else data
        raise ValueError(f"{what} has {found!r:.60}: it is a mapping of {', '.join(forms)}")
    for key, value in data.items():
        if type(value) is not forms[key]:
            wanted = forms[key].__name__
            raise ValueError(f"{what}: {key} is {value!r:.60}; it must be of type {wanted}")
    try:
        return kind(**data)
    except TypeError as error:  # an entry is missing
        raise ValueError(f"{what} is not complete: {error}") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, whose expansion may be endless."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not allowed: write the value itself")
        return super().compose_node(parent, index)


def read_yaml(text: str, what: str) -> object:
    """Parse YAML into plain data. Raises ValueError, one sentence that begins with `what`."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{what} has {len(text):,} characters: at most {MOST_CHARACTERS:,}")
    try:
        data = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(f"{what} is not plain YAML: {' '.join(str(error).split())}") from None
    check_data(data, what)
    return data


def read_yaml_file(path: Path, what: str) -> object:
    """`read_yaml` of a file. Raises ValueError for what cannot be read as text."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # an editor may add the mark
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} cannot be read: {getattr(error, 'strerror', error)}") from None
    return read_yaml(text, what)


def check_data(value: object, what: str) -> None:
    """Raise ValueError unless `value` is plain data (that of JSON): papermill writes any other type
    into a notebook as code."""
    try:
        text = json.dumps(value, allow_nan=False)
        plain = len(text) <= MOST_CHARACTERS and json.loads(text) == value
    except (TypeError, ValueError, RecursionError):
        plain = False
    if not plain or _depth(value) > MOST_DEPTH:
        kinds = "text, finite numbers, true, false, null, lists, and mappings with text keys"
        raise ValueError(f"{what} is {value!r:.60}: use {kinds}, {MOST_DEPTH} levels deep at most")


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner)) if inner else 0


def profiles() -> list[str]:
    """The names of the profiles that come with the kit."""
    return sorted(p.stem for p in PROFILES.glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """A profile by name, or from a YAML file. Raises ValueError for what it does not know."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(profiles())
        raise ValueError(f"unknown profile {str(name)!r}: choose {known}, or a file")
    what = f"profile {path.name}"
    data = read_yaml_file(path, what) or {}
    named = {"name": path.stem} | data if isinstance(data, dict) else data
    return from_data(Profile, named, what)


def notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks in order; `only` picks some by number or name."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    picked = []
    for wanted in only:
        number = wanted.zfill(2) if wanted.isdigit() else wanted
        found = [p for p in every if number in (p.stem, p.stem[:2])]
        if not found:
            names = ", ".join(p.stem for p in every)
            raise ValueError(f"there is no notebook {wanted!r}: choose {names}")
        picked += found
    return sorted(set(picked)) or every


def parameters_of(notebook: Path) -> dict:
    """Name → default value, from the notebook's one `parameters` cell, read as literals."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = next(c["source"] for c in cells if "parameters" in c["metadata"].get("tags", []))
    lines = ast.parse("".join(source)).body  # each `name: type = literal`, or without a type
    names = [ast.unparse(getattr(line, "target", None) or line.targets[0]) for line in lines]
    return {n: ast.literal_eval(line.value) for n, line in zip(names, lines, strict=True)}


def plan(profile: Profile, paths: Sequence[Path], overrides: Mapping | None = None) -> dict:
    """Notebook → its parameters, everything checked before anything runs.

    Raises ValueError when a parameter is no plain data, is unknown to its notebook (or, if it is
    for all, to every one of them), or has another type than the default that it replaces.
    """
    every = {p.stem: parameters_of(p) for p in notebooks()}
    common = {**profile.parameters, **(overrides or {})}
    anywhere = {name for known in every.values() for name in known}
    for name in common:
        _check_known(name, anywhere, "any notebook")
    check_steps(profile.notebooks)
    steps = {}
    for stem, known in every.items():
        given = {**common, **profile.notebooks.get(stem, {}), **(overrides or {})}
        steps[stem] = {name: _whole(name, v) for name, v in given.items() if name in known}
    check_steps(steps)
    check_values(steps)
    return {p.stem: steps[p.stem] for p in paths}


def _whole(name: str, value):
    """A model's folder as a whole path: notebooks run in another folder."""
    if name != "model" or not isinstance(value, str) or not re.search(r"[/\\~]", value):
        return value
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def check_values(steps: Mapping) -> None:
    """Raise ValueError for a value that no run can have, such as an unknown model."""
    for stem, given in steps.items():
        defaults = parameters_of(NOTEBOOKS / f"{stem}.ipynb")
        for name, value in given.items():
            _check_value(stem, name, value, defaults[name])


def check_steps(steps: Mapping) -> None:
    """Raise ValueError unless these are the kit's notebooks with parameters that they have."""
    every = {p.stem: p for p in notebooks()}
    for stem, given in steps.items():
        if stem not in every:
            raise ValueError(f"there is no notebook {stem!r:.60}: choose {', '.join(every)}")
        if not isinstance(given, dict):
            raise ValueError(f"the parameters of notebook {stem} are not a mapping: {given!r:.60}")
        defaults = parameters_of(every[stem])
        for name, value in given.items():
            _check_known(name, defaults, f"notebook {stem}")
            check_data(value, f"parameter {name!r} of notebook {stem}")
            _check_type(f"parameter {name!r} of notebook {stem}", value, defaults[name])


def check_parameters(stem: str, values: Mapping) -> None:
    """Raise ValueError for a parameter of this notebook that has another type than its default, or
    a value that cannot be: papermill or a reader put it there. `values`: `globals()` there."""
    for name, default in parameters_of(NOTEBOOKS / f"{stem}.ipynb").items():
        _check_type(f"parameter {name!r}", values[name], default)
        _check_value(stem, name, values[name], default)


def _check_type(what: str, value: object, default: object) -> None:
    kind = type(default)
    wanted = (int, float) if kind is float else kind
    if default is None or isinstance(value, wanted) and (type(value) is bool) == (kind is bool):
        return
    wrong = f"{value!r:.60}, of type {type(value).__name__}"
    wanted = f"it must be of type {kind.__name__}, for instance {default!r}"
    raise ValueError(f"{what} is {wrong}: {wanted}")


def _check_value(stem: str, name: str, value, default) -> None:
    """Raise ValueError, naming what would be right, for a value that no run can have."""
    what = f"parameter {name!r} of notebook {stem} is {value!r:.60}"
    if name == "model":
        models.config_of(value)  # raises for a name that is not known
    entries, like = (value, default) if isinstance(default, list) else ([value], [default])
    words = WORDS.get(name, ())
    if words and (wrong := [x for x in entries if str(x).partition(":")[0] not in words]):
        raise ValueError(f"{what}: {wrong[0]!r:.60} is none of {', '.join(words)}")
    if like and all(type(x) in (int, float) for x in like):  # no bool
        kinds = (int,) if isinstance(like[0], int) else (int, float)
        least = 0 if (stem, name) in MAY_BE_ZERO else 1 if kinds == (int,) else 1e-9
        if not entries or not all(type(x) in kinds and x >= least for x in entries):
            above = {0: "from 0 on", 1: "from 1 on"}.get(least, "above 0")
            kind = "whole numbers" if kinds == (int,) else "numbers"
            raise ValueError(f"{what}: it takes {kind} {above}, for instance {default!r}")
    if name in CHECKED_WHERE_USED:
        _check_where_used(what, name, value)
    if name == "rates" and not (len(value) == 2 and value[0] < value[1]):
        raise ValueError(f"{what}: give the lowest and the highest rate, for instance {default!r}")


def _check_where_used(what: str, name: str, value) -> None:
    """Raise ValueError for invalid limits, engines, or endpoint options."""
    from llmperf.measure import metrics  # torch is imported with them
    from llmperf.strategies import STRATEGIES
    from llmperf.strategies.peer import ENGINES

    if name == "slo":
        metrics.check_slo(value)
    elif name == "peers":
        if wrong := [x for x in value if x not in ENGINES]:
            raise ValueError(f"{what}: {wrong[0]!r:.60} is none of {', '.join(ENGINES)}")
    elif value:  # the options of a strategy
        STRATEGIES[name].check(None, 1, value)


def _check_known(name: str, known, where: str) -> None:
    if name in RESERVED:
        raise ValueError(f"parameter {name!r} is set by the study itself: leave it out")
    if name not in known:
        choice = ", ".join(sorted(k for k in known if k not in RESERVED))
        raise ValueError(f"unknown parameter {name!r} for {where}: choose {choice}")
