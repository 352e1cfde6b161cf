"""Every setting of a spec, declared once with its type, default, unit and help."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kdexport.spec.ask import Ask, Count, Positive, Section, Text, helped, some
from kdexport.tasks import BUILT_IN, DEFAULT

Texts = Annotated[tuple[Text, ...], Meta(min_length=1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Length = Annotated[int, Meta(ge=8, le=8192)]
Problem = Literal[
    "single-label", "multi-label", "regression", "seq2seq",
    "similarity", "retrieval", "retrieval-mrr", "retrieval-recall",
]  # fmt: skip
Dtype = Literal["float32", "bfloat16"]
LossName = Literal[
    "ctc", "kl", "reverse-kl", "jsd", "soft-ce", "mse", "bce", "dkd", "dist", "hidden", "attention", "relation",
    "cosine", "similarity", "margin-mse", "listwise-kl",
]  # fmt: skip
Augmentation = Literal["mask", "neighbours", "ngram", "shuffle"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
Runtime = Literal["torch", "torch-compile", "torch-cudagraphs", "onnxruntime", "openvino"]
Device = Literal["cpu", "cuda"]


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value that moves linearly from the first step of training to the last: `{from: 4, to: 1}`."""

    start: Annotated[float, Meta(ge=0)] = msgspec.field(name="from")
    end: Annotated[float, Meta(ge=0)] = msgspec.field(name="to")


Weight = Annotated[float, Meta(ge=0)] | Schedule


class Data(Section, frozen=True):
    """Where the rows come from. Columns are guessed when their names are obvious."""

    train: Annotated[
        Text,
        helped(
            "CSV, JSONL or Parquet file, text for causal-lm, a folder with train.*, validation.* and test.*, a folder "
            "of images or recordings (labels as subfolders, or metadata.csv), a folder in BEIR's layout, or a hub id"
        ),
    ]
    validation: Annotated[Text | None, helped("split off from train (10 %, stratified) when absent")] = None
    test: Annotated[Text | None, helped("split off from train (20 %, stratified) when absent")] = None
    text: Annotated[Text | None, helped("the column of texts, images or sound; guessed when its name is obvious")] = (
        None
    )
    text_pair: Annotated[Text | None, helped("the second text's column, for pairs of texts")] = None
    label: Annotated[Text | None, helped("the label's column; guessed when its name is obvious")] = None
    labels: Annotated[
        Annotated[tuple[Text, ...], Meta(min_length=2)] | Annotated[dict[Text, str], Meta(min_length=2)] | None,
        helped(
            "of text-classification: all labels, so that rows need none; a list, or {label: description} for a teacher "
            "that is asked in words; those of the rows when absent"
        ),
    ] = None
    problem: Annotated[
        Problem,
        helped(
            "of text-classification: one label a text, several (lists, or with | between), or a number; of speech "
            "seq2seq: the student is a smaller Whisper, as layers of one always are; of sentence-embedding what "
            "judges: similarity (Spearman, of scored pairs), or retrieval (nDCG@10), retrieval-mrr or "
            "retrieval-recall (of a folder in BEIR's layout); by the data when absent"
        ),
    ] = "single-label"
    unlabelled: Annotated[
        Text | None, helped("more texts, which the teacher alone labels: CSV, TSV, JSONL or a text a line")
    ] = None
    sentences: Annotated[
        Text | None,
        helped(
            "of speech without transcripts: a file of all that may be said, one a line; the nearest sentence is "
            "taken, and recordings with none are left out"
        ),
    ] = None
    language: Annotated[
        Text | None,
        helped(
            "of speech with a multilingual Whisper: the language that is spoken, by code or English name (de, german); "
            "when absent the one that the teacher hears"
        ),
    ] = None
    words: Annotated[
        Text,
        helped(
            "of speech: open; closed, which recognises the words of the train transcripts alone, as for digits or "
            "commands; or a file of all words that may be said, one a line, or of sentences of them"
        ),
    ] = "open"
    candidates: Annotated[
        Count,
        helped(
            "of rankings in BEIR's layout: the documents of each query, the judged ones and as many of the best others "
            "by BM25 as are missing"
        ),
    ] = 30
    max_length: Annotated[
        Length | None,
        helped("tokens of each text; when absent 128, 512 of embeddings, or as many as the teacher reads"),
    ] = None
    max_chars: Annotated[Count, helped("a longer text is a bad row: most often a quote that was never closed")] = (
        100_000
    )
    cache_mb: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        helped(
            "of images and sound: memory for what is decoded in training, in MB; what does not fit is in a temporary "
            "file; an eighth of the machine's memory when absent"
        ),
    ] = None
    skip_bad_rows: Annotated[bool, helped("skip and count bad rows, instead of stopping")] = False
    drop_duplicates: Annotated[bool, helped("drop texts from train that are in validation or test as well")] = True


class TeacherTraining(Section, frozen=True):
    """Fine-tuning of the teacher."""

    epochs: Annotated[
        Count | None, helped("passes over the training rows; derived from rows, labels and width when absent")
    ] = None
    learning_rate: Annotated[
        Positive | None,
        helped("the highest; warmed up over 10 %, then linear to zero; derived from the teacher's width when absent"),
    ] = None
    batch_size: Annotated[Count | None, helped("rows a step; 16 or 32, by the number of rows, when absent")] = None
    patience: Annotated[
        Count | None, helped("stop after so many epochs without a better validation metric; absent: never")
    ] = None
    dtype: Annotated[Dtype, helped("of products; bfloat16 is quicker where supported; weights stay float32")] = (
        "float32"
    )
    accumulate: Annotated[
        Count,
        helped("passes over a step's rows, each with a part of them, where memory lacks; the steps stay the same"),
    ] = 1
    checkpoint_gradients: Annotated[
        bool, helped("compute layers again for the gradient instead of storing them: less memory, slower steps")
    ] = False
    compile: Annotated[bool, helped("run the model through torch.compile, which needs a C compiler")] = False


class Teacher(Section, frozen=True):
    """The model that is distilled."""

    model: Annotated[
        Text | Texts,
        helped(
            "Hugging Face folder or hub id (sentence-transformers/all-MiniLM-L6-v2 comes with kdexport[demo]), PEFT "
            "adapter, ONNX artifact, stored logits, or a list of them; openai:MODEL@URL, a language model behind an "
            "endpoint; answers.jsonl, its answers or others'; zero-shot:MODEL, a model of language inference"
        ),
    ]
    weights: Annotated[tuple[Positive, ...] | None, helped("of several teachers; equal when absent")] = None
    combine: Annotated[
        Literal["mean", "log-mean"],
        helped("of several teachers or passes: arithmetic or geometric mean of their probabilities"),
    ] = "log-mean"
    passes: Annotated[Count, helped("stochastic passes over each text, combined; see `noise`")] = 1
    noise: Annotated[Literal["dropout", "augment"], helped("of passes: MC dropout, or augmented texts")] = "dropout"
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"],
        helped("of the weights while it computes soft targets; int8 needs a CUDA device and bitsandbytes"),
    ] = "float32"
    devices: Annotated[
        Literal["one", "all"],
        helped("that hold the teacher while it computes soft targets: all is for one too large for a single GPU"),
    ] = "one"
    pooling: Annotated[
        Literal["mean", "first", "last"] | None,
        helped(
            "of an encoder as teacher of vectors: which tokens a text's vector is of; as its folder says when absent"
        ),
    ] = None
    ask: Annotated[Ask | None, helped("of openai:MODEL@URL; the defaults when absent")] = None
    hypothesis: Annotated[
        Text, helped("of zero-shot:MODEL: the sentence whose truth is asked, with {} for the label or its description")
    ] = "This example is {}."
    corrections: Annotated[
        Text | None,
        helped("a file of texts and the labels that a person gave them, which replace the teacher's answers"),
    ] = None
    train: Annotated[
        TeacherTraining | None,
        helped("fine-tune it on the data first; absent: only where it has no trained head for the task"),
    ] = None


class Student(Section, frozen=True):
    """The model that is trained."""

    model: Annotated[
        Text | Texts | None,
        helped(
            "tiny (2 layers × 128), mini (4 × 256), small (4 × 512), 3x192, layers:3 (the teacher's lowest), spread:3, "
            "layers:0+2+5, bag, cnn, gru, cnn:512 (features), conv, conv:32 (channels; of images and sound), gru:80 "
            "(of speech), or a Hugging Face folder or hub id; a list is the ladder that a search climbs; when absent "
            "tiny, conv, or spread:3 for words and numbers; with a budget a ladder"
        ),
    ] = None
    base: Annotated[
        Text | None,
        helped(
            "folder or hub id whose tokenizer and weights students are made from, where the teacher has none to give; "
            "when absent sentence-transformers/all-MiniLM-L6-v2"
        ),
    ] = None
    vocabulary: Annotated[
        Literal["whole", "corpus"] | None,
        helped(
            "the teacher's tokens, or those of the training texts; when absent corpus, or whole for a folder or hub id "
            "and for token-classification, where words that training lacks are the point"
        ),
    ] = None
    embedding: Annotated[
        Count | None,
        helped(
            "width of the token embeddings; of bag, cnn, gru the teacher's when absent; a narrow student gets them "
            "behind a learned projection, and pools over all tokens"
        ),
    ] = None
    start: Annotated[
        Literal["projections", "embeddings"],
        helped(
            "initial weights of a narrower student: the teacher's embeddings and layers by PCA, or embeddings alone"
        ),
    ] = "projections"

    dimensions: Annotated[
        Count | None,
        helped(
            "of the vectors of sentence-embedding: the principal axes of the teacher's vectors, the first ones most "
            "important; when absent the teacher's own, or 256 of a bag"
        ),
    ] = None
    seconds: Annotated[
        Annotated[float, Meta(ge=1, le=30)] | None,
        helped(
            "of a smaller Whisper: sound that it reads at once, in s; the longest recording when absent; longer ones "
            "are read in overlapping parts"
        ),
    ] = None


class Augment(Section, frozen=True):
    """Augmented training texts, which the teacher labels anew."""

    views: Annotated[int, Meta(ge=0, description="augmented texts of each text; 0: none")] = 8
    kinds: Annotated[
        tuple[Augmentation, ...],
        some(
            "mask: words masked; neighbours: words replaced by near ones in the teacher's embeddings; ngram: a part "
            "of the text; shuffle: its sentences in another order"
        ),
    ] = ("mask", "neighbours", "ngram")
    share: Annotated[Fraction, helped("fraction of the words to change, about")] = 0.2


class Distill(Section, frozen=True):
    """Training of the student on the teacher's soft targets: alpha · Σ losses + (1 − alpha) · cross-entropy."""

    loss: Annotated[
        LossName | dict[LossName, Weight],
        helped(
            "kl, reverse-kl, jsd, soft-ce, mse, bce, dkd, dist (of logits), cosine, similarity (of vectors), "
            "margin-mse, listwise-kl (of a query's scores), hidden, attention, relation (of layers), or {name: weight}"
        ),
    ] = "kl"
    temperature: Annotated[
        Positive | Schedule, helped("T: softens the logits of both; 1 leaves them as they are; or {from: 4, to: 1}")
    ] = 4.0
    alpha: Annotated[
        Fraction | Schedule,
        helped("weight of the distillation loss against the label loss (λ in some papers); 0.9 of causal-lm"),
    ] = 1.0
    epochs: Annotated[Count | None, helped("passes over the training rows; derived from their number if absent")] = None
    patience: Annotated[
        Count | None, helped("stop after so many epochs without a better validation metric; the best epoch is used")
    ] = None
    learning_rate: Annotated[Positive | None, helped("the highest; derived from the student's width when absent")] = (
        None
    )
    batch_size: Annotated[
        Count | None, helped("rows a step; when absent 32, or 8 or 16 for speech from random weights, by their number")
    ] = None
    augment: Annotated[
        Augment | None,
        helped("also train on augmented texts; absent: where the teacher is sure of its answers to the training texts"),
    ] = None
    samples: Annotated[
        Count | None, helped("of causal-lm: also train on so many passages that the teacher writes; absent: none")
    ] = None
    max_word_error: Annotated[
        Fraction | None,
        helped(
            "of speech: where the teacher's text has a higher word error rate against the transcript, the transcript "
            "alone teaches; absent: no limit"
        ),
    ] = None
    dtype: Annotated[Dtype, helped("of products in training; see teacher.train.dtype")] = "float32"
    accumulate: Annotated[Count, helped("passes over a step's rows; see teacher.train.accumulate")] = 1
    checkpoint_gradients: Annotated[bool, helped("less memory; see teacher.train.checkpoint_gradients")] = False
    compile: Annotated[bool, helped("by torch.compile; see teacher.train.compile")] = False
    seeds: Annotated[Count, helped("train student and baseline so many times: mean and standard deviation")] = 1
    baseline: Annotated[bool, helped("also train the same student on labels alone, for comparison")] = True


class Export(Section, frozen=True):
    """The precisions of the exported files."""

    variants: Annotated[tuple[Precision, ...], some("precisions to export; fp32 always, int4 of causal-lm")] = (
        "fp32",
        "int8",
    )
    max_int8_loss: Annotated[
        Fraction, helped("int8 is recommended only if its metric is at most this far below fp32's")
    ] = 0.01


class Budget(Section, frozen=True):
    """Limits on the recommended file; absent ones do not bind."""

    p99_ms: Annotated[Positive | None, helped("99th percentile of the latency at batch 1, in ms")] = None
    size_mb: Annotated[Positive | None, helped("size of the ONNX file, in MB (10⁶ bytes)")] = None
    retention: Annotated[Fraction | None, helped("fraction of the teacher's metric on the test split")] = None
    time_limit_s: Annotated[Positive | None, helped("a search trains no new student after this, in s")] = None

    def binds(self) -> bool:
        """Return whether any limit is set."""
        return any(limit is not None for limit in (self.p99_ms, self.size_mb, self.retention))


class Bench(Section, frozen=True):
    """How latency is measured."""

    threads: Annotated[tuple[Count, ...], some("threads of the model's runtime; the first is the report's")] = (1,)
    batch_sizes: Annotated[tuple[Count, ...], helped("batches that are measured beside single texts")] = (8, 32)
    runtimes: Annotated[
        tuple[Runtime, ...],
        some("torch, torch-compile, torch-cudagraphs (models); onnxruntime, openvino (files); a run adds each first"),
    ] = ("torch", "onnxruntime")
    devices: Annotated[
        tuple[Device, ...], some("cpu, cuda; unavailable ones are skipped with a warning; a run adds cpu")
    ] = ("cpu",)
    rounds: Annotated[int, Meta(ge=1, le=100, description="rounds at least; each is a new process a variant")] = 5
    round_seconds: Annotated[Positive, helped("time measured per round and variant, in s")] = 1.0
    precision: Annotated[
        Positive | None, helped("add rounds until every ratio is known to this fraction, or time is up; null: no more")
    ] = 0.05
    time_limit_s: Annotated[Positive, helped("no round begins that would end after this, in s")] = 150.0
    price_per_hour: Annotated[
        Positive | None, helped("of one core (or GPU), in any currency, for the cost of a million answers")
    ] = None


class Spec(Section, frozen=True, kw_only=True):
    """The whole job: teacher in, budget in; artifact and report out."""

    task: Annotated[
        str, Meta(description="what the model does; recognised by the data when absent",
                  extra_json_schema={"enum": [*BUILT_IN]}),
    ] = DEFAULT  # fmt: skip
    data: Data
    teacher: Teacher
    student: Student = Student()
    distill: Distill = Distill()
    export: Export = Export()
    budget: Budget = Budget()
    bench: Bench = Bench()
    seed: Annotated[int, Meta(ge=0), helped("seeds splits, initial weights and the order of rows")] = 0
