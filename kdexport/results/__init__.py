"""The records of `report.json`, with units in the names: the source of all pages and tables.

The format is versioned (`SCHEMA`) and published as `kdexport/schemas/report.schema.json`.
"""

from kdexport.results.asked import *  # noqa: F403
from kdexport.results.findings import *  # noqa: F403
from kdexport.results.measured import *  # noqa: F403
from kdexport.results.report import *  # noqa: F403
