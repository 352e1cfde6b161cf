"""The stages of students: training and export, baselines, other seeds."""

from pathlib import Path
from typing import NamedTuple

import msgspec

from kdexport import spec
from kdexport.data import read_rows
from kdexport.progress import say
from kdexport.spec import derive
from kdexport.stages import Run
from kdexport.tasks import task_class

PATIENCE = 4  # epochs without a better validation metric, after which training in a search stops; the best is used


class Students(NamedTuple):
    """Train and export students as stages of a run, from its finished stages."""

    settings: spec.Spec
    folder: Run
    data: Path
    teacher: Path
    targets: Path

    def whole(self, name: str, suffix: str = "") -> tuple[Path, Path]:
        """Train and export a student."""
        student = self.train(name, f"student{suffix}")
        return student, self.export(student, f"export{suffix}")

    def train(self, name: str, stage: str, *, hard: bool = False, seed: int | None = None, share: float = 1.0) -> Path:
        """Train a student as a stage: on labels alone if `hard`; for a trial, for a fraction of the epochs, `share`."""
        distill = msgspec.structs.replace(self.settings.distill, baseline=True, seeds=1)
        if len(derive.students(self.settings)) > 1 and distill.patience is None:
            distill = msgspec.structs.replace(distill, patience=PATIENCE)
        if hard:
            distill = msgspec.structs.replace(
                distill, loss="kl", temperature=1.0, alpha=0.0, augment=None, max_word_error=None
            )
        seed = self.settings.seed if seed is None else seed
        student = msgspec.structs.replace(self.settings.student, model=name)

        def build(work: Path) -> None:
            from kdexport.distill.student import train_student

            places = {"data": self.data, "teacher": self.teacher, "targets": self.targets, "out": work}
            train_student(self.settings.student, name, distill, **places, seed=seed, hard=hard, share=share)

        return self.folder.stage(
            stage,
            version=3,
            settings=[spec.of_results(student), spec.of_results(distill), seed, share],
            reads=[self.data, self.teacher, self.targets, *local(name)],
            build=build,
        )

    def export(self, student: Path, stage: str) -> Path:
        """Export a student as a stage."""

        def build(work: Path) -> None:
            from kdexport.export import export_student

            export_student(self.settings.export, student, work, read_rows(self.data, "train"))

        inputs = [self.data, student]
        return self.folder.stage(stage, version=6, settings=self.settings.export.variants, reads=inputs, build=build)

    def baseline(self, name: str) -> Path | None:
        """Train the student on labels alone, unless there are none or the spec turns it off."""
        if not self.settings.distill.baseline or task_class(self.settings.task).labels_judge:
            return None
        if all(row["label"] is None or row.get("heard") for row in read_rows(self.data, "train")):
            say("baseline: the training rows have no labels, so there is none")
            return None
        return self.train(name, "baseline", hard=True)

    def other_seeds(self, name: str, baseline: bool) -> list[tuple[Path, Path | None]]:
        """Train student and baseline with each further seed."""
        first = self.settings.seed
        return [
            (
                self.train(name, f"student-seed{seed}", seed=seed),
                self.train(name, f"baseline-seed{seed}", hard=True, seed=seed) if baseline else None,
            )
            for seed in range(first + 1, first + self.settings.distill.seeds)
        ]


def local(*models: str) -> list[Path]:
    """Return the names that are local files or folders, whose content is an input of the stage."""
    return [Path(model) for model in models if Path(model).exists()]
