"""The command line: parsing, and calls into the package."""

import argparse
import gc
import json
import logging
import os
import re
import signal
import sys
import webbrowser
from pathlib import Path

from llmperf import findings, machine, models, predict, study

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
STOPS = [name for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a request to end. After a plain KeyboardInterrupt inside `exec` of a string, where
    dataclasses are made, Python ends itself with SIGINT, whatever the exit status."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Bad input ends with one sentence and status 2."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles default to a legacy code page
        stream.reconfigure(encoding="utf-8", errors="replace")
    arguments = _parser().parse_args(argv)
    for name in STOPS:  # as Ctrl-C: children end, and what was measured stays
        signal.signal(getattr(signal, name), _interrupt)
    try:
        status = arguments.call(arguments) or 0
        sys.stdout.flush()
        return status
    except ValueError as error:
        _say(f"llmperf: {error}", sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except OSError as error:  # a full disk, a folder or file that may not be written
        _say(f"llmperf: {error.strerror or error}: {error.filename or 'a file'}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("llmperf: interrupted", sys.stderr)
        return 130


def _interrupt(number: int, frame: object) -> None:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # no traceback of the task it cuts off
    raise Interrupted


def entry() -> int:
    """`main` as a process: once it has ended, no signal changes its exit status.

    Python restores the default handlers before it frees its objects, which takes seconds here.
    """
    status = main()
    for name in STOPS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    return status


def _say(text: str, file=None) -> None:
    """Print without control characters: records, names and errors may come from strangers."""
    print(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text), file=file or sys.stdout, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmperf", description="What decides how fast a language model answers here?"
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, call, text: str):
        added = commands.add_parser(name, help=text)
        added.set_defaults(call=call)
        return added.add_argument

    add = command("run", _run, "run the study and write its report")
    add("--profile", help="a name, or a YAML file (default: quick)")
    add("--only", action="append", default=[], metavar="NN", help="one notebook, by number")
    add("--set", action="append", default=[], metavar="NAME=VALUE", dest="values")
    add("--out", metavar="DIR", help="the run's folder (default: under data/runs)")
    add("--resume", metavar="DIR", help="go on with a run that was interrupted")
    add("--no-notebooks", action="store_true", help="records only, on machines without Jupyter")
    command(
        "machine", lambda _: _say(json.dumps(machine.describe(), indent=2)), "describe this machine"
    )
    add = command("models", _models, "sizes of the presets, or of the models named")
    add("models", nargs="*", help="preset, hub id, folder or config.json")
    add = command("calculator", _calculator, "does a model fit a card or computer: a page to open")
    add("models", nargs="*", help="a hub id, folder or config.json beside the presets")
    add("--out", metavar="FILE", help="write the page there and open nothing")
    add = command("compare", _compare, "put runs side by side, from any machines")
    add("runs", nargs="+", metavar="RUN", help="a folder, or a shared file")
    add("--quantity", default="output_tokens_per_s", help="any rate or time, e.g. ttft_ms.median")
    add("--published", action="store_true", help="the published tables too")
    add = command(
        "share",
        lambda a: _say(f"Shared: {findings.share(a.run, a.to)}"),
        "pack a run into one file without names or paths",
    )
    add("run", metavar="RUN")
    add("--to", metavar="FILE", help="default: the machine's name.jsonl.gz, here")
    add = command(
        "report",
        lambda a: _say(f"Report: {study.write_report(a.folder)}"),
        "write a run's report again",
    )
    add("folder", metavar="DIR")
    return parser


def _run(arguments) -> int:
    if arguments.resume:
        names = {"only": "--only", "values": "--set", "out": "--out", "profile": "--profile"}
        given = [flag for name, flag in names.items() if getattr(arguments, name)]
        if given:
            rule = "--resume takes everything from the run's folder"
            raise ValueError(f"{rule}: leave out {' '.join(given)}")
        folder = Path(arguments.resume).resolve()
        study.load_state(folder)
    else:
        profile = study.load_profile(arguments.profile or "quick")
        folder = study.start(profile, arguments.only, _values(arguments.values), arguments.out)
    _say(f"Run folder: {folder}")
    try:
        state = study.run(folder, use_notebooks=not arguments.no_notebooks, say=_say)
        return _ending(folder, state, arguments.no_notebooks)
    except KeyboardInterrupt:
        resume = f"python -m llmperf run --resume {folder}"
        _say(f"llmperf: interrupted; what was measured is kept. To go on: {resume}", sys.stderr)
        return 130


def _ending(folder: Path, state, records_only: bool) -> int:
    """The answer, what is not ok, and the path; the exit status."""
    from llmperf.study import answer

    not_ok = {stem: outcome for stem, outcome in state.done.items() if outcome != "ok"}
    failed = [stem for stem, outcome in not_ok.items() if not outcome.startswith(study.SKIPPED)]
    for stem, outcome in not_ok.items():
        _say(f"{'Failed: ' * (stem in failed)}{stem}: {outcome}", sys.stderr)
    bad = []
    try:
        run = answer.load(folder)
        bad = answer.failures(run.records)
        for line in run.notes:
            _say(line, sys.stderr)
        lines = answer.of_run(run)
        answer.write_card(folder, run, lines)
        _say("\n".join(("", *lines, "")))
        took = sum(r.metric("duration_s") or 0 for r in run.measured)
        seconds = sum(state.seconds.values())
        _say(f"Measured runs took {took:.0f} of {seconds:.0f} s ({took / max(seconds, 1):.0%}).")
        _say(f"Card: {folder / 'card.png'}")
    except ValueError as error:
        _say(f"No answer yet: {error}", sys.stderr)
    name = "records.jsonl" if records_only else "report.html"
    _say(f"{name.partition('.')[0].capitalize()}: {folder / name}")
    return 1 if failed or bad else 0


def _values(pairs: list[str]) -> dict:
    """`name=value` pairs; a value is read as YAML, so 4, [1, 2] and fp32 all work."""
    found = {}
    for name, equals, value in (pair.partition("=") for pair in pairs):
        if not equals:
            raise ValueError(f"--set {name!r}: write NAME=VALUE, for instance --set repeats=5")
        found[name.strip()] = study.read_yaml(value, f"--set {name}")
    return found


def _models(arguments) -> None:
    for name in arguments.models or models.PRESETS:
        shape = models.shape_of(name)
        gib = predict.weights_bytes(shape, "bf16") / predict.GIB
        cache_mib = predict.kv_bytes(shape, 1, 1000, "bf16") / 2**20
        print(
            f"{shape.name:20} {shape.parameters() / 1e6:>10,.0f} M parameters, {shape.layers:>3}"
            f" layers, {gib:>8,.2f} GiB in {shape.quantization or 'bf16'},"
            f" {cache_mib:>7,.1f} MiB of cache for 1,000 tokens"
        )
    print("Any hub id (owner/model), local folder and config.json work too.")


def _calculator(arguments) -> None:
    from llmperf.show import calculator_page

    kept = Path(arguments.out) if arguments.out else machine.cache_dir() / "calculator.html"
    if kept.is_dir():
        raise ValueError(f"{kept} is a folder: name a file, such as {kept / 'calculator.html'}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    _say("Reading the shapes of the models: up to minutes the first time, then they are kept.")
    kept.write_text(calculator_page(arguments.models), encoding="utf-8")
    if not arguments.out:
        webbrowser.open(kept.resolve().as_uri())
    _say(f"Calculator: {kept}")


def _compare(arguments) -> None:
    gc.disable()  # it would rescan records that all stay alive
    found = findings.load_runs(arguments.runs)
    found += findings.published_runs() if arguments.published else []
    _say(str(findings.compare_runs(found, arguments.quantity)))
