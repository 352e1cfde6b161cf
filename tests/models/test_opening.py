"""Opening somebody's model: its tokenizer is that of its file, and what can't be opened is named in one line."""

import json
import shutil

import families
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer

from kdexport.data import demo
from kdexport.errors import ModelError
from kdexport.models import LINE_5
from kdexport.models.loading import open_classifier, open_config, open_model, open_tokenizer
from kdexport.models.saving import save_model, save_tokenizer

WORD_PIECES = {"bert": "Bert", "electra": "Electra", "distilbert": "DistilBert", "mpnet": "MPNet"}
BYTE_PAIRS = {"roberta": "Roberta", "gpt2": "GPT2", "llama": "Llama", "modernbert": "PreTrained"}
UNIGRAMS = {"xlm-roberta": "XLMRoberta", "camembert": "Camembert", "albert": "Albert", "deberta-v2": "DebertaV2"}
# As no family has them: what a class makes for itself shows.
ODD = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("e", "é")]


def tokenizer_of(family, texts):
    if family in WORD_PIECES:
        tokenizer = Tokenizer.from_file(str(demo.teacher() / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    elif family in BYTE_PAIRS:
        tokenizer = families.byte_pairs().backend_tokenizer
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<s>", "<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", "<mask>"]
        tokenizer.train_from_iterator(
            texts, trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
        )
    tokenizer.normalizer = normalizers.Sequence(ODD)
    return tokenizer


@pytest.fixture
def folder(tmp_path, articles):
    """A model folder of a family with a tokenizer.json of its own."""

    def make(family):
        tokenizer_of(family, [row["text"] for row in articles[:40]]).save(str(tmp_path / "tokenizer.json"))
        name = (WORD_PIECES | BYTE_PAIRS | UNIGRAMS)[family]
        special = {"pad_token": "[PAD]" if family in WORD_PIECES else "<pad>"} if family not in BYTE_PAIRS else {}
        about = {"tokenizer_class": f"{name}Tokenizer{'Fast' if name == 'PreTrained' else ''}", **special}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
        AutoConfig.for_model(family).save_pretrained(tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("family", [*WORD_PIECES, *BYTE_PAIRS, *UNIGRAMS])
def test_a_tokenizer_is_that_of_its_file(folder, family, task, articles, tmp_path_factory):
    if (family, task, LINE_5) == ("llama", "token-classification", False):
        pytest.skip("transformers 4.57 wants SentencePiece's file for Llama's words")
    made = folder(family)
    opened, file = open_tokenizer(str(made), task), Tokenizer.from_file(str(made / "tokenizer.json"))
    texts = [row["text"][:600] for row in articles[:200]]
    if task == "token-classification":
        if hasattr(file.pre_tokenizer, "add_prefix_space"):
            file.pre_tokenizer.add_prefix_space = True
        texts = [text.split() for text in texts]
        expected = [file.encode(words, is_pretokenized=True, add_special_tokens=False).ids for words in texts]
    else:
        expected = [file.encode(text, add_special_tokens=False).ids for text in texts]
    given = opened(texts, is_split_into_words=task == "token-classification", add_special_tokens=False)["input_ids"]
    assert given == expected
    again = tmp_path_factory.mktemp("again")
    save_tokenizer(opened, again)
    saved = Tokenizer.from_file(str(again / "tokenizer.json"))
    many = saved.encode_batch(texts, is_pretokenized=task == "token-classification", add_special_tokens=False)
    assert [encoding.ids for encoding in many] == expected
    if task == "text-classification":
        assert AutoTokenizer.from_pretrained(again)(texts, add_special_tokens=False)["input_ids"] == expected


@pytest.fixture
def changed(base_model, tmp_path):
    """The base model with other values in its config.json."""

    def make(**values):
        folder = shutil.copytree(base_model, tmp_path / "model")
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | values))
        return folder

    return make


def test_a_checkpoint_of_a_newer_transformers_names_the_version_to_install(changed):
    folder = changed(model_type="bert9", transformers_version="5.99.0")
    with pytest.raises(ModelError, match=r"is of type 'bert9', unknown to transformers \S+\. .*'transformers>=5.99.0'"):
        open_config(str(folder))


@pytest.mark.skipif(not LINE_5, reason="transformers 4.57 opens any values")
def test_a_newer_checkpoint_whose_weights_do_not_fit_names_the_version_too(changed):
    folder = changed(transformers_version="5.99.0", hidden_size="wide")
    with pytest.raises(ModelError, match=r"can't be opened: .*saved by 5.99.0: pip install 'transformers>=5.99.0'"):
        open_config(str(folder))


def test_code_of_a_model_is_never_run(changed, capfd):
    folder = changed(model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    (folder / "configuration_mine.py").write_text("print('RUN')")
    with pytest.raises(ModelError, match="is of type 'mine' and brings code of its own, which is never run"):
        open_config(str(folder))
    assert "RUN" not in capfd.readouterr().out


def test_layer_types_that_contradict_the_layers_are_named(tmp_path):
    config = AutoConfig.for_model("qwen3", num_hidden_layers=4, hidden_size=32, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_bytes()) | {"layer_types": ["full_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"num_hidden_layers` \(4\) .*layer.types`? \(3\)"):
        open_config(str(tmp_path))


def test_a_slow_tokenizer_is_named(tmp_path):
    AutoConfig.for_model("deberta-v2").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(ModelError, match=r"only a slow tokenizer, without tokenizer.json\. Convert it first"):
        open_tokenizer(str(tmp_path))


def test_a_head_for_another_task_is_named_with_that_task(changed):
    folder = changed(architectures=["BertForQuestionAnswering"])
    with pytest.raises(ModelError, match="it is BertForQuestionAnswering for question-answering"):
        open_classifier(str(folder), open_config(str(folder)), "text-classification")


def test_opening_shows_no_progress_of_others(base_model, tmp_path, capfd):
    model, config = str(base_model), open_config(str(base_model))
    save_model(open_model(model, config, "text-classification", ["a", "b"]), tmp_path)
    assert capfd.readouterr().err == ""
