"""Speed of distilling texts, images and sound beside plain loops in PyTorch, stage by stage.

    python benchmarks/distill_speed.py FASHION_MNIST/train.parquet FSDD/train
    python benchmarks/distill_speed.py decode FASHION_MNIST/train.parquet 4000     # of so many images alone

Texts are sentences of BBC News; images are JPEGs of 640 × 480, each of twelve Fashion-MNIST pictures, enlarged and
tinted; recordings are spoken digits. The sides take turns on one thread, over the same rows with the same model and
loss. What is compared is the processor's time, as the machine is shared; a ratio is one of a turn, shown as median
[least–most]. Weights do not matter here: those of the images' and the sound's teachers are random.
"""

import io
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import msgspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from onnxruntime.quantization import quantize_dynamic
from PIL import Image
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from kdexport import spec
from kdexport.bench.machine import environment
from kdexport.data import demo
from kdexport.distill import train
from kdexport.distill.student import build_student
from kdexport.distill.train import TrainConfig, fit
from kdexport.export import export_student
from kdexport.models.convolution import build_conv
from kdexport.models.inference import logits_of
from kdexport.models.loading import open_config, open_model
from kdexport.models.saving import save_model, save_task
from kdexport.tasks import load_task, task_class
from kdexport.tasks.config import AudioConfig, ImageConfig, TaskConfig
from kdexport.tasks.inputs import cache
from kdexport.tasks.inputs.media import cached, taken

TURNS, EXPORTS, EPOCHS, BATCH, T = 5, 3, 3, 32, 2.0
RESULT = Path(__file__).parent / "results" / "distill-speed.json"
RECIPE = TrainConfig(epochs=EPOCHS, learning_rate=5e-4, batch_size=BATCH, seed=0, temperature=T, alpha=1.0)


def texts(folder):
    demo.write_bbc_news(folder / "bbc.jsonl")
    articles = [msgspec.json.decode(line) for line in (folder / "bbc.jsonl").read_bytes().splitlines()]
    rows = [
        {"text": part.strip(), "label": one["label"]}
        for one in articles
        for part in one["text"].split("\n")[:3]
        if 20 < len(part) < 400
    ][:256]
    labels, source = sorted({row["label"] for row in rows}), str(demo.teacher())
    teacher = open_model(source, open_config(source), "text-classification", labels)
    for name, opened in (
        ("teacher", lambda: teacher),
        ("student", lambda: build_student(spec.Student(), "tiny", folder / "teacher").opened),
    ):
        write(made := opened(), labels, folder / name, max_length=96)
        save_model(made, folder / name)
    return rows, load_task(folder / "teacher"), teacher.model


def images(parquet, folder, count=96):
    pictures = pq.read_table(parquet).slice(0, 1000).to_pylist()
    random, rows = np.random.default_rng(0), []
    for i in range(count):
        page = Image.new("RGB", (640, 480))
        for place in range(12):
            small = Image.open(io.BytesIO(pictures[(i + 83 * place) % 1000]["image"]["bytes"])).convert("L")
            grey = np.asarray(small.resize((160, 160), Image.BICUBIC), np.float32)[..., None]
            tinted = grey * random.uniform(0.4, 1, 3) + random.normal(0, 4, (160, 160, 3))
            page.paste(Image.fromarray(tinted.clip(0, 255).astype(np.uint8)), (place % 4 * 160, place // 4 * 160))
        page.save(folder / f"{i}.jpg", quality=90)
        rows.append({"image": str(folder / f"{i}.jpg"), "label": str(i % 4)})
    how = ImageConfig(channels=3, resize=[224, 224], mean=[0.5] * 3, std=[0.5] * 3)
    config = TaskConfig(task="image-classification", labels=list("0123"), inputs=["pixel_values"], image=how)
    shape = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    write(student := build_conv(8, config, rows), config.labels, folder / "student", task=config.task, rows=rows)
    save_model(student, folder / "student")
    return rows, task_class(config.task)(config), ViTForImageClassification(ViTConfig(num_labels=4, **shape))


def sound(recordings, folder):
    files = sorted(Path(recordings).rglob("*.wav"))[::7][:192]
    rows = [{"audio": str(file), "label": file.name[0]} for file in files]
    config = TaskConfig(
        task="audio-classification", labels=[*"0123456789"], inputs=["input_values"],
        audio=AudioConfig(rate=8_000, length=100, mels=64),
    )  # fmt: skip
    for name, width in (("teacher", 32), ("student", 16)):
        write(made := build_conv(width, config, rows), config.labels, folder / name, task=config.task, rows=rows)
        save_model(made, folder / name)
    return rows, load_task(folder / "teacher"), model_of(folder / "teacher")


def write(opened, labels, folder, max_length=None, **how):
    folder.mkdir()
    save_task(opened, max_length, labels, folder, **how)


def model_of(folder):
    from kdexport.models.registry import open_trained

    torch.manual_seed(0)
    return open_trained(folder)


# --- training

MARKS = []  # the processor's time at the start of each step: before its rows are decoded


def marked(encoded, chosen):
    MARKS.append(time.process_time())
    return taken(encoded, chosen)


train.taken = marked


def by_fit(dtype):
    def side(model, task, rows, soft, work):
        how = msgspec.structs.replace(RECIPE, dtype=dtype)
        fit(model, task, rows, soft, how, validation=rows[:1], work=work, title="train")

    return side


def batch_of(task, encoded, soft, chosen):
    MARKS.append(time.process_time())
    arrays = task.collate([encoded[i] for i in chosen])
    return {name: torch.from_numpy(a) for name, a in arrays.items()} | {"targets": torch.from_numpy(soft[chosen])}


def kd_loss(model, inputs):
    targets = inputs.pop("targets")
    student = log_softmax(model(**inputs).logits / T, dim=-1)
    return T**2 * kl_div(student, log_softmax(targets / T, dim=-1), log_target=True, reduction="batchmean")


def by_loop(model, task, rows, soft, work):
    encoded = task.tokenize(rows)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=RECIPE.learning_rate, weight_decay=0.01, fused=True)
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    lengths = np.array(task.sizes(encoded))
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(rows))
        order = order[np.argsort(lengths[order], kind="stable")]  # little padding, as ours
        for start in np.random.default_rng(epoch).permutation(range(0, len(order), BATCH)):
            kd_loss(model, batch_of(task, encoded, soft, order[start : start + BATCH].tolist())).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


class KDTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return kd_loss(model, inputs)


def by_trainer(model, task, rows, soft, work):
    encoded = task.tokenize(rows)
    arguments = TrainingArguments(
        output_dir=str(work), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, weight_decay=0.01,
        learning_rate=RECIPE.learning_rate, remove_unused_columns=False, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    data = {"train_dataset": range(len(rows)), "data_collator": lambda chosen: batch_of(task, encoded, soft, chosen)}
    KDTrainer(model=model, args=arguments, **data).train()


SIDES = {"loop": by_loop, "Trainer": by_trainer, "ours": by_fit("float32"), "ours, bfloat16": by_fit("bfloat16")}


def steps_of(side, folder, rows, soft):
    """Return the processor's seconds of the first epoch, and of one of the later ones."""
    MARKS.clear()
    with tempfile.TemporaryDirectory() as work:
        side(model_of(folder), load_task(folder), rows, soft, Path(work))
    MARKS.append(time.process_time())
    steps = len(MARKS[:-1]) // EPOCHS
    return MARKS[steps] - MARKS[0], (MARKS[-1] - MARKS[steps]) / (EPOCHS - 1)


# --- the other stages


def plain_pass(model, task, rows):
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            arrays = task.encode(rows[start : start + BATCH])
            model(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def plain_export(folder, task, rows):
    model, arrays = model_of(folder).eval(), task.encode(rows[:2])
    axes = {name: dict(enumerate(["batch", "length"][: 2 if task.modality == "text" else 1])) for name in arrays}
    model.config.return_dict = False
    with tempfile.TemporaryDirectory() as work:
        inputs = tuple(torch.from_numpy(array) for array in arrays.values())
        torch.onnx.export(model, inputs, f"{work}/m.onnx", input_names=[*arrays], dynamic_axes=axes, dynamo=False)
        quantize_dynamic(f"{work}/m.onnx", f"{work}/q.onnx")


def our_export(folder, rows):
    with tempfile.TemporaryDirectory() as work:
        export_student(spec.Export(variants=("fp32", "int8")), folder, Path(work), rows[:64])


def seconds(run):
    started = time.process_time()
    run()
    return time.process_time() - started


def compare(table, base="loop"):
    """From seconds by side and turn: medians, and each side's speed over that of the base."""
    found = {}
    for side, times in table.items():
        ratios = sorted(b / t for b, t in zip(table[base], times, strict=True))
        found[side] = {"seconds": median(times), "ratio": [median(ratios), ratios[0], ratios[-1]]}
    return found


def stages_of(kind, folder, rows, task, teacher):
    """Return seconds by stage, side and turn."""
    student, soft = folder / "student", logits_of(teacher.eval(), task, rows)
    found = {"teacher": {}, "first epoch": {}, "later epochs": {}, "export": {}}

    def note(stage, side, took):
        found[stage].setdefault(side, []).append(took)

    for turn in range(-1, TURNS):  # the first warms up
        note("teacher", "loop", seconds(partial(plain_pass, teacher, task, rows)))
        note("teacher", "ours", seconds(partial(logits_of, teacher, task, rows)))
        for side, run in SIDES.items():
            first, later = steps_of(run, student, rows, soft)
            note("first epoch", side, first)
            note("later epochs", side, later)
        if turn < EXPORTS and kind == "texts":
            note("export", "loop", seconds(partial(plain_export, student, load_task(student), rows)))
            note("export", "ours", seconds(partial(our_export, student, rows)))
    return {stage: {side: took[1:] for side, took in sides.items()} for stage, sides in found.items() if sides}


def main(parquet, recordings):
    torch.set_num_threads(1)
    results, began = {}, time.time()
    kinds = {"texts": texts, "images": partial(images, parquet), "sound": partial(sound, recordings)}
    for kind, made in kinds.items():
        with tempfile.TemporaryDirectory() as name:
            rows, task, teacher = made(Path(name))
            amount = sum(task.duration(row) for row in rows) if kind == "sound" else len(rows)
            for stage, times in stages_of(kind, Path(name), rows, task, teacher).items():
                results[f"{kind}, {stage}"] = found = compare(times)
                for side, one in found.items():
                    if stage != "export":
                        one["per_second"] = amount / one["seconds"]
                    speed = f"{one['seconds']:8.2f} s" if stage == "export" else f"{one['per_second']:8.1f} a second"
                    middle, least, most = one["ratio"]
                    print(f"{kind:7}{stage:13}{side:15}{speed}  {middle:.2f}× [{least:.2f}–{most:.2f}]", flush=True)
    record = {"machine": environment(), "turns": TURNS, "wall_s": round(time.time() - began), "stages": results}
    RESULT.write_text(json.dumps(record, indent=1, default=str) + "\n")


def decode(parquet, count):
    """Two passes over images with a cache of which a third is in memory, in batches, by two threads."""
    with tempfile.TemporaryDirectory() as name:
        rows, task, _ = images(parquet, Path(name), int(count))
        encoded, size = task.tokenize(rows), 3 * 224 * 224
        encoded.threads = 2
        cache.limit_memory(len(rows) * size // 3_000_000)
        with cached(Path(name), encoded):
            for title in ("first", "second"):
                began, order = time.time(), np.random.default_rng(len(title)).permutation(len(rows)).tolist()
                spent = seconds(
                    lambda order=order: [
                        task.collate(taken(encoded, order[i : i + BATCH])) for i in range(0, len(order), BATCH)
                    ]
                )
                wall, memory = 1e3 * (time.time() - began) / len(rows), psutil.Process().memory_info().rss / 1e6
                print(
                    f"{title} pass: {1e3 * spent / len(rows):.3f} ms an image, {wall:.3f} by the clock; {memory:.0f} MB"
                )


if __name__ == "__main__":
    decode(*sys.argv[2:]) if sys.argv[1] == "decode" else main(*sys.argv[1:])
