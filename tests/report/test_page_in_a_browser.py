"""Pages in a browser without a head: `make test-report`, which installs what drives it. Needs a system's Chromium.

Screenshots of the demo's and the large page lie in build/report/screenshots afterwards.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import report_material

from corrsteer import Decoding, collect, demo, evaluate, select
from corrsteer.report.page.document import page as html
from corrsteer.report.page.found import Compared, Material

if "CHROMIUM" not in os.environ:
    pytest.skip("make test-report runs these", allow_module_level=True)

TOOLS = Path(__file__).parents[2] / "build" / "report"
sys.path.append(str(TOOLS))
playwright = pytest.importorskip("playwright.sync_api", reason="make test-report installs it")

SECTIONS = ("scores", "changes", "side-effects", "runs", "features", "top-features", "progress", "search",
            "distributions", "cost", "provenance", "notes")  # fmt: skip
LARGEST, SLOWEST = 10e6, 3.0  # bytes of a page; seconds that the browser's main thread computes until a first plot
OPENED = 3  # times, the quickest of which counts: a machine's other work only ever slows
DRAWN = ".canvas[data-drawn]"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
        yield launched
        launched.close()


def of_the_demo():
    """What the demo's commands would leave, of fewer samples."""
    model, tokenizer, encoders = demo.load()
    train, validation, test = demo.tasks()
    options = {"decoding": Decoding(max_new_tokens=4), "progress": False}
    run = collect(model, tokenizer, encoders, train, pool="max", permutations=99, **options)
    world = {"model": model, "tokenizer": tokenizer, "validation": validation, **options}
    steering = select(run, "search", **world)
    evaluated = evaluate(model, tokenizer, test, {"search.safetensors": steering}, **options)
    return Material({"demo": run}, {"search.safetensors": steering}, {"evaluation.json": Compared(evaluated)})


MATERIALS = {
    "demo": of_the_demo,
    "large": report_material.large,
    "hostile": lambda: report_material.material(report_material.hostile),
    "many scripts": lambda: report_material.material(report_material.many_scripts),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """name -> the file of a page, which is made once."""
    folder, made = tmp_path_factory.mktemp("pages"), {}

    def of(name):
        if name not in made:
            made[name] = folder / f"{name}.html"
            made[name].write_text(html(MATERIALS[name](), title=name), encoding="utf-8", newline="")
        return made[name]

    return of


@pytest.fixture
def opened(browser, pages):
    """Opens a page, and hears what it says and asks for."""
    contexts = []

    def of(name, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.said, tab.asked = [], []
        tab.on("console", lambda message: tab.said.append(message.text))
        tab.on("pageerror", lambda error: tab.said.append(str(error)))
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.goto(pages(name).as_uri())
        tab.wait_for_selector(DRAWN)
        return tab

    yield of
    for context in contexts:
        context.close()


def draw_everything(tab):
    """Open what is folded, and bring every plot into view."""
    tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for figure in tab.query_selector_all("figure.plot"):
        figure.scroll_into_view_if_needed()
        figure.wait_for_selector(DRAWN)
    tab.evaluate("scrollTo(0, 0)")


@pytest.mark.parametrize("name", MATERIALS)
def test_a_page_shows_every_section_says_nothing_to_the_console_and_asks_for_nothing(name, opened, pages):
    tab = opened(name)
    assert pages(name).stat().st_size < LARGEST
    assert tuple(section.get_attribute("id") for section in tab.query_selector_all("main section")) == SECTIONS
    assert all(section.inner_text().count("\n") for section in tab.query_selector_all("main section"))
    draw_everything(tab)
    assert tab.said == [] and tab.asked == [pages(name).as_uri()]


@pytest.mark.parametrize("name", ["demo", "large"])
def test_a_first_plot_is_there_within_seconds(name, browser, pages):
    def opening():
        context = browser.new_context()
        tab = context.new_page()
        devtools = context.new_cdp_session(tab)
        devtools.send("Performance.enable", {"timeDomain": "threadTicks"})  # of the machine's others it knows nothing
        tab.goto(pages(name).as_uri())
        tab.wait_for_selector(DRAWN)
        taken = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
        wall = tab.evaluate("performance.now()") / 1000
        context.close()
        return taken["TaskDuration"], wall

    computing, wall = min(opening() for _ in range(OPENED))
    print(f"{name}: {computing:.2f} s of computing, {wall:.2f} s in all")
    assert 0 < computing < SLOWEST


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["demo", "large", "many scripts"])
def test_axe_finds_nothing_serious(name, scheme, opened):
    tab = opened(name, scheme=scheme)
    draw_everything(tab)
    tab.evaluate((TOOLS / "axe.min.js").read_text(encoding="utf-8"))
    found = tab.evaluate("axe.run()")
    assert len(found["passes"]) > 15
    bad = [
        (one["id"], one["nodes"][0]["html"]) for one in found["violations"] if one["impact"] in ("serious", "critical")
    ]
    assert bad == []


def test_tables_sort_by_their_headers_numbers_by_value_and_filter_by_text(opened):
    tab = opened("large")
    table = tab.locator("#top-features .table").first
    header = table.locator("thead th", has_text=re.compile("^r$"))
    column = tab.evaluate("(th) => th.cellIndex", header.element_handle()) + 1

    def values():
        shown = table.locator(f"tbody tr:visible > :nth-child({column})").all_inner_texts()
        return [float(text) for text in shown]

    header.get_by_role("button").focus()
    tab.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending" and values() == sorted(values()) and len(values()) == 130
    tab.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending" and values() == sorted(values(), reverse=True)
    table.get_by_role("searchbox").fill("17/")
    assert len(values()) == 5 and table.locator(".filter output").inner_text() == "5 of 130 rows"


def test_a_point_that_is_clicked_is_named_and_a_layer_can_be_chosen(opened):
    tab = opened("demo")
    figure = tab.locator("#features figure").first
    figure.scroll_into_view_if_needed()
    figure.locator(DRAWN).wait_for()
    figure.locator("select").select_option("layer 1")
    tab.wait_for_function(
        "() => document.querySelector('#features .canvas').data?.[1]?.text?.every((t) => t.startsWith('layer 1 '))"
    )
    box = figure.locator(".scatterlayer .trace").last.locator("path.point").last.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert re.fullmatch(r"layer 1 feature \d+: r [+-]0\.\d+, active in .*%", figure.locator(".named").inner_text())


def test_the_theme_can_be_turned_and_plots_turn_with_it(opened):
    tab = opened("demo", scheme="light")
    colour = "getComputedStyle(document.querySelector('.canvas .xtick text')).fill"
    before = tab.evaluate(colour)
    tab.get_by_role("button", name="Dark").click()
    tab.wait_for_function(f"(before) => {colour} !== before", arg=before)
    assert tab.get_by_role("button", name="Light").is_visible()


def test_markup_of_others_is_shown_and_never_runs(opened):
    tab = opened("hostile")
    draw_everything(tab)
    tab.evaluate("document.querySelectorAll('figure select').forEach((one) => { one.selectedIndex = 1; "
                 "one.dispatchEvent(new Event('change')); })")  # fmt: skip
    assert tab.evaluate("window.broken === undefined && document.querySelectorAll('img, main b').length === 0")
    assert "</script><img src=x onerror=" in tab.locator("#changes").inner_text()
    assert "<img src=x" in tab.locator("#scores .canvas").first.text_content()


@pytest.mark.parametrize("name", ["demo", "large", "many scripts"])
@pytest.mark.parametrize("width", [390, 1280, 2560])
def test_a_page_is_no_wider_than_its_window(name, width, opened):
    for scheme in ("light", "dark") if name == "demo" else ("light",):
        tab = opened(name, width, scheme)
        if width > 390 or name != "demo":
            draw_everything(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        TOOLS.joinpath("screenshots").mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=TOOLS / "screenshots" / f"{name}-{width}-{scheme}.png", full_page=True)
