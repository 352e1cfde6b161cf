"""Open models with the head of a task, and their tokenizer or processor."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from kdexport.data import hub
from kdexport.errors import ModelError, first_line
from kdexport.models import LINE_5
from kdexport.models.embedder import Embedder, Pooling, is_static
from kdexport.models.registry import auto_class, has_head, other_task
from kdexport.spec.teachers import has_weights
from kdexport.tasks import DEFAULT, task_class
from kdexport.tasks.config import Function
from kdexport.tasks.transcripts import BLANK

_ALPHABET = ("vocab.json", "tokenizer_config.json", "special_tokens_map.json")
# As transformers' configurations name them; without one a pipeline takes softmax.
_PROBLEM_TYPE = {"softmax": None, "sigmoid": "multi_label_classification", "none": "regression"}


class ModelAndProcessor(NamedTuple):
    """A model, its tokenizer or its processor of images or of sound, and the names of weights that no file has."""

    model: PreTrainedModel
    processor: Any
    fresh: frozenset[str] = frozenset()


def open_config(model: str) -> Any:
    """Open the configuration of a folder or hub id, or raise ModelError."""
    hub.check_model(model)
    folder = Path(model)
    with _opening(model):
        if folder.is_dir() and is_static(model):
            what = f"model {model} is a table of tokens (model2vec, StaticEmbedding), which is no teacher"
            raise ModelError(what, "Name the model that it was made of, and make such a table: --student bag")
    if folder.exists() and not _names_a_family(folder / "config.json"):
        inner = [file.parent for file in sorted(folder.glob("*/config.json")) if _names_a_family(file)]
        such = f", such as {inner[-1]}" if inner else ""
        what = f"model folder {model} holds no config.json with a model_type"
        raise ModelError(what, f"Name a folder written by save_pretrained{such}")
    with _opening(model):
        _check_known(model, PretrainedConfig.get_config_dict(model)[0])
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        _count_labels_from_0(model, config)
        return config


def _count_labels_from_0(model: str, config: Any) -> None:
    """Renumber labels that count from 1, which transformers' pipelines can't read; refuse those with gaps."""
    numbers = sorted(config.id2label or ())
    if numbers == [*range(1, len(numbers) + 1)]:
        config.id2label = dict(enumerate(own_labels(config)))
        config.label2id = {label: i for i, label in config.id2label.items()}
    elif numbers != [*range(len(numbers))]:
        numbered = ", ".join(map(str, numbers[:8]))
        raise ModelError(f"model {model!r} numbers its labels {numbered}", "Count id2label in its config.json from 0")


def _names_a_family(config: Path) -> bool:
    return config.is_file() and b'"model_type"' in config.read_bytes()


def _check_known(model: str, config: dict[str, Any]) -> None:
    """Raise ModelError if transformers does not know a configuration's type."""
    family, saved_by = config.get("model_type"), config.get("transformers_version")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(f"the weights of model {model!r} are quantized ({method})", "Name the model before that")
    if not family or family in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise ModelError(
            f"model {model!r} is of type {family!r} and brings code of its own, which is never run",
            "Take a model of a family that transformers has",
        )
    what = f"model {model!r} is of type {family!r}, unknown to transformers {transformers.__version__}"
    raise ModelError(what, _install(saved_by) if saved_by else "Upgrade transformers")


def open_model(
    model: str, config: Any, task: str, labels: Sequence[str], function: Function = "softmax", *,
    to_train: bool = False, pooling: Pooling | None = None,
) -> ModelAndProcessor:  # fmt: skip
    """Open a model with a head for these labels, a new one where they are not its own.

    Args:
        model: folder or hub id.
        config: its configuration, which is changed to these labels.
        labels: in the order of the logits.
        function: from logits to scores.
        to_train: give a folder without weights random ones.
        pooling: of an encoder of texts; as its folder says when None.

    Raises:
        ModelError: weights, tokenizer or processor are missing or unreadable.
    """
    processor = open_processor(model, task)
    if task_class(task).embeds:
        if not has_weights(model):
            raise ModelError(f"model folder {model} holds no weights", "Save the whole model")
        with _opening(model):
            return ModelAndProcessor(Embedder.open(model, pooling), processor)
    if task_class(task).has_labels:
        _name_labels(config, labels)
        config.problem_type = _PROBLEM_TYPE[function]
    if not has_weights(model):
        if not to_train:
            raise ModelError(f"model folder {model} holds no weights", "Save the whole model")
        return _padded(model, auto_class(task).from_config(config), processor, task)
    with _opening(model):
        opened, found = auto_class(task).from_pretrained(
            model, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
        )
    fresh = frozenset([*found["missing_keys"], *_mismatched(found)])
    return _padded(model, opened, processor, task)._replace(fresh=fresh)


def _mismatched(found: dict[str, Any]) -> list[str]:
    """Return the names of weights of other sizes; transformers 5 gives both shapes with each."""
    return sorted(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])


def _name_labels(config: Any, labels: Sequence[str]) -> None:
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}


def _padded(name: str, model: PreTrainedModel, processor: Any, task: str) -> ModelAndProcessor:
    """Give a classifier of texts a padding token, in its tokenizer and in its configuration.

    Where neither names one, it is the token that ends a text.

    Raises:
        ModelError: there is none, or the model would take the last token of a text for padding.
    """
    kind, config = task_class(task), model.config
    if kind.modality == "text" and kind.has_labels:
        known = getattr(config, "pad_token_id", None)
        known = known if isinstance(known, int) and known >= 0 else None
        if processor.pad_token is None:
            named = None if known is None else processor.convert_ids_to_tokens(known)
            processor.pad_token = named or processor.eos_token
        pad_id = processor.pad_token_id
        if pad_id is None or (known is None and pad_id in processor("a")["input_ids"]):
            raise ModelError(f"model {name!r} has no padding token", "Set tokenizer.pad_token and config.pad_token_id")
        if known is None:
            config.pad_token_id = pad_id
    return ModelAndProcessor(model, processor)


@contextmanager
def _opening(model: str, what: str = "can't", fix: str = "") -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError and connection errors, by cause
        raise ModelError(f"model {model!r} {what} be opened: {first_line(error)}", fix or _newer(model)) from None


def _newer(model: str) -> str:
    """Return the advice for a model that was saved by a newer transformers than this one."""
    try:
        saved_by = json.loads((Path(model) / "config.json").read_bytes())["transformers_version"]
        newer = Version(saved_by) > Version(transformers.__version__)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return _install(saved_by) if newer else ""


def _install(version: str) -> str:
    return f"It was saved by {version}: pip install 'transformers>={version}'"


def open_classifier(model: str, config: Any, task: str) -> ModelAndProcessor:
    """Open a model with the head that it was trained with; raise ModelError if part of it is missing."""
    if task_class(task).embeds:
        with _opening(model):
            return ModelAndProcessor(Embedder.open(model), open_processor(model, task))
    if not has_head(config, task):
        kind = ", ".join(config.architectures or []) or "of no known kind"
        kind += f" for {other}" if (other := other_task(config)) else ""
        kind += ", whose SetFit head is not read" if (Path(model) / "config_setfit.json").exists() else ""
        raise ModelError(
            f"model {model!r} has no head of a known task: it is {kind}",
            "Name a trained classifier or language model",
        )
    processor = open_processor(model, task)
    if task_class(task).has_labels:
        _name_labels(config, own_labels(config))
    with _opening(model):
        opened, found = auto_class(task).from_pretrained(
            model, config=config, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    if wrong := _mismatched(found):
        what = f"model {model!r} has weights of other sizes than its config.json says: {', '.join(wrong[:4])}"
        raise ModelError(what, "Do num_labels and id2label name every label?")
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"model {model!r} lacks trained weights: {', '.join(missing[:4])}", "Save the whole model")
    return _padded(model, opened, processor, task)


def open_processor(model: str, task: str) -> Any:
    """Open the tokenizer, or the processor of images or sound, of a folder or hub id, or raise ModelError."""
    reads = task_class(task).modality
    if reads == "text":
        return open_tokenizer(model, task)
    fix = "Save it beside the model: processor.save_pretrained(folder)"
    with _opening(model, f"has no {reads} processor that can", fix):
        return (AutoImageProcessor if reads == "image" else AutoFeatureExtractor).from_pretrained(model)


def open_tokenizer(model: str, task: str = DEFAULT) -> PreTrainedTokenizerFast:
    """Open the fast tokenizer of a folder or hub id, or raise ModelError."""
    # Words of a list each begin with a space, for tokenizers that tell the beginning of a word by it.
    words = {"add_prefix_space": True} if task_class(task).has_words else {}
    fix = "Save it beside the model: tokenizer.save_pretrained(folder)"
    folder = Path(model)
    slow = ModelError(f"model {model!r} has only a slow tokenizer, without tokenizer.json", "Convert it first")
    with _opening(model, "has no tokenizer that can", fix):
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **words, trust_remote_code=False)
        except Exception as error:
            if (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
                raise slow from error
            raise
    if not tokenizer.is_fast:
        raise slow
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers 5 makes it out of nothing
        raise ModelError(f"model {model!r} has no tokenizer that can be opened: it has no vocabulary", fix)
    if LINE_5 and (file := cached_file(model, "tokenizer.json", _raise_exceptions_for_missing_entries=False)):
        _as_in_file(tokenizer, Tokenizer.from_file(file), add_prefix_space=bool(words))
    return tokenizer


def _as_in_file(tokenizer: PreTrainedTokenizerFast, file: Tokenizer, *, add_prefix_space: bool) -> None:
    """Put tokenizer.json's own normalizer and pre-tokenizer back: transformers 5 makes those of the family's class."""
    file.add_tokens([t for t in tokenizer.added_tokens_decoder.values() if file.token_to_id(t.content) is None])
    if add_prefix_space and hasattr(file.pre_tokenizer, "add_prefix_space"):
        file.pre_tokenizer.add_prefix_space = True
    tokenizer._tokenizer = file


def alphabet_of(model: str, size: int) -> list[str]:
    """Return the characters of a CTC model's `vocab.json` in the order of its `size` logits, the blank first.

    Raises:
        ModelError: it has none, one for each of several languages, or its blank is another.
    """
    files = {name: cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in _ALPHABET}
    read = [json.loads(Path(file).read_bytes()) if file else {} for file in files.values()]
    ids, names = read[0], read[2] | read[1]
    if not ids or not all(isinstance(id_, int) and 0 <= id_ < size for id_ in ids.values()):
        fix = "Save the tokenizer of one language beside the model: tokenizer.save_pretrained(folder)"
        raise ModelError(f"model {model!r} has no vocab.json of characters", fix)
    blank, space = (names.get(name) or usual for name, usual in (("pad_token", BLANK), ("word_delimiter_token", "|")))
    if ids.get(blank) != 0:
        raise ModelError(f"model {model!r} has its blank {blank!r} at {ids.get(blank)}", "Take one that has it at 0")
    alphabet = [f"<{i}>" for i in range(size)]
    for token, i in ids.items():
        alphabet[i] = {blank: BLANK, space: " "}.get(token, token.lower() if len(token) == 1 else token)
    return alphabet


def own_labels(config: Any) -> list[str]:
    """Return a configuration's label names in the order of its logits."""
    return [str(config.id2label[i]) for i in sorted(config.id2label)]
