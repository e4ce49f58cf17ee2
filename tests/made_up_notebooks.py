"""Small notebooks that measure nothing and store made-up records."""

import nbformat
from nbformat import v4

PARAMETERS = "level: int = 1\nrepeats: int = 2\nsizes: list = [1]\nrecords: str = ''"
MEASURE = """
from llmperf.measure import Record, Store
store = Store(records)
for repeat in range(repeats):
    store.append(Record("{stem}", {{"strategy": "batch", "level": level}}, repeat))
"""


def write_notebook(folder, stem, parameters=PARAMETERS, body=MEASURE):
    """A notebook with a question, parameters, a cell that stores records, and one that prints."""
    cells = [
        v4.new_markdown_cell(f"# {stem}\n\n**Question.** What is {stem}?"),
        v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        v4.new_code_cell(body.replace("{stem}", stem).replace("{{", "{").replace("}}", "}"),
                         metadata={"tags": ["measure"]}),
        v4.new_code_cell("print('level', level)"),
    ]  # fmt: skip
    spec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    folder.mkdir(exist_ok=True)
    notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": spec})
    nbformat.write(notebook, folder / f"{stem}.ipynb")
