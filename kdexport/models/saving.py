"""Write model folders: config, weights, tokenizer or processor, and `task.json`."""

import json
import warnings
from collections.abc import Collection, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from kdexport.errors import ModelError, VerificationError
from kdexport.files import write_json
from kdexport.models import LINE_5
from kdexport.models.embedder import Embedder
from kdexport.models.inference import PADDING_TOLERANCE, padding_effect
from kdexport.models.loading import ModelAndProcessor, open_tokenizer
from kdexport.models.transcriber import NO_TIMES, Transcriber, config_of
from kdexport.tasks import DEFAULT, load_task, task_class
from kdexport.tasks.base import can_embed, reads_texts
from kdexport.tasks.config import AudioConfig, EmbeddingConfig, Function, TaskConfig, TextSide
from kdexport.tasks.inputs import audio as sound
from kdexport.tasks.inputs import images
from kdexport.tasks.inputs.whisper import HOP, RATE

_DEFAULT_MAX_LENGTH = 128


def save_task(
    opened: ModelAndProcessor,
    max_length: int | None,
    labels: Sequence[str],
    out: Path,
    *,
    task: str = DEFAULT,
    function: Function = "softmax",
    at_most: int = _DEFAULT_MAX_LENGTH,
    rows: Sequence[dict[str, Any]] = (),
    top_k: int = 1,
    words: Sequence[str] = (),
    language: str = "",
    problem: str = "",
) -> None:
    """Write `task.json` and the files of the tokenizer or processor.

    Args:
        max_length: tokens of each text; as many as the model reads, up to `at_most`, when None.
        labels: in the order of the logits.
        function: from logits to scores.
        rows: some training rows, to complete the settings of a processor of sound.
        top_k: tokens with a probability in a language model's output.
        words: a closed vocabulary of speech.
        language: the code of the language that is spoken, where it is known.
        problem: how vectors are judged, see `data.problem`.
    """
    model, tokenizer = opened.model, opened.processor
    kind = task_class(task)
    if kind.modality != "text":
        image = audio = None
        if kind.modality == "image":
            image = images.config_of(tokenizer.to_dict(), getattr(model.config, "num_channels", 3))
        else:
            ctc = kind.objective == "ctc"
            own = tokenizer.to_dict()
            seconds = sound.speech_seconds(rows) if ctc and (rows or "max_length" not in own) else None
            audio = sound.config_of(own, rows, seconds)
            if ctc:
                audio = replace(audio, steps=_steps(model, audio))
                _save_alphabet(labels, out)
        config = TaskConfig(
            task=task, labels=list(labels), inputs=[model.main_input_name], function=function, image=image, audio=audio,
            words=list(words), language=language,
        )  # fmt: skip
        tokenizer.save_pretrained(out)
        write_json(out / "task.json", config)
        return
    reader = model.encoder if isinstance(model, Embedder) else model
    accepted = set(tokenizer.model_input_names) & set(signature(reader.forward).parameters)
    # DeBERTa-v2 ignores token types, and RoBERTa knows one alone; GPT-2 takes them, and its exported graph does not.
    if getattr(model.config, "type_vocab_size", 2) < 2 or kind.generates:
        accepted.discard("token_type_ids")
    reads, top_k = longest_input(model, tokenizer), top_k if kind.generates else 0
    embedding = None
    if isinstance(model, Embedder):
        steps, at_most = model.steps, min(kind.usual_length, model.steps.reads)
        own = {"prompts": dict(steps.prompts), "default_prompt": steps.default_prompt}
        embedding = EmbeddingConfig(width=model.width, problem=problem, **own)
    write = partial(write_task, task=task, function=function, at_most=at_most, top_k=top_k, embedding=embedding)
    # Padding on the right shifts no positions; XLNet, which reads a text's last token, needs it on the left.
    sides: list[TextSide] = ["right", "left", "right"]
    for side in sides:
        write(tokenizer, accepted, reads, max_length, labels, out, padding_side=side)
        if kind.generates or padding_effect(model, load_task(out)) <= PADDING_TOLERANCE:
            break
    if isinstance(model, Embedder):
        model.steps = model.steps._replace(reads=load_task(out).config.max_length)


@torch.inference_mode()
def _steps(model: PreTrainedModel, how: AudioConfig) -> int:
    """Return the number of outputs along time for the longest input."""
    shape = (1, how.length, how.mels) if how.mels else (1, how.length)
    was_training = model.training
    steps = model.eval()(torch.ones(shape)).logits.shape[1]
    model.train(was_training)
    return int(steps)


def _save_alphabet(labels: Sequence[str], out: Path) -> None:
    """Write a tokenizer of characters as Wav2Vec2's, for other runtimes."""
    tokens = {"|" if label == " " else label: i for i, label in enumerate(labels)}
    write_json(out / "vocab.json", tokens)
    special = {"pad_token": labels[0], "word_delimiter_token": "|", "unk_token": labels[0], "bos_token": None}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "Wav2Vec2CTCTokenizer", "eos_token": None, **special})


def write_task(
    tokenizer: PreTrainedTokenizerFast,
    accepted: Collection[str],
    reads: int,
    max_length: int | None,
    labels: Sequence[str],
    out: Path,
    *,
    task: str = DEFAULT,
    function: Function = "softmax",
    at_most: int = _DEFAULT_MAX_LENGTH,
    top_k: int = 0,
    padding_side: TextSide = "right",
    embedding: EmbeddingConfig | None = None,
) -> None:
    """Write `task.json` and tokenizer files for a model with the inputs `accepted` that reads `reads` tokens.

    Raises:
        VerificationError: some texts have other tokens than the Hugging Face tokenizer gives them.
    """
    cut: TextSide = "right" if top_k or task_class(task).has_words else tokenizer.truncation_side
    config = TaskConfig(
        task=task,
        labels=list(labels),
        inputs=[name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted],
        max_length=_length(reads, max_length, at_most),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        pad_type_id=tokenizer.pad_token_type_id,
        padding_side=padding_side,
        truncation_side=cut,
        function=function,
        kept=min(top_k, len(tokenizer)),
        end_id=tokenizer.eos_token_id if top_k else None,
        embedding=embedding,
    )
    # A tokenizer.json may carry truncation and padding of its own, which other runtimes would follow.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = config.max_length
    ours: dict[str, Any] = {"model_input_names": config.inputs}
    if "max_length" in tokenizer.init_kwargs:  # of an earlier truncation, which fastembed would follow
        ours["max_length"] = config.max_length
    if not top_k:  # transformers pads prompts on the other side
        ours |= {"padding_side": padding_side, "truncation_side": cut}
    for name, value in ours.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value
    save_tokenizer(tokenizer, out)
    write_json(out / "task.json", config)
    _check_tokens(out)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a tokenizer so that both lines of transformers read the tokens of its tokenizer.json.

    Where transformers 5 would make another normalizer of the family's class, and where it names a class that 4.57 does
    not know, the plain class is named.
    """
    tokenizer.save_pretrained(out)
    if not LINE_5:
        return
    file = out / "tokenizer_config.json"
    config = json.loads(file.read_bytes())
    opened = AutoTokenizer.from_pretrained(out)
    if config["tokenizer_class"] == "TokenizersBackend" or _components(opened) != _components(tokenizer):
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        write_json(file, config)


def _check_tokens(folder: Path) -> None:
    """Compare our tokens with those of the Hugging Face tokenizer, by which a model is used elsewhere."""
    task, tokenizer = load_task(folder), AutoTokenizer.from_pretrained(folder)
    assert reads_texts(task)
    if task.generates:
        tokenizer.truncation_side = task.config.truncation_side
    first, second, *_ = texts = [row["text"] for row in task.examples()]
    pairs = [{"text": a, "text_pair": b} for a, b in ((first, second), (" ".join(texts * 100), first))]
    rows = [
        *task.probes(),
        *task.examples(),
        task.ready({"text": " ".join(texts * 100)}),
        *(pairs if task.pairs else []),
    ]
    for row, ours in zip(rows, task.tokenize(rows), strict=True):
        read = task.prompted(row) if can_embed(task) else row["text"]
        words = [text.split(" ") if task.has_words else text for text in (read, row.get("text_pair")) if text]
        cut = {"truncation": True, "max_length": task.config.max_length, "is_split_into_words": task.has_words}
        theirs = tokenizer(*words, **cut) if words else {}
        if any(ours[name].tolist() != theirs[name] for name in task.config.inputs if theirs.get(name)):
            fix = "This is a fault of kdexport: please report it with the tokenizer"
            raise VerificationError(f"the text {row['text'][:40]!r} has other tokens than transformers gives it", fix)


def _components(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return [backend[name] for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]


def save_model(opened: ModelAndProcessor, out: Path) -> None:
    """Write config and weights as safetensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that settings of generation move to a file of their own
        if isinstance(opened.model, Embedder):
            opened.model.save(out)
            return
        opened.model.save_pretrained(out, safe_serialization=True)


def save_processor(source: str, how: AudioConfig, out: Path) -> Any:
    """Write, and return, the tokenizer of a Whisper, and write its extractor, for a window of this length."""
    tokenizer, extractor = open_tokenizer(source), AutoFeatureExtractor.from_pretrained(source)
    save_whisper_tokenizer(tokenizer, out)
    chunk = how.length * HOP // RATE
    settings = extractor.to_dict() | {"chunk_length": chunk, "n_samples": chunk * RATE, "nb_max_frames": how.length}
    write_json(out / "preprocessor_config.json", settings)
    return tokenizer


def save_whisper_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer of a Whisper under its own name, by which transformers.js decodes."""
    save_tokenizer(tokenizer, out)
    named = json.loads((out / "tokenizer_config.json").read_bytes()) | {"tokenizer_class": "WhisperTokenizer"}
    write_json(out / "tokenizer_config.json", named)


def save_writer(
    model: Transcriber, source: str, out: Path, how: AudioConfig, task: str, kept: int, seconds: float | None = None
) -> None:
    """Write `task.json` and the processor of a Whisper, and attach that task to it. See `config_of`."""
    tokenizer = save_processor(source, how, out)
    write_json(out / "task.json", config_of(model, tokenizer, how, task, kept, seconds))
    rules, ids = model.generation_config, tokenizer.get_vocab()
    rules._from_model_config = False  # transformers would write the model's defaults in its place
    rules.return_timestamps, rules.is_multilingual = False, bool(getattr(rules, "is_multilingual", False))
    if len(model.languages) > 1:
        rules.task, rules.forced_decoder_ids = "transcribe", None  # `language` and `task` stand for them
    rules.no_timestamps_token_id = ids.get(NO_TIMES)
    written = load_task(out)
    model.writes(written, written)


def read_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: int | None) -> int:
    """Return the tokens to read of each text; raise ModelError if the model reads less than is asked for."""
    return _length(longest_input(model, tokenizer), asked, _DEFAULT_MAX_LENGTH)


def _length(reads: int, asked: int | None, at_most: int) -> int:
    if asked and asked > reads:
        raise ModelError(f"max_length is {asked}, but the model reads {reads} tokens", "Lower it")
    return asked or min(at_most, reads)


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the number of tokens that a model reads."""
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    if positions < 0:  # XLNet has no limit
        positions = 512
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            positions -= part.padding_idx + 1  # RoBERTa and its kin count positions from there
            break
    declared = tokenizer.model_max_length
    return int(min(positions, declared if 0 < declared < 10**6 else positions))
