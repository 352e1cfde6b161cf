"""Print the lowest versions that pyproject.toml allows, as constraints for pip; torch stays at the tested one."""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("cpu", "distill", "serve", "demo")

root = Path(__file__).parent.parent
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + [r for extra in EXTRAS for r in project["optional-dependencies"][extra]]
lowest = dict(found.groups() for r in wanted if (found := re.match(r"([\w.-]+)(?:\[.*\])?[>=]=([\d.]+)", r)))
tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (root / "constraints.txt").read_text(), re.MULTILINE))
lowest["torch"] = tested["torch"]
sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(lowest.items()))
