"""A Whisper's files beside transformers' pipeline: are the texts the same, and what does a recording take?

    kdexport export shared/models/whisper-tiny.en whisper --variants fp32
    python benchmarks/whisper_texts.py shared/data/speech-samples shared/models/whisper-tiny.en whisper

Prints each recording whose texts differ but for marks such as <|notimestamps|>, then how many are the same, and the
ratio of the times, in turns on one thread.
"""

import re
import sys
import time
from pathlib import Path

import numpy as np

import kdexport
from kdexport.tasks.inputs.audio import resampled
from kdexport.tasks.inputs.recordings import decoded


def main(sounds: Path, model: str, artifact: str) -> None:
    import torch
    from transformers import pipeline

    torch.set_num_threads(1)
    theirs = pipeline("automatic-speech-recognition", model, device="cpu")
    ours = kdexport.load(artifact, "fp32", threads=1)
    ours.predict([str(path) for path in sorted(sounds.rglob("*.wav"))[:1]])
    same, ratios = [], []
    for path in sorted(sounds.rglob("*.wav")):
        samples = resampled(decoded(path.read_bytes()), 16_000, 30 * 16_000)
        start = time.perf_counter()
        text = theirs({"raw": samples, "sampling_rate": 16_000}, generate_kwargs={"do_sample": False, "num_beams": 1})[
            "text"
        ]
        between = time.perf_counter()
        found = ours.predict([str(path)])[0].text
        ratios.append((between - start) / (time.perf_counter() - between))
        same.append(found == re.sub(r"<\|.*?\|>", "", text).strip())
        if not same[-1]:
            print(f"{path.name}: {found[:100]!r}, and there {text[:100]!r}")
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(
        f"{sum(same)} of {len(same)} texts are the same; {median:.1f} times as fast (quartiles {low:.1f}, {high:.1f})"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
