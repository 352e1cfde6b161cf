"""Everything that can go wrong because of what a user gave us: one line for the user, and exit code 2.

Only `cli/` catches them. Our own mistakes stay ordinary exceptions with a traceback.
"""


class KdexportError(Exception):
    """What happened and where, then how to mend it, in one line."""

    def __init__(self, what: str, fix: str = "") -> None:
        self.what, self.fix = what, fix
        line = f"{what}{'' if what.endswith('?') else '.'} {fix}" if fix else what
        super().__init__(" ".join(line.split()))


class SpecError(KdexportError):
    """A key, flag or value of the spec is wrong."""


class DataError(KdexportError):
    """A data file, row or label is wrong."""


class TooLarge(DataError):
    """A picture or a recording would cost too much to read."""


class ModelError(KdexportError):
    """A teacher or student cannot be used as it is."""


class EndpointError(ModelError):
    """A language model's endpoint can't be asked."""


class VerificationError(KdexportError):
    """An exported file does not do what the model that it was made from does."""


class ArtifactError(KdexportError):
    """An artifact folder is incomplete, unreadable or was changed after it was packed.

    Texts of the artifact that the line quotes may be of any length, and hold what a terminal obeys.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(*("".join(c if c.isprintable() else " " for c in text[:1000]) for text in (what, fix)))


class RunError(KdexportError):
    """A run folder cannot be used: in use, full, or not one of ours."""


class ElsewhereError(KdexportError):
    """Another process of the run failed, and has printed why; this one ends with its exit code."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__("another process of this run failed", "Look at its error")


class MissingPackage(KdexportError):
    """A package of an extra that was not installed."""

    def __init__(self, package: str, extra: str) -> None:
        fix = f"Install it with: pip install 'kdexport[{extra}]'"
        super().__init__(f"the package {package!r} is not installed", fix)


def counted(n: int, one: str, many: str = "") -> str:
    """Return a number with its noun: 1 text, 2,000 texts."""
    return f"{n:,} {one if n == 1 else many or f'{one}s'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with the next where it ends in a colon; else its class's name."""
    lines = [*filter(None, map(str.strip, str(error).splitlines())), ""]
    return (" ".join(lines[:2]).strip() if lines[0].endswith(":") else lines[0]) or type(error).__name__


class Interrupted(Exception):
    """Ctrl-C in long work, with what remains on disk. Typer would end the program by itself, without a message."""
