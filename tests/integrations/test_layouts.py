"""An artifact as Triton, Kubernetes and KServe want it on disk.

No Triton with its ONNX Runtime backend runs here: the configurations are held to Triton's own schema, and the text
model runs in a stand-in for Triton's Python backend, in front of ONNX Runtime.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest
import yaml
from embedders import write_embedder
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy

import kdexport as package
from kdexport.errors import KdexportError
from kdexport.files import hash_file
from kdexport.integrations import kubernetes, triton
from kdexport.pipeline.export_model import export
from kdexport.runtime.predictor import Tensor, tensors_of
from kdexport.tasks import load_task
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.text_classification import TextClassification

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(classifier, tmp_path_factory):
    """A folder that holds an artifact as a run does, with another file beside it."""
    folder = tmp_path_factory.mktemp("runs") / "tickets"
    folder.mkdir()
    export(str(classifier("single-label")), folder / "artifact", variants=("fp32",), max_length=48)
    (folder / "artifact" / "stage.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def repository(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "repository"
    export(f"{run}:fp32", out, layout="triton")
    return out


def read_config(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def test_triton_gets_the_graph_with_its_own_names_and_shapes(run, repository):
    config = read_config(repository / "tickets")
    inputs, outputs = tensors_of(repository / "tickets" / "1" / "model.onnx")
    assert [(one.name, list(one.dims)) for one in config.input] == [(one.name, [-1]) for one in inputs]
    assert [(one.name, list(one.dims)) for one in config.output] == [("logits", [3])]
    assert outputs == [("logits", "float", [None, 3])]
    assert (config.name, config.backend, config.max_batch_size) == ("tickets", "onnxruntime", 32)
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert [(group.kind, group.count) for group in config.instance_group] == [(ModelInstanceGroup.KIND_CPU, 1)]
    queue = config.dynamic_batching.default_queue_policy
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert (queue.max_queue_size, queue.timeout_action) == (256, ModelQueuePolicy.REJECT)
    assert config.output[0].label_filename == "labels.txt"
    assert (repository / "tickets" / "labels.txt").read_text().splitlines() == load_task(run / "artifact").labels
    assert hash_file(repository / "tickets" / "1" / "model.onnx") == hash_file(run / "artifact" / "onnx" / "model.onnx")


def test_tritons_warm_up_is_a_real_text_in_raw_bytes(run, repository):
    (warm_up,) = read_config(repository / "tickets").model_warmup
    task = load_task(run / "artifact")
    assert set(warm_up.inputs) == set(task.config.inputs)
    for name, what in warm_up.inputs.items():
        raw = (repository / "tickets" / "warmup" / what.input_data_file).read_bytes()
        (length,) = what.dims
        assert np.frombuffer(raw, "<i8").tolist() == task.sized(task.examples(), length)[name][0].tolist()


def pb_utils(repository):
    """What Triton's Python backend gives to a model; calls of other models go to ONNX Runtime."""

    class Tensor:
        def __init__(self, name, array):
            self.name, self.as_numpy = name, lambda: array

    class InferenceResponse:
        def __init__(self, output_tensors=(), error=None):
            self.tensors, self.error = {tensor.name: tensor for tensor in output_tensors}, lambda: error
            self.has_error = lambda: error is not None

    class InferenceRequest:
        fails = False
        batches: ClassVar = []

        def __init__(self, model_name, requested_output_names, inputs):
            self.model, self.wanted, self.inputs = model_name, requested_output_names, inputs

        def exec(self):
            feed = {tensor.name: tensor.as_numpy() for tensor in self.inputs}
            self.batches.append(feed["input_ids"].shape)
            if self.fails:
                return InferenceResponse(error="the queue is full")
            session = onnxruntime.InferenceSession(repository / self.model / "1" / "model.onnx")
            found = session.run(self.wanted, feed)
            return InferenceResponse([Tensor(*pair) for pair in zip(self.wanted, found, strict=True)])

    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.InferenceRequest = Tensor, InferenceResponse, InferenceRequest
    module.get_input_tensor_by_name = lambda request, name: request.get(name)
    module.get_output_tensor_by_name = lambda response, name: response.tensors[name]
    return module


@pytest.fixture
def text_model(repository, monkeypatch):
    """The text model, opened as Triton opens it; and the stand-in."""
    return opened(repository, "tickets_text", monkeypatch)


def opened(repository, name, monkeypatch):
    backend = pb_utils(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    folder = repository / name
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    parameters = {key: {"string_value": one.string_value} for key, one in read_config(folder).parameters.items()}
    config = json.dumps({"parameters": parameters})
    model.initialize({"model_repository": str(folder), "model_version": "1", "model_config": config})
    return model, backend


def request(backend, **texts):
    arrays = {name: np.array([[text.encode()] for text in many], dtype=object) for name, many in texts.items()}
    return {name: backend.Tensor(name, array) for name, array in arrays.items()}


def test_tritons_text_model_answers_many_requests_in_one_batch_as_kdexport_does(run, text_model, articles):
    model, backend = text_model
    texts = [row["text"] for row in articles[:5]]
    requests = [
        request(backend, text=texts[:3]),
        request(backend, text=["", "\u4f60\u597d"], text_pair=["a pair", "of texts"]),
        request(backend, text=texts[3:]),
    ]
    responses = model.execute(requests)
    assert backend.InferenceRequest.batches == [(7, 48)]
    ours = package.load(run).predict([*texts[:3], ("", "a pair"), ("\u4f60\u597d", "of texts"), *texts[3:]])
    theirs = {
        name: np.concatenate([response.tensors[name].as_numpy() for response in responses])
        for name in ("label", "score", "scores")
    }
    assert [label.decode() for label in theirs["label"][:, 0]] == [answer.label for answer in ours]
    assert np.allclose(theirs["score"][:, 0], [answer.score for answer in ours], atol=1e-6)
    assert np.allclose(theirs["scores"], [list(answer.scores.values()) for answer in ours], atol=1e-6)


def test_tritons_text_model_of_vectors_answers_as_kdexport_does(tmp_path, monkeypatch):
    written = write_embedder(tmp_path / "model", default_prompt="query")
    export(written, tmp_path / "artifact", variants="fp32")
    export(tmp_path / "artifact", tmp_path / "repository", layout="triton", name="vectors")
    model, backend = opened(tmp_path / "repository", "vectors_text", monkeypatch)
    texts = ["one text", "another, longer text", ""]
    responses = model.execute([request(backend, text=texts[:1]), request(backend, text=texts[1:])])
    theirs = np.concatenate([response.tensors["sentence_embedding"].as_numpy() for response in responses])
    assert np.allclose(theirs, package.load(tmp_path / "artifact").embed(texts), atol=1e-6)
    for name in ("vectors", "vectors_text"):
        config = read_config(tmp_path / "repository" / name)
        assert [*config.output[-1].dims] == [32]
        assert not config.output[-1].label_filename
    assert [one.name for one in config.input] == ["text"]


def test_tritons_text_model_hands_on_an_error_to_every_request(text_model, monkeypatch):
    model, backend = text_model
    monkeypatch.setattr(backend.InferenceRequest, "fails", True)
    responses = model.execute([request(backend, text=["a"]), request(backend, text=["b", "c"])])
    assert [response.error() for response in responses] == ["the queue is full"] * 2


def test_tritons_text_model_is_declared_as_it_behaves(run, repository, text_model):
    model, backend = text_model
    config = read_config(repository / "tickets_text")
    assert (config.name, config.backend, config.parameters["onnx_model"].string_value) == (
        "tickets_text",
        "python",
        "tickets",
    )
    assert [(one.name, one.optional) for one in config.input] == [("text", False), ("text_pair", True)]
    (response,) = model.execute([request(backend, text=["one", "two"])])
    for output in config.output:
        assert response.tensors[output.name].as_numpy().shape == (2, *output.dims)


@pytest.mark.parametrize(("side", "function"), [("left", "sigmoid"), ("right", "none"), ("left", "softmax")])
def test_tritons_text_model_encodes_and_scores_as_the_task_does(run, text_model, articles, side, function):
    model, _ = text_model
    task = load_task(run / "artifact")
    changed = {"padding_side": side, "truncation_side": side, "function": function, "pad_id": 7}
    config = TaskConfig(**{name: getattr(task.config, name) for name in TaskConfig.__struct_fields__} | changed)
    task, model.task = TextClassification(config, task._tokenizer), model.task | changed
    model.finisher.enable_truncation(config.max_length, direction=side)
    rows = [{"text": row["text"][: 20 * i]} for i, row in enumerate(articles[:20])]
    ours, theirs = task.encode(rows), model.encode([row["text"] for row in rows])
    assert all(np.array_equal(ours[name], theirs[name]) for name in config.inputs)
    logits = np.array([[1.0, -800.0, 900.0], [0.1, 0.2, 0.3]], dtype=np.float32)
    assert np.array_equal(task.scores(logits), model.scores(logits))


def test_a_repository_keeps_its_other_models(run, tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("tickets", "news"):
        export(str(run), tmp_path, layout="triton", name=name)
    export(str(run), tmp_path, layout="triton")
    names = ["news", "news_text", "other", "tickets", "tickets_text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (tmp_path / "other" / "config.pbtxt").write_text('name: "other"')
    with pytest.raises(KdexportError, match=r"other/config\.pbtxt was not written by kdexport"):
        export(str(run), tmp_path, layout="triton", name="other")


@pytest.fixture(scope="module")
def kserve(kdexport, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("kserve") / "deploy"
    found = kdexport("export", run, out, "--layout", "kserve", "--name", "My_Tickets")
    assert found.returncode == 0, found.stderr
    return out


def pods(kserve):
    service = yaml.safe_load((kserve / "inferenceservice.yaml").read_text())
    deployment = next(yaml.safe_load_all((kserve / "kubernetes.yaml").read_text()))
    assert (service["kind"], deployment["kind"]) == ("InferenceService", "Deployment")
    return service["spec"]["predictor"], deployment["spec"]["template"]["spec"]


def test_kserve_gets_an_artifact_that_loads_and_an_image_of_its_version(kserve, run):
    assert package.load(kserve / "My_Tickets").predict("x") == package.load(run).predict("x")
    assert not (kserve / "My_Tickets" / "stage.json").exists()
    image = f"my_tickets:{hash_file(run / 'artifact' / 'kdexport.json')[:12]}"
    dockerfile = (kserve / "Dockerfile").read_text()
    assert 'COPY ["My_Tickets", "/models/My_Tickets"]' in dockerfile
    assert f"docker build -t {image} ." in dockerfile
    for pod in pods(kserve):
        assert pod["containers"][0]["image"] == image


def test_pods_are_probed_drained_and_confined(kserve, kdexport):
    known = kdexport("serve", "--help", COLUMNS="300").stdout
    for pod in pods(kserve):
        (container,) = pod["containers"]
        assert container["command"] == ["kdexport", "serve", "/models/My_Tickets"]
        flags = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
        assert all(flag in known for flag in flags)
        assert flags["--drain-delay"] == "5"
        assert int(flags["--drain-delay"]) + int(flags["--grace"]) < pod["terminationGracePeriodSeconds"]
        paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
        ready, live = "/v2/health/ready", "/v2/health/live"
        assert paths == {"startup": ready, "readiness": ready, "liveness": live}
        # Idle clients may hold all connections of the public port.
        assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in paths} == {int(flags["--admin-port"])}
        assert flags["--admin-host"] == "0.0.0.0"
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] == "512Mi"
        assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]


def test_kubernetes_finds_the_pods_and_scrapes_the_admin_port(kserve):
    text = (kserve / "kubernetes.yaml").read_text()
    assert "&id" not in text
    found = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert set(found) == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    assert {document["metadata"]["name"] for document in found.values()} == {"my-tickets"}
    template = found["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "my-tickets"
    ports = [port["containerPort"] for port in template["spec"]["containers"][0]["ports"]]
    assert ports == [8080, 8081]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == 8080
    service = yaml.safe_load((kserve / "inferenceservice.yaml").read_text())
    for annotations in (template["metadata"]["annotations"], service["metadata"]["annotations"]):
        assert (annotations["prometheus.io/port"], annotations["prometheus.io/path"]) == ("8081", "/metrics")
    assert {"name": "PROTOCOL", "value": "v2"} in service["spec"]["predictor"]["containers"][0]["env"]


# What Kubernetes asks of a Service's name, and KServe of an InferenceService's.
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("My_Tickets", "my-tickets"),
        ("2024-tickets", "model-2024-tickets"),
        ("tickets-", "tickets"),
        ("a" * 49 + "-tickets", "a" * 49),
        ("9" * 64, "model-" + "9" * 44),
        ("null", "null"),
    ],
)
def test_a_name_becomes_one_that_kubernetes_takes(run, tmp_path, name, label):
    export(str(run), tmp_path / "out", layout="kserve", name=name, image="x")
    documents = list(yaml.safe_load_all((tmp_path / "out" / "kubernetes.yaml").read_text()))
    documents.append(yaml.safe_load((tmp_path / "out" / "inferenceservice.yaml").read_text()))
    assert {document["metadata"]["name"] for document in documents} == {label}
    assert DNS_LABEL.fullmatch(label)
    assert len(f"{label}-api-keys") <= 63
    assert (tmp_path / "out" / name / "kdexport.json").is_file()


def test_the_same_command_replaces_what_it_wrote(kserve, run):
    (kserve / "stale").touch()
    with pytest.raises(KdexportError, match="stale was not written by kdexport"):
        export(str(run), kserve, layout="kserve", image="registry/tickets:2")
    (kserve / "stale").unlink()
    export(str(run), kserve, layout="kserve", image="registry/tickets:2")
    assert sorted(path.name for path in kserve.iterdir()) == [
        ".kdexport",
        "Dockerfile",
        "inferenceservice.yaml",
        "kubernetes.yaml",
        "tickets",
    ]
    assert 'image: "registry/tickets:2"\n' in (kserve / "kubernetes.yaml").read_text()


def test_laying_out_loads_no_torch(run, tmp_path):
    code = (
        "import sys; from pathlib import Path; from kdexport.pipeline.export_model import export; "
        f"[export({str(run)!r}, Path({str(tmp_path)!r}) / kind, layout=kind) for kind in ('triton', 'kserve')]; "
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'onnx', 'datasets'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


WRONG = [
    (["{run}", "{out}"], "tickets is an artifact already. Copy it, or choose another --layout"),
    (["{run}", "{out}", "--layout", "hug"], "--layout 'hug' is none of hub, triton, kserve"),
    (["{run}", "{out}", "--layout", "triton", "--max-length", "9"], "so only its layout is left to choose"),
    (["{run}", "{out}", "--layout", "triton", "--image", "x"], "--image has no effect on layout triton"),
    (
        ["{run}", "{out}", "--layout", "kserve", "--image", "x\nRUN curl evil"],
        "'x\\nRUN curl evil' can't be an image's name",
    ),
    (["{run}", "{out}", "--layout", "triton", "--name", "../x"], "'../x' can't be a model's name"),
    (["{run}:int8", "{out}", "--layout", "triton"], "has no variant 'int8'. It has: fp32"),
]


@pytest.mark.parametrize(("flags", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_use_is_one_line_and_exit_code_2(kdexport, run, tmp_path, flags, says):
    found = kdexport("export", *(flag.format(run=run, out=tmp_path / "out") for flag in flags))
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert says in found.stderr
    assert list(tmp_path.iterdir()) == []


IMAGES = {
    True: [
        "x", "x:1", "registry/tickets:2", "localhost:5000/a/b_c/d.e--f:V1.0", "[::1]:5000/a:b", "ghcr.io/a/b",
        f"docker.io/team/x:1@sha256:{'0a' * 32}",
    ],
    False: [
        "", "x\n", "x\r\ny", "x y", "X", "x:", "x:1:2", "/x", "x/", "a//b", "x -f evil", "$(id)", "${BASE}", "x#y",
        '"x"', "x@sha256:12", "http://x/y", "\u00e9", "x:" + "1" * 129, "x\x85y",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("fit", "image"), [(fit, image) for fit, images in IMAGES.items() for image in images])
def test_an_images_name_is_one_or_refused(fit, image):
    assert bool(kubernetes._IMAGE.fullmatch(image)) == fit


def test_tensors_may_have_any_name_in_a_configuration():
    name = 'a"b\\c\n}] name: "owned" \u00e9\x85/../x'
    text = triton._config(
        "model", [Tensor(name, "int64", [None, 7])], [Tensor(name, "float", [None, 2])], {name: ("x", 7)}
    )
    config = text_format.Parse(text, ModelConfig())
    assert [one.name for one in (*config.input, *config.output)] == [name, name]
    assert list(config.model_warmup[0].inputs) == [name]
    assert config.name == "model"


def test_warm_up_files_stay_in_their_folder(run, tmp_path):
    name = "../../out"

    class Odd:
        config = load_task(run / "artifact").config
        examples = staticmethod(list)
        sized = staticmethod(lambda _, length: {name: np.zeros((1, length), dtype=np.int64)})

    (tmp_path / "model").mkdir()
    files = triton._write_warm_up(Odd, tmp_path / "model" / "warmup")
    assert (tmp_path / "model" / "warmup" / files[name][0]).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_changed_artifact_is_not_laid_out(run, tmp_path):
    folder = shutil.copytree(run / "artifact", tmp_path / "artifact")
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    for layout in ("triton", "kserve"):
        with pytest.raises(KdexportError, match="is not the file that was packed"):
            export(str(folder), tmp_path / "out", layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
