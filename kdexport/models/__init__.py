"""Networks and their folders: loading with a head, small networks, shrinking. torch lives here."""

import transformers
from transformers.utils import logging

# Two lines of transformers are supported, 4.57 and 5.
LINE_5 = int(transformers.__version__.split(".")[0]) >= 5

logging.set_verbosity_error()  # we report new heads ourselves
logging.disable_progress_bar()  # opening and saving take no time that is worth one
