"""The command line: parsing, and calls into the package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Bad input ends with one sentence and status 2."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles default to a legacy code page
        stream.reconfigure(encoding="utf-8", errors="replace")
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.call(arguments) or 0
        sys.stdout.flush()
        return status
    except ValueError as error:
        print(f"llmperf: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except KeyboardInterrupt:
        print("\nllmperf: interrupted; everything measured so far is on disk", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmperf", description="What decides how fast a language model answers here?"
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("run", help="run the study and write its report")
    run.add_argument("--profile", default="quick", help="a name, or a YAML file (default: quick)")
    run.add_argument(
        "--only", action="append", default=[], metavar="NN", help="one notebook, by number"
    )
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="values")
    run.add_argument("--out", metavar="DIR", help="the run's folder (default: under data/runs)")
    run.add_argument("--resume", metavar="DIR", help="go on with a run that was interrupted")
    run.add_argument(
        "--no-notebooks", action="store_true", help="records only, on machines without Jupyter"
    )
    run.set_defaults(call=_run)

    machine = commands.add_parser("machine", help="describe this machine")
    machine.set_defaults(call=_machine)
    models = commands.add_parser("models", help="list the presets")
    models.set_defaults(call=_models)

    compare = commands.add_parser("compare", help="put runs side by side, from any machines")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a folder, or a shared file")
    compare.add_argument(
        "--quantity", default="output_tokens_per_s", help="any metric, for instance ttft_ms.median"
    )
    compare.add_argument("--published", action="store_true", help="the published tables too")
    compare.set_defaults(call=_compare)

    share = commands.add_parser("share", help="pack a run into one file without names or paths")
    share.add_argument("run", metavar="RUN")
    share.add_argument("--to", metavar="FILE", help="default: the machine's name.jsonl.gz, here")
    share.set_defaults(call=_share)

    report = commands.add_parser("report", help="write a run's report again")
    report.add_argument("folder", metavar="DIR")
    report.set_defaults(call=_report)
    return parser


def _run(arguments) -> int:
    from llmperf import study

    if arguments.resume:
        given = [f"--{n}" for n in ("only", "values", "out") if getattr(arguments, n)]
        if given:
            raise ValueError(
                f"--resume takes everything from the run's folder: leave out {' '.join(given)}"
            )
        folder = Path(arguments.resume).resolve()
        study.load_state(folder)
    else:
        profile = study.load_profile(arguments.profile)
        folder = study.start(profile, arguments.only, _values(arguments.values), arguments.out)
    print(f"Run folder: {folder}", flush=True)
    try:
        state = study.run(folder, use_notebooks=not arguments.no_notebooks)
    except KeyboardInterrupt:
        print(f"\nTo go on: python -m llmperf run --resume {folder}", file=sys.stderr)
        raise
    failed = {stem: outcome for stem, outcome in state.done.items() if outcome != "ok"}
    for stem, outcome in failed.items():
        print(f"Failed: {stem}: {outcome}", file=sys.stderr)
    name = "records.jsonl" if arguments.no_notebooks else "report.html"
    print(f"{'Records' if arguments.no_notebooks else 'Report'}: {folder / name}")
    return 1 if failed else 0


def _values(pairs: list[str]) -> dict:
    """`name=value` pairs; a value is read as YAML, so 4, [1, 2] and fp32 all work."""
    import yaml

    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set {pair!r}: write NAME=VALUE, for instance --set repeats=5")
    split = (pair.split("=", 1) for pair in pairs)
    return {name.strip(): yaml.safe_load(value) for name, value in split}


def _machine(_) -> None:
    import json

    from llmperf import machine

    print(json.dumps(machine.describe(), indent=2, ensure_ascii=False))


def _models(_) -> None:
    from llmperf import models
    from llmperf.models import shapes

    for name in models.PRESETS:
        shape = shapes.preset(name)
        print(f"{name:20} {shape.parameters() / 1e6:>10,.0f} M parameters, {shape.layers} layers")
    print("Any hub id (owner/model) and any local folder work too.")


def _compare(arguments) -> None:
    import gc

    from llmperf import findings

    gc.disable()  # it would walk through all records again and again, and this process ends soon
    found = findings.load_runs(arguments.runs)
    found += findings.published_runs() if arguments.published else []
    print(findings.compare(found, arguments.quantity))


def _share(arguments) -> None:
    from llmperf import findings

    print(f"Shared: {findings.share(arguments.run, arguments.to)}")


def _report(arguments) -> None:
    from llmperf import study

    print(f"Report: {study.write_report(arguments.folder)}")
