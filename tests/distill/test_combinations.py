"""Whatever a spec accepts trains: every task with every student and every loss, or it is refused before any work."""

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)
from whispers import write_whisper

from kdexport import spec
from kdexport.analysis.duplicates import Audit
from kdexport.data import Summary, read_rows, write_rows
from kdexport.distill.student import train_student
from kdexport.distill.transcripts import prepare_transcriber
from kdexport.errors import KdexportError, SpecError
from kdexport.files import write_json
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.registry import open_trained
from kdexport.models.saving import save_model, save_task
from kdexport.models.speechnet import SpeechNetConfig, SpeechNetForCTC
from kdexport.spec import derive
from kdexport.spec.sections import LossName
from kdexport.tasks import load_task, task_class
from kdexport.tasks.menus import LAYERS, MEDIA, SPEECH, TEXTS

WORDS = ["[PAD]", "[UNK]", "red", "green", "blue", "car", "tree", "sky", "is", "was", "not", "far"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = {  # task, problem and labels
    "one label": ("text-classification", "single-label", ["a", "b", "c"]),
    "several labels": ("text-classification", "multi-label", ["a", "b", "c"]),
    "a number": ("text-classification", "regression", ["value"]),
    "rankings": ("text-ranking", "single-label", ["value"]),
    "tags": ("token-classification", "single-label", ["O", "B-x", "I-x"]),
    "text": ("causal-lm", "single-label", []),
    "images": ("image-classification", "single-label", ["a", "b", "c"]),
    "sound": ("audio-classification", "single-label", ["a", "b", "c"]),
    "speech": ("automatic-speech-recognition", "single-label", ["<pad>", "a", "b", "c"]),
    "speech of a waveform": ("automatic-speech-recognition", "single-label", ["<pad>", " ", "a", "b"]),
    "written speech": ("automatic-speech-recognition", "seq2seq", []),
}
STUDENTS = ["bag", "cnn:16", "gru:16", "1x16", "1x16 behind 8", "layers:1", "spread:2", "layers:0+1", "conv:8"]
LOSSES = get_args(LossName)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tokenizer():
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", eos_token="[UNK]", model_max_length=16
    )


def teacher_of(task, labels, problem):
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    kind = {"multi-label": "multi_label_classification", "regression": "regression"}.get(problem)
    kind = "regression" if task == "text-ranking" else kind
    texts = {"vocab_size": len(WORDS), "max_position_embeddings": 16, "type_vocab_size": 1, **SIZES, **names}
    if task in ("text-classification", "text-ranking"):
        return ModelAndProcessor(BertForSequenceClassification(BertConfig(problem_type=kind, **texts)), tokenizer())
    if task == "token-classification":
        return ModelAndProcessor(BertForTokenClassification(BertConfig(**texts)), tokenizer())
    if task == "causal-lm":
        config = GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=32, n_layer=2, n_head=2)
        return ModelAndProcessor(GPT2LMHeadModel(config), tokenizer())
    if task == "image-classification":
        config = ViTConfig(image_size=32, patch_size=16, **SIZES, **names)
        return ModelAndProcessor(ViTForImageClassification(config), ViTImageProcessor(size={"height": 32, "width": 32}))
    if labels[:2] == ["<pad>", " "]:
        config = Wav2Vec2Config(conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
                                vocab_size=len(labels), **SIZES)  # fmt: skip
        return ModelAndProcessor(Wav2Vec2ForCTC(config), Wav2Vec2FeatureExtractor())
    if task == "automatic-speech-recognition":
        network = SpeechNetForCTC(SpeechNetConfig(width=16, depth=1, num_mel_bins=40, **names))
        return ModelAndProcessor(network, ASTFeatureExtractor(num_mel_bins=40, max_length=64))
    config = ASTConfig(max_length=64, num_mel_bins=40, **SIZES, **names)
    return ModelAndProcessor(ASTForAudioClassification(config), ASTFeatureExtractor(num_mel_bins=40, max_length=64))


def rows_of(task, problem, labels, folder, n=16):
    draw, rows = np.random.default_rng(0), []
    for i in range(n):
        words = draw.choice(WORDS[2:], 6).tolist()
        row = {"id": f"r:{i}", "text": " ".join(words), "label": labels[i % len(labels)] if labels else ""}
        if problem == "multi-label":
            row["label"] = "\x1f".join(labels[: i % 3])
        elif problem == "regression":
            row["label"] = f"{i / n:g}"
        elif task == "text-ranking":
            row |= {"text": WORDS[2 + i % 4], "text_pair": row["text"], "label": f"{i % 3}"}
        elif task == "token-classification":
            row["label"] = " ".join(("O", "B-x", "I-x")[j % 3] for j in range(len(words)))
        elif task == "image-classification":
            file = folder / f"{i}.png"
            Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
            row = {"id": row["id"], "image": str(file), "label": row["label"], "sha256": str(i)}
        elif task in ("audio-classification", "automatic-speech-recognition"):
            row = {"id": row["id"], "audio": sound(draw), "label": row["label"], "sha256": str(i)}
            row |= {"label": "ab"} if task == "automatic-speech-recognition" else {}
        rows.append(row)
    return rows


def sound(draw):
    samples = (draw.normal(0, 3000, 8000)).astype("<i2").tobytes()
    head = b"RIFF" + (36 + len(samples)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    head += b"\x01\x00\x01\x00" + (16_000).to_bytes(4, "little") + (32_000).to_bytes(4, "little") + b"\x02\x00\x10\x00"
    return head + b"data" + len(samples).to_bytes(4, "little") + samples


@pytest.fixture(scope="module", params=KINDS)
def stages(request, tmp_path_factory):
    """A data, a teacher and a targets stage of one kind of task, on rows of a few made-up words or of noise."""
    torch.manual_seed(0)
    task, problem, labels = KINDS[request.param]
    run = tmp_path_factory.mktemp("run")
    data, teacher, targets = (run / name for name in ("data", "teacher", "targets"))
    for folder in (data, teacher, targets):
        folder.mkdir()
    rows = rows_of(task, problem, labels, data)
    for split in ("train", "validation", "test"):
        write_rows(data, split, rows)
    counts = dict.fromkeys(("train", "validation", "test"), len(rows))
    summary = Summary(counts, labels, 0, [], Audit(0, 0, 0, {}, {}, {}), 0, task, problem)
    write_json(data / "data.json", summary)
    if problem == "seq2seq":
        whisper = str(write_whisper(run / "whisper"))
        prepare_transcriber(summary, whisper, read_rows(data, "train"), teacher)
    else:
        opened = teacher_of(task, labels, problem)
        function = task_class(task, problem).function
        kept = 8 if task == "causal-lm" else 1
        save_task(opened, None, labels, teacher, task=task, function=function, rows=rows, top_k=kept)
        save_model(opened, teacher)
    model, opened_task = open_trained(teacher), load_task(teacher)
    for split in ("train", "validation", "test"):
        np.save(targets / f"{split}.npy", opened_task.pack(logits_of(model, opened_task, read_rows(data, split))))
    return task, problem, data, teacher, targets


@pytest.mark.parametrize("student", STUDENTS)
def test_what_a_spec_accepts_trains_two_steps(stages, student, tmp_path):
    task, problem, data, teacher, targets = stages
    name, _, width = student.partition(" behind ")
    accepted = 0
    for loss in LOSSES:
        given = {"task": task, "data.train": "d.csv", "teacher.model": str(teacher), "student.model": name}
        given |= {"distill.loss": loss}
        given |= {"data.problem": problem} if problem != "single-label" else {}
        given |= {"student.embedding": int(width)} if width else {}
        try:
            settings = spec.load(None, given | {"distill.batch_size": 8, "distill.epochs": 1})
        except SpecError:
            continue
        out = tmp_path / loss
        out.mkdir()
        train_student(
            settings.student, name, settings.distill, data=data, teacher=teacher, targets=targets, seed=0, out=out
        )
        assert np.isfinite(np.load(out / "reference.npy")).all()
        accepted += 1
    menu, (kind, *_, network) = task_class(task, problem).menu, derive.shape_of(name)
    layers = not (menu.own_steps and kind in LAYERS) or (teacher / "config.json").read_text().count("conv_stride")
    assert bool(accepted) == bool(
        layers and {kind, network} & menu.students and "student.embedding" not in given.keys() & menu.unused.keys()
    )


def test_a_menu_holds_only_what_there_is():
    known = set(LOSSES)
    for task, problem, _ in KINDS.values():
        assert {*task_class(task, problem).menu.losses} <= known
    assert not {"hidden"} & {*MEDIA.losses}
    others = (task_class(name).menu.losses for name in ("text-ranking", "sentence-embedding"))
    assert {*TEXTS.losses, *SPEECH.losses}.union(*others) == known


@pytest.mark.parametrize("loss", ["dist", "dkd", "bce"])
def test_losses_that_packed_targets_make_wrong_are_refused(loss):
    given = {"task": "causal-lm", "data.train": "d.txt", "teacher.model": "t", "distill.loss": loss}
    with pytest.raises(KdexportError, match=rf"distill\.loss: {loss} is not for causal-lm\. Take kl, "):
        spec.load(None, given)


def test_softened_targets_of_a_language_model_are_refused():
    given = {"task": "causal-lm", "data.train": "d.txt", "teacher.model": "t"}
    assert spec.load(None, given).distill.temperature == 1
    with pytest.raises(KdexportError, match=r"distill\.temperature: soft targets of causal-lm are those of 1"):
        spec.load(None, given | {"distill.temperature": 2})
