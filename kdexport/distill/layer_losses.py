"""Losses of layers: the student's hidden states, attention or relations against the teacher's, on the same tokens.

hidden      the states after the embeddings and after each layer (TinyBERT, Jiao et al. 2020)
attention   the attention probabilities of each layer (TinyBERT)
relation    how queries, keys and values of the last layer relate among themselves (MiniLMv2, Wang et al. 2021)

The teacher runs live, frozen and without dropout. Padding is masked. Each loss is a mean over tokens and, where a paper
sums over layers, over layers: a weight means the same for a student of two layers as for one of six.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdexport.errors import ModelError
from kdexport.models.registry import open_trained
from kdexport.tasks import load_task
from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array

_MOST_RELATION_HEADS = 12
_MASKED = -1e9  # stands for minus infinity, which would make 0 · ∞ of a padded token's part of the divergence

# Names of the query, key and value layers by family, the fused ones last.
_TAPS = (
    ("query", "key", "value"),  # BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, ALBERT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2 and -v3
    ("q", "k", "v"),  # MPNet
    ("Wqkv",),  # ModernBERT
)


class Activations(NamedTuple):
    """Hidden tensors of one forward pass through L layers of width W with H heads; empty where not asked for."""

    states: tuple[Tensor, ...]  # 1 + L of [B, T, W]: the embeddings, then each layer's output
    attentions: tuple[Tensor, ...]  # L of [B, H, T, T]: probabilities, after dropout where the model has any
    vectors: tuple[Tensor, ...]  # queries, keys and values of the last layer, each [B, T, W]


class Matching(nn.Module):
    """The losses of layers of a student and its frozen teacher, with the projections that they need.

    The projections are trained with the student; the teacher is no submodule, so optimizer and state dict don't see it.
    `token_ids` int64 [V] are the teacher's of each of the student's, where its vocabulary was trimmed.

    Raises:
        ModelError: a model has no layers, no attention probabilities, or no known queries, keys and values.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, names: Iterable[str], token_ids: Array | None = None
    ) -> None:
        super().__init__()
        self._names = set(names)
        self._token_ids: Tensor | None
        self.register_buffer("_token_ids", None if token_ids is None else torch.from_numpy(token_ids), persistent=False)
        self._teacher = _Watched(teacher.requires_grad_(False).eval(), self._names, "teacher")
        self._student = _Watched(student, self._names, "student")
        self.flags = self._student.flags
        ours, theirs = self._student.look(), self._teacher.look()
        self._pairs = layer_pairs(len(ours.states) - 1, len(theirs.states) - 1)
        if "relation" in self._names:
            self._heads = relation_heads(ours.vectors[0].shape[-1], theirs.vectors[0].shape[-1])
        self.of_embeddings: nn.Module = nn.Identity()  # equal widths need no projection, and a student made of the
        self.of_layers: nn.Module = nn.Identity()  # teacher's own layers would have to undo it
        widths = ours.states[0].shape[-1], theirs.states[0].shape[-1]
        if "hidden" in self._names and widths[0] != widths[1]:
            self.of_embeddings, self.of_layers = nn.Linear(*widths, bias=False), nn.Linear(*widths, bias=False)
        self.to(student.device)

    def forward(self, inputs: dict[str, Tensor], student_output: Any) -> dict[str, Tensor]:
        """Return each loss of one batch, a scalar, for the student's inputs and its output, called with `flags`."""
        ids = inputs["input_ids"]
        given = inputs.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
        with torch.no_grad():
            theirs = self._teacher(inputs if self._token_ids is None else inputs | {"input_ids": self._token_ids[ids]})
        ours = self._student.inside(student_output)
        losses = {}
        if "hidden" in self._names:
            first, *rest = ours.states
            projected = [self.of_embeddings(first), *map(self.of_layers, rest)]
            losses["hidden"] = hidden_loss(projected, [theirs.states[0], *self._matched(theirs.states[1:])], mask)
        if "attention" in self._names:
            losses["attention"] = attention_loss(ours.attentions, self._matched(theirs.attentions), mask)
        if "relation" in self._names:
            losses["relation"] = relation_loss(ours.vectors, theirs.vectors, mask, self._heads)
        return losses

    def release(self) -> None:
        """Remove the hooks from both models."""
        self._student.release()
        self._teacher.release()

    def _matched(self, of_layers: Sequence[Tensor]) -> list[Tensor]:
        return [of_layers[i] for i in self._pairs]


@contextmanager
def matched(
    student: PreTrainedModel,
    folder: Path,
    names: Iterable[str],
    token_ids: Array | None,
    *,
    task: Task,
    rows: Sequence[dict[str, Any]],
) -> Iterator[Matching]:
    """Attach a `Matching` to the student as a module, for optimizer and checkpoints to see; detach it afterwards.

    Raises:
        ModelError: see `Matching`; or student and teacher (of the stage `folder`) read other tokens in these rows.
    """
    teacher = open_trained(folder)
    _check_tokens(task.tokenize(rows), load_task(folder).tokenize(rows), token_ids)
    before = student.config._attn_implementation
    if "attention" in names:  # the quick implementations keep no probabilities
        _attend(student, "eager")
        _attend(teacher, "eager")
    matching = Matching(student, teacher, names, token_ids)
    student.matching = matching
    try:
        yield matching
    finally:
        matching.release()
        del student.matching
        _attend(student, before)


# --- the losses, of lists of tensors of student and teacher; mask is bool [B, T], false at padding


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean squared difference of states, over features and tokens, the mean over layers.

    TinyBERT (https://arxiv.org/abs/1909.10351, equations 8 and 9), which sums over layers. Both have 1 + L states
    [B, T, W]; the student's are projected to the teacher's width.
    """
    layers = [_mean((ours - theirs).square().mean(dim=-1), mask) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(layers).mean()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean squared difference of attention probabilities, over heads and pairs of tokens, the mean over layers.

    TinyBERT (equation 7) takes the scores before the softmax and sums over layers; Transformers' models return
    probabilities, which are small, so this loss needs a large weight. They come after dropout, [B, H, T, T] a layer.
    Where head counts H differ, means over heads are compared.
    """
    pairs = mask.unsqueeze(-1) & mask.unsqueeze(-2)  # [B, T, T]
    layers = []
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape[1] != theirs.shape[1]:
            ours, theirs = ours.mean(dim=1, keepdim=True), theirs.mean(dim=1, keepdim=True)
        layers.append(_mean((ours - theirs).square().mean(dim=1), pairs))
    return torch.stack(layers).mean()


def relation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    """Σ over queries, keys and values of KL(relation of the teacher ‖ of the student), the mean over heads and tokens.

    A relation is softmax(X Xᵀ / √d) of vectors X [B, T, W] cut into `heads` parts of d numbers, so widths W and head
    counts may differ. MiniLMv2 (https://arxiv.org/abs/2012.15828, equations 3 to 5): its relations Q-Q, K-K and V-V.
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        log_student, log_teacher = _log_relation(ours, mask, heads), _log_relation(theirs, mask, heads)
        divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)  # [B, H, T]
        losses.append(_mean(divergence.mean(dim=1), mask))
    return torch.stack(losses).sum()


def layer_pairs(student_layers: int, teacher_layers: int) -> list[int]:
    """Return the teacher's layer, from 0, for each of the student's: TinyBERT's g(m) = m · N / M, rounded."""
    return [
        max(1, (2 * m * teacher_layers + student_layers) // (2 * student_layers)) - 1
        for m in range(1, student_layers + 1)
    ]


def relation_heads(student_width: int, teacher_width: int) -> int:
    """Return the largest head count up to 12 that divides both widths."""
    return max(n for n in range(1, _MOST_RELATION_HEADS + 1) if student_width % n == teacher_width % n == 0)


def _log_relation(vectors: Tensor, mask: Tensor, heads: int) -> Tensor:
    """[B, T, W] → log probabilities over the real tokens [B, H, T, T]."""
    parts = vectors.float().reshape(*mask.shape, heads, -1).transpose(1, 2)  # [B, H, T, d]
    scores = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
    return F.log_softmax(scores.masked_fill(~mask[:, None, None, :], _MASKED), dim=-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


# --- looking inside


class _Watched:
    """A model whose hidden tensors are recorded."""

    def __init__(self, model: PreTrainedModel, names: Collection[str], who: str) -> None:
        self._model, self._who = model, who
        self._reads = set(signature(model.forward).parameters)
        self._tapped: tuple[str, ...] = ()
        self._seen: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self.flags = {"output_hidden_states": True} if "hidden" in names else {}
        if "attention" in names:
            self.flags["output_attentions"] = True
        self._wants_vectors = "relation" in names

    def __call__(self, inputs: dict[str, Tensor]) -> Activations:
        """Run the model on its inputs' device; drop what it doesn't take (token types, for DistilBERT)."""
        if self._model.device != inputs["input_ids"].device:
            self._model.to(inputs["input_ids"].device)
        read = {name: value for name, value in inputs.items() if name in self._reads}
        return self.inside(self._model(**read, **self.flags))

    def inside(self, output: Any) -> Activations:
        """Return the tensors of the pass with this output; vectors only once, so that they are freed after the step."""
        vectors = tuple(self._seen.pop(name) for name in self._tapped)
        if len(vectors) == 1:  # queries, keys and values side by side
            vectors = vectors[0].chunk(3, dim=-1)
        return Activations(output.get("hidden_states") or (), output.get("attentions") or (), vectors)

    @torch.no_grad()
    def look(self) -> Activations:
        """Set the hooks and learn the shapes from two tokens; raise ModelError where the model lacks a tensor."""
        was_training = self._model.training
        self._model.eval()
        tokens = torch.ones(1, 2, dtype=torch.int64, device=self._model.device)
        inputs = {"input_ids": tokens, "attention_mask": tokens}
        states = self._model(**inputs, output_hidden_states=True).get("hidden_states")
        kind, logits = self._model.config.model_type, "Take losses of logits: kl, mse, dkd, dist"
        if not states:
            raise ModelError(f"the {self._who} has no layers to match: it is of the family {kind!r}", logits)
        if self._wants_vectors:
            self._tap(kind)
        found = self(inputs)._replace(states=states)
        if "output_attentions" in self.flags and (not found.attentions or found.attentions[0] is None):
            raise ModelError(f"the {self._who}, of the family {kind!r}, gives no attention probabilities", logits)
        self._model.train(was_training)
        return found

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _tap(self, kind: str) -> None:
        by_leaf = {name.rpartition(".")[2]: part for name, part in self._model.named_modules()}
        self._tapped = next((names for names in _TAPS if set(names) <= set(by_leaf)), ())
        if not self._tapped:
            raise ModelError(
                f"where the family {kind!r} of the {self._who} keeps queries, keys and values is not known",
                "Take hidden or attention for relation",
            )
        self._hooks.append(self._model.register_forward_pre_hook(lambda *_: self._seen.clear()))
        self._hooks += [by_leaf[name].register_forward_hook(self._note(name)) for name in self._tapped]

    def _note(self, name: str) -> Callable[..., None]:
        # DeBERTa-v2 sends its table of positions through the same layers, after the tokens; ALBERT, whose layers are
        # one and the same, sends the tokens through it once a layer, and the last counts.
        def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if name not in self._seen or not name.endswith("_proj"):
                self._seen[name] = output

        return note


def _attend(model: PreTrainedModel, implementation: str) -> None:
    if model._can_set_attn_implementation():  # the others have one alone, or change by themselves when asked
        model.set_attn_implementation(implementation)


def _check_tokens(
    ours: Sequence[dict[str, Array]], theirs: Sequence[dict[str, Array]], token_ids: Array | None
) -> None:
    for student, teacher in zip(ours, theirs, strict=True):
        ids = student["input_ids"] if token_ids is None else token_ids[student["input_ids"]]
        same = min(len(ids), len(teacher["input_ids"])) - 1  # where one is cut earlier, its last token is an end
        if not np.array_equal(ids[:same], teacher["input_ids"][:same]):
            raise ModelError(
                "losses of layers compare token with token, and the student's tokenizer is not the teacher's",
                "Take losses of logits: kl, mse, dkd, dist",
            )
