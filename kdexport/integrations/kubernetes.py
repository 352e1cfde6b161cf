"""An artifact as a folder for Kubernetes and KServe.

The files were checked against the types of Kubernetes' API; no cluster and no KServe ran them.
"""

import re
import shutil
from pathlib import Path

from kdexport.errors import SpecError
from kdexport.files import hash_file, write_text
from kdexport.integrations import render
from kdexport.runtime import artifact

# [registry[:port]/]path[:tag][@digest], as Docker reads it. In a Dockerfile a further line would be a command.
_IMAGE = re.compile(
    r"(?:(?:[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*"
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@[a-z0-9]+:[0-9a-f]{32,128})?"
)
_MAX_NAME = 50  # of 63: others append to it


def write(folder: Path, variant: str | None, name: str, image: str | None, out: Path) -> None:
    """Write an artifact, a Dockerfile, and manifests for Kubernetes and KServe into a new folder.

    `variant` defaults to the recommended one, `image` to `name:version`.
    """
    _copy(folder, out / name)
    size = artifact.size_of(artifact.model_file(folder, variant))
    image = image or f"{name.lower()}:{hash_file(folder / artifact.MANIFEST)[:12]}"
    if not _IMAGE.fullmatch(image):
        raise SpecError(f"{image!r} can't be an image's name", "Give one like --image registry.example/team/tickets:2")
    model = f"/models/{name}:{variant}" if variant else f"/models/{name}"
    memory = f"{256 + 128 * -(-3 * size // 2**27)}Mi"
    values = {"folder": name, "name": _dns_label(name), "image": image, "model": model, "memory": memory}
    for file in ("Dockerfile", "kubernetes.yaml", "inferenceservice.yaml"):
        write_text(out / file, render(f"{file}.j2", {}, **values))


def _dns_label(name: str) -> str:
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower())
    label = label if label[0].isalpha() else f"model-{label}"
    return label[:_MAX_NAME].rstrip("-")


def _copy(folder: Path, out: Path) -> None:
    """Copy an artifact's own files, each checked against the manifest."""
    manifest = artifact.read_manifest(folder)
    chosen = (artifact.model_file(folder, variant) for variant in manifest.variants)
    models = [file for model in chosen for file in artifact.files_of(model)]
    names = [*(str(path.relative_to(folder)) for path in models), *manifest.files, "README.md", artifact.MANIFEST]
    for name in (name for name in names if (folder / name).exists()):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
