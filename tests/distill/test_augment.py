"""Changed copies of texts, and the rows that the teacher alone labels."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdexport import spec
from kdexport.data import demo
from kdexport.distill.augment import Nearest, changer, mask_token, transfer_rows, views
from kdexport.tasks.text_classification import TextClassification

NEWS = (
    "Shares in the airline rose after it beat profit forecasts. Analysts had expected a loss! "
    "What will the board do next? Nobody knows, and the CEO isn't sure."
)
SHORT = "play something quiet in the kitchen"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(demo.teacher() / "tokenizer.json"))


@pytest.fixture(scope="module")
def embeddings(base_model):
    from transformers import AutoModel

    return AutoModel.from_pretrained(base_model).get_input_embeddings().weight.detach().numpy()


@pytest.fixture(scope="module")
def nearest(tokenizer, embeddings):
    return Nearest(tokenizer, embeddings)


def how(*kinds, views=20, share=0.2):
    return spec.Augment(kinds=kinds, views=views, share=share)


def words(text):
    return re.findall(r"\w+(?:'\w+)?", text)


def test_copies_are_of_text_and_seed_alone_whatever_else_is_asked(nearest):
    few, many = how("mask", "neighbours", "ngram", views=3), how("mask", "neighbours", "ngram", views=8)

    def copies(texts, settings=many, seed=0):
        return views(texts, settings, seed, mask="[MASK]", nearest=nearest)

    alone, [other, again] = copies([NEWS]), copies([SHORT, NEWS])
    assert alone == [again]
    assert other != again
    assert copies([NEWS], few)[0] == again[:3]
    assert copies([NEWS], seed=1)[0] != again
    assert len(set(again)) == len(again) == 8
    assert NEWS not in again


def test_masks_take_about_their_share_of_the_words_and_at_least_one():
    [copies] = views([NEWS], how("mask", views=400, share=0.3), 0, mask="[MASK]")
    assert all(copy.count("[MASK]") >= 1 for copy in copies)
    assert 0.27 < np.mean([copy.count("[MASK]") for copy in copies]) / len(words(NEWS)) < 0.33
    assert all(len(words(copy)) == len(words(NEWS)) for copy in copies)
    [one] = views([SHORT], how("mask", share=0.0), 0, mask="[MASK]")
    assert {copy.count("[MASK]") for copy in one} == {1}


def test_without_a_mask_token_words_are_left_out():
    [copies] = views([SHORT], how("mask"), 0)
    assert all(0 < len(words(copy)) < len(words(SHORT)) and "  " not in copy for copy in copies)
    assert all(set(words(copy)) < set(words(SHORT)) for copy in copies)


def test_a_text_of_one_word_has_no_copy_that_says_nothing():
    assert views(["kitchen", "?!", ""], how("mask"), 0, mask="[MASK]") == [[], [], []]
    assert views(["kitchen", "?!", ""], how("mask"), 0) == [[], [], []]
    assert views(["kitchen"], how("ngram", "shuffle"), 0) == [[]]


def test_neighbours_are_the_nearest_whole_words_by_cosine(tokenizer, embeddings, nearest):
    found = nearest.of({"money", "Money", "airline", "tokenisation", "2004"})
    assert set(found) == {"money", "Money", "airline"}  # no piece of a word, no number
    assert found["money"] == found["Money"]
    assert {"cash", "fund", "funds"} <= set(found["money"])
    vocabulary = tokenizer.get_vocab()
    table = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = table @ table[vocabulary["airline"]]
    whole = [i for word, i in vocabulary.items() if word.isalpha() and word != "airline"]
    nearest = sorted(whole, key=lambda i: -cosines[i])[:10]
    assert {vocabulary[word] for word in found["airline"]} == set(nearest)


def test_a_piece_of_a_word_is_no_neighbour_where_words_are_marked_by_their_blank():
    """Byte-level BPE writes a word in a text as Ġword, and a piece of one like a word that begins it."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["the walking and talking of walkers and talkers", "walk talk and the walks"] * 20
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    pieces = [token for token in vocabulary if token.isalpha() and token.isascii() and len(token) > 1]
    assert "Ġwalk" in vocabulary
    assert pieces
    table = np.random.default_rng(0).normal(size=(len(vocabulary), 8)).astype(np.float32)
    for piece in pieces:  # the nearest of all, were they words
        table[vocabulary[piece]] = table[vocabulary["Ġwalk"]]
    found = Nearest(tokenizer, table).of({"walk", "the"})
    assert set(found) == {"walk", "the"}
    assert all(f"Ġ{word}" in vocabulary for near in found.values() for word in near)


def test_two_texts_are_changed_in_other_places():
    first, second = views(["a b c d e f g h", "i j k l m n o p"], how("mask"), 0, mask="*")
    assert [copy.split().index("*") for copy in first] != [copy.split().index("*") for copy in second]


def test_only_words_of_one_token_are_replaced_and_by_their_neighbours(nearest):
    text = "the airline lost tokenisation money"
    near = nearest.of(set(words(text)))
    [copies] = views([text], how("neighbours", share=0.5), 0, mask="[MASK]", nearest=nearest)
    for copy in copies:
        for before, after in zip(words(text), words(copy), strict=True):
            assert after == before or after in near[before]
        assert "tokenisation" in copy
        assert "[MASK]" not in copy


def test_a_part_is_contiguous_and_of_half_the_words_at_least():
    [copies] = views([NEWS], how("ngram", views=200), 0)
    lengths = {len(words(copy)) for copy in copies}
    assert all(copy in NEWS for copy in copies)
    assert min(lengths) >= len(words(NEWS)) // 2
    assert max(lengths) < len(words(NEWS))
    assert len(lengths) > 8


def test_shuffled_sentences_are_the_same_ones_in_another_order():
    sentences = ["Analysts had expected a loss!", "What will the board do next?"]
    [copies] = views([NEWS], how("shuffle"), 0)
    assert len(copies) > 5
    assert all(sorted(words(copy)) == sorted(words(NEWS)) for copy in copies)
    assert all(sentence in copy for sentence in sentences for copy in copies)
    assert views(["One sentence alone."], how("shuffle"), 0) == [[]]


def test_a_part_is_taken_of_a_quarter_of_the_copies_beside_changed_words():
    [copies] = views([NEWS], how("mask", "ngram", views=400), 0, mask="MASK")
    assert 0.18 < np.mean([len(words(copy)) < len(words(NEWS)) for copy in copies]) < 0.32


def test_words_of_scripts_without_blanks_are_characters():
    [copies] = views(["今天天气很好"], how("mask"), 0, mask="*")
    assert all(len(copy) == 6 and copy.replace("*", "") for copy in copies)


def test_a_folder_says_its_mask_token_and_brings_its_embeddings(base_model, tmp_path, nearest):
    assert mask_token(base_model) == "[MASK]"
    assert mask_token(tmp_path) is None
    settings = how("mask", "neighbours", views=4)
    expected = views([NEWS], settings, 3, mask="[MASK]", nearest=nearest)
    assert changer(base_model, settings, 3)([NEWS]) == expected


# --- rows


def change(texts):
    return [[f"{text} one", f"{text} two", "same for all"] for text in texts]


def test_transfer_rows_are_unlabelled_texts_and_copies_each_once_without_label():
    train = [{"id": "t:1", "text": "a", "label": "x"}, {"id": "t:2", "text": "b", "text_pair": "p", "label": "y"}]
    more = [
        {"id": "u:1", "text": "c"},
        {"id": "u:2", "text": "a"},
        {"id": "u:3", "text": "c"},
        {"id": "u:4", "text": "z"},
    ]
    seen = [[{"text": "z"}], [{"text": "c two"}]]
    found = list(transfer_rows(train, more, change, TextClassification, seen))
    assert [(row["id"], row["text"]) for row in found] == [
        ("u:1", "c"),
        ("t:1~1", "a one"),
        ("t:1~2", "a two"),
        ("t:1~3", "same for all"),
        ("t:2~1", "b one"),
        ("t:2~2", "b two"),
        ("t:2~3", "same for all"),  # beside its second text it is another content
        ("u:1~1", "c one"),
    ]
    assert all(row["label"] is None for row in found)
    assert [row.get("text_pair") for row in found] == [None] * 4 + ["p"] * 3 + [None]
    assert [row["id"] for row in transfer_rows(train, more, None, TextClassification)] == ["u:1", "u:4"]
