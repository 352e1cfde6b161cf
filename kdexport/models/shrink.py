"""Build students from a teacher's weights: some of its layers, or narrower ones.

A narrow student sees the teacher's hidden states x [H] as Pᵀx, with P [H, width] the principal axes of the teacher's
token embeddings. What reads the hidden states reads through P, what writes into them writes through Pᵀ.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdexport.errors import ModelError


class Narrowed(NamedTuple):
    """A narrow student, and how much of its teacher it has."""

    model: PreTrainedModel
    kept_variance: float  # fraction of the variance of the word embeddings that reaches the first layer
    projected_layers: int  # layers that start from the teacher's
    stream: Tensor  # [H, width], the axes of its hidden states in the teacher's


# --- some of the layers


def layers_of(total: int, wanted: int | Sequence[int], *, spread: bool = False) -> list[int]:
    """Return the teacher's layers to keep: the lowest `wanted`, as many spread evenly, or those named.

    Spread ones include the first and the last (Sanh et al. 2019 take every other one of BERT's).

    Raises:
        ModelError: more than there are, none, or names that aren't ascending layers of the teacher.
    """
    if not isinstance(wanted, int):
        found = list(wanted)
        if not found or found != sorted(set(found)) or found[0] < 0 or found[-1] >= total:
            raise ModelError(
                f"the teacher's layers are 0 to {total - 1}; {found} are not some of these in ascending order",
                f"Name them like {layers_of(total, min(3, total), spread=True)}",
            )
        return found
    if not 0 < wanted <= total:
        raise ModelError(f"the teacher has {total} layers, not {wanted}", f"Ask for 1 to {total}")
    if not spread or wanted == 1:
        return list(range(wanted))
    return [round(i * (total - 1) / (wanted - 1)) for i in range(wanted)]


def keep_layers(teacher: PreTrainedModel, indices: Sequence[int]) -> PreTrainedModel:
    """Build a student of the teacher's embeddings, some of its layers (ascending, from 0) and its head.

    Raises:
        ModelError: there are no such layers, or one would be another kind of layer at its new place.
    """
    indices = layers_of(teacher.config.num_hidden_layers, indices)
    _check_kinds(teacher.config, indices)
    student = type(teacher)(with_layers(teacher.config, indices))
    student.load_state_dict(teacher.state_dict(), strict=False)  # all but the layers is the same in both
    theirs = _layers(teacher)
    for i, layer in zip(indices, _layers(student), strict=False):
        layer.load_state_dict(theirs[i].state_dict(), strict=False)  # WavLM's first has a table more
    return student.eval()


def with_layers(config: Any, indices: Sequence[int]) -> Any:
    """Return a configuration with some of its layers; where it lists their kinds, with those of these layers."""
    config = deepcopy(config)
    for name in ("layer_types", "mlp_layer_types"):
        if kinds := getattr(config, name, None):
            setattr(config, name, [kinds[i] for i in indices])
    if hasattr(config, "layerdrop"):  # Wav2Vec2 leaves out layers at random in training
        config.layerdrop = 0.0
    config.num_hidden_layers = len(indices)
    return config


def _check_kinds(config: Any, indices: list[int]) -> None:
    """ModernBERT's layers attend globally or locally by their index, and its first has no first norm."""
    period = getattr(config, "global_attn_every_n_layers", None)
    for new, old in enumerate(indices):
        if period and (old == 0, old % period == 0) != (new == 0, new % period == 0):
            raise ModelError(
                f"layer {old} of a {config.model_type} teacher can't be layer {new}: the first has no norm before "
                f"attention, and of every {period} the first attends to all tokens, the others to near ones",
                "Keep the lowest layers",
            )


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return a model's layers; none where one runs several times, as in ALBERT."""
    config = model.config
    if getattr(config, "num_hidden_groups", None) == 1:
        return nn.ModuleList()
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    # Wav2Vec2 and its kin have lists of convolutions as well: conv_layers and pos_conv_embed.
    fitting = {name: part for name, part in lists.items() if len(part) == config.num_hidden_layers}
    found = {name: part for name, part in fitting.items() if "conv_" not in name}
    outer = [part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise ModelError(f"of a {config.model_type} model the layers can't be told", "Take another teacher")
    return outer[0]


# --- narrower ones

# A layer's query, key, value, output and norm; its feed-forward in, out and norm.
_BERT = (
    *(f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")),
    *("intermediate.dense", "output.dense", "output.LayerNorm"),
)
_DISTILBERT = (
    *(f"attention.{part}_lin" for part in ("q", "k", "v", "out")),
    *("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
)
_PARTS = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT) | {"distilbert": _DISTILBERT}
_Pair = tuple[Any, Any]  # a part of the student and the same of the teacher
# Where families with a narrow table of words keep the linear layer from it to the stream, in their base model.
_WIDENING = ("embeddings_project", "encoder.embedding_hidden_mapping_in", "embeddings.embed_proj")


@torch.no_grad()
def narrow(teacher: PreTrainedModel, layers: int, width: int, *, project_layers: bool = True) -> Narrowed:
    """Build a narrower model of the teacher's family from the teacher's weights by PCA.

    It has heads of the teacher's size where that divides the width (else of 64, else one), a feed-forward width of
    4 × width (Turc et al. 2019), and no dropout: a model this small underfits, and soft targets regularise it.

    Word, position and type embeddings are summed before the first layer, so one projection serves all three. Layers
    follow by the same projection, from the lowest up, for BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA and DistilBERT with
    heads of equal size; of attention heads and feed-forward neurons those of greatest norm stay, of what they read
    times what they write. Other families' layers, and the classifier, are random.

    Args:
        layers: of the student; those beyond the teacher's are random.
        width: of the student's hidden states, at most the teacher's. At full width the projection is the identity.
        project_layers: False leaves all layers random, and centres the word embeddings.

    Raises:
        ModelError: wider than the teacher, or a family with unknown embeddings.
    """
    student = type(teacher)(_narrow_config(teacher.config, layers, width)).eval()
    if teacher.dtype != torch.float32:
        teacher = deepcopy(teacher).float()
    names = _PARTS.get(teacher.config.model_type) if project_layers else None
    if _head_size(student.config) != _head_size(teacher.config):
        names = None
    stream, table, kept = _project_embeddings(teacher, student, centre=names is None)
    theirs, ours = teacher.get_output_embeddings(), student.get_output_embeddings()
    if theirs is not None and theirs.weight is not teacher.get_input_embeddings().weight:
        ours.weight.copy_(theirs.weight @ stream)
    if names is None:
        return Narrowed(student, kept, 0, stream)
    if table is not None:
        _project_norm(student.base_model.embeddings.LayerNorm, teacher.base_model.embeddings.LayerNorm, table)
    pairs = list(zip(_layers(student), _layers(teacher), strict=False))
    for ours, theirs in pairs:
        parts: list[_Pair] = [(ours.get_submodule(name), theirs.get_submodule(name)) for name in names]
        _project_units(parts[:3], parts[3], stream, _head_size(teacher.config))
        _project_norm(*parts[4], stream)
        _project_units(parts[5:6], parts[6], stream, 1)
        _project_norm(*parts[7], stream)
    return Narrowed(student, kept, len(pairs), stream)


def _narrow_config(teacher: Any, layers: int, width: int) -> Any:
    if width > teacher.hidden_size:
        raise ModelError(f"the student is {width} wide, the teacher {teacher.hidden_size}", "Take a smaller one")
    heads = next((width // size for size in (_head_size(teacher), 64) if width % size == 0), 1)
    config = with_layers(teacher, [i % teacher.num_hidden_layers for i in range(layers)])
    if hasattr(teacher, "embedding_size"):  # ELECTRA's and ALBERT's table of words may be narrower than their stream
        config.embedding_size = min(width, teacher.embedding_size)
    for name, value in {
        "hidden_size": width,
        "pooler_hidden_size": width,
        "num_attention_heads": heads,
        "attention_head_size": width // heads,
        "head_dim": width // heads,
        "num_key_value_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_dim": 4 * width,  # DistilBERT's name for it
    }.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float | int):
            setattr(config, name, 0.0)
    return config


def _head_size(config: Any) -> int:
    return int(getattr(config, "attention_head_size", None) or config.hidden_size // config.num_attention_heads)


def _project_embeddings(
    teacher: PreTrainedModel, student: PreTrainedModel, *, centre: bool
) -> tuple[Tensor, Tensor | None, float]:
    """Fill the student's tables.

    Returns:
        The axes [H, width] of the hidden states; those [E, E'] of the table, None where it has to be turned into the
        hidden states' own; the retained fraction of the word table's variance.
    """
    words = teacher.get_input_embeddings().weight
    mean = words.mean(dim=0)
    variance = torch.cov((words - mean).T)  # [E, E]
    theirs, ours = _widening(teacher), _widening(student)
    if theirs is None and len(variance) != teacher.config.hidden_size:
        raise ModelError(f"a {teacher.config.model_type} model's embeddings can't be narrowed", "Keep whole layers")
    widen = theirs.weight if theirs else torch.eye(len(variance))  # [H, E]
    stream = _axes(widen @ variance @ widen.T, student.config.hidden_size)
    table = _axes(variance, student.get_input_embeddings().embedding_dim) if ours else widen.T @ stream
    seen = table  # what becomes of a row of words on its way into the student's stream
    if ours:
        ours.weight.copy_(stream.T @ widen @ table)
        seen = table @ ours.weight.T
        if ours.bias is not None:
            ours.bias.copy_(stream.T @ theirs.bias if theirs else torch.zeros_like(ours.bias))
    lost = widen - stream @ seen.T
    kept = 1 - float((lost @ variance * lost).sum() / (widen @ variance * widen).sum())
    tables = _tables(student)
    for name, rows in _tables(teacher).items():
        shift = mean if centre and rows.data_ptr() == words.data_ptr() else 0
        tables[name].copy_((rows - shift) @ table)
    return stream, table if ours or not theirs else None, kept


def _widening(model: PreTrainedModel) -> nn.Linear | None:
    """Return the linear layer from the table of words to the hidden states, if there is one."""
    parts = dict(model.base_model.named_modules())
    return next((parts[name] for name in _WIDENING if isinstance(parts.get(name), nn.Linear)), None)


def _tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tables that are summed into the first layer's input, by name."""
    base = model.base_model
    if not hasattr(base, "embeddings"):  # GPT-2's and Llama's stand in the model itself
        return {name: part.weight for name, part in base.named_children() if isinstance(part, nn.Embedding)}
    block = base.embeddings
    return {name: part.weight for name, part in block.named_modules() if isinstance(part, nn.Embedding)}


def _axes(covariance: Tensor, width: int) -> Tensor:
    """Return an orthonormal basis [H, width]: 1, the direction that layer norms remove, then the principal axes.

    It is turned so that 1 of the wide vectors is 1 of the narrow ones. At full width it is the identity.
    """
    size = len(covariance)
    if width == size:
        return torch.eye(size)
    ones = torch.full((size, 1), size**-0.5, dtype=torch.double)
    others = torch.eye(size, dtype=torch.double) - ones @ ones.T
    # Less the trace, 1 comes last of all, even where there are axes without variance.
    axes = torch.linalg.eigh(others @ covariance.double() @ others - covariance.trace() * ones @ ones.T).eigenvectors
    basis = torch.cat([ones, axes[:, size - width + 1 :].flip(1)], dim=1)
    mirror = torch.full((width,), -(width**-0.5), dtype=torch.double)  # Householder's, of the first axis and 1
    mirror[0] += 1
    return (basis - 2 * torch.outer(basis @ mirror, mirror) / mirror.dot(mirror)).float()


def _project_norm(ours: Any, theirs: Any, axes: Tensor) -> None:
    """Project a layer norm: the bias exactly, the gain as the average of those that an axis mixes.

    A norm makes vectors √H long, ours √width: the gain makes up for it.
    """
    ours.weight.copy_((axes**2).T @ theirs.weight * (len(axes) / axes.shape[1]) ** 0.5)
    ours.bias.copy_(axes.T @ theirs.bias)


def _project_units(readers: list[_Pair], writer: _Pair, stream: Tensor, size: int) -> None:
    """Project attention heads, or neurons (`size` 1), of greatest norm in reading times writing.

    Where the student has more of them, those beyond the teacher's write zeros at first.
    """
    read, write = readers[-1][1].weight @ stream, stream.T @ writer[1].weight
    strength = read.reshape(-1, size * read.shape[1]).norm(dim=1) * write.T.reshape(len(read) // size, -1).norm(dim=1)
    count = min(readers[-1][0].out_features // size, len(strength))
    chosen = strength.topk(count).indices.sort().values
    rows = (chosen[:, None] * size + torch.arange(size)).flatten()
    for ours, theirs in readers:
        ours.weight[: len(rows)] = theirs.weight[rows] @ stream
        ours.bias[: len(rows)] = theirs.bias[rows]
    writer[0].weight.zero_()
    writer[0].weight[:, : len(rows)] = write[:, rows]
    writer[0].bias.copy_(stream.T @ writer[1].bias)
