"""Run a notebook's measurements without Jupyter: the cells tagged `parameters` and `measure`."""

import ast
import asyncio
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

TAGS = {"parameters", "measure"}


def execute(notebook: Path, parameters: Mapping) -> dict:
    """Execute the tagged cells in order with these parameters; returns their namespace.

    The same code makes the same records as in Jupyter; prose and plots are left out.
    """
    namespace: dict = {"__name__": "__main__", "display": lambda *_: None}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        tags = TAGS & set(cell["metadata"].get("tags", []))
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
    return namespace
