"""Passages that a language model writes itself, which a student is trained on as well.

Sequence-level distillation (Kim and Rush 2016, https://arxiv.org/abs/1606.07947, section 3.2): with alpha 0 the student
learns the teacher's texts alone, with alpha above 0 the teacher's probabilities for them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdexport.models.registry import open_trained
from kdexport.progress import bar
from kdexport.tasks import load_task
from kdexport.tasks.base import can_generate

# A passage begins as a training passage does, with so many tokens of it.
_PROMPT = 8
_AT_ONCE = 64


@torch.inference_mode()
def written_by(teacher: Path, rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with the ids `sample:1`, `sample:2`, …, drawn from the teacher's own probabilities.

    Args:
        teacher: a finished teacher stage.
        rows: of train; what is written goes on from the first tokens of some.
        count: how many.
        seed: of the beginnings and of what is drawn.
    """
    task = load_task(teacher)
    assert can_generate(task)
    model: Any = open_trained(teacher).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    draw = torch.Generator().manual_seed(seed)
    starts = [a["input_ids"][:_PROMPT] for a in task.tokenize(rows) if len(a["input_ids"]) > _PROMPT]
    chosen = torch.randint(len(starts), (count,), generator=draw).tolist()
    texts: list[str] = []
    with torch.random.fork_rng(), bar("the teacher writes", count) as advance:
        torch.manual_seed(seed)
        for i in range(0, count, _AT_ONCE):
            prompts = torch.tensor([starts[j].tolist() for j in chosen[i : i + _AT_ONCE]]).to(model.device)
            written = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_length=task.config.max_length,
                do_sample=True,
                top_k=0,
                pad_token_id=task.config.pad_id,
            )
            texts += [task.text_of(ids) for ids in written.tolist()]
            advance(len(prompts))
    return [{"id": f"sample:{i}", "text": text, "label": ""} for i, text in enumerate(texts, 1) if text.strip()]
