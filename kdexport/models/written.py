"""A Whisper with a smaller vocabulary: its table, tokenizer, generation_config.json and task."""

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from kdexport.files import write_json
from kdexport.models.loading import open_tokenizer
from kdexport.models.saving import save_whisper_tokenizer
from kdexport.models.transcriber import Transcriber
from kdexport.models.vocabulary import trim_vocabulary
from kdexport.tasks import load_task
from kdexport.tasks.base import writes_speech
from kdexport.tasks.metrics import Array


def trim_writer(model: Transcriber, folder: Path, outputs: Array) -> int:
    """Trim a Whisper in place, and its tokenizer and `task.json` in a folder; return how many tokens it has now.

    The tokens in `outputs` stay, those that spell these texts, and those that `trim_vocabulary` needs. So these texts
    are written as before, and any other text can still be written, in more tokens.
    """
    tokenizer, task = open_tokenizer(str(folder)), load_task(folder)
    assert writes_speech(task)
    written = {token for one in outputs for token in task.ids_of(one)}
    kept = trim_vocabulary(tokenizer, model, [f" {text}" for text in task.raw(outputs)], written)
    new = {int(old): i for i, old in enumerate(kept)}
    rules = model.generation_config
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"):
        if getattr(model.config, name, None) is not None:  # older models have them in config.json
            if name != "forced_decoder_ids":  # which follow from the language and the task
                setattr(rules, name, getattr(rules, name, None) or getattr(model.config, name))
            setattr(model.config, name, None)
    for name, value in vars(rules).items():
        if name in ("suppress_tokens", "begin_suppress_tokens") and value is not None:
            setattr(rules, name, [new[token] for token in value if token in new])
        elif name == "forced_decoder_ids" and value:
            setattr(rules, name, [[place, token and new[token]] for place, token in value])
        elif name in ("lang_to_id", "task_to_id"):
            setattr(rules, name, {key: new[token] for key, token in value.items()})
        elif name.endswith("_token_id") and value is not None:
            setattr(rules, name, new[value])
    save_whisper_tokenizer(tokenizer, folder)
    config: Any = task.config
    old = config.decoder
    decoder = replace(
        old, start=[new[token] for token in old.start], never=[new[token] for token in old.never if token in new],
        never_first=[new[token] for token in old.never_first if token in new], silence=new.get(old.silence),
    )  # fmt: skip
    write_json(folder / "task.json", replace(config, decoder=decoder, end_id=new[config.end_id]))
    task = load_task(folder)
    model.writes(task, task)
    return len(kept)
