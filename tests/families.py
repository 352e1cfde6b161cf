"""Twenty small models, one of each family and of each of our own networks, as model folders with `task.json`."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    ASTFeatureExtractor,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
)

from kdexport.data import demo
from kdexport.models.convnet import ConvNetConfig, ConvNetForAudioClassification, ConvNetForImageClassification
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_model, save_task
from kdexport.models.textnet import KINDS, TextNet, TextNetConfig

LABELS = ["no", "perhaps", "yes"]
SIZES = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}
# Family → settings beside the sizes above.
TEXTS = {
    "bert": {},
    "distilbert": {"n_layers": 4, "dim": 64, "n_heads": 4, "hidden_dim": 256},
    "roberta": {"pad_token_id": 0, "max_position_embeddings": 320},
    "electra": {"embedding_size": 32},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2},
}
WRITERS = {
    "gpt2": {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 128},
    "llama": {"num_key_value_heads": 2, "max_position_embeddings": 128},
}
IMAGES = {
    "vit": {"image_size": 32, "patch_size": 8},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1]},
}
SOUNDS = {
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "wav2vec2": {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}
# Families of 2026, which transformers 4.57 does not know.
NEW_TEXTS = {name: {"num_key_value_heads": 2, "pad_token_id": 0} for name in ("eurobert", "nomic_bert", "gte", "olmo3")}
NEW_TEXTS["jina_embeddings_v3"] = {"pad_token_id": 0}
NEW_WRITERS = {
    name: {"num_key_value_heads": 2, "max_position_embeddings": 128}
    for name in ("ministral3", "cwm", "hyperclovax", "exaone", "nanochat")
}
OURS = [*KINDS, "conv", "conv-audio"]
EVERY = ["minilm", "tiny", *TEXTS, *WRITERS, *IMAGES, *SOUNDS, *OURS]
# Those whose attention ONNX Runtime fuses, with their layers.
FUSED = {"minilm": 6, "tiny": 2, "bert": 4, "distilbert": 4, "roberta": 4, "electra": 4, "encoder": 2}


def byte_pairs(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer, as GPT-2 has it, on a few English sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = "The parcel arrived two days late and nothing inside was broken. Can you play something quiet in here?"
    tokenizer.train_from_iterator([words], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", model_max_length=128)


def build(name: str) -> tuple[str, PreTrainedModel, object]:
    """Return the task, the model with random weights (real ones of `minilm`), and its tokenizer or processor."""
    torch.manual_seed(0)
    labels = {"num_labels": len(LABELS), "id2label": dict(enumerate(LABELS))}
    if settings := (WRITERS | NEW_WRITERS).get(name):
        tokenizer = byte_pairs()
        ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
        config = AutoConfig.for_model(name, **SIZES, **settings, **ids, vocab_size=len(tokenizer))
        return "causal-lm", transformers.AutoModelForCausalLM.from_config(config), tokenizer
    if name in IMAGES:
        config = AutoConfig.for_model(name, **SIZES, **IMAGES[name], **labels)
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
        return "image-classification", transformers.AutoModelForImageClassification.from_config(config), processor
    if name in SOUNDS:
        config = AutoConfig.for_model(name, **SIZES, **SOUNDS[name], **labels)
        mels = ASTFeatureExtractor(max_length=64, num_mel_bins=32)
        processor = Wav2Vec2FeatureExtractor() if name == "wav2vec2" else mels
        return "audio-classification", transformers.AutoModelForAudioClassification.from_config(config), processor
    if name == "conv":
        model = ConvNetForImageClassification(ConvNetConfig(num_channels=3, image_size=[32, 32], **labels))
        return "image-classification", model, ViTImageProcessor(size={"height": 32, "width": 32})
    if name == "conv-audio":
        model = ConvNetForAudioClassification(ConvNetConfig(frames=64, num_mel_bins=32, **labels))
        return "audio-classification", model, ASTFeatureExtractor(max_length=64, num_mel_bins=32)
    tokenizer = AutoTokenizer.from_pretrained(demo.teacher())
    if name in KINDS:
        return "text-classification", TextNet(TextNetConfig(name, num_hidden_layers=2, **labels)), tokenizer
    if name in ("minilm", "tiny"):
        small = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
        config = AutoConfig.from_pretrained(demo.teacher(), **(small if name == "tiny" else {}), **labels)
        kind = transformers.AutoModelForSequenceClassification
        model = kind.from_config(config) if name == "tiny" else kind.from_pretrained(demo.teacher(), config=config)
    else:
        config = AutoConfig.for_model(name, **(SIZES | (TEXTS | NEW_TEXTS)[name]), **labels, vocab_size=len(tokenizer))
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return "text-classification", model, tokenizer


def write(name: str, folder: Path) -> None:
    """Write a model folder."""
    task, model, processor = build(name)
    folder.mkdir(parents=True)
    with torch.no_grad():  # logits of usual size
        for part_name, weight in model.named_parameters():
            if part_name.endswith(("classifier.weight", "out_proj.weight", "classifier.1.weight")):
                weight.mul_(10)
    opened = ModelAndProcessor(model.eval(), processor)
    labels = [] if task == "causal-lm" else LABELS
    rows = [{"audio": silence()}] if task == "audio-classification" else []
    save_task(opened, None, labels, folder, task=task, rows=rows)
    save_model(opened, folder)


def silence() -> bytes:
    """One second of almost nothing, as a WAV file."""
    import io
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(bytes(range(256)) * 125)
    return file.getvalue()
