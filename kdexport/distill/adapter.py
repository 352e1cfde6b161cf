"""Merge a PEFT adapter (LoRA and its kind) into its base model."""

import re
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from kdexport.errors import MissingPackage, ModelError, first_line
from kdexport.models.loading import open_config, open_model, open_tokenizer, own_labels
from kdexport.models.registry import has_head
from kdexport.spec.teachers import base_of
from kdexport.tasks import DEFAULT
from kdexport.tasks.metrics import Array

# The last layer of a sequence classifier in transformers' families: its rows are the labels.
_HEAD = re.compile(r"(^|\.)(classifier|score|out_proj|logits_proj|summary)\.weight$")


def merge_adapter(folder: Path, out: Path) -> None:
    """Write adapter and base model as one Hugging Face folder, in the existing folder `out`.

    The head is the adapter's if it was trained with it (`modules_to_save`), else the base's; so are tokenizer and label
    names.

    Raises:
        MissingPackage: peft is not installed.
        ModelError: the adapter or its base can't be read, can't be merged, or has no head.
    """
    try:
        from peft import PeftConfig, PeftModel
        from peft.utils import load_peft_weights
    except ModuleNotFoundError:
        raise MissingPackage("peft", "distill") from None
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # peft raises a dozen classes for what is missing or unknown
        raise ModelError(f"adapter {folder} can't be read: {first_line(error)}", "Save it again") from None
    if settings.task_type not in (None, "SEQ_CLS"):
        raise ModelError(f"adapter {folder} is for {settings.task_type}, not for classification (SEQ_CLS)")
    if settings.is_prompt_learning:
        raise ModelError(f"adapter {folder} is a learned prompt, which can't be merged", "Take LoRA, or merge it")
    base = base_of(folder)
    config = open_config(base)
    opened = open_model(base, config, DEFAULT, _labels(folder, config, weights))
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = open_tokenizer(str(folder)) if has_tokenizer else opened.processor
    if len(tokenizer) > opened.model.get_input_embeddings().num_embeddings:
        opened.model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(opened.model, str(folder)).merge_and_unload()
        except Exception as error:
            raise ModelError(f"adapter {folder} does not fit its base {base}: {first_line(error)}") from None
    missing = [str(one.message) for one in caught if "missing adapter keys" in str(one.message)]
    if missing:
        raise ModelError(f"adapter {folder} lacks weights: {missing[0][:200]}", "Save the whole adapter")
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def _labels(folder: Path, base: Any, weights: dict[str, Array]) -> list[str]:
    heads = [len(weight) for name, weight in weights.items() if _HEAD.search(name)]
    if not heads and not has_head(base, DEFAULT):
        raise ModelError(
            f"neither adapter {folder} nor its base has a trained classification head",
            'Train it with modules_to_save=["classifier"]',
        )
    own = [AutoConfig.from_pretrained(folder)] if (folder / "config.json").is_file() else []
    labels = [own_labels(config) for config in (*own, base)]
    rows = heads[-1] if heads else len(own_labels(base))
    return next((names for names in labels if len(names) == rows), [f"LABEL_{i}" for i in range(rows)])
