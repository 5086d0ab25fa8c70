"""A report in a real browser."""

from __future__ import annotations

import base64
import copy
import json

import pytest

from browsing import PATIENCE
from example_run import AUDIT, HOSTILE, LONG, RECORD, comparison, finding, outcomes
from palinode.progress import plain
from palinode.report.reports import Facts, html_report, report_content


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with every section, and traps in its texts."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    facts = Facts("unlearn", RECORD, AUDIT, outcomes(), texts=True)
    path.write_text(html_report(report_content(facts)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(browser, page):
    """The page, opened, and everything that was asked for and said on the way."""
    show(browser, width=1280)
    browser.get(page.as_uri())
    return browser


def wait(browser, happened):
    """Wait until something happened, and return it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, PATIENCE, poll_frequency=0.1).until(lambda _: happened())


def show(browser, *, width, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def errors(browser):
    """What the browser complained of since it was last asked."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def shown_cases(browser):
    return [case for case in find(browser, ".case") if case.is_displayed()]


def test_opens_from_disk_without_errors_and_asks_no_network(opened):
    assert errors(opened) == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_plots_and_tables_are_there(opened):
    assert len(find(opened, ".plot")) == 9
    assert len([svg for svg in find(opened, ".plot svg") if svg.is_displayed()]) == 9
    marks = [mark for mark in find(opened, "#plot-tradeoff .mark") if mark.is_displayed()]
    assert len(marks) == 7 + 7  # three points, four models; and as many in the key
    assert len(find(opened, "section tbody tr")) == 4 + 4 + 3 + 2 + 2 + 2 + 3 + 2 + 6 + 4
    assert [" ".join(light.text.split()) for light in find(opened, ".claim .light")] == [
        "✓ Yes",
        "! Partly",
        "! Partly",
        "! Partly",
        "✕ No",
    ]


def star(opened):
    """The mark of the chosen point, in the middle of the screen."""
    mark = next(
        mark for mark in find(opened, "#plot-tradeoff [data-shown=unlearned]") if "chosen" in told(mark)
    )
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    return mark


def told(mark):
    return mark.find_element("css selector", "title").get_property("textContent")


def test_hovering_over_a_point_tells_scales_and_scores(opened):
    assert told(star(opened)).splitlines()[:3] == ["α = 1, β = 0.5", "forget set: 0.200", "retain set: 0.750"]


def test_clicking_a_point_shows_its_figures_and_sample_answers(opened):
    from selenium.webdriver import ActionChains

    mark, panel = star(opened), find(opened, "#picked")[0]

    def picked():
        ActionChains(opened).move_to_element(mark).click().perform()
        return panel.is_displayed()

    wait(opened, picked)
    text = panel.get_property("textContent")
    assert "α = 1, β = 0.5" in text
    assert "unlearned says 0" in text
    assert plain(HOSTILE) in text


def test_search_keeps_the_rows_that_hold_every_word(opened):
    box = find(opened, "#search")[0]
    assert len(shown_cases(opened)) == 6
    box.send_keys("ada PAINTER")
    wait(opened, lambda: len(shown_cases(opened)) == 1)
    assert "Who is Ada?" in shown_cases(opened)[0].text
    assert find(opened, "#count")[0].text == "1 of 6 rows"
    box.clear()
    box.send_keys("no such words")
    wait(opened, lambda: not shown_cases(opened))
    box.clear()
    box.send_keys(" ")
    wait(opened, lambda: len(shown_cases(opened)) == 6)
    find(opened, "input.set[value=forget]")[0].click()
    wait(opened, lambda: len(shown_cases(opened)) == 3)
    find(opened, "input.set[value=forget]")[0].click()
    wait(opened, lambda: len(shown_cases(opened)) == 6)


def test_hostile_and_huge_texts_are_shown_as_texts(opened):
    prompts = [found.get_property("textContent") for found in find(opened, ".prompt")]
    answers = [found.get_property("textContent") for found in find(opened, ".case dd")]
    assert plain(HOSTILE) in prompts
    assert answers.count(plain(HOSTILE)) == 9  # one right answer, and four models on two rows
    assert LONG in answers
    assert find(opened, "main img, main script, main iframe") == []
    assert opened.execute_script("return window.attacked") is None


def test_dark_scheme_and_phone_repaint_the_figures(opened):
    def ink():
        return opened.execute_script(
            "return getComputedStyle(document.querySelector('#plot-tradeoff .tick')).fill"
        )

    light = ink()
    show(opened, width=390, scheme="dark")
    wait(opened, lambda: ink() != light)
    shown = [svg for svg in find(opened, "#plot-tradeoff svg") if svg.is_displayed()]
    assert [svg.size["width"] <= 390 for svg in shown] == [True]
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
    assert (
        opened.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    )
    show(opened, width=1280)
    wait(opened, lambda: ink() == light)


def test_prints_and_says_nothing_wrong_on_the_way(opened):
    printed = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    assert errors(opened) == []


PAGES = {
    "run": Facts("unlearn", RECORD, AUDIT, outcomes(), texts=True),
    "audit": Facts("audit", audit=AUDIT),
    "comparison": Facts("compare", comparison()),
}


@pytest.mark.parametrize("kind", PAGES)
def test_a_phone_shows_the_whole_page_without_sideways_scrolling(browser, tmp_path, kind):
    path = tmp_path / "report.html"
    path.write_text(html_report(report_content(PAGES[kind])), encoding="utf-8")
    show(browser, width=390)
    browser.get(path.as_uri())
    browser.execute_script("for (const folded of document.querySelectorAll('details')) folded.open = true")
    wait(browser, lambda: find(browser, ".scroll.wide"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert browser.execute_script(SPILLED) == []
    sizes = browser.execute_script(LETTERS)
    assert min(sizes, default=11) >= 11
    wait(browser, lambda: browser.execute_script(UNMARKED) == [])
    assert errors(browser) == []
    show(browser, width=1280)
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280


UNMARKED = """
return [...document.querySelectorAll('.scroll')].filter((one) =>
  (one.scrollWidth > one.clientWidth) !== (one.querySelector('.hint').offsetHeight > 0))
  .map((one) => one.ariaLabel)
"""
"""Tables that scroll without a word of it, or say so and do not."""
SPILLED = """
return [...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll, svg'))
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML)
"""
"""What reaches beyond the screen, outside of tables that scroll in their own box."""
LETTERS = """
return [...document.querySelectorAll('.narrow svg text')].filter((one) => one.getBoundingClientRect().width)
  .map((one) => parseFloat(one.getAttribute('font-size')) * one.ownerSVGElement.getScreenCTM().a)
"""
"""Sizes of the letters in pictures, in pixels of the screen."""


def test_colours_of_an_audit_follow_its_findings(browser, tmp_path):
    audit = copy.deepcopy(AUDIT)
    test = audit["attacks"]["questions"]["tests"]["probability"]
    test["findings"]["audited"] = finding(0.4, 0.2, "within")  # two margins more, where only less is judged
    audit["policy"]["margins"]["questions.probability"] = {"more": False, "less": 0.1}
    path = tmp_path / "report.html"
    path.write_text(html_report(report_content(Facts("audit", audit=audit))), encoding="utf-8")
    show(browser, width=1280)
    browser.get(path.as_uri())
    marks = {
        told(mark).split("\n")[0]: mark for mark in find(browser, "#plot-attacks .wide .mark:has(title)")
    }
    style = "return getComputedStyle(arguments[0]).stroke"
    assert {said: browser.execute_script(style, mark) for said, mark in marks.items()} == {
        "not judged": "rgb(102, 112, 122)",
        "knows more": "rgb(179, 38, 30)",
    }
    assert find(browser, "td.good") == []
