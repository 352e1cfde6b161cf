import math

import jsonschema
import pytest
import yaml

from kdexport import cli, schemas, spec
from kdexport.cli.options import parse_sets
from kdexport.errors import SpecError
from kdexport.spec.flags import numbers, quantity

MINIMAL = {"data": {"train": "a.csv"}, "teacher": {"model": "./t"}}


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"distill": {"temperature": 4.0, "alpha": 0.5}}))
    found = spec.load(path, {"distill.temperature": 3.0, "teacher.train.epochs": 2})
    assert (found.distill.temperature, found.distill.alpha, found.teacher.train.epochs) == (3.0, 0.5, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": {"modle": "x"}}, "unknown key 'teacher.modle'. Did you mean 'teacher.model'?"),
        ({"distil": {}}, "unknown key 'distil'. Did you mean 'distill'?"),
        ({"teacher": {}}, "'teacher.model' is missing"),
        ({"distill": {"temperature": "hot"}}, "distill.temperature: expected float or a mapping, got str"),
        (
            {"distill": {"alpha": 1.5}},
            "distill.alpha: expected float <= 1.0. It means: weight of the distillation",
        ),
        ({"export": {"variants": ["fp33"]}}, "export.variants[0]: invalid enum value 'fp33'"),
        ({"distill": {"alpha": 0, "temperature": 3.0}}, "distill.temperature has no effect with alpha 0"),
        ({"distill": {"alpha": 0, "loss": "mse"}}, "distill.loss has no effect with alpha 0"),
        ({"distill": {"loss": "mse", "temperature": 3.0}}, "distill.temperature has no effect on the loss mse"),
        (
            {"distill": {"loss": {"mse": 1, "hidden": 1}, "temperature": 3.0}},
            "distill.temperature has no effect on the loss hidden, mse",
        ),
        ({"distill": {"loss": {"kl": 0}}}, "distill.loss: every weight is 0"),
        ({"distill": {"loss": "hidden", "alpha": 1}}, "distill.loss: hidden with alpha 1 leaves the student's head"),
        ({"distill": {"loss": "kll"}}, "distill.loss: invalid enum value 'kll'"),
        ({"distill": {"loss": {"kll": 1.0}}}, "distill.loss: invalid enum value 'kll'"),
        ({"distill": {"temperature": {"from": 4, "too": 1}}}, "unknown key 'distill.temperature.too'"),
        ({"teacher": {"model": "t", "weights": [1.0]}}, "teacher.weights has no effect with one teacher"),
        ({"teacher": {"model": "t", "combine": "mean"}}, "teacher.combine has no effect with one teacher and one pass"),
        ({"teacher": {"model": "t", "noise": "augment"}}, "teacher.noise has no effect with one pass"),
        ({"budget": {"time_limit_s": 60}}, "budget.time_limit_s has no effect with one student"),
        ({"export": {"variants": ["fp32"], "max_int8_loss": 0.1}}, "export.max_int8_loss has no effect without int8"),
        ({"seed": -1}, "seed: expected int >= 0"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(changes, says):
    with pytest.raises(SpecError) as caught:
        spec.parse(MINIMAL | changes, "s.yaml")
    assert f"s.yaml: {says}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("distill", {"alpha": 0, "max_word_error": 0.1}, "distill.max_word_error has no effect with alpha 0"),
        ("student", {"model": "gru:1"}, "student.model: 'gru:1' has no channel for each of two directions"),
        ("data", {"train": "a.csv", "sentences": "a.txt"}, "data.sentences has no effect: teacher .* is no Whisper"),
        ("data", {"train": "a.csv", "language": "de"}, "data.language has no effect: teacher .* is no Whisper"),
    ],
)
def test_a_setting_of_speech_without_effect_is_refused(tmp_path, key, value, says):
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2", "conv_stride": [5], "num_hidden_layers": 2}')
    speech = {"task": "automatic-speech-recognition", "data": {"train": "a.csv"}, "teacher": {"model": str(tmp_path)}}
    spec.parse(speech, "s.yaml")
    with pytest.raises(SpecError, match=says):
        spec.parse(speech | {key: value}, "s.yaml")


@pytest.mark.parametrize(
    ("text", "says"), [("a: [1", "line 1 is not valid YAML"), ("", "holds no settings"), ("- 1", "holds no settings")]
)
def test_a_file_that_is_no_spec_is_refused(tmp_path, text, says):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=says):
        spec.load(path, {})


def test_what_is_dumped_is_read_back_as_the_same_spec():
    settings = spec.parse(MINIMAL, "x")
    assert spec.parse(yaml.safe_load(spec.dump(settings)), "x") == settings
    assert spec.parse(yaml.safe_load(spec.commented(settings)), "x") == settings


def test_every_setting_has_a_help_text():
    assert all(spec.settings().values())


def test_the_commented_spec_explains_every_setting():
    text = spec.commented(spec.parse(MINIMAL | {"distill": {"augment": {}}}, "x"))
    text += spec.commented(spec.parse(MINIMAL | {"teacher": {"model": "openai:m@http://localhost:1/v1"}}, "x"))
    missing = [k for k, meaning in spec.settings().items() if meaning not in text and "teacher.train." not in k]
    assert not missing


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_published_schemas_are_those_of_the_code(name):
    assert schemas.path(name).read_bytes() == schemas.generate(name), "run: python -m kdexport.schemas"


def test_a_resolved_spec_satisfies_its_schema():
    schema = yaml.safe_load(schemas.generate("spec"))
    jsonschema.validate(yaml.safe_load(spec.dump(spec.parse(MINIMAL, "x"))), schema)


# --- YAML that can't be read

SPEC = "data: {train: a.csv}\nteacher: {model: ./t}\n"
LONG = "9" * 5000
UNREADABLE = {
    "seed: 2024-99-99": "line 3 is not valid YAML: seed: a value of the kind 'timestamp'",
    "seed: 2024-01-01 25:61:61": "line 3 is not valid YAML: seed: a value of the kind 'timestamp'",
    "seed: 2024-01-01 10:00:00 +99:99": "line 3 is not valid YAML: seed: a value of the kind 'timestamp'",
    "seed: !!int abc": "line 3 is not valid YAML: seed: 'abc' is no int",
    "seed: !!int ''": "line 3 is not valid YAML: seed: '' is no int",
    "seed: !!float x": "line 3 is not valid YAML: seed: 'x' is no float",
    "seed: !!bool x": "line 3 is not valid YAML: seed: 'x' is no bool",
    "seed: 0x_": "line 3 is not valid YAML: seed: '0x_' is no int",
    f"seed: {LONG}": f"line 3 is not valid YAML: seed: '{LONG[:40]}' is no int",
    f"seed: {LONG[:4000]}": "line 3 is not valid YAML: seed: '9999",
    "distill: {temperature: .inf}": "line 3 is not valid YAML: distill.temperature: '.inf' is no finite number",
    "distill:\n  loss:\n    kl: .nan": "line 5 is not valid YAML: distill.loss.kl: '.nan' is no finite number",
    "distill: {temperature: 1e400}": "line 3 is not valid YAML: distill.temperature: '1e400' is no finite number",
    "distill: " + "{a: " * 5000: "line 3 is not valid YAML: it is nested too deep",
    "distill: " + "[" * 3000: "line 3 is not valid YAML: it is nested too deep",
    "\n".join(" " * i + "a:" for i in range(100)): "line 23 is not valid YAML: it is nested too deep",
    "distill: &a {loss: *a}": "line 3 is not valid YAML: distill.loss.loss",
    "export: {variants: &a [*a]}": "line 3 is not valid YAML: export.variants.0.0",
    "\n".join(["a: &a0 [1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]): "too many",
    "seed: 1\nseed: 2": "line 4 is not valid YAML: the key 'seed' stands twice",
    "distill:\n  alpha: 0.1\n  alpha: 0.2": "line 5 is not valid YAML: distill: the key 'alpha' stands twice",
    "distill: {<<: {alpha: 0.1}}": "line 3 is not valid YAML: distill: a key must be a text",
    "1: 2": "line 3 is not valid YAML: a key must be a text",
    "? [a, b]\n: 1": "line 3 is not valid YAML: a key must be a text",
    "yes: 1": "line 3 is not valid YAML: a key must be a text",
    "seed: !!binary aGk=": "line 3 is not valid YAML: seed: a value of the kind 'binary'",
    "seed: !!set {a}": "line 3 is not valid YAML: seed: a value of the kind 'set'",
    "seed: !!python/object/apply:os.getcwd []": "line 3 is not valid YAML: seed: a value of the kind 'python/",
    "seed: !mine 1": "line 3 is not valid YAML: seed: a value of the kind '!mine'",
    "seed: *nobody": "line 3 is not valid YAML: found undefined alias",
    "seed: \x00": "unacceptable character",
    "--- {}": "found another document",
}  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda text: text[:30])
def test_what_yaml_can_write_and_a_spec_can_not_hold_is_one_line_with_the_key(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(SPEC + text)
    with pytest.raises(SpecError) as caught:
        spec.load(path, {})
    assert UNREADABLE[text] in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "value",
    ["2024-99-99", "!!int abc", "!!float x", "0x_", LONG, LONG[:4000], "[" * 3000, ".inf", "1e400", "{a: 1, a: 2}",
     "!!binary aGk=", "{<<: {a: 1}}", "&a [*a]", "a: b: c", "{1: 2}"],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_values_of_set_are_read_alike(value):
    with pytest.raises(SpecError, match=r"--set distill\.alpha.*line 1 is not valid YAML") as caught:
        parse_sets([f"distill.alpha={value}"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_values_of_set_mean_what_they_look_like():
    assert parse_sets(["a=3", "b=true", "c=[fp32]", "d=2e-4", "e=null", "f={from: 4, to: 1}", "g='2024-01-01'"]) == {
        "a": 3, "b": True, "c": ["fp32"], "d": 2e-4, "e": None, "f": {"from": 4, "to": 1}, "g": "2024-01-01",
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, 2**63])
@pytest.mark.parametrize("key", ["distill.temperature", "seed", "distill.loss.kl"])
def test_numbers_of_flags_are_finite(key, value):
    with pytest.raises(SpecError, match=rf"flags: {key}: expected a finite number"):
        spec.load(None, {"data.train": "a.csv", "teacher.model": "t", key: value})
    with pytest.raises(SpecError, match="round_seconds: expected a finite number"):
        spec.parse_bench({"round_seconds": value})


@pytest.mark.parametrize(
    "text", ["inf", "infms", "nan", "1e400", "1e308s", LONG, "", "ms", "-1", "1 parsec", "1e", "."]
)
def test_a_quantity_is_a_finite_number_and_a_unit(text):
    with pytest.raises(SpecError, match=r"--max-p99 .* can't be read") as caught:
        quantity(text, "--max-p99", {"ms": 1.0, "s": 1e3})
    assert len(str(caught.value)) < 200


def test_quantities_are_read_as_before():
    for text, value in {"2ms": 2, "0.5 s": 500, ".5s": 500, "1e-3s": 1, "7": 7, "2E3MS": 2000}.items():
        assert quantity(text, "--max-p99", {"ms": 1.0, "s": 1e3}) == value


@pytest.mark.parametrize("text", ["inf", "", "1,,2", "0", "1,-1", LONG, LONG[:3000], "1.5", "1000001"])
def test_numbers_are_whole_and_below_a_million(text):
    with pytest.raises(SpecError, match=r"--threads .* can't be read") as caught:
        numbers(text, "--threads")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--data", "a.csv", "--teacher", "t", "--temperature", "inf"],
        ["run", "--data", "a.csv", "--teacher", "t", "--alpha", "nan"],
        ["run", "--data", "a.csv", "--teacher", "t", "--min-retention", "nan"],
        ["bench", "t", "--round-seconds", "inf"],
        ["bench", "t", "--load-seconds", "inf"],
        ["predict", "t", "a", "--temperature", "inf"],
        ["predict", "t", "a", "--top-p", "-inf"],
    ],
    ids=" ".join,
)
def test_a_flag_that_is_no_finite_number_is_an_error_of_the_user(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kdexport", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "finite number" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
