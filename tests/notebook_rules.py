"""The house rules of a notebook: each takes one and yields a sentence for each fault."""

import ast
import builtins
import copy
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator

import nbformat

MEDIAN_LINES, MOST_LINES = 6, 15
# Not after a letter, so that a web address or a relative path may hold the same word.
ROOTS = ("home", "root", "tmp", "work", "Users", "var/folders")
MACHINE_PATH = re.compile(rf"(?<![\w.~-])/(?:{'|'.join(ROOTS)})/|\b[A-Za-z]:[\\/]+Users\b")
COLOUR = re.compile(r"\x1b\[[\d;]*m")  # ends in a letter, which would hide the path behind it
WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")


Rule = Callable[[nbformat.NotebookNode], Iterator[str]]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code(nb) -> list:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tagged(nb, tag: str) -> list:
    return [cell for cell in code(nb) if tag in tags(cell)]


def mime_bundles(nb) -> Iterator[dict]:
    """The data of every output, and of every file attached to a markdown cell."""
    for cell in nb.cells:
        yield from (output.get("data", {}) for output in cell.get("outputs", []))
        yield from cell.get("attachments", {}).values()


def strings(value) -> Iterator[str]:
    """Every text inside `value`, except images, whose base64 may spell anything."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith("image/"):
                yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def one_parameters_cell(nb):
    found = tagged(nb, "parameters")
    if len(found) != 1:
        yield f"{len(found)} code cells are tagged parameters: tag exactly one"
    for cell in found:
        yield from not_literal(cell.source)


def parameters_are_checked(nb):
    """By the cell that follows them; papermill puts its own in between."""
    at = next((i for i, cell in enumerate(nb.cells) if "parameters" in tags(cell)), None)
    after = "" if at is None or at + 1 >= len(nb.cells) else nb.cells[at + 1].source
    if not re.search(r'^check_parameters\("[0-9a-z-]+", globals\(\)\)$', after, re.MULTILINE):
        yield "the parameters are not checked by the cell that follows them"


def not_literal(source: str) -> Iterator[str]:
    """Papermill and a reader set parameters: each line is a name, its type and a literal."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        yield f"the parameters cell is not plain Python: {error.msg}"
        return
    if not body:
        yield "the parameters cell sets nothing"
    for line in body:
        try:
            ast.literal_eval(line.value)
            literal = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        except (AttributeError, ValueError, TypeError):
            literal = False
        if not literal:
            yield f"parameters: `{ast.unparse(line)}` is not `name: type = literal`"


def kernel_is_python3(nb):
    name = nb.metadata.get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"the kernel is {name!r}: name it python3"


def format_is_4_5_with_unique_ids(nb):
    if (nb.nbformat, nb.nbformat_minor) != (4, 5):
        yield f"the format is {nb.nbformat}.{nb.nbformat_minor}: save it as 4.5"
    counts = Counter(cell.get("id") for cell in nb.cells)
    yield from (f"{n} cells have the id {i!r}" for i, n in counts.items() if n > 1 or not i)


def schema_holds(nb):
    try:
        nbformat.validator.validate(copy.deepcopy(nb))
    except nbformat.ValidationError as error:
        yield f"the notebook is not valid: {error.message}"


def measure_cells_need_no_others(nb):
    """`run --no-notebooks` executes the cells tagged parameters and measure alone."""
    cells = [cell.source for tag in ("parameters", "measure") for cell in tagged(nb, tag)]
    nodes = list(ast.walk(ast.parse("\n".join(cells))))
    made = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    made |= {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}
    made |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler)}
    names = [n for n in nodes if isinstance(n, ast.Name)]
    made |= {n.id for n in names if not isinstance(n.ctx, ast.Load)}
    missing = {n.id for n in names} - made - {*dir(builtins), "display"}
    yield from (f"{name} is used in a cell tagged measure, and made in another" for name in missing)


def every_code_cell_was_run(nb):
    for cell in code(nb):
        if not isinstance(cell.get("execution_count"), int):
            yield f"cell {cell.get('id')} has no execution count: run the notebook through"


def checked_cells_have_outputs(nb):
    for cell in tagged(nb, "nbval-check-output"):
        if not cell.outputs:
            yield f"cell {cell.get('id')} is to be compared by nbval but has no output"


def no_widget_state(nb):
    if "widgets" in nb.metadata:
        yield "the metadata holds widget state"
    if any(mime in data for data in mime_bundles(nb) for mime in WIDGETS):
        yield "an output holds a widget"


def no_machine_path(nb):
    for cell in nb.cells:
        for raw in strings([cell.source, cell.get("outputs", [])]):
            text = COLOUR.sub("", raw)
            if found := MACHINE_PATH.search(text):
                around = text[found.start() : found.end() + 30].splitlines()[0]
                yield f"cell {cell.get('id')} holds a path of one machine: {around}"


def errors_are_meant(nb):
    for cell in code(nb):
        failed = any(output.output_type == "error" for output in cell.outputs)
        if failed and "raises-exception" not in tags(cell):
            yield f"cell {cell.get('id')} ended in an error and is not tagged raises-exception"


def code_cells_are_short(nb):
    lines = {c.get("id"): sum(map(bool, map(str.strip, c.source.splitlines()))) for c in code(nb)}
    long = {i: n for i, n in lines.items() if n > MOST_LINES}
    yield from (f"cell {i} has {n} lines: at most {MOST_LINES}" for i, n in long.items())
    if lines and statistics.median(lines.values()) > MEDIAN_LINES:
        yield f"half of the code cells are longer than {MEDIAN_LINES} lines: split them"


def answers_hide_no_import(nb):
    """A reader's `name = None` must not take the place of something that other cells call."""
    source = "\n".join(c.source for c in code(nb))
    imports = " ".join(re.findall(r"^\s*(?:from \S+ )?import (.+)$", source, re.MULTILINE))
    for name in re.findall(r"^(\w+) = None", source, re.MULTILINE):
        if re.search(rf"\b{name}\b", imports):
            yield f"the answer {name!r} hides an import of this name"


def nothing_is_installed(nb):
    for cell in code(nb):
        if re.search(r"^\s*[!%].*\b(pip|conda|mamba)\b", cell.source, re.MULTILINE):
            yield f"cell {cell.get('id')} installs packages: environment.yml does that"


def images_are_png(nb):
    kinds = {mime for data in mime_bundles(nb) for mime in data if mime.startswith("image/")}
    yield from (f"an image is {kind}: show PNG" for kind in sorted(kinds - {"image/png"}))
    if any("<svg" in text for data in mime_bundles(nb) for text in strings(data)):
        yield "an output draws SVG inside HTML: show PNG"


RULES: list[Rule] = [
    one_parameters_cell,
    parameters_are_checked,
    kernel_is_python3,
    format_is_4_5_with_unique_ids,
    schema_holds,
    measure_cells_need_no_others,
    every_code_cell_was_run,
    checked_cells_have_outputs,
    no_widget_state,
    no_machine_path,
    errors_are_meant,
    code_cells_are_short,
    answers_hide_no_import,
    nothing_is_installed,
    images_are_png,
]


def misnamed(names: list[str]) -> list[str]:
    """File names that are not `NN-words.ipynb`, or whose number another one has."""
    pattern = re.compile(r"(\d\d)-[a-z0-9]+(-[a-z0-9]+)*\.ipynb")
    numbers = Counter(name[:2] for name in names)
    return [name for name in names if not pattern.fullmatch(name) or numbers[name[:2]] > 1]
