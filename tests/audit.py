"""Ask pip-audit for known vulnerabilities of the pins in constraints.txt: `make audit`.

It fails where a version without the vulnerability is allowed by all that need the package, so that a new pin mends it;
others are printed. Without a network, or where the service can't be reached, that is one line and no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PINS = Path(__file__).parents[1] / "constraints.txt"
COMMAND = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]


def main() -> int:
    """Print what is found; return 1 where a new pin would mend it."""
    try:
        asked = subprocess.run(
            [sys.executable, *COMMAND, "--timeout", "10", "--requirement", PINS],
            capture_output=True,
            text=True,
            timeout=300,
        )
        found = [pin for pin in json.loads(asked.stdout)["dependencies"] if "vulns" in pin]  # the others got no answer
    except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError):
        found = []
    if not found:
        print("audit: the service of advisories could not be asked")
        return 0
    mendable = 0
    for pin in found:
        for advisory in pin["vulns"]:
            mends = [version for version in advisory["fix_versions"] if is_allowed(pin["name"], version)]
            mendable += bool(mends)
            then = f"pin {mends[0]}" if mends else "no mended version is allowed by all that need it"
            print(f"audit: {pin['name']} {pin['version']} has {advisory['id']}: {then}")
    print(f"audit: {len(found)} pins asked about, {mendable} to be raised")
    return int(mendable > 0)


def is_allowed(name: str, version: str) -> bool:
    """Whether every installed package that needs this one, kdexport among them, takes a version of it."""
    needed = (Requirement(line) for package in distributions() for line in package.requires or ())
    return all(
        each.specifier.contains(version, prereleases=True)
        for each in needed
        if canonicalize_name(each.name) == canonicalize_name(name)
    )


if __name__ == "__main__":
    sys.exit(main())
