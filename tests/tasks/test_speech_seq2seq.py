"""Texts that are written token by token: where they end, and what they are judged by."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tones import wav

from kdexport.errors import TooLarge
from kdexport.tasks.config import AudioConfig, DecoderConfig, TaskConfig
from kdexport.tasks.packed import BEST, LOG_P
from kdexport.tasks.speech_seq2seq import SpeechSeq2Seq

WORDS = ["one", "two", "three", "four", "<end>", "<start>", "<silence>", "<times>"]
END, START, SILENCE, TIMES = 4, 5, 6, 7


def made(most=40, kept=1, **decoder) -> SpeechSeq2Seq:
    tokenizer = Tokenizer(models.WordLevel(dict(zip(WORDS, range(8), strict=True)), unk_token="one"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[END:])
    how = AudioConfig(rate=16_000, length=200, mels=80, filters="slaney")
    return SpeechSeq2Seq(
        TaskConfig(
            task="automatic-speech-recognition", labels=[], inputs=["input_features"], audio=how, max_length=most,
            kept=kept, end_id=END, decoder=DecoderConfig(start=[START, TIMES], silence=SILENCE, most=most, **decoder),
        ),
        tokenizer,
    )  # fmt: skip


def reading(texts, silent=0.0, sure=9.0):
    """Return a decoder that has these texts in mind; the cache is the number of tokens written."""

    def read(ids, cache):
        before = cache or 0
        logits = np.zeros((len(texts), ids.shape[1], 8), np.float32)
        logits[:, 0, SILENCE] += silent if cache is None else 0.0
        for row, text in zip(logits, texts, strict=True):
            row[-1, text[before] if before < len(text) else END] += sure
        return logits, before + 1

    return read


def test_each_text_of_a_batch_ends_at_its_own_end():
    task = made()
    packed = task.write(reading([[0, 1], [2], []]), 3)
    assert packed.shape == (3, 40, 3)
    assert task.raw(packed) == ["one two", "three", ""]
    alone = task.write(reading([[2]]), 1)
    np.testing.assert_array_equal(packed[1], alone[0])
    assert np.all(packed[1, 2:, LOG_P] == 0)


def test_a_text_is_no_longer_than_the_model_writes():
    packed = made(most=3).write(reading([[0, 1, 2, 3, 0]]), 1)
    assert made(most=3).ids_of(packed[0]) == [0, 1, 2]


@pytest.mark.parametrize("period", [[0], [0, 1], [0, 1, 2, 3, 3, 2, 1, 0]])
def test_a_loop_ends_where_it_begins(period):
    task = made()
    found = task.ids_of(task.write(reading([[3, 3, 2, *period * 40]]), 1)[0])
    assert len(found) <= 3 + 2 * len(period)
    assert found[:3] == [3, 3, 2]
    whole = task.ids_of(task.write(reading([[3, 3, 2, *period * 40]]), 1, loops=True)[0])
    assert len(whole) == 40  # what a transcript is judged by shows the loop
    twice = [*period, *period]
    assert task.ids_of(task.write(reading([twice]), 1)[0]) == twice


def test_marks_and_forbidden_tokens_are_never_written():
    task = made(never=[0], never_first=[1])
    assert task.ids_of(task.write(reading([[0, TIMES, 1]], sure=3.0), 1)[0])[2:] == [1]
    assert {0, TIMES} & {*task.ids_of(task.write(reading([[0, TIMES, 0]]), 1)[0])} == set()
    assert task.ids_of(task.write(reading([[1, 2]]), 1)[0])[0] != 1


@pytest.mark.parametrize(("silent", "sure", "text"), [(9.0, 0.2, ""), (9.0, 9.0, "one two"), (0.0, 0.2, "one two")])
def test_nothing_is_written_where_silence_is_probable_and_the_text_is_not(silent, sure, text):
    task = made()
    assert task.raw(task.write(reading([[0, 1]], silent, sure), 1)) == [text]


def test_the_most_probable_tokens_come_with_the_written_one_first():
    task = made(kept=3)
    line = task.write(reading([[2]]), 1)[0, 0]
    assert line[BEST] == 2
    assert line[LOG_P] == line[BEST + 1] < 0
    assert len({*line[1::2].tolist()}) == 3


def test_models_differ_by_the_tokens_up_to_the_first_that_is_another():
    task = made()
    one, near = (task.write(reading([[0, 1, 2]], sure=sure), 1) for sure in (6.0, 6.01))
    other = task.write(reading([[0, 3, 3, 3]], sure=6.0), 1)
    assert 0 < task.difference(one, near) < 1e-3
    assert task.difference(one, other) == 0  # as probable, so it is a tie; what follows is another text
    assert task.difference(one, task.write(reading([[3, 1, 2]], sure=3.0), 1)) > 0.1


def test_a_batch_for_training_has_what_the_decoder_reads_and_where_it_predicts():
    task = made()
    encoded = [
        {"heard": np.zeros((3, 2), np.float16)} | task.tokens(row) for row in ({"tokens": [0, 1]}, {"label": "two"})
    ]
    batch = task.collate(encoded)
    assert batch["decoder_input_ids"].tolist() == [[START, TIMES, 0, 1], [START, TIMES, 1, END]]
    assert batch["places"].tolist() == [[1, 2, 3], [1, 2, -1]]
    assert task.tokens({"tokens": [], "label": "two"})["tokens"].tolist() == [END]  # the teacher heard nothing
    assert task.tokens({"label": None}) == {}
    assert task.label_array([{"tokens": [0, 1]}, {"label": "two"}])[:, :4].tolist() == [
        [0, 1, END, -100],
        [1, END, -100, -100],
    ]


def test_answers_have_the_text_as_written_and_metrics_its_normal_form():
    task = made()
    logits = task.write(reading([[0, 1], []]), 2)
    answers = task.decode(logits)
    assert [answer.text for answer in answers] == ["one two", ""]
    assert 0.9 < answers[0].score <= 1
    assert task.value(task.stats(logits, [{"label": "one three"}, {"label": ""}]).sum(axis=0)) == 0.5


def sounding(seconds: float) -> bytes:
    return wav((0.1 * np.sin(np.arange(int(16_000 * seconds)) / 20)).tolist(), 16_000)


@pytest.mark.parametrize(("seconds", "windows"), [(0.5, 1), (2.0, 1), (2.1, 2), (3.3, 2), (3.4, 3), (6.0, 4)])
def test_longer_recordings_are_read_in_overlapping_windows(seconds, windows):
    task = made(seconds=6.0)
    arrays = task.encode([{"audio": sounding(seconds)}, {"audio": sounding(1.0)}])
    assert arrays["input_features"].shape == (windows + 1, 80, 200)
    assert arrays["windows"].tolist() == [windows, 1]
    assert task.windows({"audio": sounding(seconds)}) == windows
    with pytest.raises(TooLarge, match=r"it lasts 6\.5 s; the model reads 6\.0"):
        task.row(sounding(6.5))


def test_texts_of_windows_are_joined_where_they_overlap():
    task = made(seconds=6.0)
    texts = [[0, 1, 2, 3, 1], [3, 2, 3, 0, 0, 2], [0, 2, 1]]  # each window's edge is misheard
    parts = task.write(reading([*texts, [3]]), 4)
    joined = task.gather(parts, {"windows": np.array([3, 1])})
    assert task.ids_of(joined[0]) == [0, 1, 2, 3, 0, 0, 2, 1]
    assert task.ids_of(joined[1]) == [3]
    apart = task.gather(task.write(reading([[0, 1], [2, 3]]), 2), {"windows": np.array([2])})
    assert task.raw(apart) == ["one two three four"]
