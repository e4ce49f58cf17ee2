"""The notebook cleaner, on a made-up notebook that holds everything it must take out or keep."""

import json

import clean_notebooks
import nbformat
import pytest

PRINTED_BAR = {
    "output_type": "stream",
    "name": "stderr",
    "text": ["study:  50%|#####     | 3/6 [00:01"],
}
VIEW = {"application/vnd.jupyter.widget-view+json": {"model_id": "a1", "version_major": 2}}
BAR = {"output_type": "display_data", "metadata": {}, "data": {**VIEW, "text/plain": ["Bar(3)"]}}
ONLY_VIEW = {"output_type": "display_data", "metadata": {}, "data": VIEW}
PLAIN = {"output_type": "stream", "name": "stdout", "text": ["延迟 12 ms\n", "é\n"]}
TIMES = {"iopub.execute_input": "2024-01-01T00:00:00Z"}


def made_up() -> dict:
    code = {
        "cell_type": "code",
        "id": "first",
        "execution_count": 7,
        "metadata": {"tags": ["keep"], "execution": TIMES, "papermill": {"duration": 1.5}},
        "outputs": [BAR, ONLY_VIEW, PRINTED_BAR, PLAIN],
        "source": ["a = 1\n", "a"],
    }
    prose = {"cell_type": "markdown", "id": "second", "metadata": {}, "source": ["# Größe"]}
    prose["metadata"]["papermill"] = {"status": "completed"}
    metadata = {
        "kernelspec": {"display_name": "my env", "language": "python", "name": "env311"},
        "language_info": {"name": "python", "version": "3.11.7", "file_extension": ".py"},
        "papermill": {"input_path": "x.ipynb"},
        "widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}},
        "title": "kept",
    }
    return {"cells": [code, prose], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "01-made-up.ipynb"
    file.write_text(json.dumps(made_up()), encoding="utf-8")
    return file


def test_only_the_volatile_parts_go():
    expected = made_up()
    code, prose = expected["cells"]
    code["metadata"] = {"tags": ["keep"]}
    code["outputs"] = [PLAIN]
    prose["metadata"] = {}
    expected["metadata"] = {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python", "file_extension": ".py"},
        "title": "kept",
    }
    assert json.loads(clean_notebooks.cleaned(json.dumps(made_up()))) == expected


def test_cleaning_twice_is_cleaning_once():
    once = clean_notebooks.cleaned(json.dumps(made_up()))
    assert clean_notebooks.cleaned(once) == once


def test_a_clean_notebook_is_what_jupyter_would_save(path):
    clean_notebooks.main([str(path)])
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert nbformat.writes(notebook) + "\n" == path.read_text(encoding="utf-8")


def test_the_file_is_utf8_with_plain_letters_and_one_last_newline(path):
    clean_notebooks.main([str(path)])
    written = path.read_bytes()
    assert "延迟 12 ms".encode() in written and "Größe".encode() in written
    assert written.endswith(b"}\n") and not written.endswith(b"\n\n") and b"\r" not in written


def test_missing_cell_ids_are_not_invented():
    notebook = made_up()
    del notebook["cells"][0]["id"]
    assert "id" not in json.loads(clean_notebooks.cleaned(json.dumps(notebook)))["cells"][0]


def test_check_tells_and_writes_nothing(path, capsys):
    before = path.read_bytes()
    assert clean_notebooks.main(["--check", str(path)]) == 1
    assert path.read_bytes() == before
    assert "would be cleaned" in capsys.readouterr().out


def test_check_passes_once_the_file_is_clean(path, capsys):
    assert clean_notebooks.main([str(path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(": cleaned")
    assert clean_notebooks.main(["--check", str(path)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["not json", "[]", '{"cells": []}', '{"nbformat": 3}'])
def test_what_is_no_notebook_is_named_and_left_alone(text, tmp_path, capsys):
    file = tmp_path / "broken.ipynb"
    file.write_text(text, encoding="utf-8")
    assert clean_notebooks.main([str(file)]) == 1
    assert "broken.ipynb: this is not a notebook" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == text


def test_a_missing_file_is_an_error_and_the_others_are_still_cleaned(path, capsys):
    assert clean_notebooks.main(["nowhere.ipynb", str(path)]) == 1
    assert "nowhere.ipynb" in capsys.readouterr().err
    assert clean_notebooks.main(["--check", str(path)]) == 0
