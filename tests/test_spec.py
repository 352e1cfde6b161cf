import jsonschema
import pytest
import yaml

from kdexport import schemas, spec
from kdexport.errors import SpecError

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
        ({"distill": {"alpha": 1.5}}, "distill.alpha: expected float <= 1.0. It means: weight of the teacher's term"),
        ({"export": {"variants": ["fp33"]}}, "export.variants[0]: invalid enum value 'fp33'"),
        ({"distill": {"alpha": 0, "temperature": 4.0}}, "distill.temperature has no effect with alpha 0"),
        ({"distill": {"alpha": 0, "loss": "mse"}}, "distill.loss has no effect with alpha 0"),
        ({"distill": {"loss": "mse", "temperature": 4.0}}, "distill.temperature has no effect on the loss mse"),
        (
            {"distill": {"loss": {"mse": 1, "hidden": 1}, "temperature": 4.0}},
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
    missing = [k for k, meaning in spec.settings().items() if meaning not in text and "teacher.train." not in k]
    assert not missing


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_published_schemas_are_those_of_the_code(name):
    assert schemas.path(name).read_bytes() == schemas.generate(name), "run: python -m kdexport.schemas"


def test_a_resolved_spec_satisfies_its_schema():
    schema = yaml.safe_load(schemas.generate("spec"))
    jsonschema.validate(yaml.safe_load(spec.dump(spec.parse(MINIMAL, "x"))), schema)
