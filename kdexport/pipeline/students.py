"""The stages of students: a named one, or the winner of a search; baselines; other seeds."""

from pathlib import Path
from typing import NamedTuple

import msgspec

from kdexport import spec
from kdexport.data import read_rows
from kdexport.pipeline import search
from kdexport.progress import say
from kdexport.results import Search, SearchCandidate
from kdexport.spec import derive
from kdexport.stages import Run, read_record


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

    def search(self, names: tuple[str, ...]) -> tuple[Path, Path, Search]:
        """Return the folders of the best of several students, and the record of the search."""
        settings, built = self.settings, msgspec.structs.replace(self.settings.student, model=names)
        ladder = self.folder.stage(
            "ladder",
            version=3,
            settings=[names, built, settings.export.variants, settings.bench.threads[0], settings.seed],
            reads=[self.data, self.teacher, self.targets, *local(*names)],
            build=lambda work: search.measure_ladder(
                settings, names, self._build, self.teacher, read_rows(self.data, "test"), work
            ),
        )
        candidates, teacher_p50_ms = search.read_ladder(ladder, settings.budget)
        fitting = [one for one in candidates if not one.over]
        if len(fitting) > 1:
            say(f"search: {len(fitting)} of {len(candidates)} students fit; each is tried for a short while")
            candidates = [self._try(one) if one in fitting else one for one in candidates]
        return search.climb(
            settings, candidates, lambda name: self.whole(name, f"-{search.slug(name)}"),
            self.data, self.teacher, self.targets, teacher_p50_ms,
        )  # fmt: skip

    def train(self, name: str, stage: str, *, hard: bool = False, seed: int | None = None, share: float = 1.0) -> Path:
        """Train a student as a stage: on labels alone if `hard`; for a trial, for a fraction of the epochs, `share`."""
        distill = msgspec.structs.replace(self.settings.distill, baseline=True, seeds=1)
        if len(derive.students(self.settings)) > 1 and distill.patience is None:
            distill = msgspec.structs.replace(distill, patience=search.PATIENCE)
        if hard:
            distill = msgspec.structs.replace(distill, loss="kl", temperature=1.0, alpha=0.0, augment=None)
        seed = self.settings.seed if seed is None else seed

        def build(work: Path) -> None:
            from kdexport.distill.student import train_student

            places = {"data": self.data, "teacher": self.teacher, "targets": self.targets, "out": work}
            train_student(self.settings.student, name, distill, **places, seed=seed, hard=hard, share=share)

        return self.folder.stage(
            stage,
            version=3,
            settings=[msgspec.structs.replace(self.settings.student, model=name), distill, seed, share],
            reads=[self.data, self.teacher, self.targets, *local(name)],
            build=build,
        )

    def export(self, student: Path, stage: str) -> Path:
        """Export a student as a stage."""

        def build(work: Path) -> None:
            from kdexport.export import export_student

            export_student(self.settings.export, student, work, read_rows(self.data, "train"))

        inputs = [self.data, student]
        return self.folder.stage(stage, version=4, settings=self.settings.export.variants, reads=inputs, build=build)

    def baseline(self, name: str) -> Path | None:
        """Train the student on labels alone, unless there are none or the spec turns it off."""
        if not self.settings.distill.baseline:
            return None
        if all(row["label"] is None for row in read_rows(self.data, "train")):
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

    def _try(self, one: SearchCandidate) -> SearchCandidate:
        stage = self.train(one.name, f"trial-{search.slug(one.name)}", share=search.TRIAL_SHARE)
        curve = msgspec.json.decode((stage / "training.json").read_bytes())["curve"]
        return msgspec.structs.replace(one, trial=curve[-1]["validation"], trial_seconds=read_record(stage).seconds)

    def _build(self, name: str, work: Path) -> None:
        from kdexport.distill.student import write_untrained

        places = {"data": self.data, "teacher": self.teacher, "targets": self.targets, "out": work}
        write_untrained(self.settings.student, name, **places, seed=self.settings.seed)


def local(*models: str) -> list[Path]:
    """Return the names that are local files or folders, whose content is an input of the stage."""
    return [Path(model) for model in models if Path(model).exists()]
