"""One distillation in a process of its own: `python runner.py JOB.json`, by the Python of the tool's environment.

Times two things: from the start of the process until all is imported, and from there until the trained student is
written. Standard library and torch only, because it runs in every environment.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace

PACKAGES = ("torch", "transformers", "textbrewer", "torchdistill", "kdexport")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent / "adapters"))
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    adapter = import_module(job.adapter)
    import torch

    torch.set_num_threads(job.threads)
    imported = time.monotonic()
    student = adapter.distil(job)
    ended = time.monotonic()
    found = {
        "import_s": imported - job.started,  # the clock is the machine's, so the parent's reading will do
        "distil_s": ended - imported,
        "cpu_s": time.process_time(),
        "peak_rss_mb": peak_rss_mb(),
        "student": student,
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }
    Path(job.result).write_text(json.dumps(found))


def peak_rss_mb() -> float:
    """The most that this process held, and the largest of its children, if it had any.

    Not this process's own getrusage: that starts with what the parent held when it forked.
    """
    own = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    return (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024 / 1e6


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
