"""torchdistill's distillation box, as its GLUE example has it; loss and temperature as in its SST-2 configuration.

`targets` decides what its `KDLoss` is. With them it is alpha · cross-entropy + (1 − alpha) · T² · KL, so that the
configuration's alpha of 0.9 goes to the labels. Its own GLUE example leaves them None, and then the loss is the plain
KL without T², whatever alpha says. Both are measured.

The forward hooks on the classifier have to be named, because the loss finds no logits without them. That example's
`optimizer_no_decay` is not in the package; here it is torch's AdamW. There is nothing to cache the teacher
with in 1.1: the configurations still have `cache_output`, which nothing reads.
"""

import torch

try:
    import torchvision  # noqa: F401  (torchdistill imports it, whatever is distilled)
except RuntimeError:
    # PyPI's torchvision is compiled for CUDA: beside a CPU build of torch its operators are missing, and so it does
    # not import. Text needs none of them, so declaring those two that it trips over is enough.
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")

# --- what a user writes
import csv
from pathlib import Path

import torch
from torchdistill.core.distillation import get_distillation_box
from torchdistill.datasets.registry import register_collate_func
from torchdistill.optim.registry import register_scheduler
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, DataCollatorWithPadding, get_linear_schedule_with_warmup, set_seed


def distil(job):
    set_seed(job.seed)
    teacher = Classifier.from_pretrained(job.teacher)
    student = Classifier.from_pretrained(job.student)
    tokenizer = AutoTokenizer.from_pretrained(job.student)
    with Path(job.data, "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=job.max_length)
    encoded["labels"] = [student.config.label2id[row["label"]] for row in rows]
    examples = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    register_collate_func(DataCollatorWithPadding(tokenizer))
    register_scheduler(get_linear_schedule_with_warmup)
    steps = job.epochs * -(-len(examples) // job.batch_size)
    model = {"forward_proc": "forward_batch_only_as_kwargs", "forward_hook": {"output": ["classifier"]}}
    path = {"student_module_path": "classifier", "teacher_module_path": "classifier"}
    io = {"student_module_io": "output", "teacher_module_io": "output"}
    loss = {"key": "KDLoss", "kwargs": path | io | {"temperature": 3.0, "alpha": 0.9, "reduction": "batchmean"}}
    config = {
        "num_epochs": job.epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler},
            "kwargs": {"batch_size": job.batch_size},
            "collate_fn": "DataCollatorWithPadding",
            "requires_supp": False,
        },
        "teacher": model | {"requires_grad": False},
        "student": model,
        "optimizer": {"key": "AdamW", "kwargs": {"lr": job.learning_rate, "weight_decay": 0.01}, "max_grad_norm": 1.0},
        "scheduler": {
            "key": "get_linear_schedule_with_warmup",
            "kwargs": {"num_warmup_steps": int(0.1 * steps), "num_training_steps": steps},
            "scheduling_step": 1,
        },
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    box = get_distillation_box(teacher, student, {"train": examples}, config, torch.device("cpu"), None, False, 1)
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for batch in box.train_data_loader:
            labels = batch.pop("labels")
            loss = box.forward_process(batch, targets=labels if job.targets else None)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    student.save_pretrained(job.out)
    return job.out


# --- end
