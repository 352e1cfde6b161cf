"""An artifact as others want it on disk: a Triton model repository, or a folder for Kubernetes and KServe. No torch.

Tried with Triton 2.51, in the build for CPUs that nvidia-pytriton 0.7 brings: both configurations load, warm-up
runs, and the text model answers as kdexport does, in batches under load. That build has no ONNX Runtime backend: a
Python model ran the ONNX file in its place. The files for Kubernetes were held to its API's types; no cluster and
no KServe ran them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kdexport.errors import SpecError
from kdexport.files import hash_file, write_bytes, write_json, write_text
from kdexport.runtime import artifact
from kdexport.runtime.predictor import Tensor, tensors_of
from kdexport.tasks import load_task
from kdexport.tasks.base import Task

MARK = "# Written by kdexport export.\n"

# Of a model in a Triton repository; other versions may stand beside version 1.
TRITON_NAMES = ("1", "config.pbtxt", "labels.txt", "warmup")

_MAX_BATCH, _WARM_UP_TOKENS = 32, 32
_TRITON_TYPES = {"int64": "TYPE_INT64", "float": "TYPE_FP32"}
_TEXT_IO = """\
input [
  { name: "text" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "text_pair" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output [
  { name: "label" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "score" data_type: TYPE_FP32 dims: [ 1 ] },
  { name: "scores" data_type: TYPE_FP32 dims: [ %d ] label_filename: "labels.txt" }
]
"""
_QUEUE = """\
# No delay: on a CPU waiting for a fuller batch gives nothing. What would wait longer than a second, or behind more
# than 256 requests, is refused.
dynamic_batching {
  default_queue_policy {
    timeout_action: REJECT
    default_timeout_microseconds: 1000000
    allow_timeout_override: true
    max_queue_size: 256
  }
}
"""

# [registry[:port]/]path[:tag][@digest], as Docker reads it. In a Dockerfile a further line would be a command.
_IMAGE = re.compile(
    r"(?:(?:[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*"
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@[a-z0-9]+:[0-9a-f]{32,128})?"
)

# --drain-delay, --grace of the server, and some seconds to spare.
_DRAIN_S, _GRACE_S, _SPARE_S = 5, 30, 5


def triton(folder: Path, variant: str | None, name: str, out: Path) -> None:
    """Write two models of a Triton repository: `name` (tensors → logits) and `name_text` (texts → answers).

    Args:
        folder: an artifact.
        variant: the file to serve; the recommended one when None.
        name: of the model.
        out: an existing folder; gets one folder a model.
    """
    file, task = artifact.model_file(folder, variant), load_task(folder)
    inputs, outputs = tensors_of(file)
    tensors, texts = out / name, out / f"{name}_text"
    for model in (tensors, texts):
        (model / "1").mkdir(parents=True)
        write_text(model / "labels.txt", "".join(f"{' '.join(label.split())}\n" for label in task.labels))
    shutil.copyfile(file, tensors / "1" / "model.onnx")
    warm_up = _write_warm_up(task, tensors / "warmup")
    write_text(tensors / "config.pbtxt", _tensor_config(name, inputs, outputs, warm_up))

    shutil.copyfile(folder / "tokenizer.json", texts / "1" / "tokenizer.json")
    shutil.copyfile(Path(__file__).with_name("triton_text.py"), texts / "1" / "model.py")
    write_json(texts / "1" / "task.json", task.config)
    write_text(texts / "config.pbtxt", _text_config(name, len(task.labels)))


def _tensor_config(name: str, inputs: list[Tensor], outputs: list[Tensor], warm_up: str) -> str:
    return f"""{MARK}name: "{name}"
backend: "onnxruntime"
# The first axis of every tensor is the batch's; it is not among the dims.
max_batch_size: {_MAX_BATCH}
input [
{_tensors(inputs)}
]
output [
{_tensors(outputs, ' label_filename: "labels.txt"')}
]
{_QUEUE}# One thread for one instance: raise `count` to the cores that Triton may use.
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}
parameters {{ key: "inter_op_thread_count" value {{ string_value: "1" }} }}
{warm_up}"""


def _text_config(name: str, labels: int) -> str:
    return f"""{MARK}name: "{name}_text"
# Triton's own images lack one package: pip install tokenizers
backend: "python"
max_batch_size: {_MAX_BATCH}
{_TEXT_IO % labels}{_QUEUE}instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters {{ key: "onnx_model" value {{ string_value: "{name}" }} }}
"""


def _tensors(tensors: list[Tensor], more: str = "") -> str:
    lines = []
    for tensor in tensors:
        dims = ", ".join(str(-1 if size is None else size) for size in tensor.shape[1:])
        data_type = _TRITON_TYPES[tensor.type]
        lines.append(f"  {{ name: {_quoted(tensor.name)} data_type: {data_type} dims: [ {dims} ]{more} }}")
    return ",\n".join(lines)


def _quoted(text: str) -> str:
    """A string of protobuf's text format: bytes that could end it, or its line, are written in octal."""
    inner = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(inner)}"'


def _write_warm_up(task: Task, folder: Path) -> str:
    """Write one real text's tensors as raw bytes, where Triton looks for them; what config.pbtxt says of them."""
    folder.mkdir()
    length = min(_WARM_UP_TOKENS, task.config.max_length)
    inputs = []
    for i, (name, array) in enumerate(task.sized(task.examples(), length).items()):
        file = f"input-{i}"  # a graph may call its tensors anything, ../ included
        write_bytes(folder / file, array.astype("<i8").tobytes())
        what = f'data_type: TYPE_INT64 dims: [ {length} ] input_data_file: "{file}"'
        inputs.append(f"  inputs {{ key: {_quoted(name)} value {{ {what} }} }}")
    return "\n".join(["model_warmup [ {", '  name: "a text"', "  batch_size: 1", *inputs, "} ]", ""])


def kserve(folder: Path, variant: str | None, name: str, image: str | None, out: Path) -> None:
    """Write the artifact, a Dockerfile that puts it into the serving image, and what Kubernetes and KServe read.

    Args:
        folder: an artifact.
        variant: the file to serve; the recommended one when None.
        name: of the model, in URLs.
        image: that the Dockerfile will be built as; `name:version` when None, the version as the server tells it.
        out: a folder that isn't there yet.
    """
    _copy(folder, out / name)
    file = artifact.model_file(folder, variant)
    image = image or f"{name.lower()}:{hash_file(folder / artifact.MANIFEST)[:12]}"
    if not _IMAGE.fullmatch(image):
        raise SpecError(f"{image!r} can't be an image's name", "Give one like --image registry.example/team/tickets:2")
    dns = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:50]
    model = f"/models/{name}:{variant}" if variant else f"/models/{name}"
    pod = _pod(dns, model, image, file.stat().st_size)
    write_text(out / "Dockerfile", _dockerfile(name, image))
    write_text(out / "kubernetes.yaml", _yaml(*_kubernetes(dns, pod)))
    write_text(out / "inferenceservice.yaml", _yaml(_inference_service(dns, pod)))


def _copy(folder: Path, out: Path) -> None:
    """Copy an artifact's own files, each checked against the manifest."""
    manifest = artifact.read_manifest(folder)
    models = [artifact.model_file(folder, variant) for variant in manifest.variants]
    names = [*(str(path.relative_to(folder)) for path in models), *manifest.files, "README.md", artifact.MANIFEST]
    for name in (name for name in names if (folder / name).exists()):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)


def _dockerfile(name: str, image: str) -> str:
    return (
        f"{MARK}# docker build -t {image} .\n"
        "# The base is the serving image of kdexport: `docker build -t kdexport-serve .` in its source.\n"
        "ARG BASE=kdexport-serve\n"
        "FROM ${BASE}\n"
        f'COPY ["{name}", "/models/{name}"]\n'
    )


def _pod(name: str, model: str, image: str, size: int) -> dict[str, Any]:
    """The pod: the server on 8080; health, metrics and reloads on 8081; not root, nothing writable but /tmp."""

    def probe(path: str, **times: int) -> dict[str, Any]:
        # Not on the clients' port: when they hold all of its connections, the pod is busy, not dead.
        return {"httpGet": {"path": path, "port": 8081}, "timeoutSeconds": 2} | times

    # Measured: 125 MiB and 1.2 times the file. A reload loads the new version beside the old one.
    memory = f"{256 + 128 * -(-3 * size // 2**27)}Mi"
    resources = {"cpu": "1", "memory": memory}
    keys = {"name": f"{name}-api-keys", "key": "keys", "optional": True}
    return {
        # The server does what a preStop hook would: after SIGTERM it says that it isn't ready, and still answers for
        # --drain-delay, until no new request is sent here; then it ends what it has begun, for 30 s at most.
        "terminationGracePeriodSeconds": _DRAIN_S + _GRACE_S + _SPARE_S,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "kserve-container",
                "image": image,
                "command": ["kdexport", "serve", model],
                "args": [
                    *("--host", "0.0.0.0", "--port", "8080"),
                    *("--admin-host", "0.0.0.0", "--admin-port", "8081"),
                    *("--drain-delay", str(_DRAIN_S), "--grace", str(_GRACE_S)),
                ],
                # With keys in the secret, the API and reloads want one of them. Without it, whoever comes is answered,
                # and models are neither loaded nor unloaded through port 8081.
                "env": [{"name": "KDEXPORT_API_KEYS", "valueFrom": {"secretKeyRef": keys}}],
                "ports": [{"containerPort": 8080, "protocol": "TCP"}],
                "startupProbe": probe("/v2/health/ready", periodSeconds=1, failureThreshold=120),
                "readinessProbe": probe("/v2/health/ready", periodSeconds=2, failureThreshold=3),
                "livenessProbe": probe("/v2/health/live", periodSeconds=10, failureThreshold=3),
                "resources": {"requests": resources, "limits": resources},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "16Mi"}}],
    }


_SCRAPE = {"prometheus.io/scrape": "true", "prometheus.io/port": "8081", "prometheus.io/path": "/metrics"}


def _kubernetes(name: str, pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Deployment, Service, a budget for drains of nodes, and a scaler by CPU."""
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "model"}
    (container,) = pod["containers"]
    pod = pod | {
        "containers": [container | {"name": "kdexport", "ports": [*container["ports"], {"containerPort": 8081}]}]
    }
    meta, selector = {"name": name, "labels": labels}, {"matchLabels": labels}
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    cpu = {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}}
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": meta,
            "spec": {
                "selector": selector,
                "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
                "template": {"metadata": {"labels": labels, "annotations": _SCRAPE}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": meta,
            "spec": {"selector": selector, "maxUnavailable": 1},
        },
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": meta,
            "spec": {"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 8, "metrics": [cpu]},
        },
    ]


def _inference_service(name: str, pod: dict[str, Any]) -> dict[str, Any]:
    """KServe's, with the server as its custom predictor.

    In its plain deployments (`RawDeployment`, which newer versions call `Standard` and read as well): Knative allows
    neither a second port nor a longer end.
    """
    (container,) = pod["containers"]
    predictor = pod | {"containers": [container | {"env": [{"name": "PROTOCOL", "value": "v2"}, *container["env"]]}]}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "annotations": {"serving.kserve.io/deploymentMode": "RawDeployment"} | _SCRAPE,
        },
        "spec": {"predictor": {"minReplicas": 2, "maxReplicas": 8} | predictor},
    }


def _yaml(*documents: dict[str, Any]) -> str:
    class Plain(yaml.SafeDumper):  # no anchors where two documents share a part
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return MARK + yaml.dump_all(msgspec.to_builtins(documents), Dumper=Plain, sort_keys=False, width=120)
