"""Write the schemas again: `python -m kdexport.schemas`."""

from kdexport.schemas import SCHEMAS, generate, openapi, path

for name in SCHEMAS:
    path(name).write_bytes(generate(name))
openapi.PATH.write_bytes(openapi.generate())
