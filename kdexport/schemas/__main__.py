"""Write the schemas again: `python -m kdexport.schemas`."""

from kdexport.schemas import SCHEMAS, generate, path

for name in SCHEMAS:
    path(name).write_bytes(generate(name))
