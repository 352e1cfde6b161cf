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
    """A run's report, one with a missed budget from a machine of much noise, and a comparison."""
    import msgspec

    from kdexport.output import Output
    from kdexport.pipeline.compare import compare, parse_gate
    from kdexport.report import draw
    from kdexport.report.difference import write_comparison
    from kdexport.results import Check, Verdict, read_report

    folder = tmp_path_factory.mktemp("pages")
    report = read_report(finished / "report.json")
    how = msgspec.structs.replace(report.bench, warnings=["this machine was too noisy", "the machine was busy"])
    out = Output(folder, "report")
    budget = Verdict(False, [Check("p99_ms", 0.1, 0.2, False)])
    draw(msgspec.structs.replace(report, bench=how, budget=budget, variants=noisy(report.variants)), out)
    gates = [parse_gate("p99>+10%"), parse_gate("accuracy<-0.5")]
    write_comparison(compare(str(finished), str(finished), gates, side_by_side=False), out)
    return {"report": finished / "report.html", "missed": folder / "report.html", "compare": folder / "compare.html"}


def noisy(variants):
    """The same figures with intervals over four decades."""
    from msgspec.structs import replace

    def wide(value):
        return (value / 100, value * 100)

    return [
        replace(
            v,
            latency_ms=replace(t, p50_ci95=wide(t.p50), p99_ci95=wide(t.p99 or t.p50), rounds=3),
            cells=[replace(cell, p50_ci95=wide(cell.p50_ms)) for cell in v.cells],
        )
        for v in variants
        if (t := v.latency_ms)
    ]


def test_noise_leaves_the_points_apart_and_the_warnings_in_one_line(browser, pages):
    with browser.new_context(viewport={"width": 1400, "height": 900}) as context:
        page = context.new_page()
        page.goto(pages["missed"].as_uri())
        box = page.locator(".warnings")
        assert box.locator("summary").is_visible()
        assert not box.locator("li").first.is_visible()
        assert box.bounding_box()["height"] < 60
        box.locator("summary").click()
        assert box.locator("li").first.inner_text() == "the machine was busy"
        chart = page.locator('svg[aria-label="p50 latency after each step"]')
        frame = chart.bounding_box()
        ends = [bar.bounding_box() for bar in chart.locator("rect").all()]
        assert max(b["x"] + b["width"] for b in ends) - min(b["x"] for b in ends) > 0.8 * frame["width"]
        for whisker in chart.locator(".whisker").all():
            drawn = whisker.bounding_box()
            assert frame["x"] - 1 <= drawn["x"] <= drawn["x"] + drawn["width"] <= frame["x"] + frame["width"] + 1


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
