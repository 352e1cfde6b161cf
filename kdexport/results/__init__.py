"""The records of what was measured: `report.json`, with units in the names. Everything else renders these.

The contract is versioned (`SCHEMA`) and published as `kdexport/schemas/report.schema.json`.
"""

from kdexport.results.findings import *  # noqa: F403
from kdexport.results.measured import *  # noqa: F403
from kdexport.results.report import *  # noqa: F403
