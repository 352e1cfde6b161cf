"""TextBrewer's distillers, as its text-classification examples have them.

Cross-entropy with the teacher's probabilities at temperature 8, and no weight on the labels: so in its MNLI and
random-tokens examples. `cached` takes `BasicDistiller` with `is_caching_logits`, which its documentation offers for
small and medium data sets; else it is `GeneralDistiller`, which it recommends and which can't cache.

Two things differ from its examples, which were written for transformers 2 to 4.8: AdamW is torch's, because
transformers has none any more, and batches are made plain dicts, because it asks for `type(batch) is dict`. It saves
weights after every epoch as they do, and texts are padded to the longest of their batch, not to 128 as they do.
"""

# --- what a user writes
import csv
from pathlib import Path

import torch
from textbrewer import BasicDistiller, DistillationConfig, GeneralDistiller, TrainingConfig
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, DataCollatorWithPadding, get_linear_schedule_with_warmup, set_seed


def distil(job):
    set_seed(job.seed)
    teacher = Classifier.from_pretrained(job.teacher)
    student = Classifier.from_pretrained(job.student)
    tokenizer = AutoTokenizer.from_pretrained(job.student)
    with Path(job.data, "train.csv").open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    encoded = tokenizer(texts, truncation=True, max_length=job.max_length)
    examples = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    loader = torch.utils.data.DataLoader(
        examples, batch_size=job.batch_size, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    steps = job.epochs * len(loader)
    distiller = (BasicDistiller if job.cached else GeneralDistiller)(
        train_config=TrainingConfig(output_dir=f"{job.out}/checkpoints", device="cpu"),
        distill_config=DistillationConfig(temperature=8, hard_label_weight=0, is_caching_logits=job.cached),
        model_T=teacher,
        model_S=student,
        adaptor_T=lambda batch, outputs: {"logits": outputs.logits},
        adaptor_S=lambda batch, outputs: {"logits": outputs.logits},
    )
    with distiller:
        distiller.train(
            torch.optim.AdamW(student.parameters(), lr=job.learning_rate, weight_decay=0.01),
            loader,
            num_epochs=job.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": int(0.1 * steps), "num_training_steps": steps},
            max_grad_norm=1.0,
            batch_postprocessor=dict,
        )
    student.save_pretrained(job.out)
    return job.out


# --- end
