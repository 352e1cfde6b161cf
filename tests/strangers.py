"""Small classifiers with random weights in the layouts in which strangers bring them."""

import json
from pathlib import Path
from typing import Any

import families
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from kdexport.data import demo

TEXTS = [
    "Play something quiet in the kitchen, please: it is late, and the children of our neighbours sleep already.",
    "The parcel arrived two days late and the box was torn, but nothing inside was broken.",
    "Can you tell me how much money is left in my account?",
]
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
BERTS = {"tokenizer_class": "BertTokenizerFast", "model_max_length": 32} | SPECIAL
XLM = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "bos_token": "<s>"}
XLM |= {"eos_token": "</s>", "tokenizer_class": "XLMRobertaTokenizerFast", "model_max_length": 32}
GPTS = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32}
ENDS = {"eos_token_id": 0, "bos_token_id": 0}


def word_pieces() -> Tokenizer:
    """BERT's tokenizer, without padding and truncation."""
    tokenizer = Tokenizer.from_file(str(demo.teacher() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def unigrams() -> Tokenizer:
    """Train a tokenizer as XLM-R has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(special_tokens=special, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def byte_pairs() -> Tokenizer:
    """GPT-2's kind, which adds no special tokens."""
    return families.byte_pairs().backend_tokenizer


def write(
    folder: Path, family: str = "bert", tokenizer: Tokenizer | None = None, about: dict[str, Any] = BERTS, **more: Any
) -> PreTrainedModel:
    """Write a classifier of three labels with its tokenizer, as their authors would, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or word_pieces()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    sizes = SIZES | ({"max_position_embeddings": 40} if family != "xlnet" else {}) | more
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, vocab_size=tokenizer.get_vocab_size(), num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():  # scores that differ
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


def configure(folder: Path, name: str = "config.json", **values: Any) -> None:
    """Change values of a JSON file."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_bytes()) | values))
