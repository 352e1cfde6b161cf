"""Sentence embedders, in the layout of Sentence-Transformers: an encoder, pooling, dense layers, normalisation.

    config.json, weights      the encoder: a transformer, or a table of token vectors
    modules.json              the steps in their order
    1_Pooling/config.json     the mean over the tokens, the first or the last one
    2_Dense/ …                a linear layer, and its activation
    config_sentence_transformers.json      prompts by name, which are put before a text

Importing this module registers the table with Transformers' Auto classes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, cached_file

from kdexport.errors import ModelError
from kdexport.files import write_json

TABLE = "kdexport-table"
STEPS = ("modules.json", "*_*/*")  # the files of what follows the encoder
Pooling = Literal["mean", "first", "last"]
# Sentence-Transformers' names, in files of before and after version 5.
_MODES = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
_NAMED = {"cls": "first", "mean": "mean", "lasttoken": "last"}
_PROMPTS = "config_sentence_transformers.json"
_READS = "sentence_bert_config.json"
_TYPES = "sentence_transformers.models."


class TableConfig(PretrainedConfig):  # type: ignore[misc] # transformers ships no types
    """Shape of a `Table`."""

    model_type = TABLE

    def __init__(self, vocab_size: int = 30522, hidden_size: int = 256, pad_token_id: int = 0, **settings: Any) -> None:
        super().__init__(vocab_size=vocab_size, hidden_size=hidden_size, pad_token_id=pad_token_id, **settings)


class Table(PreTrainedModel):  # type: ignore[misc]
    """A static encoder: each token has its vector, whatever stands beside it (model2vec, Tulkens and van Dongen 2024).

    A token's weight in the mean over a text is the length of its vector.
    """

    config_class = TableConfig
    base_model_prefix = "table"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)

    def get_input_embeddings(self) -> nn.Embedding:  # noqa: D102
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # noqa: D102
        self.embeddings = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Return the vectors [B, T, H] of token ids int64 [B, T]."""
        return BaseModelOutput(last_hidden_state=self.embeddings(input_ids))


AutoConfig.register(TABLE, TableConfig, exist_ok=True)
AutoModel.register(TableConfig, Table, exist_ok=True)


class Steps(NamedTuple):
    """Pooling, normalisation, prompts by name, and the most tokens of a text."""

    pooling: Pooling = "mean"
    normalize: bool = True
    prompts: Mapping[str, str] = {}  # of a tuple, and never changed
    default_prompt: str | None = None
    reads: int = 2**16


@dataclass
class EmbedderOutput(ModelOutput):  # type: ignore[misc]
    """Vectors [B, D] as `logits`; states of tokens [B, T, H]; those of all layers and attention where asked for."""

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Embedder(PreTrainedModel):  # type: ignore[misc]
    """An encoder's states of tokens → one vector for each text, [B, D]."""

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True  # as its encoder

    base_model_prefix = "encoder"

    def __init__(self, encoder: PreTrainedModel, steps: Steps, dense: Sequence[nn.Module] = ()) -> None:
        super().__init__(encoder.config)
        if _has_pooler(encoder.config):
            encoder.pooler = None
        self.encoder, self.dense, self.steps = encoder, nn.ModuleList(dense), steps
        self.supports_gradient_checkpointing = encoder.supports_gradient_checkpointing
        self.post_init()

    def init_weights(self) -> None:
        """Keep the weights of its parts."""

    @classmethod
    def open(cls, model: str | Path, pooling: Pooling | None = None) -> "Embedder":
        """Open a folder or hub id; `pooling` is for a plain encoder, whose folder names none.

        Raises:
            ModelError: the steps behind the encoder can't be read, or are of an unknown kind.
        """
        steps, dense = read_steps(model, pooling)
        how = {"dtype": torch.float32, "output_loading_info": True}
        if _has_pooler(AutoConfig.from_pretrained(model)):
            how["add_pooling_layer"] = False
        encoder, found = AutoModel.from_pretrained(model, **how)
        if missing := sorted(name for name in found["missing_keys"] if "pooler" not in name):
            raise ModelError(f"model {model!r} lacks trained weights: {', '.join(missing[:4])}", "Save the whole model")
        return cls(encoder, steps, dense).eval()  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Write all files but the tokenizer's."""
        self.encoder.save_pretrained(folder)
        write_steps(folder, self.steps, self.encoder.config.hidden_size, list(self.dense), self.encoder)

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Set that of the encoder."""
        self.encoder.set_attn_implementation(attn_implementation)

    @property
    def width(self) -> int:
        """The length D of a vector."""
        last = list(self.dense)[-1] if len(self.dense) else None
        return last.out_features if isinstance(last, Dense) else int(self.encoder.config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.encoder.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *arguments: Any, **settings: Any) -> Any:  # noqa: D102
        return self.encoder.resize_token_embeddings(*arguments, **settings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> EmbedderOutput:
        """Return the vectors of token ids int64 [B, T] and their mask [B, T]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more)
        states = found.last_hidden_state
        vectors = pooled(states, attention_mask, self.steps.pooling)
        for layer in self.dense:
            vectors = layer(vectors)
        if self.steps.normalize:
            vectors = vectors / vectors.square().sum(dim=-1, keepdim=True).clamp(min=1e-24).sqrt()
        return EmbedderOutput(vectors, states, found.get("hidden_states"), found.get("attentions"))


class Dense(nn.Linear):
    """A linear layer behind the pooling, with the activation that Sentence-Transformers names for it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "") -> None:
        super().__init__(in_features, out_features, bias)
        self.activation = activation or "torch.nn.modules.linear.Identity"
        self._function = locate(self.activation)()  # type: ignore[operator]

    def forward(self, vectors: Tensor) -> Tensor:
        """Return [B, out] of [B, in]."""
        return self._function(super().forward(vectors))  # type: ignore[no-any-return]


def pooled(states: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector [B, H] of the states [B, T, H] of the tokens that the mask [B, T] names."""
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    if pooling == "mean":
        return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
    length = states.shape[1]
    places = torch.arange(length, device=states.device).unsqueeze(0)
    there = attention_mask.bool()
    place = (
        places.masked_fill(~there, -1).amax(dim=1)
        if pooling == "last"
        else places.masked_fill(~there, length).amin(dim=1)
    )
    return states.gather(1, place.clamp(0, length - 1)[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


# --- files


def is_embedder(model: str | Path) -> bool:
    """Return whether a folder or hub id has Sentence-Transformers' list of modules."""
    return _file(model, "modules.json") is not None


def student_pooling(model: str | Path) -> Pooling | None:
    """Return the pooling of a plain encoder that becomes a student, None where its folder names one."""
    return None if is_embedder(model) else "mean"


def is_static(model: str | Path) -> bool:
    """Return whether a folder or hub id is a table of tokens, as model2vec and Sentence-Transformers write it."""
    modules, config = (_read(model, name) or () for name in ("modules.json", "config.json"))
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    return "StaticEmbedding" in kinds or dict(config).get("model_type") == "model2vec"


def read_steps(model: str | Path, pooling: Pooling | None = None) -> tuple[Steps, list[nn.Module]]:
    """Read what follows the encoder; see `Embedder.open`."""
    prompts = _read(model, _PROMPTS) or {}
    reads = int((_read(model, _READS) or {}).get("max_seq_length") or Steps().reads)
    named = (prompts.get("prompts") or {}, prompts.get("default_prompt_name"), reads)
    if (modules := _read(model, "modules.json")) is None:
        if pooling is None:
            what = f"model {str(model)!r} is a plain encoder, and names no pooling"
            raise ModelError(what, "Name it: teacher.pooling mean, first or last")
        return Steps(pooling, True, *named), []
    found, dense, normalize = pooling, list[nn.Module](), False
    for module in modules:
        kind, path = str(module["type"]).rpartition(".")[2], module["path"]
        if kind == "Pooling":
            config = _read(model, f"{path}/config.json") or {}
            found = pooling or _pooling(model, config)
            if named[0] and config.get("include_prompt") is False:
                raise ModelError(f"model {str(model)!r} pools without its prompts, which is not read", _ANOTHER)
        elif kind == "Dense" and not normalize:
            dense.append(_dense(model, path))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ModelError(f"model {str(model)!r} has a module {kind!r}, which is not read", _ANOTHER)
    if found is None:
        raise ModelError(f"model {str(model)!r} names no pooling", "Name it: teacher.pooling mean, first or last")
    return Steps(found, normalize, *named), dense


def write_steps(
    folder: Path, steps: Steps, width: int, dense: Sequence[nn.Module] = (), encoder: PreTrainedModel | None = None
) -> None:
    """Write the files beside the encoder's, as every version of Sentence-Transformers reads them."""
    kinds = ["Transformer", "Pooling", *["Dense"] * len(dense), *(["Normalize"] if steps.normalize else [])]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    listed = zip(kinds, paths, strict=True)
    modules = [{"idx": i, "name": str(i), "path": path, "type": _TYPES + kind} for i, (kind, path) in enumerate(listed)]
    write_json(folder / "modules.json", modules)
    modes = dict.fromkeys((*_MODES.values(), "pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens"), False)
    (folder / paths[1]).mkdir(exist_ok=True)
    pools = {"word_embedding_dimension": width, **modes, _MODES[steps.pooling]: True}
    write_json(folder / paths[1] / "config.json", pools)
    for layer, path in zip(dense, paths[2:], strict=False):
        assert isinstance(layer, Dense)
        (folder / path).mkdir(exist_ok=True)
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
        write_json(folder / path / "config.json", sizes | {"activation_function": layer.activation})
        weights = {f"linear.{name}": value.contiguous() for name, value in layer.state_dict().items()}
        save_file(weights, folder / path / "model.safetensors")
    if steps.reads < Steps().reads:
        write_json(folder / _READS, {"max_seq_length": steps.reads, "do_lower_case": False})
    write_json(folder / _PROMPTS, {
        "prompts": steps.prompts, "default_prompt_name": steps.default_prompt, "similarity_fn_name": "cosine",
    })  # fmt: skip


def _pooling(model: str | Path, config: dict[str, Any]) -> Pooling:
    if isinstance(mode := config.get("pooling_mode"), str):  # as version 5 writes it
        chosen = [_NAMED.get(mode, mode)]
    else:
        on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
        chosen = [next((ours for ours, theirs in _MODES.items() if theirs == name), name) for name in on]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        what = f"model {str(model)!r} pools by {' and '.join(chosen) or 'nothing'}, which is not read"
        raise ModelError(what, "Name one with teacher.pooling: mean, first or last")
    return chosen[0]  # type: ignore[return-value]


def _dense(model: str | Path, path: str) -> Dense:
    config, file = _read(model, f"{path}/config.json"), _file(model, f"{path}/model.safetensors")
    if config is None or file is None:
        raise ModelError(f"model {str(model)!r}: {path} lacks config.json or model.safetensors", "Save it anew")
    activation = str(config.get("activation_function", ""))
    known = locate(activation) if activation.startswith("torch.nn.") else None
    if activation and not (isinstance(known, type) and issubclass(known, nn.Module)):
        raise ModelError(f"model {str(model)!r}: {path} has the activation {activation!r}", "Take one of torch.nn")
    layer = Dense(config["in_features"], config["out_features"], config.get("bias", True), activation)
    layer.load_state_dict({name.removeprefix("linear."): value for name, value in load_file(file).items()})
    return layer


def _read(model: str | Path, name: str) -> Any:
    file = _file(model, name)
    try:
        return None if file is None else json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise ModelError(f"{file} can't be read: {error}") from None


def _file(model: str | Path, name: str) -> str | None:
    return cached_file(str(model), name, _raise_exceptions_for_missing_entries=False)  # type: ignore[no-any-return]


def _has_pooler(config: PretrainedConfig) -> bool:
    """Return whether the encoder may have BERT's own pooler, which embeddings do not read."""
    return type(config).__name__.removesuffix("Config") in _POOLERS


_ANOTHER = "Name another teacher"
_POOLERS = {"Bert", "Roberta", "XLMRoberta", "Camembert", "MPNet", "Albert"}
