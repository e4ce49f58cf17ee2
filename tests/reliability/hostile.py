"""What a stranger may send: folders of models, files of records, notebooks in a report.

Each scenario takes how often, a seed and a folder. It returns what it saw in a few words, and
raises AssertionError when code ran, something was fetched, or an error was no sentence.
"""

import dataclasses
import gzip
import http.server
import json
import pickle
import random
import shutil
import subprocess
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
from nbformat import v4
from tiny_models import save_llama

from llmperf import findings, models, strategies
from llmperf.decoding.requests import build
from llmperf.measure import records
from llmperf.study import report

MOST_GROWTH = 1 << 30  # bytes that a hostile input may cost
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--virtual-time-budget=2000", "--dump-dom")  # fmt: skip


class _Evil:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def hostile_models(count: int, seed: int, folder: Path) -> str:
    """Folders that bring code, pickles, other folders' files or damaged weights: each loads without
    any of it, or is refused with a sentence."""
    dice, seen, mark = random.Random(seed), Counter(), folder / "code-ran"
    clean = save_llama(folder / "clean")
    before = psutil.Process().memory_info().rss
    for i in range(count):
        bad = Path(shutil.copytree(clean, folder / f"model-{i}"))
        for spoil in dice.sample(SPOILERS, dice.choice((1, 1, 2, 3))):
            spoil(bad, mark, dice)
        try:
            model = models.load(str(bad), dtype="fp32", device="cpu")
            work = build(model.tokenizer, 1, 4, 2)
            strategies.STRATEGIES["peer"](model, work, {"engine": "generate"})
            seen["loaded without it"] += 1
        except ValueError as error:
            assert str(error).strip() and "\n" not in str(error), f"no sentence: {error!r}"
            seen["refused"] += 1
        shutil.rmtree(bad)
        assert not mark.exists(), "code of a model's folder ran"
    grown = psutil.Process().memory_info().rss - before
    assert grown < MOST_GROWTH, f"memory grew by {grown:,} bytes"
    return ", ".join(f"{n} {what}" for what, n in sorted(seen.items())) + "; no code ran"


def _change(file: Path, **entries) -> None:
    with suppress(ValueError, OSError, TypeError, RecursionError):  # it is spoiled already
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def _code(bad: Path, mark: Path, name: str) -> str:
    """A Python file in the folder that writes the mark when it is imported."""
    (bad / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    return f"{name}.Evil"


def _own_model(bad, mark, dice):
    kind = {"model_type": "evil"} if dice.random() < 0.5 else {}
    named = _code(bad, mark, "modeling_evil")
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), named)
    _change(bad / "config.json", auto_map=classes, **kind)


def _own_tokenizer(bad, mark, dice):
    named = _code(bad, mark, "tokenization_evil")
    _change(bad / "tokenizer_config.json", auto_map={"AutoTokenizer": [named, named]},
            tokenizer_class=dice.choice(("EvilTokenizer", None, 3)))  # fmt: skip


def _own_generation(bad, mark, dice):
    (bad / "custom_generate").mkdir(exist_ok=True)
    _code(bad / "custom_generate", mark, "generate")
    _change(bad / "generation_config.json", custom_generate=str(bad), trust_remote_code=True)


def _template(bad, mark, dice):
    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**9) %}{% endfor %}"
    _change(bad / "tokenizer_config.json", chat_template=code)


def _pickles(bad, mark, dice):
    if dice.random() < 0.7:
        (bad / "model.safetensors").unlink(missing_ok=True)
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl", "weights.bin"):
        (bad / name).write_bytes(pickle.dumps(_Evil(mark)))


def _index(bad, mark, dice):
    (bad / "x.bin").write_bytes(pickle.dumps(_Evil(mark)))
    name = dice.choice(("x.bin", "../outside.safetensors", "/etc/passwd", "a\\b.safetensors", ""))
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))


def _weights(bad, mark, dice):
    file = bad / "model.safetensors"
    data = bytearray(file.read_bytes() if file.is_file() else b"") or bytearray(64)
    match dice.randrange(4):
        case 0:  # a header of almost 2^63 bytes
            data[:8] = (2**63 - 1).to_bytes(8, "little")
        case 1:
            data = data[: dice.randrange(len(data))]
        case 2:  # bits in the header
            for _ in range(8):
                data[dice.randrange(8, min(400, len(data)))] ^= 1 << dice.randrange(8)
        case 3:
            data = bytearray(dice.randbytes(200))
    file.unlink(missing_ok=True)  # it may be a link to a folder
    file.write_bytes(data)


def _config(bad, mark, dice):
    key = dice.choice(("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads",
                       "rope_scaling", "head_dim", "model_type", "torch_dtype"))  # fmt: skip
    value = dice.choice((-1, 0, 10**30, 1.5, None, "evil", [], {"a": {"b": []}}, True))
    _change(bad / "config.json", **{key: value})


def _torn(bad, mark, dice):
    file = bad / dice.choice(("config.json", "tokenizer.json", "tokenizer_config.json"))
    file.unlink(missing_ok=True)
    file.write_bytes(dice.choice((b"", b"{", b"[" * 50_000, b"\xff\xfe", b"[]")))


def _link(bad, mark, dice):
    file = bad / dice.choice(("config.json", "model.safetensors"))
    file.unlink(missing_ok=True)
    file.symlink_to(dice.choice(("/dev/null", "/nonexistent", str(bad))))


SPOILERS = (_own_model, _own_tokenizer, _own_generation, _template, _pickles, _index, _weights,
            _config, _torn, _link)  # fmt: skip


def hostile_archives(count: int, seed: int, folder: Path) -> str:
    """Files of records that are bombs, torn or of any other form: read, compared and shared, or
    refused with a sentence, in bounded memory and inside the folder."""
    dice, seen = random.Random(seed), Counter()
    shipped = findings.shipped_runs()[0] / "records.jsonl.gz"
    lines = gzip.decompress(shipped.read_bytes()).splitlines(keepends=True)[:60]
    before = psutil.Process().memory_info().rss
    for i in range(count):
        file = folder / f"archive-{i}.jsonl.gz"
        file.write_bytes(dice.choice(ARCHIVES)(lines, dice))
        try:
            runs = findings.load_runs([shipped, file])
            findings.compare_runs(runs)
            shared = findings.share(file, folder / "shared.jsonl.gz")
            text = gzip.decompress(shared.read_bytes())
            shared.unlink()
            assert b"my secret" not in text, "text that is not listed was shared"
            seen["read"] += 1
        except ValueError as error:
            assert str(error).strip(), "an empty sentence"
            seen["refused"] += 1
        file.unlink()
        grown = psutil.Process().memory_info().rss - before
        assert grown < MOST_GROWTH, f"memory grew by {grown:,} bytes"
    left = [p.name for p in folder.iterdir()]
    assert not left, f"files appeared: {left}"
    return ", ".join(f"{n} {what}" for what, n in sorted(seen.items())) + "; memory stayed bounded"


def _torn_archive(lines, dice):
    data = gzip.compress(b"".join(lines))
    return data[: dice.randrange(1, len(data))]


def _flipped(lines, dice):
    data = bytearray(gzip.compress(b"".join(lines)))
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def _bomb(lines, dice):
    """A megabyte that unpacks to a gigabyte: one line, or many."""
    piece = dice.choice((b"0", b"0\n", b"{}\n", b"[")) * (1 << 20)
    packed = gzip.compress(piece)
    return gzip.compress(b"".join(lines[:5])) + packed * 256


def _nested(lines, dice):
    deep = dice.choice((b"[", b'{"a":')) * 200_000
    return gzip.compress(b"".join([*lines, deep, b"\n"]))


def _renamed(lines, dice):
    """Hostile names of machines and models, and secrets wherever text is not listed."""
    said = dice.choice(
        ("../../evil", "<script>evil()</script>", "\x1b[2Jevil", "evil\x00", "=evil()")
    )
    secret = "my secret"
    found = []
    for line in lines:
        record = json.loads(line)
        record["environment"] |= {"cpu_model": said, "os": said, "gpus": [{"name": said}]}
        record["condition"] |= {"model": said, "options": {secret: secret}, secret: secret}
        record["warnings"], record["reason"] = [secret], secret
        found.append(json.dumps(record | {secret: secret}).encode() + b"\n")
    return gzip.compress(b"".join(found))


def _retyped(lines, dice):
    values = (None, [], {}, -1, 1e308, "evil", True, [[]], {"evil": float("nan")})
    found = []
    for line in lines:
        record = json.loads(line)
        block = dice.choice((record, record["condition"], record["environment"], record["metrics"]))
        if block:
            block[dice.choice(sorted(block))] = dice.choice(values)
        found.append(json.dumps(record).encode() + b"\n")
    return gzip.compress(b"".join(found))


ARCHIVES = (_torn_archive, _flipped, _bomb, _nested, _renamed, _retyped,
            lambda lines, dice: dice.randbytes(300))  # fmt: skip


def hostile_reports(count: int, seed: int, folder: Path) -> str:
    """Reports of strangers' runs, opened in Chromium: no script runs, nothing is fetched."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "there is no Chromium to open a report with"
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    dice = random.Random(seed)
    served = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(folder))
    )
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"
    try:
        for i in range(count):
            run = folder / f"run-{i}"
            _hostile_run(run, dice, f"{address}/evil")
            for page in ("report.html", "card.html"):
                asked.clear()
                url = f"{address}/run-{i}/{page}"
                done = subprocess.run(
                    [browser, *FLAGS, f"--user-data-dir={folder / 'browser'}", url],
                    capture_output=True, encoding="utf-8", timeout=120,
                )  # fmt: skip
                assert "</html>" in done.stdout, f"Chromium did not open {page}: {done.stderr}"
                fetched = set(asked) - {f"/run-{i}/{page}", "/favicon.ico"}
                assert not fetched, f"{page} fetched {fetched}"
                assert "<title>evil" not in done.stdout, f"a script of {page} ran"
    finally:
        served.shutdown()
        served.server_close()
    return f"{count} reports and cards opened; no script ran, nothing was fetched"


def _payloads(evil: str) -> list[str]:
    script = f"document.title='evil';fetch('{evil}')"
    return [
        f"<script>{script}</script>",
        f"<scr<script>ipt>{script}</scr</script>ipt>",
        f'<img src=x onerror="{script}">',
        f"<img src='{evil}'><img srcset='{evil} 2x'>",
        f"<svg/onload={script}><image href='{evil}'/></svg>",
        f"<iframe src='{evil}'></iframe><object data='{evil}'></object><embed src='{evil}'>",
        f"<style>@import '{evil}';body{{background:url({evil})}}</style>",
        f"<link rel=stylesheet href='{evil}'><base href='{evil}'>",
        f"<meta http-equiv=refresh content='0;url={evil}'>",
        f"<form action='{evil}'><button autofocus onfocus=\"{script}\">x</button></form>",
        f"<a href='javascript:{script}' id=a>x</a><details open ontoggle=\"{script}\">x</details>",
        f'<math><mtext><table><mglyph><style><img src=x onerror="{script}">',
        f"</pre></td></section></main><script>{script}</script>",
        f"![x]({evil}) [x](javascript:{script}) <b style='background:url({evil})'>x</b>",
        f"<video autoplay poster='{evil}'><source src='{evil}'></video><audio src='{evil}'>",
        f"--><script>{script}</script><!--",
    ]


def _hostile_run(run: Path, dice: random.Random, evil: str) -> None:
    """A run's folder with payloads in its records, its state and the outputs of a notebook."""
    (run / "notebooks").mkdir(parents=True)
    payloads = _payloads(evil)
    say = partial(dice.choice, payloads)
    shipped = records.scan(findings.shipped_runs()[0] / "records.jsonl.gz")[0]
    with (run / "records.jsonl").open("w", encoding="utf-8") as file:
        for r in [r for r in shipped if r.counts][:40]:
            environment = r.environment | {"cpu_model": say(), "os": say()}
            condition = r.condition | {"model": say()}
            bad = dataclasses.replace(r, environment=environment, condition=condition,
                                      warnings=[say()])  # fmt: skip
            file.write(json.dumps(dataclasses.asdict(bad)) + "\n")
    cells = []
    for text in dice.sample(payloads, len(payloads)):
        kinds = ("text/html", "text/markdown", "text/plain", "text/latex", "image/svg+xml",
                 "application/javascript")  # fmt: skip
        bundle = {kind: text for kind in dice.sample(kinds, 3)}
        outputs = [v4.new_output("display_data", data=bundle), v4.new_output("stream", text=text),
                   v4.new_output("error", ename=text, evalue=text, traceback=[text])]  # fmt: skip
        cells += [v4.new_markdown_cell(text), v4.new_code_cell("1", outputs=outputs)]
    nbformat.write(v4.new_notebook(cells=cells), run / "notebooks" / "03-batch.ipynb")
    steps, done = {"03-batch": {}}, {"03-batch": say()}
    state = SimpleNamespace(steps=steps, done=done, profile=say(), started=say())
    report.write(run, state)
