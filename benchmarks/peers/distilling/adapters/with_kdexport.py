"""`kdexport run` as the command line has it, up to the trained student.

What comes after it (export, verification, measuring, packing) is nothing that the other tools do, so the run ends
there. What comes before is all in the time: rows read, checked and searched for duplicates, the teacher's labels
matched and its files copied, and its soft targets computed for all three splits.
"""

import shlex
import sys
from pathlib import Path

import kdexport.distill.soft_targets

# The command imports these when it needs them. Here they come first, to count as importing, as with the others.
import kdexport.distill.student
import kdexport.distill.teacher  # noqa: F401
from kdexport.cli import main
from kdexport.pipeline import run

COMMAND = """
# --- what a user writes
kdexport run {spec} --teacher {teacher} --data {data} --student {student} --max-length {max_length} --seed {seed}
    --epochs {epochs} --set distill.learning_rate={learning_rate} --set distill.batch_size={batch_size} --no-baseline
# --- end
    --out {out}/run
"""


class UntilStudent(run.Run):
    """A run that ends where the student is trained."""

    def stage(self, name, **how):
        if name == "export":
            raise SystemExit(0)
        return super().stage(name, **how)


def distil(job):
    run.Run = UntilStudent
    sys.argv = [word.format(**vars(job)) for word in shlex.split(COMMAND, comments=True)]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    return str(Path(job.out) / "run" / "student")
