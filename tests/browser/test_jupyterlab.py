"""Notebooks in JupyterLab, in Chromium: opened, run from top to bottom, their forms moved."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing

import httpx
import pytest

from llmperf import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium to open JupyterLab in"),
]
FEWER = {"repeats": 1, "rounds": 1, "pairs": 3, "batch_sizes": [1, 2]}  # parameters
RUN_S = 600


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over copies of the notebooks, and a browser page; (page, address, folder)."""
    folder = tmp_path_factory.mktemp("lab")
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = json.loads(file.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["execution_count"] = None  # to be seen to run
            if "parameters" in cell["metadata"].get("tags", []):
                text = "".join(cell["source"])
                new = {"records": str(folder / f"{file.stem}.jsonl"), **FEWER}
                lines = [f"\n{name} = {value!r}" for name, value in new.items()]
                kept = [line for line in lines if f"{line.split(' ')[0]}: " in text]
                cell["source"] = (text + "".join(kept)).splitlines(keepends=True)
        (folder / file.name).write_text(json.dumps(notebook, indent=1), encoding="utf-8")
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    whole = {"windowingMode": "none"}  # cells out of sight stay in the page
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps(whole))
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    command += ["--allow-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}  # fmt: skip
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    address = f"http://127.0.0.1:{port}"
    api = httpx.Client(base_url=f"{address}/api", headers={"Authorization": f"token {token}"})
    try:
        _wait(lambda: _answers(api), 60, "JupyterLab did not start")
        with playwright.sync_playwright() as starter:
            browser = starter.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"{address}/lab?token={token}")
            yield page, f"{address}/lab/workspaces", api, folder
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def _answers(api) -> bool:
    try:
        return api.get("/status").is_success
    except httpx.TransportError:
        return False


def _wait(ready, seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, otherwise
        time.sleep(0.5)


def _command(page, name: str, seconds: float) -> None:
    """One of JupyterLab's commands on the open notebook, as its menus send it, and its end."""
    page.evaluate(
        "name => { window.ended = null; jupyterapp.commands.execute(name).then("
        " value => { window.ended = { value } },"
        " error => { window.ended = { error: `${error}` } }) }",
        name,
    )
    page.wait_for_function("window.ended", timeout=1000 * seconds)
    assert page.evaluate("window.ended.error || ''") == "", name


def _save(page) -> None:
    _command(page, "docmanager:save", 30)
    _wait(lambda: not page.locator(".jp-mod-dirty").count(), 20, "it was not saved")


def _without_version(file) -> dict:
    """JupyterLab writes the kernel's version of Python into every notebook that it opens."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    notebook["metadata"]["language_info"].pop("version", None)
    return notebook


SHORT = ("00-check-your-machine", "07-vram")
STEMS = [
    file.stem if file.stem in SHORT else pytest.param(file.stem, marks=pytest.mark.long)
    for file in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("stem", STEMS)
def test_a_notebook_runs_in_jupyterlab_and_its_forms_redraw(lab, stem):
    page, workspaces, api, folder = lab
    page.goto(f"{workspaces}/{stem}/tree/{stem}.ipynb")  # a workspace without other tabs
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(
        "(at => at?.isReady && at.contentsModel?.writable && at.sessionContext.isReady)"
        "(window.jupyterapp?.shell.currentWidget?.context)",
        timeout=60_000,
    )
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=60_000)
    opened, file = _without_version(folder / f"{stem}.ipynb"), folder / f"{stem}.ipynb"
    _save(page)
    assert _without_version(file) == opened, "opening changed the notebook"
    _command(page, "notebook:run-all-cells", RUN_S)
    forms = page.locator(".widget-interact").all()
    calls = re.findall(r"widgets\.(?:explore|calculator)\(", file.read_text(encoding="utf-8"))
    assert len(forms) == len(calls), "a form is not shown"
    for form in forms:
        form.scroll_into_view_if_needed()
        before = form.locator("img").last.get_attribute("src")
        handle = form.locator(".noUi-handle").first
        at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        handle.press("ArrowLeft" if at_end else "ArrowRight")
        page.wait_for_function(
            "([form, before]) => { const img = form.querySelector('img');"
            " return img && img.src != before }",
            arg=[form.element_handle(), before],
        )
    _save(page)
    for cell in (c for c in _without_version(file)["cells"] if c["cell_type"] == "code"):
        assert cell["execution_count"], "a cell did not run: " + "".join(cell["source"])
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output["evalue"]
            assert output.get("name") != "stderr", "".join(output["text"])
    for kernel in api.get("/kernels").json():
        api.delete(f"/kernels/{kernel['id']}")
