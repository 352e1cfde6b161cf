"""A task's part of the model card."""

from typing import NamedTuple

# Python code for model cards, with an example of an input.
PREDICT = '\nmodel = kdexport.load("path/to/this/folder")\nmodel.predict(["{}"])'


class Card(NamedTuple):
    """The model card's metadata and usage: the Hub's name of the task, Optimum's class, Python code.

    `elsewhere` is code for the `library` whose layout the folder has, with `{file}` for the one to load.
    """

    tag: str
    optimum: str
    code: str
    library: str = "onnx"
    elsewhere: str = ""
    tags: tuple[str, ...] = ()
