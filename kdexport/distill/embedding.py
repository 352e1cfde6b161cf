"""Students that embed: a few layers, a narrower encoder, or a table of token vectors, with their first weights."""

from collections import Counter
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.distill.targets import SoftTargets, principal_axes
from kdexport.models.embedder import Dense, Embedder, Table, TableConfig, student_pooling
from kdexport.models.loading import ModelAndProcessor, open_processor
from kdexport.models.registry import dimensions
from kdexport.models.shrink import keep_layers, layers_of, narrow
from kdexport.models.vocabulary import trim_vocabulary
from kdexport.progress import bar
from kdexport.spec import derive
from kdexport.tasks import load_task
from kdexport.tasks.metrics import Array

_TABLE_WIDTH = 256  # of a bag's vectors: docs/decisions.md
_MOST_VECTORS = 20_000  # whose principal axes are taken
_AT_ONCE = 512
# SIF's a (Arora et al. 2017, section 3): a word of this probability has half the weight of the rarest.
_RARE = 1e-3


def build_embedder(
    student: spec.Student, name: str, teacher_folder: Path, texts: Iterable[str], targets: SoftTargets | None
) -> tuple[ModelAndProcessor, str, NDArray[np.int64] | None, Array | None]:
    """Build the student that `student.model` calls `name`.

    Returns:
        The model with its tokenizer; where its weights come from; the teacher's ids of a trimmed vocabulary, int64 [V];
        and the axes [D, d] on which the teacher's vectors are learned, None where they are learned as they are.

    Raises:
        ModelError: see `shrink`.
    """
    shape, teacher = derive.shape_of(name), load_task(teacher_folder)
    (width,), task = teacher.answer_shape, teacher.name
    model = Embedder.open(name, student_pooling(name)) if shape.kind == "model" else Embedder.open(teacher_folder)
    taught = width if targets is None else targets[:1].shape[1]
    bag = shape.kind == "network"
    wanted = student.dimensions or (min(_TABLE_WIDTH, taught) if bag else width)
    axes, of_vectors = None, ""
    if targets is not None and (student.dimensions or not wanted == taught == width):
        axes, energy = principal_axes(targets[sampled(len(targets), _MOST_VECTORS)], wanted)
        of_vectors = f", vectors of {wanted} dimensions by PCA ({energy:.0%} of the teacher's energy)"
    source = name if shape.kind == "model" else str(teacher_folder)
    tokenizer = open_processor(source, task)
    kept, size = None, ""
    if derive.vocabulary(student, name, task) == "corpus":
        kept = trim_vocabulary(tokenizer, model, texts)
        size = f", a vocabulary of {len(kept):,}"
    onto = None if axes is None else torch.from_numpy(axes[: model.width].T)
    if shape.kind == "model":
        onto = None if model.width == wanted else torch.nn.init.orthogonal_(torch.empty(wanted, model.width))
        made, origin = _ending(model, model.encoder, None, onto), f"its weights from {name}"
    elif bag:
        table = _table(model, tokenizer, texts, onto)
        made = Embedder(table, model.steps._replace(pooling="mean", normalize=True))
        origin = "the teacher's vector of each token by itself, rare ones weighted"
    elif shape.kind == "narrow":
        narrowed = narrow(model.encoder, shape.layers, shape.width, project_layers=student.start == "projections")
        made = _ending(model, narrowed.model, narrowed.stream, onto)
        layers = f" and {narrowed.projected_layers} layers" if narrowed.projected_layers else ""
        origin = f"embeddings{layers} from the teacher's by PCA ({narrowed.kept_variance:.0%} of their variance)"
    else:
        wanted_layers = list(shape.indices) or shape.layers
        indices = layers_of(dimensions(model.config).layers, wanted_layers, spread=shape.kind == "spread")
        made = _ending(model, keep_layers(model.encoder, indices), None, onto)
        origin = f"the teacher's layers {', '.join(map(str, indices))}"
    return ModelAndProcessor(made, tokenizer), origin + of_vectors + size, kept, axes


@torch.no_grad()
def _ending(teacher: Embedder, encoder: PreTrainedModel, stream: Tensor | None, onto: Tensor | None) -> Embedder:
    """Put behind an encoder the way back from its `stream` [H, w], the teacher's dense layers, and `onto` [d, D]."""
    dense, linear = list(deepcopy(teacher.dense)), stream
    if dense and linear is not None:
        dense.insert(0, _dense(linear))
        linear = None
    if onto is not None:
        linear = onto if linear is None else onto @ linear
    made = Embedder(encoder, teacher.steps, [*dense, *([] if linear is None else [_dense(linear)])])
    return made.eval()  # type: ignore[no-any-return]


def _dense(weight: Tensor) -> Dense:
    layer = Dense(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    layer.bias.data.zero_()
    return layer


@torch.no_grad()
def _table(teacher: Embedder, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], onto: Tensor | None) -> Table:
    """Return a table of the teacher's vector of each token, weighted by how rare it is (model2vec)."""
    special = tokenizer("")["input_ids"]
    before, after = special[: len(special) // 2], special[len(special) // 2 :]
    size = int(teacher.encoder.get_input_embeddings().num_embeddings)
    vectors = []
    with bar("vectors of tokens", size) as advance:
        for start in range(0, size, _AT_ONCE):
            ids = [[*before, token, *after] for token in range(start, min(start + _AT_ONCE, size))]
            vectors.append(teacher(torch.tensor(ids)).logits)
            advance(len(ids))
    found = torch.nn.functional.normalize(torch.cat(vectors), dim=-1)
    found = found if onto is None else found @ onto.T
    counts = _counts(tokenizer, texts, size)
    weights = torch.from_numpy(_RARE / (_RARE + counts / max(1, counts.sum()))).to(found.dtype)
    weights[tokenizer.all_special_ids] = 0.0
    config = TableConfig(size, found.shape[1], tokenizer.pad_token_id or 0)
    table = Table(config).eval()
    table.embeddings.weight.copy_(found * weights[:, None])
    return table  # type: ignore[no-any-return]


def _counts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], size: int) -> Array:
    """Return how often each token occurs in texts, float64 [size]."""
    counts: Counter[int] = Counter()
    left: Iterator[str] = iter(texts)
    while some := list(islice(left, _AT_ONCE)):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(some, add_special_tokens=False):
            counts.update(encoding.ids)
    found = np.zeros(size)
    found[list(counts)] = list(counts.values())
    return found
