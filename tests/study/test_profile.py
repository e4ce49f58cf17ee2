"""Profiles and parameters: what is no plain data, or does not fit a notebook, is refused."""

import pytest
from made_up_notebooks import write_notebook

from llmperf import findings, study
from llmperf.findings import published
from llmperf.study import Profile, profile


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder with two small notebooks in place of the kit's own."""
    folder = tmp_path / "notebooks"
    for stem in ("00-first", "03-third"):
        write_notebook(folder, stem)
    monkeypatch.setattr(profile, "NOTEBOOKS", folder)
    return folder


def test_every_shipped_profile_fits_every_notebook():
    for name in study.profiles():
        loaded = study.load_profile(name)
        assert loaded.description
        study.plan(loaded, study.notebooks())


def test_the_profile_of_gpt2_has_every_published_level():
    asked = study.load_profile("gpu-gpt2").notebooks
    names = {
        "batch": ("03-batch", "batch_sizes"),
        "coroutine": ("04-coroutines", "tasks"),
        "threads": ("05-threads", "threads"),
        "processes": ("06-processes", "processes"),
    }
    for strategy, (notebook, name) in names.items():
        rows = published.measurements(model="GPT2", strategy=strategy)
        assert set(rows.concurrency) <= set(asked[notebook][name]), strategy
        assert set(rows.new_tokens) == {asked[notebook]["new_tokens"]}
    assert asked["03-batch"]["loop_batches"] == [1, 10]


def test_no_cell_of_the_full_profile_outlasts_its_limit():
    """The longest measures notebook 05, here at the lowest speed of the shipped run."""
    run = findings.load_runs(findings.shipped_runs()[:1])[0]
    speed = min(r.metric("output_tokens_per_s") for r in run.measured if "05" in r.experiment)
    full = study.load_profile("full")
    asked = full.notebooks["05-threads"]
    requests = 2 * sum(asked["threads"]) * full.parameters["repeats"]  # with all cores, and divided
    assert requests * asked["new_tokens"] / speed < full.timeout_s


def test_a_plan_gives_each_notebook_what_it_has(shelf):
    asked = Profile("p", parameters={"level": 4}, notebooks={"03-third": {"repeats": 5}})
    assert study.plan(asked, study.notebooks(), {"level": 9}) == {
        "00-first": {"level": 9},
        "03-third": {"level": 9, "repeats": 5},
    }


def test_a_folder_of_a_model_is_found_from_where_the_notebooks_run(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.chdir(tmp_path)
    steps = study.plan(Profile("p", parameters={"model": "./my-model"}), study.notebooks(["03"]))
    assert steps["03-batch"]["model"] == str(tmp_path / "my-model")
    assert profile._whole("model", "gpt2") == "gpt2", "a preset stays one beside such a folder"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Profile("p", parameters={"levl": 1}), "unknown parameter 'levl' for any notebook"),
        (Profile("p", notebooks={"03-third": {"x": 1}}), "unknown parameter 'x' for notebook 03-"),
        (Profile("p", notebooks={"07-none": {}}), "there is no notebook '07-none'"),
        (Profile("p", parameters={"level": "4"}), "'4', of type str: it must be of type int"),
        (Profile("p", parameters={"level": True}), "True, of type bool: it must be of type int"),
        (Profile("p", notebooks={"03-third": 4}), "are not a mapping: 4"),
        (Profile("p", parameters={"records": "x"}), "set by the study itself"),
        (Profile("p", parameters={"sizes": [b"x"]}), r"is \[b'x'\]: use text"),
        (Profile("p", parameters={"sizes": [{1: 2}]}), "mappings with text keys"),
        (Profile("p", parameters={"sizes": [float("inf")]}), r"is \[inf\]: use text"),
    ],
)
def test_bad_profiles_are_refused_before_anything_runs(shelf, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        study.plan(asked, study.notebooks())


@pytest.mark.parametrize(
    ("stem", "name", "value", "sentence"),
    [
        ("03-batch", "batch_sizes", [], r"is \[\]: it takes whole numbers from 1 on, for instance"),
        ("03-batch", "batch_sizes", [4, 0], "whole numbers from 1 on"),
        ("03-batch", "batch_sizes", [4, 1.5], "whole numbers from 1 on"),
        ("03-batch", "batch_sizes", [True], "whole numbers from 1 on"),
        ("03-batch", "new_tokens", -3, "is -3: it takes whole numbers from 1 on"),
        ("03-batch", "model", "nope", "unknown model 'nope': choose smollm2-135m"),
        ("03-batch", "model", "gpt2:layers=99", "layers=99 cannot be taken: this model has 12"),
        ("03-batch", "dtype", "fp8", "'fp8' is none of fp32, bf16, fp16"),
        ("03-batch", "loop", "fast", "'fast' is none of recompute, cached, compiled"),
        ("03-batch", "weights", "none", "is none of auto, trained, random"),
        ("03-batch", "device", "gpu", "is none of auto, cpu, cuda"),
        ("08-models-and-speed", "quantizations", ["int3"], "'int3' is none of int8, int4, bnb-8"),
        ("08-models-and-speed", "peers", ["foo"], "'foo' is none of generate, "),
        ("09-serving", "slo", {"ttft_ms": -5}, "the SLO 'ttft_ms' is -5: give ms above 0"),
        ("09-serving", "endpoint", {"url": "ftp://x"}, "url is 'ftp://x': give the server's"),
        ("09-serving", "endpoint", {"url": "http://x:99999"}, "url is 'http://x:99999': give"),
        ("09-serving", "endpoint", {"url": "http://x/v1", "foo": 1}, "has no option 'foo'"),
        ("09-serving", "rate_per_s", 0, "it takes numbers above 0, for instance 16"),
        ("09-serving", "rates", [5.0], "give the lowest and the highest rate"),
        ("09-serving", "rates", [9.0, 3.0], "give the lowest and the highest rate"),
    ],
)
def test_values_that_no_run_can_have_are_refused_before_anything_runs(stem, name, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        study.plan(Profile("p", notebooks={stem: {name: value}}), study.notebooks())
    values = profile.parameters_of(profile.NOTEBOOKS / f"{stem}.ipynb") | {name: value}
    with pytest.raises(ValueError, match=sentence):
        study.check_parameters(stem, values)


def test_values_that_mean_something_pass():
    given = {"08-models-and-speed": {"quantizations": [], "model": "gpt2:layers=3"},
             "09-serving": {"rates": [1, 2.5]}, "11-verdict": {"new_tokens": 0}}  # fmt: skip
    study.plan(Profile("p", notebooks=given), study.notebooks())


def test_notebooks_are_picked_by_number_or_name(shelf):
    assert [p.stem for p in study.notebooks(["3"])] == ["03-third"]
    assert [p.stem for p in study.notebooks(["00-first", "03"])] == ["00-first", "03-third"]
    with pytest.raises(ValueError, match="no notebook '42': choose 00-first, 03-third"):
        study.notebooks(["42"])


BOMB = "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[!!binary aGVsbG8=]", "hello.*: use text"),
        ("!!set {a, b}", "use text"),
        ("2024-01-01", "datetime.date"),
        (".nan", "is nan"),
        ("!!python/object/apply:os.system [true]", "is not plain YAML"),
        (BOMB, "an alias .* is not allowed"),
        ("[" * 10 + "]" * 10, "8 levels deep"),
        ("[" * 40_000, "is not plain YAML"),
        ("a" * 100_001, "at most 100,000"),
        ("{1: 2}", "text keys"),
        ("a: [", "is not plain YAML"),
    ],
)
def test_yaml_is_data_and_nothing_else(text, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        study.read_yaml(text, "--set sizes")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_plain_data_passes_as_it_is():
    data = {"a": [1, 2.5, None, True, "x", {"b": [[]]}]}
    assert study.read_yaml("a: [1, 2.5, null, true, x, {b: [[]]}]", "x") == data


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1]", "it is a mapping of"),
        ("parameters: 4", "parameters is 4; it must be of type dict"),
        ("timeout_s: soon", "timeout_s is 'soon'; it must be of type int"),
        ("surprise: 1", "has .'surprise'"),
    ],
)
def test_a_profile_of_a_wrong_form_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"profile mine.yaml.*{sentence}"):
        study.load_profile(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        study.load_profile(path)
    path.write_text("timeout_s: 60", encoding="utf-8-sig")  # with the mark that an editor adds
    assert study.load_profile(path).timeout_s == 60


def test_a_notebook_refuses_a_parameter_of_another_type_before_it_measures(shelf):
    values = {"level": 2, "repeats": 2, "sizes": [1, 2], "records": "", "unrelated": object()}
    study.check_parameters("03-third", values)
    with pytest.raises(ValueError, match="'sizes' is 4, of type int: it must be of type list"):
        study.check_parameters("03-third", values | {"sizes": 4})
