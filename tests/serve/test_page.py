"""The page of `kdexport serve`, in Chromium: a person tries a model, with whatever card, labels and errors there are.

Skipped where the system has no Chromium; CI installs it.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from embedders import write_embedder
from serve_process import served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TEXT = "The striker scored twice in the second half"
# A shell, Python, JavaScript and JSON each give some of these a meaning; two are keystrokes to a terminal.
ODD_TEXT = "it's \"$HOME\" `id` !! \\n \\' $(id) %s {{x}} ${x}\n<b>ünï</b> 漢字 🙂 \u2028 \x7f \x9b </script>"
HOSTILE = """\ufeff---
license: secret-front-matter
---
# Card <script>document.title = "owned"</script>

<script>document.title = "owned"</script>
<img src=x onerror="document.title = 'owned'">

![a picture](https://example.org/track.png) ![x" onerror="document.title='owned'](data:image/png;base64,AA)

[run](javascript:document.title='owned') [data](data:text/html,x) [near](LICENSE) [mail](mailto:a@example.org)
[far](https://example.org/a?b=<"c>) <http://example.org/> [other](//example.org/) [V](vbscript:x)

| a<i> | b |
|:--|--:|
| 1 | <script>2</script> |

```"><script>document.title = "owned"</script>
</code></pre><script>document.title = "owned"</script>
```
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="this machine has no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def one(finished):
    """A server of one model."""
    with served(f"news={finished}") as server:
        yield server


@pytest.fixture(scope="module")
def two(finished, tmp_path_factory):
    """A server of two models; the second one's card is hostile."""
    hostile = shutil.copytree(finished / "artifact", tmp_path_factory.mktemp("hostile") / "artifact")
    (hostile / "README.md").write_text(HOSTILE, encoding="utf-8")
    with served(f"news={finished}", f"hostile={hostile}:fp32") as server:
        yield server


@pytest.fixture(scope="module")
def predict(finished):
    from kdexport import load

    return load(finished / "artifact").predict


@pytest.fixture
def opened(browser):
    """Open a page; afterwards nothing may have been said on the console, nor asked of anyone else."""
    contexts, said, asked, origins = [], [], [], set()

    def open_page(server, **how):
        context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | how))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        origins.add(server.url + "/")
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Chromium itself notes every answer that is an error.
    assert [line for line in said if not line.startswith("Failed to load resource")] == []
    assert [url for url in asked if not url.startswith(tuple(origins))] == []


def classify(page, text=None):
    if text is not None:
        page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Classify").click()
    page.locator("#answer[aria-busy=false]").wait_for()
    return page.get_by_role("status").first.inner_text().split("\n")


def instead(page, status=200, body="", headers=None):
    """Answer the next questions in the server's stead."""
    page.route(
        "**/*",
        lambda route: (
            route.fulfill(status=status, body=body, headers=headers or {})
            if route.request.method == "POST"
            else route.continue_()
        ),
    )


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1400, "dark")])
def test_a_text_gets_the_models_answer_wide_and_narrow_light_and_dark(opened, one, two, predict, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    look = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = opened(one, **look)
    label, words = classify(page, TEXT)
    expected = predict([TEXT])[0]
    assert label == expected.label
    assert re.fullmatch(rf"{100 * expected.score:.1f} %, answered by news in [\d.]+ ms as this browser saw it", words)
    shown = page.locator("#scores bdi").all_inner_texts()
    assert shown == sorted(expected.scores, key=expected.scores.get, reverse=True)
    assert page.get_by_role("heading", name="Model card").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # axe puts a script into the page, which the page's own policy forbids.
    for server, other in ((one, scheme), (two, {"light": "dark", "dark": "light"}[scheme])):
        page = opened(server, bypass_csp=True, **look | {"color_scheme": other})
        classify(page)
        page.get_by_text("Second text, for").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
        assert [rule["id"] for rule in found.response["violations"]] == []


def test_a_keyboard_is_enough(opened, one, predict):
    page = opened(one)
    page.get_by_label("Text", exact=True).focus()
    for keys in ("ControlOrMeta+a", *TEXT, "Control+Enter"):
        page.keyboard.press(keys)
    page.locator("#answer[aria-busy=false]").wait_for()
    assert page.get_by_role("status").first.inner_text().startswith(predict([TEXT])[0].label)
    pair = "Shares rose after the merger"
    for keys in ("Tab", "Enter", "Tab", *pair):
        page.keyboard.press(keys)
    with page.expect_response(lambda response: response.request.method == "POST") as answer:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    assert answer.value.request.post_data_json == {"inputs": {"text": TEXT, "text_pair": pair}, "parameters": {}}
    assert answer.value.json()[0][0]["label"] == predict([(TEXT, pair)])[0].label
    page.get_by_label("curl").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#code").inner_text().startswith("from huggingface_hub import")
    # What is folded away is not sent.
    page.get_by_text("Second text, for").click()
    page.get_by_label("curl").check()
    assert "text_pair" not in page.locator("#code").inner_text()


def test_the_code_that_is_shown_asks_the_same(opened, one, predict, tmp_path):
    page = opened(one, permissions=["clipboard-read", "clipboard-write"])
    expected = predict([ODD_TEXT])[0].label
    label, _ = classify(page, ODD_TEXT)
    assert label == expected
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").wait_for()
    code = {"curl": page.evaluate("navigator.clipboard.readText()")}
    for language in ("Python", "JavaScript"):
        page.get_by_label(language).check()
        code[language] = page.locator("#code").text_content()
    assert not re.search(r"[\x7f-\x9f]", "".join(code.values()))
    (tmp_path / "ask.mjs").write_text(code["JavaScript"], encoding="utf-8")
    # HF_HUB_OFFLINE would keep huggingface_hub from asking anyone, this machine included.
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    commands = {
        "curl": ["bash", "-c", code["curl"]],
        "Python": [sys.executable, "-c", code["Python"]],
        "JavaScript": ["node", tmp_path / "ask.mjs"],
    }
    asking = {
        language: subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for language, command in commands.items()
        if shutil.which("curl" if language == "curl" else command[0])
    }
    for language, process in asking.items():
        answered, _ = process.communicate(timeout=60)
        assert process.returncode == 0, language
        assert expected in answered[: 40 + len(expected)], language  # the best comes first


def test_many_and_odd_labels_and_a_single_number_are_shown(opened, one):
    page = opened(one)
    labels = ["<img src=x onerror=alert(1)>", "\u202eabc", "x" * 300, "{{ 1 }}", *(f"label {i}" for i in range(146))]
    scores = [{"label": label, "score": 0.9996 if i == 0 else 2e-6} for i, label in enumerate(labels)]
    instead(page, body=json.dumps([scores]))
    label, words = classify(page)
    assert (label, words[:8]) == (labels[0], "> 99.9 %")
    lines = page.locator("#scores li")
    visible = "lines => lines.filter((line) => line.checkVisibility()).length"
    assert (lines.count(), lines.evaluate_all(visible)) == (150, 5)
    more = page.get_by_role("button", name="Show all 150")
    assert more.get_attribute("aria-expanded") == "false"
    more.click()
    assert lines.evaluate_all(visible) == 150
    assert lines.locator("bdi").all_text_contents() == labels
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400
    assert page.get_by_role("button", name="Show the best 5").get_attribute("aria-expanded") == "true"
    page.unroute_all()
    # A regression's number is no share of anything.
    page.evaluate("document.querySelector('[name=model]').dataset.function = 'none'")
    instead(page, body='[[{"label": "LABEL_0", "score": -2.34567}]]')
    label, words = classify(page)
    assert (label, words[:6]) == ("LABEL_0", "-2.346")
    assert page.locator("#scores i").count() == 0
    assert page.get_by_role("button", name="Show").count() == 0


def test_errors_stand_there_in_the_servers_words(opened, one, predict):
    page = opened(one)
    title, words = classify(page, "x" * 100_001)
    assert (title, words) == ("Error 413", "a text may have 100,000 characters")
    instead(page, 429, '{"error": "too much work is waiting"}', {"Retry-After": "2"})
    assert classify(page, TEXT) == ["Error 429", "too much work is waiting. Come again in 2 s."]
    page.unroute_all()
    instead(page, 502, "<h1>Bad gateway</h1>")
    assert classify(page) == ["Error 502", "This is no answer of kdexport"]
    page.unroute_all()
    page.route("**/*", lambda route: route.abort())
    assert classify(page) == ["No answer", "The server can't be reached."]
    assert page.locator("#scores li").count() == 0
    page.unroute_all()
    assert classify(page)[0] == predict([TEXT])[0].label


def test_a_hostile_card_only_shows_text_tables_and_web_links(opened, two, predict):
    page = opened(two)
    assert page.get_by_role("heading", name="Model card of hostile").is_hidden()
    page.get_by_role("radio", name="hostile").check()
    card = page.locator(".card").nth(1)
    assert card.get_by_role("heading", name="Model card of hostile").is_visible()
    assert page.get_by_role("heading", name="Model card of news").is_hidden()
    assert page.title() == "kdexport: news, hostile"
    assert card.locator("script, img, iframe, style, i, [style], [onerror]").count() == 0
    links = card.locator("a[href]")
    assert links.evaluate_all("all => all.map((a) => a.getAttribute('href'))") == [
        "https://example.org/a?b=%3C%22c%3E",
        "http://example.org/",
    ]
    assert links.evaluate_all("all => all.every((a) => a.rel === 'noopener')")
    text = card.inner_text()
    assert "a picture" in text
    assert "secret-front-matter" not in text
    assert card.locator("td.right").inner_text() == "<script>2</script>"
    # The second model answers under its own name.
    with page.expect_request(lambda request: request.method == "POST") as asked:
        label, words = classify(page, TEXT)
    assert asked.value.url == f"{two.url}/models/hostile"
    assert "answered by hostile" in words
    assert label == predict([TEXT])[0].label
    assert "/models/hostile" in page.locator("#code").inner_text()


def test_with_keys_there_is_no_card_and_the_key_goes_nowhere_else(opened, finished, predict):
    with served(finished, KDEXPORT_API_KEYS="schlüssel-1") as server:
        page = opened(server)
        assert page.locator(".card").count() == 0
        assert classify(page, TEXT) == ["Error 401", "an API key is needed: Authorization: Bearer KEY"]
        page.get_by_label("API key").fill("schlüssel-1")
        assert classify(page)[0] == predict([TEXT])[0].label
        assert "schlüssel" not in page.locator("body").inner_text()
        assert "$KDEXPORT_API_KEY" in page.locator("#code").inner_text()
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.reload()
        assert page.get_by_label("API key").input_value() == ""


def test_the_policy_lets_nothing_else_run_and_nothing_is_kept(browser, one):
    with browser.new_context() as context:
        headers = context.request.get(one.url).headers
        page = context.new_page()
        page.goto(one.url)
        page.evaluate("document.body.setAttribute('onclick', 'document.title = 1')")
        page.click("h1")
        assert page.title() == "kdexport: news"
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert re.fullmatch(r"'sha256-\S+'", policy["script-src"])
    assert re.fullmatch(r"'sha256-\S+'", policy["style-src"])
    assert policy["connect-src"] == "'self'"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"


def test_a_page_is_drawn_once_and_says_when_nothing_is_in_service():
    from kdexport.serve import page

    assert page.render([], True) is page.render([], True)
    assert b"No model is in service" in page.render([], True).body


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("---\na: b\n---\ntext", "<p>text</p>\n"),
        ("---\r\na: b\r\n---\r\ntext", "<p>text</p>\n"),
        ("text\n\n---\n\nmore", "<p>text</p>\n<hr />\n<p>more</p>\n"),
        ("", ""),
        ("###### deep", "<h6>deep</h6>\n"),
        ("x" * 60_000, f"<p>{'x' * 50_000}…</p>\n"),
    ],
)
def test_a_cards_front_matter_goes_and_a_long_card_is_cut(markdown, html):
    from kdexport.serve.page import card_html

    assert card_html(markdown) == html


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1400, "dark")])
def test_two_texts_get_the_cosine_of_their_vectors(opened, tmp_path, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    from kdexport import load
    from kdexport.pipeline.export_model import export

    export(write_embedder(tmp_path / "model"), tmp_path / "vectors", variants="fp32")
    texts = ["a refund, please", "<b>my money</b> back"]
    with served(tmp_path / "vectors") as server:
        page = opened(server, viewport={"width": width, "height": 900}, color_scheme=scheme)
        assert "32\ndimensions" in page.locator(".facts").first.inner_text()
        for label, text in zip(("A text", "Another text"), texts, strict=True):
            page.get_by_label(label, exact=True).fill(text)
        page.get_by_role("button", name="Compare").click()
        page.locator("#vectors-answer[aria-busy=false]").wait_for()
        cosine, words = page.get_by_role("status").first.inner_text().split("\n")
        a, b = load(tmp_path / "vectors").embed(texts)
        assert float(cosine) == pytest.approx(a @ b, abs=6e-4)
        assert re.fullmatch(r"cosine, by vectors in \d+ ms as this browser saw it", words)
        page.get_by_label("A text", exact=True).fill("x" * 100_001)
        page.get_by_role("button", name="Compare").click()
        page.get_by_text("Error 413").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        grave = [
            one["id"] for one in Axe().run(page).response["violations"] if one["impact"] in ("serious", "critical")
        ]
        assert grave == []
