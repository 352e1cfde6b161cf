"""Speech recognition: transcripts and their errors, paths of characters, and logits that no batch changes."""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from tones import say, wav, write_folder
from transformers import ASTFeatureExtractor

from kdexport import spec
from kdexport.data import prepare, read_summary
from kdexport.data.sources import local_files
from kdexport.distill.losses import ctc, ctc_of_teacher
from kdexport.errors import DataError, TooLarge
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_task
from kdexport.models.speechnet import SpeechNetConfig, SpeechNetForCTC, _levelled, _noisy
from kdexport.tasks import load_task
from kdexport.tasks.inputs.audio import extractor_of, fitted
from kdexport.tasks.inputs.media import inline
from kdexport.tasks.inputs.transcripts import edits, normalised
from kdexport.tasks.metrics import log_softmax

LABELS = ["<pad>", " ", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def rows():
    return [{"audio": inline(say(text, i)), "label": text} for i, text in enumerate(["a", "ab cd", "abcd dcba aa"])]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    return SpeechNetForCTC(
        SpeechNetConfig(width=16, depth=2, kernel=5, halvings=1, num_mel_bins=20, reach=5, **names)
    ).eval()


@pytest.fixture(scope="module")
def task(network, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    extractor = ASTFeatureExtractor(**extractor_of(fitted(rows, 8_000, 20, 3.0)))
    save_task(ModelAndProcessor(network, extractor), None, LABELS, folder, task="automatic-speech-recognition",
              function="none", rows=rows)  # fmt: skip
    return load_task(folder)


def path(task, *steps):
    """Return the logits of a path: the text of each step."""
    logits = np.full((1, *task.answer_shape), -9.0, np.float32)
    for i in range(task.answer_shape[0]):
        logits[0, i, LABELS.index(steps[i]) if i < len(steps) else 0] = 0.0
    return logits


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("  One, TWO:  three! ", "one two three"),
        ("Don’t stop — 'now'", "don't stop now"),
        ("CAFÉ №5 ½", "café no5 1 2"),
        ("", ""),
    ],
)
def test_transcripts_have_one_form(given, found):
    assert normalised(given) == found


def test_errors_are_counted_as_jiwer_does():
    draw = np.random.default_rng(0)
    for _ in range(200):
        truth, heard = (list(draw.choice(list("abcd"), draw.integers(low, 12))) for low in (1, 0))
        theirs = jiwer.process_words(" ".join(truth), " ".join(heard))
        assert edits(truth, heard) == (theirs.substitutions, theirs.deletions, theirs.insertions)


def test_a_path_is_read_without_repetitions_and_blanks(task):
    blank = LABELS[0]
    logits = path(task, "a", "a", blank, "a", "b", " ", " ", blank, "c", "c")
    (answer,) = task.decode(logits)
    assert answer.text == "aab c" == task.texts(logits)[0]
    step = 0.04
    times = [(word.word, round(word.start / step), round(word.end / step)) for word in answer.words]
    assert times == [("aab", 0, 5), ("c", 8, 10)]
    assert 0.99 < answer.score <= 1.0
    assert task.decode(path(task))[0].to_dict(True) == {"text": "", "score": pytest.approx(1, abs=1e-3), "words": []}


def test_a_closed_vocabulary_writes_its_words_alone(task):
    closed = type(task)(replace(task.config, words=["ab", "cd"]))
    logits = path(task, "a", "d", " ", "c", "<pad>", "d") + path(task, "a", "b") / 4
    assert task.texts(logits) == ["ad cd"]
    assert closed.texts(logits) == [closed.decode(logits)[0].text] == ["ab cd"]
    assert closed.texts(path(task)) == [""]
    assert closed.decode(logits)[0].score < task.decode(logits)[0].score
    heard = closed.target_of("ad b")[None]
    assert closed.texts(heard) == ["ad b"], "a transcript keeps the words that it has"


def test_a_closed_vocabulary_is_of_the_train_transcripts(tmp_path, capsys):
    def words_of(how, **splits):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for seed, (split, texts) in enumerate(splits.items()):
            write_folder(folder / split, texts, seed=10 * seed)
        out = folder / "out"
        out.mkdir()
        prepare(spec.Data(train=str(folder), words=str(how)), "automatic-speech-recognition", 0, out)
        return read_summary(out).words

    texts = {"train": ["ab cd", "a cd", "ba"], "validation": ["ab"], "test": ["dc ab"]}
    assert words_of("open", **texts) == []
    assert words_of("closed", **texts) == ["a", "ab", "ba", "cd"]
    assert "words of test beyond data.words can't be recognised: dc" in capsys.readouterr().err
    with pytest.raises(DataError, match="is longer than 64 characters"):
        words_of("closed", **(texts | {"train": ["ab" * 40 + " cd"]}))
    listed = tmp_path / "words.txt"
    listed.write_text("ab\nCD, dc!\n")
    assert words_of(listed, **texts) == ["ab", "cd", "dc"]
    assert "words of train beyond data.words can't be recognised: a, ba" in capsys.readouterr().err
    for content, problem in (("abe", "'abe' has 'e', which no transcript of train has"), ("!", "holds no words")):
        listed.write_text(content)
        with pytest.raises(DataError, match=problem):
            words_of(listed, **texts)


def test_lists_of_speech_are_files_of_the_data(tmp_path):
    (tmp_path / "train.csv").write_text("audio,text\na.wav,ab\n")
    for key in ("words", "sentences"):
        mend = "Take open, closed, or a file of words" if key == "words" else "Check the path"
        with pytest.raises(DataError, match=rf"none\.txt does not exist\. {mend}"):
            local_files(spec.Data(train=str(tmp_path / "train.csv"), **{key: str(tmp_path / "none.txt")}))


def test_an_altered_closed_vocabulary_is_refused(task):
    closed = type(task)(replace(task.config, words=["xyz"]))
    with pytest.raises(DataError, match="the word 'xyz' has 'x', which the model does not write"):
        closed.texts(path(task, "a"))


def test_a_soft_word_after_a_loud_one_is_heard():
    """Two words of the same bands, the second 15 dB softer, and frames of padding."""
    word = torch.linspace(-1, 0, 20)[None, :, None].expand(1, 20, 10)
    soft = 15 / 10 * np.log(10) / 9.2  # of the 40 dB that are heard
    bands = torch.cat([word, torch.full((1, 20, 60), -2.0), word - soft, torch.zeros(1, 20, 5)], dim=2)
    there = (bands.abs().amax(dim=1, keepdim=True) > 0).float()
    levelled, whole = (_levelled(bands, there, 1.0, reach) for reach in (25, 0))
    assert torch.allclose(levelled[:, :, :10], levelled[:, :, 70:80], atol=1e-6)
    assert (whole[:, -1, :10] - whole[:, -1, 70:80]).numpy() == pytest.approx(2 * soft, abs=1e-5)
    assert levelled.abs().max() <= 1
    assert (levelled[:, :, 80:] == 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_of_training_leaves_padding_alone_and_follows_the_seed(seed):
    bands = torch.zeros(4, 20, 60)
    bands[:, :, :50] = torch.randn(4, 20, 50)
    there = (bands.abs().amax(dim=1, keepdim=True) > 0).float()
    torch.manual_seed(seed)
    changed = _noisy(bands, there, 0.13)
    torch.manual_seed(seed)
    assert torch.equal(_noisy(bands, there, 0.13), changed)
    assert changed.isfinite().all()
    assert (changed[:, :, 50:] == 0).all()
    assert not torch.allclose(changed[:, :, :50], bands[:, :, :50], atol=0.1)


def test_the_word_error_rate_is_that_of_all_words_together(task):
    logits = np.concatenate([path(task, "a", " ", "b"), path(task, "d")])
    rows = [{"label": "a b c"}, {"label": "D!"}]
    assert task.stats(logits, rows).tolist() == [[0, 1, 0, 3], [0, 0, 0, 1]]
    assert task.value(task.stats(logits, rows).sum(axis=0)) == 0.25
    assert task.correct(logits, rows).tolist() == [False, True]
    assert task.further(logits, rows) == pytest.approx(
        {"substitutions": 0, "deletions": 0.25, "insertions": 0, "character error rate": 2 / 6}
    )


def test_logits_do_not_depend_on_the_batch(task, network, rows):
    together, alone = (logits_of(network, task, rows, batch_size=size) for size in (3, 1))
    assert np.abs(together - alone).max() < 1e-5
    assert together.shape == (3, *task.answer_shape)


def test_lengths_are_known_from_headers(task, rows):
    encoded = task.tokenize(rows)
    assert task.sizes(encoded) == [len(one["input_values"]) for one in encoded] == task.sizes(list(encoded))


def test_a_recording_at_another_rate_has_as_many_frames(task):
    slow, quick = (task.encode([{"audio": say("ab cd", 0, rate)}])["input_values"] for rate in (8_000, 48_000))
    assert abs(slow.shape[1] - quick.shape[1]) <= 1
    assert task.encode([{"audio": wav(np.zeros(1))}])["input_values"].shape[1] == 1


def test_a_recording_longer_than_the_model_reads_is_refused_not_cut(task):
    with pytest.raises(TooLarge, match=r"it lasts 60.0 s; the model reads \d+\.\d. Cut it"):
        task.row(wav(np.zeros(480_000)))


def test_ctc_is_the_sum_over_paths(task):
    """Against all paths of two steps, by hand: P("a") = aa + a_ + _a."""
    logits = torch.randn(1, 2, 3)
    p = logits.softmax(-1)[0].numpy()
    by_hand = -np.log(p[0, 1] * p[1, 1] + p[0, 1] * p[1, 0] + p[0, 0] * p[1, 1])
    assert ctc(logits, torch.tensor([[1, -1]])).item() == pytest.approx(by_hand, rel=1e-5)


def test_rows_without_a_transcript_teach_nothing_and_weigh(task):
    logits = torch.randn(2, 5, len(LABELS))
    labels = torch.from_numpy(task.label_array([{"label": "ab"}, {"label": None}]))
    assert labels.tolist() == [[2, 3], [-100, -100]]
    assert ctc(logits, labels).item() == pytest.approx(ctc(logits[:1], labels[:1]).item() / 2)
    assert ctc(logits, labels[1:].repeat(2, 1)).item() == 0


def test_a_teacher_teaches_its_text_whatever_its_steps(task):
    student = torch.randn(2, 6, len(LABELS))
    teacher = torch.from_numpy(np.concatenate([path(task, "a", "a", "<pad>", "b"), path(task)]))
    wanted = ctc(student, torch.tensor([[2, 3], [-1, -1]]))
    assert ctc_of_teacher(student, teacher, None, 1.0).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_row_keeps_its_probability_behind_its_end(task, network):
    logits = logits_of(network, task, [{"audio": say("a")}])[0]
    assert np.allclose(np.exp(log_softmax(logits))[-1], [1, *[0] * (len(LABELS) - 1)], atol=1e-9)
