"""Folders of images or recordings, as in Hugging Face's imagefolder and audiofolder → tables of file names."""

from pathlib import Path
from typing import Any

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SUFFIXES |= {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"}
METADATA = ("metadata.csv", "metadata.jsonl")
NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def splits_in(folder: Path) -> dict[str, str]:
    """Return split → folder; without a train folder, the folder itself is train."""
    found = {s: str(folder / n) for s, names in NAMES.items() for n in reversed(names) if (folder / n).is_dir()}
    if "train" in found:
        return found
    return {"train": str(folder)} if metadata_of(folder) or any(_files(folder)) else {}


def metadata_of(folder: Path) -> Path | None:
    """Return the folder's table of files, `file_name,label`, if there is one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def labelled_files(folder: Path) -> list[dict[str, Any]]:
    """Return a row `{"file_name", "label"}` for each file below a folder; the label is the first subfolder."""
    names = (path.relative_to(folder) for path in _files(folder))
    return [{"file_name": name.as_posix(), "label": name.parts[0] if len(name.parts) > 1 else None} for name in names]


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
