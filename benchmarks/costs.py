"""What one request may cost at most, per task: `python benchmarks/costs.py` prints the table of SECURITY.md.

Each request goes through the whole application, in a process of its own: peak memory above what was there before, and
CPU seconds of all threads.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

SETUP = f"""
import base64, io, gzip, json, os, struct, sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "fuzz")!r}]
import numpy as np, small, soundfile
from PIL import Image
server = small.Server(2_998)  # speech of 30 s, the most that kdexport sets for a recogniser
server.post("/", b'{{"inputs": "a text"}}')
def picture(size, kind, mode, **how):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **how)
    return file.getvalue()
def noisy(size, kind, mode, rows, **how):
    "A picture whose first rows do not compress."
    file, image = io.BytesIO(), Image.new(mode, size)
    image.paste(Image.frombytes(mode, (size[0], rows), os.urandom(size[0] * rows * len(mode))))
    image.save(file, kind, **how)
    return file.getvalue()
def in_json(body, parameters=b'{{"top_k": 1}}'):
    return b'{{"inputs": "' + base64.b64encode(body) + b'", "parameters": ' + parameters + b"}}"
def sound(rate, size):
    head = struct.pack("<HHIIHH", 1, 1, rate, 0, 0, 16)
    return b"RIFF\\0\\0\\0\\0WAVEfmt " + struct.pack("<I", 16) + head + b"data\\xff\\xff\\xff\\x7f" + bytes(size)
def coded(form, seconds, rate, frames):
    "A second of sound [T, 8 channels], again and again."
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 8, form[1], format=form[0]) as out:
        for begin in np.arange(0, seconds, 1):
            out.write(frames[: round(min(1, seconds - begin) * rate)])
    return file.getvalue()
picture((8, 8), "PNG", "RGB")
SPEECH, NOISE = "/models/speech", np.random.default_rng(0).normal(0, 0.1, (384_000, 8))
PICTURES = "/models/image"
"""
WORK = "status = server.post(path, body, *headers); result = [status, len(body)]"
LANGUAGE_MODEL = """
import json, sys
from kdexport.data import demo
from kdexport.tasks.causal_lm import CausalLM
from kdexport.tasks.config import TaskConfig
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(str(demo.teacher() / "tokenizer.json"))
task = CausalLM(TaskConfig(task="causal-lm", labels=[], inputs=["input_ids"], max_length=1024, kept=1), tokenizer)
task.prompt("a text", 16)
"""
# Task, what is asked, Python that sets path and body (of JSON: content), for a server of the default limits.
REQUESTS = [
    ("text-classification", "19 × 99 kB of “(”", 'path, content = "/", {"inputs": ["(" * 99_000] * 19}'),
    ("", "19 × 99 kB of spaces, “(” last", 'path, content = "/", {"inputs": [" " * 98_000 + "(" * 1_000] * 19}'),
    ("", "256 × 7.4 kB of words", 'path, content = "/", {"inputs": ["word " * 1_480] * 256}'),
    ("", "520,000 empty texts (refused)", 'path, content = "/", {"inputs": [""] * 520_000}'),
    ("pairs", "9 × 2 × 99 kB of “(”",
     'path, content = "/", {"inputs": [{"text": "(" * 99_000, "text_pair": "(" * 99_000}] * 9}'),
    ("", "95 × 2 × 9.9 kB of “(”",
     'path, content = "/", {"inputs": [{"text": "(" * 9_900, "text_pair": "(" * 9_901}] * 95}'),
    ("token-classification", "19 × 99 kB of words, all answered",
     'path, content = "/models/tags", {"inputs": ["a " * 49_500] * 19, '
     '"parameters": {"aggregation_strategy": "none", "ignore_labels": []}}'),
    ("", "256 × 7.4 kB of “(”", 'path, content = "/models/tags", {"inputs": ["(" * 7_400] * 256}'),
    ("image-classification", "PNG, 45 million pixels", 'path, body = PICTURES, picture((6_700, 6_700), "PNG", "RGB")'),
    ("", "WebP, 12 million pixels", 'path, body = PICTURES, picture((3_480, 3_480), "WEBP", "RGB", lossless=True)'),
    ("", "GIF, 38 million pixels", 'path, body = PICTURES, picture((6_160, 6_160), "GIF", "L")'),
    ("", "JPEG, 78 million pixels", 'path, body = PICTURES, picture((8_800, 8_800), "JPEG", "RGB")'),
    ("", "PNG, 45 million pixels, 9.9 MB", 'path, body = PICTURES, noisy((6_700, 6_700), "PNG", "RGB", 485)'),
    ("", "WebP, 12 million pixels, 9.7 MB",
     'path, body = PICTURES, noisy((3_480, 3_480), "WEBP", "RGB", 930, lossless=True)'),
    ("", "GIF, 38 million pixels, 9.3 MB", 'path, body = PICTURES, noisy((6_160, 6_160), "GIF", "L", 1_100)'),
    ("", "JPEG, 12 million pixels, 7.2 MB", 'path, body = PICTURES, noisy((4_000, 3_000), "JPEG", "RGB", 3_000)'),
    ("", "JPEG, 78 million pixels, 7.9 MB", 'path, body = PICTURES, noisy((8_800, 8_800), "JPEG", "RGB", 1_300)'),
    ("", "PNG, 45 million pixels, 7.2 MB, in base64",
     'path, body = PICTURES, in_json(noisy((6_700, 6_700), "PNG", "RGB", 355))'),
    ("", "JPEG, 12 million pixels, 5.6 MB, in base64",
     'path, body = PICTURES, in_json(noisy((4_000, 3_000), "JPEG", "RGB", 2_300))'),
    ("", "WebP, 49 million pixels (refused)",
     'path, body = PICTURES, picture((7_000, 7_000), "WEBP", "L", lossless=True)'),
    ("audio-classification", "4 MB at 384 kHz", 'path, body = "/models/audio", sound(384_000, 3_999_000)'),
    ("", "3 MB at 384 kHz, in base64", 'path, body = "/models/audio", in_json(sound(384_000, 2_990_000))'),
    ("", "4 MB at 101 Hz (refused)", 'path, body = "/models/audio", sound(101, 3_999_000)'),
    ("automatic-speech-recognition", "4 MB at 384 kHz", "path, body = SPEECH, sound(384_000, 3_999_000)"),
    ("", "3 MB at 384 kHz, in base64", 'path, body = SPEECH, in_json(sound(384_000, 2_990_000), b"{}")'),
    ("", "FLAC, 29.9 s of 8 channels at 384 kHz",
     'path, body = SPEECH, coded(("FLAC", "PCM_24"), 29.9, 384_000, 0 * NOISE)'),
    ("", "Vorbis, 29.9 s of 8 channels at 192 kHz",
     'path, body = SPEECH, coded(("OGG", "VORBIS"), 29.9, 192_000, NOISE)'),
    ("", "Opus, 29.9 s of 8 channels at 48 kHz", 'path, body = SPEECH, coded(("OGG", "OPUS"), 29.9, 48_000, NOISE)'),
    ("", "FLAC, 119 s of 8 channels at 384 kHz (refused)",
     'path, body = SPEECH, coded(("FLAC", "PCM_16"), 119, 384_000, 0 * NOISE)'),
]  # fmt: skip


def main() -> None:
    """Measure and print."""
    from limits import cost_of

    print("| task | one request | bytes on the wire | status | memory | CPU |")
    print("|---|---|--:|--:|--:|--:|")
    for task, what, code in REQUESTS:
        for packed in (False, True) if "content" in code else (False,):
            more = "body = json.dumps(content).encode()" if "content" in code else ""
            more += "; headers = []"
            more += "; body, headers = gzip.compress(body), [(b'content-encoding', b'gzip')]" if packed else ""
            cost = cost_of(f"{SETUP}\n{code}\n{more.lstrip('; ')}", WORK, timeout=120)
            status, size = cost.result
            name = f"{what}, gzipped" if packed else what
            print(f"| {task} | {name} | {size:,} | {status} | {cost.mb:.0f} MB | {cost.seconds:.2f} s |", flush=True)
            task = ""
    cost = cost_of(LANGUAGE_MODEL, 'result = len(task.prompt(" " * 98_000 + "(" * 1_000, 16))')
    found = f"{cost.mb:.0f} MB | {cost.seconds:.2f} s"
    print(f"| causal-lm, the prompt alone | 99 kB of spaces, “(” last | 99,000 | – | {found} |")


if __name__ == "__main__":
    main()
