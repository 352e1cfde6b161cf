"""Answers of Optimum's ORTModel classes, with Hugging Face's own tokenizers and processors; no kdexport here.

Run by the Python of an environment with optimum-onnx, which holds transformers at 4.57:

    python optimum_reads.py CLASS FOLDER FILE < inputs.json > answers.json

Answers are [label, score] for texts, words, images and sounds; of a language model the text that it
writes; of a CTC model see `spelled`.
"""

import json
import sys
import wave

import numpy as np
import optimum.onnxruntime
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

kind, folder, file = sys.argv[1:]
where = {"subfolder": "onnx", "file_name": file}
if kind == "ORTModelForSpeechSeq2Seq":  # it finds an encoder and a merged decoder by their names
    where = {"subfolder": "onnx"}
model = getattr(optimum.onnxruntime, kind).from_pretrained(folder, **where)


def labelled(logits):
    best = torch.softmax(logits, dim=-1).max(dim=-1)
    return [[model.config.id2label[int(i)], float(score)] for i, score in zip(best.indices, best.values, strict=True)]


def text(given):
    inputs = AutoTokenizer.from_pretrained(folder)(given, return_tensors="pt", truncation=True)
    return labelled(model(**inputs).logits)[0]


def words(given):
    inputs = AutoTokenizer.from_pretrained(folder)(given, is_split_into_words=True, return_tensors="pt")
    first = {word: i for i, word in reversed(list(enumerate(inputs.word_ids()))) if word is not None}
    return labelled(model(**inputs).logits[0, [first[i] for i in range(len(given))]])


def written(given):
    tokens = AutoTokenizer.from_pretrained(folder)
    inputs = tokens(given, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    return tokens.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def image(path):
    pixels = np.asarray(Image.open(path))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    processor = AutoImageProcessor.from_pretrained(folder)
    return labelled(model(**processor(pixels, return_tensors="pt", input_data_format="channels_last")).logits)[0]


def extracted(path):
    with wave.open(path) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768
        rate = file.getframerate()
    return AutoFeatureExtractor.from_pretrained(folder)(samples, sampling_rate=rate, return_tensors="pt")


def sound(path):
    return labelled(model(**extracted(path)).logits)[0]


def heard(path):
    tokens = AutoTokenizer.from_pretrained(folder)
    above = [*range(tokens.eos_token_id + 1, model.config.vocab_size)]
    ids = model.generate(**extracted(path), max_new_tokens=24, do_sample=False, num_beams=1, suppress_tokens=above)[0]
    return tokens.decode(ids, skip_special_tokens=True).strip()


def spelled(given):
    """Of features [B, T, …] the logits; of a recording its text, and its logits."""
    if isinstance(given, list):
        return model(input_values=torch.tensor(given)).logits.tolist()
    logits = model(**extracted(given)).logits
    return [AutoTokenizer.from_pretrained(folder).decode(logits[0].argmax(dim=-1)), logits[0].tolist()]


READ = {
    "ORTModelForCTC": spelled,
    "ORTModelForSequenceClassification": text,
    "ORTModelForTokenClassification": words,
    "ORTModelForCausalLM": written,
    "ORTModelForImageClassification": image,
    "ORTModelForAudioClassification": sound,
    "ORTModelForSpeechSeq2Seq": heard,
}
json.dump([READ[kind](given) for given in json.load(sys.stdin)], sys.stdout)
