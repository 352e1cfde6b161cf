"""Embedders side by side: quality on STS-B and Cranfield, sentences a second in bulk, latency of one, memory.

    python benchmarks/embeddings.py ../shared/data ARTIFACT[:VARIANT] …      # writes results/embeddings.json
    python benchmarks/embeddings.py ../shared/data --texts texts.txt         # writes texts to train on (--few: fewer)
    python benchmarks/embeddings.py ../shared/data --quality ARTIFACT …      # of these alone

Beside the artifacts run Sentence-Transformers with the teacher in PyTorch and in ONNX Runtime, and model2vec's static
model of the teacher without training. Each subject is a process of its own on one thread, and they take turns over the
same texts: a ratio is one of a turn. Peers have an environment of their own under `.benchmarks/embeddings/`, which the
first run makes.
"""

import argparse
import csv
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TURNS, TEXTS, CALLS, BATCH = 5, 1000, 100, 32
HERE = Path(__file__).parent
PEERS = Path(".benchmarks/embeddings")
# Two environments, as model2vec and optimum-onnx want different transformers.
PACKAGES = {
    "sentence-transformers": (
        "transformers==4.57.6",
        "sentence-transformers==5.7.0",
        "optimum-onnx==0.1.0",
        "onnxruntime",
    ),
    "model2vec": ("model2vec[distill]==0.9.0",),
}


# --- a subject: a process that embeds the texts that it is given


def subject(kind: str, model: str) -> None:
    """Read requests as JSON lines: {"texts": file, "out": file or null, "times": n}; answer with seconds and memory."""
    import numpy as np
    import psutil

    embed = {"kdexport": of_kdexport, "st-torch": of_st, "st-onnx": of_st, "model2vec": of_model2vec}[kind](kind, model)
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        texts = json.loads(Path(asked["texts"]).read_text())
        times = []
        if asked["out"]:
            started = time.perf_counter()
            found = embed(texts)
            times.append(time.perf_counter() - started)
            np.save(asked["out"], np.asarray(found, np.float32))
        else:
            for text in texts:
                started = time.perf_counter()
                embed([text])
                times.append(time.perf_counter() - started)
        memory = psutil.Process().memory_info().rss / 1e6
        print(json.dumps({"seconds": times, "memory_mb": memory}), file=out, flush=True)


def of_kdexport(kind, model):
    import numpy as np

    import kdexport

    predictor = kdexport.load(model, threads=1)
    return lambda texts: np.stack([one.values for one in predictor.predict(texts, BATCH)])


def of_st(kind, model):
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    if kind == "st-torch":
        opened = SentenceTransformer(model, device="cpu")
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        opened = SentenceTransformer(model, backend="onnx", model_kwargs={"session_options": options})
    return lambda texts: opened.encode(texts, batch_size=BATCH, show_progress_bar=False)


def of_model2vec(kind, model):
    from model2vec.distill import distill

    opened = distill(model_name=model, pca_dims=256)
    return lambda texts: opened.encode(texts, show_progress_bar=False, use_multiprocessing=False)


# --- the driver


class Running:
    def __init__(self, name: str, python: str, kind: str, model: str, work: Path) -> None:
        self.name, self._work = name, work
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, __file__, "--subject", kind, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=env, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert json.loads(self._process.stdout.readline())["ready"]

    def embed(self, texts, whole=True):
        import numpy as np

        file, out = self._work / "texts.json", self._work / "out.npy"
        file.write_text(json.dumps(texts))
        print(
            json.dumps({"texts": str(file), "out": str(out) if whole else None}), file=self._process.stdin, flush=True
        )
        answer = json.loads(self._process.stdout.readline())
        return (np.load(out) if whole else None), answer

    def end(self):
        self._process.stdin.close()
        self._process.wait()


def python_of(kind: str) -> str:
    """Return the interpreter of a peer's environment, which is made at its first use."""
    home = PEERS / kind
    python = home / "bin" / "python"
    if not (home / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        torch = next(line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch, "psutil", *PACKAGES[kind]], check=True)
        (home / "made").touch()
    return str(python)


def write_texts(data: Path, file: Path, *, few: bool) -> None:
    """Write sentences of STS-B (train, validation), Cranfield's abstracts and sentences, clinc150's and BBC's.

    No text of STS-B's test pairs and no query of Cranfield is among them but by chance; a run drops those.
    """
    from kdexport.data import demo

    def column(path: str, *names: str) -> list[str]:
        with (data / path).open(encoding="utf-8") as source:
            return [row[name] for row in csv.DictReader(source) for name in names]

    pairs = [
        text for split in ("train", "validation") for text in column(f"stsb/{split}.csv", "sentence1", "sentence2")
    ]
    queries = column("clinc150/train.csv", "text")
    documents = map(json.loads, (data / "cranfield" / "corpus.jsonl").open(encoding="utf-8"))
    abstracts = [text for one in documents if (text := f"{one.get('title', '')} {one['text']}".strip())]
    parts = [part for text in abstracts for part in re.split(r"(?<= \.)\s+", text) if 30 <= len(part) <= 400]
    news = [part.strip() for one in demo.bbc_news() for part in re.split(r"(?<=[.!?])\s+|\n+", one["text"])]
    news = [part for part in news if 15 <= len(part) <= 300]
    chance = random.Random(int(few))
    chance.shuffle(parts if few else news)
    some = [*abstracts, *parts[:5000], *queries[:1500]] if few else [*queries[:8000], *abstracts, *parts, *news[:15000]]
    found = list(dict.fromkeys(" ".join(text.split()) for text in [*pairs, *some]))
    chance.shuffle(found)
    file.write_text("\n".join(found) + "\n", encoding="utf-8")


def quality(subject: Running, data: Path) -> dict:
    """Spearman on STS-B's test pairs and nDCG@10 on Cranfield, with 95 % intervals over pairs and queries."""
    import numpy as np

    from kdexport.data.beir import read_beir
    from kdexport.tasks import task_class
    from kdexport.tasks.judgements import Judgement, written
    from kdexport.tasks.judging import metric_interval
    from kdexport.tasks.sentence_embedding import Retrieval, Similarity
    from kdexport.tasks.vectors import unit

    with (data / "stsb" / "test.csv").open(encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    rows = [
        {"text": pair[side], "label": written(Judgement(pair=str(i), score=float(pair["label"])))}
        for i, pair in enumerate(pairs)
        for side in ("sentence1", "sentence2")
    ]
    beir = read_beir(data / "cranfield")
    documents = [{"text": text, "label": written(Judgement(document=name))} for name, text in beir.documents()]
    judged = {query: gains for split in beir.judged.values() for query, gains in split.items()}
    queries = [{"text": beir.queries[q], "label": written(Judgement(gains=gains))} for q, gains in judged.items()]
    found = {}
    for name, kind, some in (("STS-B", Similarity, rows), ("Cranfield", Retrieval, [*documents, *queries])):
        assert task_class("sentence-embedding", kind.problem) is kind
        vectors = unit(subject.embed([row["text"] for row in some])[0])
        value, interval = metric_interval(kind.__new__(kind), vectors, some)
        found[name] = {"metric": kind.metric.name, "value": value, "ci95": interval, "width": int(np.shape(vectors)[1])}
    return found


def main() -> None:
    if sys.argv[1:2] == ["--subject"]:
        subject(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("artifacts", nargs="*")
    parser.add_argument("--texts", type=Path, help="write texts to train on, and do nothing else")
    parser.add_argument("--few", action="store_true", help="a part of them")
    parser.add_argument("--quality", action="store_true", help="quality of the artifacts alone")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "embeddings.json")
    options = parser.parse_args()
    if options.texts:
        write_texts(options.data, options.texts, few=options.few)
        return
    import numpy as np

    from kdexport.bench import stats
    from kdexport.bench.machine import environment
    from kdexport.data import demo

    teacher = str(demo.teacher())
    with tempfile.TemporaryDirectory() as work:
        made = [Running(one, sys.executable, "kdexport", one, Path(work)) for one in options.artifacts]
        if not options.quality:
            of_teacher, static = python_of("sentence-transformers"), python_of("model2vec")
            peers = [
                ("teacher, PyTorch", of_teacher, "st-torch"),
                ("teacher, ONNX Runtime", of_teacher, "st-onnx"),
                ("model2vec", static, "model2vec"),
            ]
            made = [Running(name, python, kind, teacher, Path(work)) for name, python, kind in peers] + made
        found = {one.name: {"quality": quality(one, options.data)} for one in made}
        if not options.quality:
            with (options.data / "stsb" / "test.csv").open(encoding="utf-8") as file:
                sides = [side for pair in csv.DictReader(file) for side in (pair["sentence1"], pair["sentence2"])]
            texts = list(dict.fromkeys(sides))[:TEXTS]
            times = {one.name: {"bulk": [], "single": [], "memory_mb": 0.0} for one in made}
            order = np.random.default_rng(0)
            for turn in range(TURNS + 1):  # the first warms up
                for i in order.permutation(len(made)):
                    one = made[i]
                    _, whole = one.embed(texts)
                    _, single = one.embed(texts[:CALLS], whole=False)
                    if turn:
                        times[one.name]["bulk"] += whole["seconds"]
                        times[one.name]["single"].append(median(single["seconds"]))
                        times[one.name]["memory_mb"] = max(times[one.name]["memory_mb"], whole["memory_mb"])
            reference = times[made[0].name]
            for name, own in times.items():
                found[name] |= {
                    "sentences_per_s": len(texts) / median(own["bulk"]), "p50_ms": 1e3 * median(own["single"]),
                    "memory_mb": own["memory_mb"],
                    "faster_in_bulk": stats.ratio(reference["bulk"], own["bulk"]),
                    "faster_alone": stats.ratio(reference["single"], own["single"]),
                }  # fmt: skip
        for one in made:
            one.end()
    if not options.quality:
        import msgspec

        record = {"texts": len(texts), "turns": TURNS, "subjects": found, "environment": environment()}
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    for name, one in found.items():
        values = "  ".join(
            f"{k} {100 * q['value']:.2f} [{100 * q['ci95'][0]:.1f}–{100 * q['ci95'][1]:.1f}]"
            for k, q in one["quality"].items()
        )
        speed = ""
        if "sentences_per_s" in one:
            ratios = " ".join(f"{one[k].value:.1f}×" for k in ("faster_in_bulk", "faster_alone"))
            speed = f"  {one['sentences_per_s']:.0f}/s  {one['p50_ms']:.3f} ms  {ratios}  {one['memory_mb']:.0f} MB"
        print(f"{name:40} {values}{speed}")


if __name__ == "__main__":
    main()
