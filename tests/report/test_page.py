"""The page in a real browser: nothing leaves it, nothing fails in it, it can be read and used by everyone."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_gputrain.report.page import page, write_page
from pytest_gputrain.report.page_compared import Compared, Mark
from pytest_gputrain.report.page_nights import NightBar
from pytest_gputrain.report.page_text import anchor, clean, link, ranges
from tests.report.browser import REQUIRED, Browser, browser, missing
from tests.report.page_reports import HANG, HOSTILE, a_test, large, launch_of, night, report_of

NIGHTS = [
    NightBar(f"2026-11-{day:02}", "failed" if day == 3 else "passed", 9, day == 3, 1, 60.0 * day)
    for day in range(1, 9)
]
WORSE = Compared("2026-11-28", [Mark("worse", "gpt::stable_training", "tokens/s 48,000 → 45,120")])


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if lacking := missing():
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(lacking)
    with browser() as opened:
        yield opened


def test_everything_of_a_night_is_there_and_nothing_is_fetched(chromium: Browser, tmp_path: Path) -> None:
    chromium.requests(), chromium.complaints()
    path = write_page(night(), tmp_path, compared=WORSE, nights=NIGHTS)
    chromium.open(path)
    assert chromium.complaints() == []
    assert chromium.requests() == [path.as_uri()]
    assert chromium.run("return document.querySelector('h1').textContent") == "2 of 13 tests failed"
    for section in ("failures", "not-run", "compared", "checks", "plots", "nights", "tests"):
        assert chromium.run(f"return !!document.getElementById('{section}')"), section
    assert HANG in chromium.run("return document.body.innerText")


def test_a_phone_never_scrolls_sideways(chromium: Browser, tmp_path: Path) -> None:
    report = night()
    report["tests"].append(a_test("x" * 900, "failed", message="y" * 900, launches=[launch_of(8, "z" * 900)]))
    chromium.cdp(
        "Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True
    )
    try:
        chromium.open(write_page(report, tmp_path, compared=WORSE, nights=NIGHTS))
        chromium.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert chromium.run("return document.documentElement.scrollWidth") == 360
    finally:
        chromium.cdp("Emulation.clearDeviceMetricsOverride")


# The least contrast of a text with the nearest colour behind it, as WCAG 2 counts it, and which text that is.
CONTRAST = r"""
const parts = text => text.match(/[\d.]+/g).map(Number);
const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = text => {
  const [r, g, b] = parts(text).map(linear);
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = one => {
  for (; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if (parts(colour)[3] !== 0) return colour;
  }
  return 'rgb(255, 255, 255)';
};
let worst = [99, ''];
for (const one of document.querySelectorAll('body *')) {
  if (['SCRIPT', 'TITLE', 'OPTION'].includes(one.tagName.toUpperCase())) continue;
  if (![...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
  const style = getComputedStyle(one), drawn = one.namespaceURI.endsWith('svg');
  const ink = light(drawn ? style.fill : style.color), paper = light(behind(one));
  const ratio = (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  if (ratio < worst[0]) worst = [ratio, `${one.outerHTML.slice(0, 200)} ${style.fill} ${behind(one)}`];
}
return worst"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(chromium: Browser, tmp_path: Path, scheme: str) -> None:
    chromium.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    chromium.open(write_page(night(), tmp_path, compared=WORSE, nights=NIGHTS))
    worst, where = chromium.run(CONTRAST)
    assert worst >= 4.5, where
    paper = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 23, 26)") == (scheme == "dark")
    chromium.cdp("Emulation.setEmulatedMedia", features=[])


def test_the_keyboard_reaches_everything(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(write_page(night(), tmp_path))
    first = chromium.tab()
    assert first == "#content"  # the skip link
    reached = {chromium.tab() for _ in range(90)}
    assert {
        "#failures",
        "#tests",
        "filter",
        "outcome",
        "SUMMARY",
        f"#{anchor('gpt::ddp_completes')}",
    } <= reached


def test_the_filter_leaves_what_fits(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(write_page(large(1000, 2), tmp_path))
    assert (
        chromium.later("""const done = arguments[0], told = document.getElementById('told');
        new MutationObserver(() => done(told.textContent)).observe(told, {childList: true});
        const field = document.getElementById('filter');
        field.value = 'part3 failed'; field.dispatchEvent(new Event('input'));""")
        == "2 tests fit"
    )


def test_an_address_opens_the_row_it_points_to(chromium: Browser, tmp_path: Path) -> None:
    report = report_of([a_test(f"case::check{n}", check="c", case="case") for n in range(60)], "passed")
    chromium.open(write_page(report, tmp_path), f"#{anchor('case::check41')}")
    assert chromium.run("return document.querySelector('tr:target').getBoundingClientRect().height") > 0


def test_on_paper_nothing_is_folded_or_cut(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(write_page(night(), tmp_path, compared=WORSE, nights=NIGHTS))
    chromium.cdp("Emulation.setEmulatedMedia", media="print")
    try:
        assert chromium.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
        hidden = """return [...document.querySelectorAll('.failure pre, #not-run ~ ul li, .matrix td')]
            .filter(one => !one.checkVisibility({contentVisibilityAuto: true}) || !one.offsetHeight
                           || one.scrollHeight > one.clientHeight + 1).map(one => one.outerHTML)"""
        assert chromium.run(hidden) == []
    finally:
        chromium.cdp("Emulation.setEmulatedMedia", media="")
    paper = base64.b64decode(chromium.cdp("Page.printToPDF", printBackground=True)["data"])
    assert paper.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type */Page\b", paper)) <= 20


def test_without_javascript_everything_can_be_read(chromium: Browser, tmp_path: Path) -> None:
    report = report_of([a_test(f"case::check{n}", check="c", case="case") for n in range(60)])
    report["tests"] += night()["tests"]
    path = write_page(report, tmp_path, compared=WORSE, nights=NIGHTS)
    chromium.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(path, f"#{anchor('case::check41')}")
        asked = """JSON.stringify({ready: document.documentElement.dataset.ready || 'no',
            tools: document.getElementById('tools').hidden,
            row: document.querySelector('tr:target').getBoundingClientRect().height > 0,
            said: document.body.textContent})"""
        told = json.loads(chromium.cdp("Runtime.evaluate", expression=asked)["result"]["value"])
    finally:
        chromium.cdp("Emulation.setScriptExecutionDisabled", value=False)
    assert (told["ready"], told["tools"]) == ("no", True)  # no filter that would do nothing
    assert told["row"]  # its group opened for the address
    assert HANG in told["said"]
    assert "likely: ranks ran a different number of steps" in told["said"]


def test_hostile_texts_stay_texts(chromium: Browser, tmp_path: Path) -> None:
    chromium.requests(), chromium.complaints()
    launch = launch_of(2, HOSTILE) | {
        "artifacts": "javascript:alert(1)",
        "timeline": "../../etc/passwd",
        "likely": HOSTILE,
    }
    series = [{"plot": HOSTILE, "label": HOSTILE, "unit": HOSTILE, "x": [0, 1], "y": [1, "nan"]}]
    hostile = a_test(
        HOSTILE, "failed", message=f"{HOSTILE}\n{HOSTILE}", labels=[HOSTILE], figures={HOSTILE: HOSTILE}
    )
    hostile |= {"case": HOSTILE, "check": HOSTILE, "device": HOSTILE, "series": series, "launches": [launch]}
    reason = [{"reason": HOSTILE, "count": 1, "tests": [HOSTILE]}]
    report = report_of([hostile], not_run=reason, machines=[{"label": HOSTILE}])
    path = write_page(
        report,
        tmp_path,
        compared=Compared(HOSTILE, [Mark("worse", HOSTILE, HOSTILE)]),
        nights=[NightBar(HOSTILE, HOSTILE, 1, 0, 0, 1.0)],
    )
    chromium.open(path)
    assert chromium.complaints() == []
    assert chromium.requests() == [path.as_uri()]
    assert chromium.run("return document.title") == "1 of 1 test failed · pytest-gputrain"
    assert chromium.run("return document.querySelectorAll('script, img').length") == 1
    assert chromium.run("return document.querySelectorAll('a[href^=javascript]').length") == 0


@pytest.mark.parametrize("failing", [False, True])
def test_ten_thousand_tests_of_eight_ranks_stay_small(failing: bool) -> None:
    text = page(large(10_000, 8, failing=failing))
    assert len(text.encode()) < 5_000_000
    assert ("more like this are among all tests below" in text) == failing


@pytest.mark.parametrize(
    ("verdict", "headline"),
    [
        ("passed", "1 test passed"),
        ("nothing_ran", "Nothing ran"),
        ("interrupted", "Interrupted after 1 test"),
        ("incomplete", "Incomplete: 1 test ended"),
    ],
)
def test_the_verdict_comes_in_words(verdict: str, headline: str) -> None:
    assert f"<h1>{headline}</h1>" in page(report_of([a_test("a::b")], verdict))


def test_texts_are_made_fit() -> None:
    assert clean("\x1b[31mred\x1b[0m\u202e\ud800\x00") == "red\ufffd\ufffd\ufffd"
    assert [link(path) for path in ("a b/c.txt", "/etc", "../x", "javascript:x", None)] == [
        "a%20b/c.txt",
        None,
        None,
        None,
        None,
    ]
    assert ranges([3, 0, 2, 7, 1]) == "0–3, 7"
    assert anchor("tests/a.py::test_b[1]") != anchor("tests/a.py::test_b[2]")
