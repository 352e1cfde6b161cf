"""How near the KL of k tokens of each soft target is to that of the whole vocabulary, for a run's teacher and student.

    python benchmarks/soft_targets.py runs/causal-lm

On the test split: KL over all V tokens, over the k that are kept, and by how much they differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer

from kdexport.data import read_rows
from kdexport.distill.losses import kl, with_rest
from kdexport.models.registry import open_trained
from kdexport.tasks.causal_lm import CausalLM, drawn_of

_ROWS, _KS = 64, (4, 8, 16, 32, 64, 128, 256)


@torch.inference_mode()
def main(run: Path) -> None:
    """Print one line a k."""
    task = CausalLM.load(run / "student")
    teacher, student = open_trained(run / "teacher").eval(), open_trained(run / "student").eval()
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    rows = read_rows(run / "data", "test")[:_ROWS]
    tokenizer = Tokenizer.from_file(str(run / "student" / "tokenizer.json"))
    for row in rows:
        ids = torch.from_numpy(task.encode([row])["input_ids"])
        for side, model in zip(sides, (teacher, student), strict=True):
            side.append(model(input_ids=ids).logits[0, :-1])
    theirs, ours = map(torch.cat, sides)
    whole = kl(ours, theirs, None, 1.0).item()
    print(f"{len(ours):,} tokens, a vocabulary of {ours.shape[1]:,}: KL {whole:.4f}")
    for k in _KS:
        some, mass = [], []
        for row, teacher_logits, student_logits in zip(rows, *sides, strict=True):
            kept = CausalLM(msgspec.structs.replace(task.config, kept=k), tokenizer)
            batch = kept.encode([row])
            padded = torch.cat([teacher_logits, teacher_logits[-1:]])[None].numpy()
            packed = torch.from_numpy(kept.gather(padded, batch)[0, : len(student_logits)])
            some.append(len(packed) * kl(*with_rest(student_logits, packed), None, 1.0).item())
            mass.append(packed[:, 2 : 2 * (k - drawn_of(k, ours.shape[1])) + 1 : 2].exp().sum(dim=-1))
        found = sum(some) / len(ours)
        top = 100 * torch.cat(mass).mean().item()
        print(f"k = {k:3}: KL {found:.4f}, {100 * (found / whole - 1):+6.2f} %; the most probable hold {top:.1f} %")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
