"""Pages as a person meets them: in Chromium, wide and narrow, light and dark, and by axe's rules.

Skipped where the system has no Chromium; CI installs it.
"""

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="this machine has no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(finished, tmp_path_factory):
    """A run's report, a missed budget's with doubts, and a comparison."""
    import msgspec

    from kdexport.output import Output
    from kdexport.pipeline.compare import compare, parse_gate
    from kdexport.report import draw
    from kdexport.report.difference import write_comparison
    from kdexport.results import Check, Verdict, read_report

    folder = tmp_path_factory.mktemp("pages")
    report = read_report(finished / "report.json")
    how = msgspec.structs.replace(report.bench, warnings=["this machine was too noisy"])
    out = Output(folder, "report")
    draw(msgspec.structs.replace(report, bench=how, budget=Verdict(False, [Check("p99_ms", 0.1, 0.2, False)])), out)
    gates = [parse_gate("p99>+10%"), parse_gate("accuracy<-0.5")]
    write_comparison(compare(str(finished), str(finished), gates, side_by_side=False), out)
    return {"report": finished / "report.html", "missed": folder / "report.html", "compare": folder / "compare.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["report", "missed", "compare"])
def test_a_page_opens_quietly_fits_and_breaks_no_serious_rule(browser, pages, name, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    # axe puts a script into the page, which the page's own policy forbids; so quiet is looked at first, with it
    said, asked = [], []
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("svg").first.is_visible()
    assert said == []
    assert asked == [pages[name].as_uri()]
    viewport = {"width": width, "height": 900}
    with browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=True) as context:
        page = context.new_page()
        page.goto(pages[name].as_uri())
        found = Axe().run(page).response["violations"]
    assert [rule["id"] for rule in found if rule["impact"] in ("serious", "critical")] == []
