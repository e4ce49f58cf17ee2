"""One run as one small file that can be given away: figures and listed words, no free text."""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from llmperf import DATA
from llmperf.findings.runs import Run, load_runs
from llmperf.models import configs

# A field that is added later stays on the machine until it is listed.
LISTED = yaml.safe_load((DATA / "shared_fields.yaml").read_text(encoding="utf-8"))
FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")


def share(source: Path | str, target: Path | str | None = None) -> Path:
    """Pack the run in `source` into `target` (default: `<machine>.jsonl.gz` here); its path.

    Raises ValueError when there is no run, several, or the target exists.
    """
    runs = load_runs([source])
    if len(runs) != 1:
        raise ValueError(f"{source} holds {len(runs)} runs: name one of its folders")
    target = Path(target or re.sub(r"[^\w-]+", "-", runs[0].name).strip("-"))
    if not target.name.endswith(".jsonl.gz"):
        target = target.with_name(target.name + ".jsonl.gz")
    if target.exists():
        raise ValueError(f"{target.name} is there already: name another file, or remove it")
    try:
        with gzip.open(target, "wt", encoding="utf-8") as file:
            file.writelines(_lines(runs[0]))
    except OSError as error:
        target.unlink(missing_ok=True)  # half a file
        raise ValueError(f"cannot write {target}: {error.strerror}") from None
    return target


def _lines(run: Run) -> Iterator[str]:
    for r in run.records:
        kept = _picked(vars(r), "record") | {
            "condition": _picked(r.condition, "condition"),
            "environment": _picked(r.environment, "environment"),
            "trace": r.trace and {"requests": [], "notes": r.notes},
        }
        kept = without_free_text(kept)
        kept["run_id"], kept["warnings"] = "shared", ["unstable"] * bool(r.warnings)
        kept["condition"]["model"] = public_model(str(r.condition.get("model")))
        cards = r.environment.get("gpus") or []
        kept["environment"]["gpus"] = [without_free_text(_picked(card, "gpu")) for card in cards]
        kept["environment"]["packages"] = r.environment.get("packages") or {}
        yield json.dumps(kept, ensure_ascii=False) + "\n"


def _picked(values: Mapping, block: str) -> dict:
    return {name: values[name] for name in LISTED[block] if name in values}


def without_free_text(value, field: str = ""):
    """Numbers stay; a text stays only in a field listed under `words`, and is None elsewhere."""
    if isinstance(value, Mapping):
        return {k: without_free_text(v, k) for k, v in value.items() if FIELD_NAME.fullmatch(k)}
    if isinstance(value, list | tuple):
        return [without_free_text(v, field) for v in value]
    return None if isinstance(value, str) and field not in LISTED["words"] else value


def public_model(model: str) -> str:
    """A hub id or preset as it is; a folder, whose path may name its owner, without its name."""
    if configs.preset(model.partition(":")[0]) or model.startswith("<"):
        return model
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not Path(model).exists()
    return model if hub else "<a local model>"
