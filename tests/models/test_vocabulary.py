"""A vocabulary trimmed to a corpus: the same tokens for every text of it, and the same logits."""

import copy
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from near import apart
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    DebertaV2TokenizerFast,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
    XLMRobertaTokenizerFast,
)

from kdexport.data import demo
from kdexport.errors import ModelError
from kdexport.models import vocabulary
from kdexport.models.saving import save_tokenizer
from kdexport.models.vocabulary import trim_vocabulary

STRANGE = ["naïve café, 北京 😀 €5", "[MASK] <mask> [unused3] <unk>", "ΣΊΣΥΦΟΣ ǅ ﬁ", "", " \n\t ", "x" * 300]
WORDS = ["Shares", "in", "the", "airline", "rose", "3.5%", "after", "forecasts;", "president's", "1999", "Café"]

KINDS = {  # kind of tokenizer → families that are trimmed with it
    "wordpiece": ["bert", "distilbert", "electra", "albert"],
    "bpe": ["roberta", "mpnet"],
    "bpe-neox": ["modernbert"],
    "unigram": ["xlm-roberta", "camembert"],
    "unigram-deberta": ["deberta-v2"],
}
FAMILIES = [(kind, family) for kind, families in KINDS.items() for family in families]


@pytest.fixture(scope="module")
def sentences(articles) -> list[str]:
    return [part for row in articles for part in row["text"].split(". ")]


@pytest.fixture(scope="module")
def tokenizer_of(sentences):
    """A tokenizer of each kind, its pieces learnt from the articles: a fresh copy at every call."""

    @cache
    def make(kind: str) -> PreTrainedTokenizerFast:
        kinds = {"wordpiece": wordpiece, "bpe": bpe, "bpe-neox": bpe_neox, "unigram": unigram}
        return kinds[kind](sentences) if kind in kinds else unigram_deberta(sentences)

    return lambda kind: copy.deepcopy(make(kind))


def wordpiece(texts) -> PreTrainedTokenizerFast:
    special = ["[PAD]", *(f"[unused{i}]" for i in range(9)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=3000, special_tokens=special))
    vocab = backend.get_vocab()  # [unused0] and so on are ordinary pieces, as in BERT's own vocabulary
    plain = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    plain.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return BertTokenizerFast(tokenizer_object=plain)


def bpe(texts) -> PreTrainedTokenizerFast:
    backend = byte_level(texts, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return RobertaTokenizerFast(tokenizer_object=backend)


def bpe_neox(texts) -> PreTrainedTokenizerFast:
    """As ModernBERT's: what is special comes after the vocabulary, beside runs of blanks and unused tokens."""
    backend = byte_level(texts, [])
    backend.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *(f"[unused{i}]" for i in range(9))])
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_level(texts, special) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return backend


def unigram(texts) -> PreTrainedTokenizerFast:
    backend = sentencepiece(texts, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<unk>")
    ids = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", ids)
    return XLMRobertaTokenizerFast(tokenizer_object=backend)


def unigram_deberta(texts) -> PreTrainedTokenizerFast:
    """As DeBERTa-v2's: [MASK] is no piece of the model but comes after them."""
    backend = sentencepiece(texts, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[UNK]")
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    return DebertaV2TokenizerFast(tokenizer_object=backend)


def sentencepiece(texts, special, unknown) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=2000, special_tokens=special, unk_token=unknown)
    backend.train_from_iterator(texts[:2000], trainer)
    return backend


def model_for(family: str, tokenizer, auto=AutoModelForSequenceClassification):
    """A small random model of a family; its table has a few rows more than the tokenizer has tokens."""
    names = ("pad", "cls", "sep", "bos", "eos")
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        embedding_size=32 if family == "deberta-v2" else 16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=90,
        initializer_range=0.5,
        **{f"{name}_token_id": i for name in names if (i := getattr(tokenizer, f"{name}_token_id")) is not None},
    )
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def any_model(tokenizer):
    return model_for("bert", tokenizer)


def ids_of(tokenizer, texts) -> list[list[int]]:
    return [encoding.ids for encoding in Tokenizer.from_str(tokenizer.to_str()).encode_batch(texts)]


@torch.no_grad()
def logits_of(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length=80, return_tensors="pt")
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# --- tokens


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_of_the_corpus_keeps_its_tokens(kind, tokenizer_of, sentences, tmp_path):
    tokenizer, corpus = tokenizer_of(kind), [*sentences[:150], *STRANGE]
    before, size = ids_of(tokenizer.backend_tokenizer, corpus), len(tokenizer)
    kept = trim_vocabulary(tokenizer, any_model(tokenizer), corpus)
    assert kept.dtype == np.int64
    assert (np.diff(kept) > 0).all()
    assert len(tokenizer) == len(kept) < 0.8 * size
    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for trimmed in (
        tokenizer.backend_tokenizer,
        again.backend_tokenizer,
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    ):
        assert [kept[ids].tolist() for ids in ids_of(trimmed, corpus)] == before
    assert again(corpus[0], corpus[1])["input_ids"] == tokenizer(corpus[0], corpus[1])["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(corpus=st.lists(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=8).map(" ".join), max_size=5))
def test_any_corpus_keeps_its_tokens(kind, tokenizer_of, corpus):
    tokenizer = tokenizer_of(kind)
    before = ids_of(tokenizer.backend_tokenizer, corpus)
    kept = trim_vocabulary(tokenizer, any_model(tokenizer), corpus)
    assert [kept[ids].tolist() for ids in ids_of(tokenizer.backend_tokenizer, corpus)] == before


@pytest.mark.parametrize("kind", KINDS)
def test_another_word_of_known_characters_is_not_unknown(kind, tokenizer_of, sentences):
    whole, tokenizer = tokenizer_of(kind), tokenizer_of(kind)
    kept = trim_vocabulary(tokenizer, any_model(tokenizer), ["word"])  # a corpus of a single word
    assert len(kept) < 700
    assert tokenizer.tokenize("word") == whole.tokenize("word")
    for text in sentences[:50]:
        assert (tokenizer.unk_token in tokenizer.tokenize(text)) == (whole.unk_token in whole.tokenize(text)), text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stay_and_unused_ones_go(kind, tokenizer_of):
    whole, tokenizer = tokenizer_of(kind), tokenizer_of(kind)
    kept = trim_vocabulary(tokenizer, any_model(tokenizer), ["the", "word"])
    assert tokenizer.special_tokens_map == whole.special_tokens_map
    assert kept[tokenizer.all_special_ids].tolist() == whole.all_special_ids
    assert not [token for token in tokenizer.get_vocab() if "unused" in token]
    assert set(tokenizer.added_tokens_encoder) == {t for t in whole.added_tokens_encoder if "unused" not in t}
    pair = kept[tokenizer("word", "the")["input_ids"]].tolist()
    assert pair == whole("word", "the")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_single_characters_stay_at_every_place_in_a_word(kind, tokenizer_of):
    whole, tokenizer = tokenizer_of(kind), tokenizer_of(kind)
    trim_vocabulary(tokenizer, any_model(tokenizer), ["word"])
    characters = {t for t in whole.get_vocab() if len(t.removeprefix("##").removeprefix("▁")) == 1}
    assert len(characters) > 60
    assert characters <= set(tokenizer.get_vocab())


def test_an_unused_token_that_somebody_uses_stays(tokenizer_of):
    tokenizer = tokenizer_of("wordpiece")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[unused2]"]})
    between = ("[unused4]", tokenizer.convert_tokens_to_ids("[unused4]"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", "$A [unused4] $B", [between])
    trim_vocabulary(tokenizer, any_model(tokenizer), ["the"])
    assert tokenizer.tokenize("[unused2] the") == ["[unused2]", "the"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("the", "the")["input_ids"]) == ["the", "[unused4]", "the"]
    assert "[unused3]" not in tokenizer.get_vocab()


def test_sentencepieces_own_file_is_not_saved_beside(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("unigram")
    (tmp_path / "old.model").write_bytes(b"250,002 pieces")
    tokenizer.vocab_file = str(tmp_path / "old.model")
    trim_vocabulary(tokenizer, any_model(tokenizer), ["word"])
    assert not tokenizer.can_save_slow_tokenizer  # where `sentencepiece` is installed, it would be copied
    tokenizer.save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.model"))


def test_no_text_is_cut_and_the_tokenizers_own_limits_stay(tokenizer_of, sentences):
    tokenizer = tokenizer_of("wordpiece")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, length=6)
    words = sentences[0].split()
    kept = trim_vocabulary(tokenizer, any_model(tokenizer), [sentences[0]])
    assert len(tokenizer.backend_tokenizer.encode(sentences[0]).ids) == 6
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    whole = tokenizer_of("wordpiece")
    assert kept[tokenizer(" ".join(words))["input_ids"]].tolist() == whole(" ".join(words))["input_ids"]


def test_a_word_that_was_unknown_stays_so():
    """`xab` is unknown as nothing fits after `xa`; were `xa` taken out, `x ##ab` would fit."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "x", "y", "xa", "##ab", "##cd"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    trim_vocabulary(tokenizer, any_model(tokenizer), ["XAB yab"])
    assert tokenizer.tokenize("xab yab") == ["[UNK]", "y", "##ab"]
    assert "##cd" not in tokenizer.get_vocab()


def test_what_an_unknown_character_costs_stays():
    """It costs 10 more than the worst piece, `zzz` here; were that taken out, `ž` would be unknown and `kl` a piece."""
    scores = {"aaa": -9, "<pad>": 0, "<unk>": 0, "▁": -1, "žk": -12, "l": -12, "kl": -1, "k": -2, "zz": -13, "zzz": -30}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    kept = trim_vocabulary(tokenizer, any_model(tokenizer), ["žkl kl"])
    assert tokenizer.tokenize("žkl kl ž") == ["▁", "žk", "l", "▁", "kl", "▁", "ž"]
    assert tokenizer("ž")["input_ids"][-1] == tokenizer.unk_token_id == 1  # it was third, behind a piece that went
    assert 8 not in kept


def test_merges_on_the_way_to_a_token_stay(tokenizer_of, sentences):
    whole, tokenizer = tokenizer_of("bpe"), tokenizer_of("bpe")
    long = max((t for t in whole.get_vocab() if t.isascii() and t.isalpha()), key=len)
    trim_vocabulary(tokenizer, any_model(tokenizer), [long])
    assert tokenizer.tokenize(long) == whole.tokenize(long)
    assert len(tokenizer) > 256 + 5 + len(long) / 2


# --- models


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
def test_logits_stay_the_same(kind, family, tokenizer_of, sentences, tmp_path):
    whole, tokenizer, corpus = tokenizer_of(kind), tokenizer_of(kind), [*sentences[:30], *STRANGE]
    model = model_for(family, whole)
    expected = logits_of(model, whole, corpus)
    assert expected.std(dim=0).min() > 0.01  # the texts do matter
    kept = trim_vocabulary(tokenizer, model, corpus)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for trimmed in (model, again):
        table = trimmed.get_input_embeddings()
        assert trimmed.config.vocab_size == table.num_embeddings == len(table.weight) == len(kept) == len(tokenizer)
        assert trimmed.config.pad_token_id == table.padding_idx == tokenizer.pad_token_id
        assert apart(logits_of(trimmed, tokenizer, corpus), expected) < 1e-4
    for name in ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            assert getattr(model.config, name) == getattr(tokenizer, name)


def test_real_weights_keep_their_logits(sentences, tmp_path):
    whole, tokenizer = (AutoTokenizer.from_pretrained(demo.teacher()) for _ in range(2))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(demo.teacher(), num_hidden_layers=2)
    expected = logits_of(model, whole, sentences[:20])
    kept = trim_vocabulary(tokenizer, model, sentences[:20])
    assert len(kept) < 4000
    assert apart(logits_of(model, tokenizer, sentences[:20]), expected) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_over_the_vocabulary_follows(tied, tokenizer_of, sentences):
    whole, tokenizer = tokenizer_of("wordpiece"), tokenizer_of("wordpiece")
    model = model_for("bert", whole, AutoModelForMaskedLM)
    if not tied:
        model.config.tie_word_embeddings = False
        model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(model.get_input_embeddings().weight))
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    expected = logits_of(model, whole, sentences[:5])
    kept = trim_vocabulary(tokenizer, model, sentences[:5])
    assert apart(logits_of(model, tokenizer, sentences[:5]), expected[..., torch.from_numpy(kept)]) < 1e-4
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_positions_that_are_counted_from_the_padding_stay(sentences):
    """Where another tokenizer has pieces before its padding, they stay too: RoBERTa's positions start behind it."""
    backend = byte_level(sentences, ["<s>", "one more", "</s>", "two more", "<unk>", "<pad>"])
    plain = Tokenizer(models.BPE(backend.get_vocab(), [], unk_token="<unk>"))
    plain.pre_tokenizer = backend.pre_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>")
    model = model_for("roberta", tokenizer)
    expected = logits_of(model, tokenizer, ["one", "three"])
    trim_vocabulary(tokenizer, model, ["one", "three"])
    assert tokenizer.pad_token_id == model.config.pad_token_id == 5
    assert apart(logits_of(model, tokenizer, ["one", "three"]), expected) < 1e-4


# --- what can't be


def test_what_can_not_be_trimmed_is_left_as_it_was(tokenizer_of):
    tokenizer = tokenizer_of("wordpiece")
    model, before = any_model(tokenizer), tokenizer.backend_tokenizer.to_str()
    vocab = {token: i for i, token in enumerate(["a", "##b", "ab", "##c", "##bc"])}
    merges = [("a", "##b"), ("##b", "##c")]  # in BPE such a prefix is rare, and skeletoken takes it for none
    backend = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="##"))
    prefixed = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ModelError, match=r"can't be trimmed: .* Keep it whole"):
        trim_vocabulary(prefixed, any_model(tokenizer), ["ab"])
    model.resize_token_embeddings(100)
    with pytest.raises(ModelError, match=r"the tokenizer has ids up to 2,999, the model's table 100 rows"):
        trim_vocabulary(tokenizer, model, ["word"])
    assert tokenizer.backend_tokenizer.to_str() == before
    assert model.get_input_embeddings().num_embeddings == 100


def test_a_corpus_is_read_in_batches(tokenizer_of, monkeypatch):
    class Text(str):
        __slots__ = ("__weakref__",)

    alive, most = weakref.WeakSet(), []

    class Corpus:
        def __iter__(self):
            for i in range(100):
                alive.add(text := Text(f"word {i}"))
                most.append(len(alive))
                yield text

    monkeypatch.setattr(vocabulary, "_BATCH", 10)
    tokenizer = tokenizer_of(next(iter(KINDS)))
    trim_vocabulary(tokenizer, any_model(tokenizer), Corpus())
    assert len(most) % 100 == 0
    assert 10 <= max(most) <= 40
