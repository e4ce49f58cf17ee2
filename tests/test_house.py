"""The house: which room may import which, and what lies where."""

import ast
from pathlib import Path

import llmperf

PACKAGE = Path(llmperf.__file__).parent
ROOMS = [
    "stats",
    "machine",
    "models",
    "decoding",
    "memory",
    "predict",
    "strategies",
    "measure",
    "findings",
    "show",
    "study",
]


def imports(path: Path) -> set[str]:
    """The rooms that a file imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("llmperf.")}
    return found & set(ROOMS)


def upward(path: Path) -> list[str]:
    """What a file imports from rooms below its own."""
    room = path.relative_to(PACKAGE).parts[0]
    return [x for x in imports(path) if ROOMS.index(x) > ROOMS.index(room)]


def test_the_package_holds_eleven_rooms_and_two_files():
    inside = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert inside == {*ROOMS, "__init__.py", "__main__.py"}


def test_no_room_imports_from_a_room_below_it():
    files = [p for room in ROOMS for p in sorted((PACKAGE / room).rglob("*.py"))]
    wrong = {str(p.relative_to(PACKAGE)): upward(p) for p in files if upward(p)}
    assert not wrong


def test_the_check_of_directions_sees_an_import_inside_a_function(tmp_path, monkeypatch):
    monkeypatch.setattr("test_house.PACKAGE", tmp_path)
    file = tmp_path / "stats" / "bad.py"
    file.parent.mkdir()
    file.write_text("def f():\n    from llmperf import show\n")
    assert upward(file) == ["show"]


def files() -> dict[str, Path]:
    """Module name → file, faces left out: they import lazily."""
    found = (p for p in PACKAGE.rglob("*.py") if not p.name.startswith("__"))
    return {".".join(("llmperf", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in found}


def test_no_files_import_each_other_in_a_circle():
    modules = files()
    graph = {}
    for name, path in modules.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if hasattr(n, "names")]
        named = [f"{getattr(n, 'module', '') or ''}.{a.name}".strip(".") for n in nodes
                 if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]  # fmt: skip
        graph[name] = {x for n in named for x in (n, n.rpartition(".")[0]) if x in modules}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"in circles: {sorted(graph)}"


def test_no_file_is_longer_than_300_lines():
    every = [p for ending in ("py", "c", "h") for p in PACKAGE.rglob(f"*.{ending}")]
    long = {p.name: n for p in every if (n := len(p.read_text("utf-8").splitlines())) > 300}
    assert not long
