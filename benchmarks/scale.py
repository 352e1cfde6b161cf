"""Memory and time of each stage over the number of rows: `python benchmarks/scale.py texts 10000 100000 1000000`.

Texts are made of random words, with a label that some of them decide; `tokens` instead of `texts` takes numbers of
tokens of text for a language model. The teacher is a small BERT or GPT-2 that a first run trains on little data; it is
the same for all sizes. Memory is sampled from outside, 20 times a second: of the run and its children, and without the
pages of mapped files, which the system takes back where it needs them. Times are the CPU's, of all threads.

Results go to `benchmarks/results/scale-texts.json` or `scale-tokens.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

HERE = Path(__file__).parent
WORDS, LENGTH = 3_000, 10
SMALL = ["bench.rounds=3", "bench.round_seconds=0.1", "bench.time_limit_s=5", "bench.batch_sizes=[]"]
LIGHT = [*SMALL, "distill.epochs=1", "distill.batch_size=256", "distill.baseline=false"]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("kind", choices=["texts", "tokens"])
    asked.add_argument("sizes", type=int, nargs="+")
    asked.add_argument("--work", type=Path, default=None, help="a folder for data and runs, which is kept")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(exist_ok=True)
        write, teach, flags = (write_texts, text_teacher, []) if given.kind == "texts" else (write_lm, lm_teacher, [])
        teacher = teach(work)
        found = {}
        for size in given.sizes:
            data = work / f"{given.kind}-{size}{'.csv' if given.kind == 'texts' else '.txt'}"
            write(data, size)
            found[size] = measured(data, teacher, work / f"run-{given.kind}-{size}", flags)
            show(size, found[size])
            file = HERE / "results" / f"scale-{given.kind}.json"
            before = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(json.dumps(before | {str(size): found[size]}, indent=1) + "\n")


def words() -> list[str]:
    random = np.random.default_rng(7)
    vowels, consonants = list("aeiou"), list("bdfgklmnprstvz")
    return ["".join(random.choice(part) for part in (consonants, vowels) * 2) + str(i) for i in range(WORDS)]


def write_texts(path: Path, rows: int) -> None:
    random, known = np.random.default_rng(rows), np.array(words())
    with path.open("w") as file:
        file.write("text,label\n")
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            labels = random.integers(0, 4, count)
            chosen = random.integers(0, WORDS, (count, LENGTH))
            chosen[:, :3] = 4 * random.integers(0, 40, (count, 3)) + labels[:, None]  # words that only one label has
            for label, one in zip(labels, chosen, strict=True):
                file.write(f"{' '.join(known[random.permutation(one)])},topic {label}\n")


def write_lm(path: Path, tokens: int) -> None:
    """Sentences of a Markov chain over words; a word is about 2.2 tokens of the tokenizer below."""
    random, known, written = np.random.default_rng(tokens), np.array([word[:4] for word in words()]), 0
    with path.open("w") as file:
        while written < tokens:
            starts = random.integers(0, WORDS, (5_000, 1))
            steps = random.integers(0, 4, (5_000, 11)) * 7 + 1
            chosen = (starts + np.cumsum(steps, axis=1)) % WORDS
            file.write("".join(" ".join(known[one]) + ".\n" for one in chosen))
            written += round(5_000 * 11 * TOKENS_A_WORD)


TOKENS_A_WORD = 2.0


def text_teacher(work: Path) -> Path:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    if not (work / "teach-texts" / "teacher" / "stage.json").is_file():
        start = work / "bert"
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789", *(f"##{i}" for i in range(10))]
        start.mkdir(exist_ok=True)
        (start / "vocab.txt").write_text("\n".join([*tokens, *words()]))
        BertTokenizerFast(str(start / "vocab.txt")).save_pretrained(start)
        config = BertConfig(vocab_size=len(tokens) + WORDS, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                            intermediate_size=128, max_position_embeddings=64)  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(start)
        write_texts(work / "few.csv", 20_000)
        trained = ["teacher.train.epochs=4", "teacher.train.learning_rate=0.001"]
        run(work / "few.csv", start, work / "teach-texts", [*LIGHT, *trained]).wait()
    return work / "teach-texts" / "teacher"


def lm_teacher(work: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if not (work / "teach-tokens" / "teacher" / "stage.json").is_file():
        start = work / "gpt2"
        write_lm(work / "few.txt", 400_000)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
        tokenizer.train([str(work / "few.txt")], trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(start)
        config = GPT2Config(vocab_size=512, n_positions=128, n_embd=64, n_layer=1, n_head=1)
        GPT2LMHeadModel(config).save_pretrained(start)
        trained = ["teacher.train.epochs=3", "teacher.train.learning_rate=0.002"]
        run(work / "few.txt", start, work / "teach-tokens", [*LIGHT, *trained]).wait()
    return work / "teach-tokens" / "teacher"


def run(data: Path, teacher: Path, out: Path, settings: list[str]) -> subprocess.Popen:
    lm = data.suffix == ".txt"
    student = "1x32" if lm else "bag"
    sets = [part for one in settings for part in ("--set", one)]
    task = ["--task", "causal-lm"] if lm else ["--task", "text-classification"]
    command = [sys.executable, "-m", "kdexport", "run", "--teacher", teacher, "--data", data, "--student", student]
    env = os.environ | {"KDEXPORT_CACHE": str(out.parent / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command), *task, *sets, "--out", str(out), "--augment", "0"][: None if not lm else -2], env=env
    )


def measured(data: Path, teacher: Path, out: Path, settings: list[str]) -> dict:
    """Run, and return of each stage its peak memory in MB, with and without mapped files, and its seconds."""
    started = time.monotonic()
    process, peaks, seconds, before = run(data, teacher, out, [*LIGHT, *settings]), {}, defaultdict(float), 0.0
    peaks = defaultdict(lambda: [0.0, 0.0])
    main_one = psutil.Process(process.pid)
    while process.poll() is None:
        stage = next((p.name.removeprefix(".kdexport-") for p in out.glob(".kdexport-*")), "report")
        try:
            every = [main_one, *main_one.children(recursive=True)]
            found = [memory(one.pid) for one in every]
            spent = sum(main_one.cpu_times()[:4])
        except psutil.Error:
            continue
        for i, value in enumerate(map(sum, zip(*found, strict=True))):
            peaks[stage][i] = max(peaks[stage][i], value)
        seconds[stage] += spent - before
        before = spent
        time.sleep(0.05)
    assert process.returncode == 0, process.returncode
    stages = {name: {"rss_mb": round(rss), "own_mb": round(own), "cpu_s": round(seconds[name], 1)}
              for name, (rss, own) in peaks.items()}  # fmt: skip
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"stages": stages, "wall_s": round(time.monotonic() - started), "folder_mb": round(size / 1e6)}


def memory(pid: int) -> tuple[float, float]:
    """Return resident memory in MB, with and without mapped files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    facts = {
        name: int(rest.split()[0]) / 1e3
        for name, _, rest in (line.partition(":") for line in lines)
        if name.startswith(("VmRSS", "RssFile"))
    }
    return facts.get("VmRSS", 0.0), facts.get("VmRSS", 0.0) - facts.get("RssFile", 0.0)


def show(size: int, found: dict) -> None:
    print(f"\n{size:,}: {found['wall_s']} s, {found['folder_mb']} MB on disk")
    for name, stage in found["stages"].items():
        print(f"  {name:<10} {stage['own_mb']:>6,} MB ({stage['rss_mb']:,} with mapped files) {stage['cpu_s']:>8.1f} s")


if __name__ == "__main__":
    main()
