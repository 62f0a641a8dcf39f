"""The page of a report in a real browser: it asks for nothing, complains of nothing, and its pictures are there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_folders import audited, table, written

from fedsplit import report
from fedsplit.report.page import build

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with a profile of its own; every request and every line of the console is recorded."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("there is no Chromium with chromedriver here (apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    quiet = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage", "disable-sync")
    quiet += ("disable-background-networking", "disable-component-update", f"user-data-dir={profile}")
    for option in (*quiet, "window-size=1200,1600"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield opened
    opened.quit()


def page(tmp_path: Path) -> Path:
    """Two groups, one of two seeds, with all tables that take no training."""
    for seed in (0, 1):
        for front in (1, 2):
            written(tmp_path / f"{front}-{seed}", [0.2, 0.5], seed=seed, cut__front=front, name="<i>odd</i> & name")
    folder = tmp_path / "1-0"
    table(folder / "classes.csv", [{"round": 1, "class": name, "samples": 5, "accuracy": 0.5} for name in ("é", "<b>")])
    table(folder / "ledger.csv", [{"round": r, "activations_up": 9, "raw_activations_up": 18} for r in (1, 2)])
    table(folder / "partition.csv", [{"device": d, "class": "é", "samples": 3 + d} for d in range(4)])
    spent = {"virtual_s": 2.0, "compute_s": 1.0, "upload_s": 0.5, "idle_s": 0.5, "profile": "pi", "failure": ""}
    table(folder / "clients.csv", [{"round": r, "client": c, **spent} for r in (1, 2) for c in range(4)])
    audited(folder)
    return build(report.load_all([tmp_path]), tmp_path / "out")


@pytest.mark.slow
def test_in_a_browser(browser: Any, tmp_path: Path) -> None:
    html = page(tmp_path)
    text = html.read_text()
    assert "http:" not in text and "https:" not in text and "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text), "everything is in the page itself"
    browser.get(html.as_uri())
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not complaints
    each = "[i.complete, i.naturalWidth, i.alt.length, i.getBoundingClientRect().width]"
    images = browser.execute_script(f"return [...document.images].map(i => {each})")
    assert len(images) >= 10 and len(images) == text.count("<img ")
    assert all(complete and width > 0 and alt > 20 and shown > 100 for complete, width, alt, shown in images)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    broken = "return [...document.links].filter(a => !document.getElementById(a.hash.slice(1))).map(a => a.href)"
    assert browser.execute_script("return document.links.length") > 4 and not browser.execute_script(broken)
    twice = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    assert browser.execute_script(twice) == 0
    assert browser.execute_script("return document.querySelectorAll('h1 i, td b').length") == 0, "names are text"
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = {each["request"]["url"] for each in sent if each["documentURL"] == html.as_uri()}
    assert html.as_uri() in asked and all(url == html.as_uri() or url.startswith("data:") for url in asked)
    browser.set_window_size(500, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), "on a phone"
