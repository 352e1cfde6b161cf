"""The picture in the README: the first screen of a run's report, in Chromium.

python benchmarks/screenshot.py runs/demo benchmarks/results/demo-report.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    report, out = Path(sys.argv[1]).resolve() / "report.html", sys.argv[2]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1180, "height": 1760}, color_scheme="light")
        page.goto(report.as_uri())
        page.screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    main()
