"""The pages in headless Chromium: they load without an error or a request, and every control does what it says."""

import copy
import math
import os
import re
import shutil

import pytest
from playwright import sync_api
from report_data import (
    NATS_WEIGHTS,
    ROLE_BIASES,
    RUN,
    START,
    by_slice,
    make_metrics,
    make_row,
    make_rows,
    make_sample,
    make_task_rows,
    make_workdir,
    write,
)
from test_report import CASES, TOY

from natsjax.report import fields
from natsjax.report.compare import compare
from natsjax.runs.metrics import METRICS, Metric

_PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    _PROGRAM is None, reason="no chromium, chromium-browser or google-chrome is on this machine"
)

PHONE = {"width": 390, "height": 844}
TOKENS = [f"w{index}" for index in range(60)]


def long_sample(title="speech 1962"):
    """60 tokens in two layers of two heads; every tenth is GLOBAL, every third LOCAL."""
    text = "".join("0" if s % 10 == 0 else "1" if s % 3 == 0 else "2" for s in range(len(TOKENS)))
    other = "0" + "2" * (len(TOKENS) - 1)
    return make_sample(TOKENS, roles=[[text, other], [other, text]], title=title, windows=[1, 4])


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    samples = [long_sample(), long_sample("speech 1970")]
    metrics = make_metrics()
    metrics[20]["warnings"] = ["no_global: layer 0, head 1 keeps nothing"]
    return write(path, samples=samples, metrics=metrics, starts=[START])[2]


@pytest.fixture(scope="module")
def comparison_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    make_workdir(path / "a")
    make_workdir(path / "b", budget=0.3, perplexity=0.9)
    make_workdir(path / "dense", attention="dense")
    make_workdir(path / "young", evaluated=False)
    return compare([path / name for name in ("a", "b", "dense", "young")], path / "out")[0]


@pytest.fixture
def open_page(chromium):
    """Opens a page; at the end there was no error and no request but for the page itself."""
    contexts, problems = [], []

    def open_it(path, fragment="", **options):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.split("#")[0] == path.as_uri() or problems.append(request.url))
        page.goto(f"{path.as_uri()}#{fragment}")
        if folder := os.environ.get("NATSJAX_SCREENSHOTS"):  # for people, who look at them
            name = re.sub(r"\W+", "_", os.environ["PYTEST_CURRENT_TEST"].split("::")[-1])
            page.screenshot(path=f"{folder}/{name}.png", full_page=True)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def roles(page):
    """The reader's roles, a digit a token."""
    return page.evaluate(
        "[...document.querySelectorAll('#tokens .token')].map((node) => node.className.match(/role-(.)/)[1]).join('')"
    )


def ends(page):
    return page.evaluate("[...document.querySelectorAll('#tokens .token')].map((node) => Number(node.dataset.end))")


def selected(page):
    return page.evaluate("document.querySelector('#tokens [aria-selected=true]')?.dataset.index ?? null")


# --- One run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_case_loads_and_shows_what_it_has(tmp_path, open_page, case):
    arguments = copy.deepcopy(CASES[case])
    page = open_page(write(tmp_path, **arguments)[2], viewport=PHONE)
    rows = arguments.get("rows", make_rows())
    accuracy = arguments.get("run", RUN)["show_accuracy"]
    drawable = [row["accuracy" if accuracy else "perplexity"] for row in rows]
    assert page.locator("#rows tbody tr").count() == len(rows)
    assert page.locator("#curve .hit").count() == sum(math.isfinite(math.nan if x is None else x) for x in drawable)
    assert page.locator("#heat").count() == any(row["method"] == "nats" for row in rows)
    assert page.locator("#reader").count() == bool(arguments.get("samples"))
    assert page.locator("#budget-check").count() == (arguments.get("budget_check", True) is not None)
    assert page.locator("#training").count() == bool(arguments.get("metrics"))
    assert page.locator("#position").count() == any(row["by_position"] for row in rows)
    shown = page.evaluate("document.body.innerText")
    assert ("NaN" in shown) == any(math.isnan(row["perplexity"]) for row in rows)
    assert "undefined" not in shown
    assert overflow(page) == 0


def test_reader_shows_the_selected_head_with_lifetimes_of_method_section_1(tmp_path, open_page):
    layers = [["12012201", "00000000"]]
    sample = make_sample("LSGLSSGL", roles=layers, role_biases=[-0.25], document_starts=[0, 6]) | {"roles": [layers]}
    path = write(tmp_path, samples=[sample], run=RUN | {"layers": ["nats"]})[2]
    first = open_page(path)
    # Types L S G L S S of docs/method.md 1 end at 3 3 oo oo 6 7; the second document, at 6, cuts what is longer.
    assert (roles(first), ends(first)) == ("12012201", [3, 3, 6, 6, 6, 6, 8, 8])
    assert first.locator("#role-bias").is_hidden()
    second = open_page(path, "layer=0&head=1&token=3")
    assert (roles(second), ends(second)) == ("00000000", [6] * 6 + [8] * 2)
    assert second.locator("#tokens .role-0.readable").count() == 4
    assert "“L”" in second.locator("#detail").inner_text()


def test_reader_names_sliding_roles_after_their_windows(tmp_path, open_page):
    layers = [["02322222", "00000000"]]
    sample = make_sample("GSWSSSSS", roles=layers, role_biases=[-0.25], windows=[[1, 3]]) | {"roles": [layers]}
    page = open_page(write(tmp_path, samples=[sample], run=RUN | {"layers": ["nats"], "window": [1, 3]})[2], "token=2")
    assert (roles(page), ends(page)) == ("02222222", [8, 3, 6, 5, 6, 7, 8, 8])
    assert page.locator("#reader th .name").all_inner_texts() == ["GLOBAL", "LOCAL", "SLIDING 1", "SLIDING 3"]
    assert page.locator("#tokens .wider-1").count() == 1
    assert (
        "is SLIDING 3. Its key is read up to and including token 5, 3 tokens on" in page.locator("#detail").inner_text()
    )


def test_the_slider_shows_the_roles_and_the_figures_of_each_measured_role_bias(run_page, open_page):
    page = open_page(run_page)
    sample = long_sample()
    slider, figures = page.locator("#role-bias"), page.locator("#role-bias-figures")
    assert slider.get_attribute("max") == "2"
    assert slider.input_value() == "1"
    assert "set to the budget" in figures.inner_text()
    slider.focus()
    for key, role_bias, kv, perplexity in (
        ("ArrowRight", 2, "49.0 %", "49.00"),
        ("ArrowLeft", 1, "14.9 %", "51.30"),
        ("ArrowLeft", 0, "8.00 %", "58.40"),
    ):
        page.keyboard.press(key)
        assert slider.input_value() == str(role_bias)
        assert roles(page) == sample["roles"][role_bias][0][0]
        text = figures.inner_text()
        assert kv in text
        assert perplexity in text
        name = f"role bias {ROLE_BIASES[role_bias]:g}".replace("-", "\N{MINUS SIGN}")
        assert name in text
        assert slider.get_attribute("aria-valuetext").startswith(name)
        # The heat map shows the same setting.
        assert page.locator("#heat-row").input_value() == str(role_bias)
    page.locator("#heat-row").select_option("2")
    assert slider.input_value() == "2"
    assert page.locator(".heat button").first.inner_text() == f"{make_rows()[2]['kv_live_mean_per_head'][0][0]:.1f}"


def test_the_lists_choose_text_layer_and_head(run_page, open_page):
    page = open_page(run_page)
    sample = long_sample()
    for identity, value, layer, head in (("layer", "1", 1, 0), ("head", "1", 1, 1), ("layer", "0", 0, 1)):
        page.locator(f"#{identity}").select_option(value)
        assert roles(page) == sample["roles"][1][layer][head]
    page.locator("#sample").select_option("1")
    assert page.locator("#sample option:checked").inner_text() == "speech 1970"
    # SLIDING keys of layer 1 stay for 4 queries, those of layer 0 for 1.
    page.locator("#layer").select_option("1")
    page.locator("#head").select_option("0")
    assert ends(page)[1] == 6
    # The address follows 200 ms behind the last choice; on a busy machine an earlier one may have been written before.
    sync_api.expect(page).to_have_url(re.compile("sample=1.*layer=1.*head=0"))
    again = open_page(run_page, page.evaluate("location.hash.slice(1)"))
    assert (ends(again), again.locator("#sample").input_value()) == (ends(page), "1")


def test_the_arrow_keys_move_through_the_text_and_escape_leaves(run_page, open_page):
    page = open_page(run_page)
    page.locator("#tokens [tabindex='0']").focus()
    assert selected(page) == "0"
    for key, index in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("ArrowLeft", 0),
        ("ArrowLeft", 0),
        ("End", 59),
    ):
        page.keyboard.press(key)
        assert selected(page) == str(index)
        assert page.evaluate("document.activeElement.dataset.index") == str(index)
    expected = [s for s, end in enumerate(ends(page)) if s <= 59 < end]
    readable = "[...document.querySelectorAll('#tokens .readable')].map((node) => Number(node.dataset.index))"
    assert page.evaluate(readable) == expected
    assert f"reads {len(expected)} of the 60 keys" in page.locator("#detail").inner_text()
    # The roles change under the selection, which stays.
    page.locator("#role-bias").focus()
    page.keyboard.press("End")
    assert selected(page) == "59"
    assert page.locator("#tokens .readable").count() == 60
    page.locator("#tokens [tabindex='0']").focus()
    page.keyboard.press("Escape")
    assert selected(page) is None
    assert page.locator("#tokens.active").count() == 0


def test_spans_reach_from_each_key_to_its_last_reader_and_share_slots(run_page, open_page):
    page = open_page(run_page)
    spans = page.evaluate(
        """[...document.querySelectorAll('.span')].map((node) => [Number(node.dataset.index), Number(node.dataset.slot),
           parseFloat(node.style.left) / TOKEN_WIDTH, (parseFloat(node.style.width) + 1) / TOKEN_WIDTH])"""
    )
    end = ends(page)
    assert [index for index, *_ in spans] == list(range(60))
    assert all(left == index and width == end[index] - index for index, _, left, width in spans)
    live = [sum(s <= t < end[s] for s in range(60)) for t in range(60)]
    for t in range(60):
        slots = [slot for index, slot, *_ in spans if index <= t < end[index]]
        assert len(set(slots)) == len(slots) == live[t]
    assert 1 + max(slot for _, slot, *_ in spans) == max(live)
    assert f"{max(live)} slots in this text, where full attention needs 60" in page.locator("#spans-note").inner_text()


def test_the_query_of_the_spans_is_that_of_the_text(run_page, open_page):
    page = open_page(run_page, viewport=PHONE)
    page.locator("#spans").focus()
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 59)):
        page.keyboard.press(key)
        assert selected(page) == str(index)
    assert page.locator("#spans .readable").count() == page.locator("#tokens .readable").count() > 0
    line = page.locator(".query-line").bounding_box()
    box = page.locator("#spans").bounding_box()
    assert box["x"] <= line["x"] <= box["x"] + box["width"]  # it scrolled along
    page.keyboard.press("Home")
    page.locator(".span").nth(3).click()
    assert selected(page) == "3"
    page.keyboard.press("Escape")
    assert page.locator(".query-line").is_hidden()


def test_a_cell_of_the_heat_map_opens_its_head(run_page, open_page):
    page = open_page(run_page)
    cells = page.locator(".heat button")
    assert cells.count() == 4
    assert [cells.nth(i).get_attribute("aria-pressed") for i in range(4)] == ["true", "false", "false", "false"]
    cells.nth(3).click()
    assert cells.nth(3).get_attribute("aria-pressed") == "true"
    assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == ("1", "1")
    assert "Layer 1, head 1" in page.locator("#detail").inner_text()
    # By keyboard: one tab stop, arrows between cells, Enter opens.
    assert page.locator(".heat button[tabindex='0']").count() == 1
    cells.nth(3).focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == ("0", "1")


def test_perplexity_by_position_can_be_set_to_a_budget_and_beside_full_attention(run_page, open_page):
    page = open_page(run_page)
    options = page.locator("#position-budget option").all_inner_texts()
    assert options == ["KV budget 15.0 %", "every role bias"]
    legend = page.locator("#position-legend li")
    assert legend.count() == 5  # three methods at the budget, full attention on both weights
    assert page.locator("#position-chart .hit").count() == 5 * 3  # nothing was predicted in the third bucket
    page.locator("summary", has_text="The numbers").click()
    table = page.locator("#position-table tbody tr")
    assert table.all_inner_texts()[0].split("\t")[:2] == ["1", "12"]
    assert table.all_inner_texts()[3].split("\t")[:3] == ["6\N{EN DASH}256", "4,064", "51.30 (46.17\N{EN DASH}56.43)"]
    page.locator("#position-budget").select_option("1")
    assert legend.count() == 3
    page.locator("#position-scale").select_option("1")
    assert table.all_inner_texts()[3].split("\t")[2] == f"{58.4 / 55:.3f}"


def test_slices_are_shown_beside_each_other(tmp_path, open_page):
    make_workdir(tmp_path / "nats", marks=("all", "few", "none"))
    make_workdir(tmp_path / "dense", attention="dense", marks=("all", "few", "none"))
    page = open_page(compare([tmp_path / "nats", tmp_path / "dense"], tmp_path / "out")[0])
    lines = [line.split("\t") for line in page.locator("#slices-table tr").all_inner_texts()]
    assert lines[0] == ["Slice", "Tokens", "nats", "dense"]
    assert lines[1] == ["all tokens", "4,096", f"{51.3 / 48.7:.3f}", "1.000"]
    assert lines[3] == ["nothing", "0", "\N{EN DASH}", "\N{EN DASH}"]
    page.locator("#slices-scale").select_option("0")
    assert (
        page.locator("#slices-table tr")
        .nth(1)
        .inner_text()
        .split("\t")[2]
        .startswith(f"{by_slice(51.3)['perplexity'][0]:.2f} (")
    )
    assert overflow(page) == 0
    page = open_page(tmp_path / "nats" / "report" / "report.html")
    assert page.locator("#slices-group option").all_inner_texts() == ["KV budget 15.0 %", "every role bias"]
    assert not page.locator("#slices-scale").is_visible()  # nothing to compare with
    assert page.locator("#slices-table th").nth(2).inner_text().startswith("NAtS: role bias")


def test_needles_are_shown_by_depth_and_length(tmp_path, open_page):
    page = open_page(write(tmp_path, tasks=make_task_rows())[2], viewport=PHONE)
    assert page.locator("#task-rows tbody tr").count() == 6
    cells = page.locator("#needles td span")
    assert cells.all_inner_texts() == ["90.0 %"] * 2 + ["67.5 %"] * 2 + ["45.0 %"] * 2
    page.select_option("#needle-map", label=f"needle: sliding window, budget 15.0 %, {NATS_WEIGHTS}")
    assert cells.all_inner_texts()[0] == "20.0 %"
    page.select_option("#needle-metric", "generated")
    assert cells.all_inner_texts()[0] == "10.0 %"
    assert cells.first.get_attribute("title") == "depth 0, 128 tokens: 10.0 %"
    assert overflow(page) == 0


def test_training_curves_marks_and_commands_are_shown(run_page, open_page):
    page = open_page(run_page)
    assert page.locator("#training figure").count() == 4
    assert page.locator("#training figure").first.locator(".mark").count() == 3
    assert page.locator("#training-marks li").all_inner_texts() == [
        "Step 12: a step skipped as a loss spike",
        "Step 21: no_global: layer 0, head 1 keeps nothing",
        "Step 30: a step skipped as a loss spike",
    ]
    name = page.locator("#training-loss svg").get_attribute("aria-label")
    assert "10 at step 1" in name
    assert START["command"] in page.locator("#commands").inner_text()
    page.locator("#settings summary").click()
    assert "model.embed_dim" in page.locator("#settings table").inner_text()


def test_layers_of_other_kinds_are_named_and_the_first_with_roles_is_open(tmp_path, open_page):
    page = open_page(write(tmp_path, **copy.deepcopy(CASES["layers of several kinds"]))[2])
    assert page.locator("#layer option").all_inner_texts() == ["0 (dense)", "1 (nats)"]
    assert page.locator("#layer").input_value() == "1"


def test_a_new_row_field_and_a_new_metric_are_shown(tmp_path, monkeypatch, open_page):
    monkeypatch.setitem(fields.ROW_FIELDS, TOY.name, TOY)
    monkeypatch.setitem(METRICS, "toy", Metric("toy", "a toy", "fraction", curve="toy curve"))
    rows = [row | {TOY.name: 12.345} for row in make_rows()]
    metrics = [line | {"toy": 0.5} for line in make_metrics()]
    page = open_page(write(tmp_path, rows=rows, metrics=metrics)[2])
    heads = page.locator("#rows thead th").all_inner_texts()
    cells = page.locator("#rows tbody tr").first.locator("th, td").all_inner_texts()
    assert dict(zip(heads, cells, strict=True))["Toy size"] == "12.3"
    assert page.locator("#training-toy .title").first.text_content() == "toy curve"


# --- Several runs -------------------------------------------------------------------------------


def test_the_comparison_shows_every_run(comparison_page, open_page):
    page = open_page(comparison_page)
    names = page.locator("#runs tbody th").all_inner_texts()
    assert [name.strip() for name in names] == ["a", "b", "dense", "young"]
    text = page.locator("#runs tbody tr").all_inner_texts()
    assert "15.0 % ✓" in text[0]
    assert "46.17" in text[1]  # 0.9 of 51.3
    assert "48.70" in text[2]
    assert "young has not been evaluated yet" in page.locator("#notes").inner_text()
    assert page.locator("#settings tbody tr").count() == 2
    assert page.locator("#settings mark").all_inner_texts() == ["dense", "0.3"]
    assert page.locator("#training figure").count() == 4
    assert page.locator("#training-loss .line").count() == 4
    assert page.locator("#position-chart .line").count() == 3
    assert "# b" in page.locator("#commands").inner_text()


def test_the_comparison_can_show_other_settings(comparison_page, open_page):
    page = open_page(comparison_page)
    hits = page.locator("#curve .hit")
    assert hits.count() == 3 + 3 + 3
    assert page.locator("#curve .ring").count() == 2
    page.locator("#curve-choice").select_option("1")
    assert hits.count() == 3
    page.locator("#curve-choice").select_option("2")
    assert hits.count() == 7 + 7 + 3
    page.locator("#position-budget").select_option("1")
    assert page.locator("#position-legend li").all_inner_texts() == ["a", "b", "dense"]


# --- Both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["run_page", "comparison_page"])
@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_the_screen(which, width, request, open_page):
    page = open_page(request.getfixturevalue(which), viewport={"width": width, "height": 844})
    for details in page.locator("details").all():
        details.locator("summary").click()
    assert overflow(page) == 0
    page.set_viewport_size({"width": 1000, "height": 800})
    assert overflow(page) == 0


CONTRASTS = """() => {
  const parse = (text) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const pair = [parse(node.closest("svg") ? style.fill : style.color), behind(node)].map(luminance);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    const name = `${node.tagName}.${node.className.baseVal ?? node.className}`;
    found[name] = Math.min(ratio, found[name] ?? Infinity);
  }
  return found;
}"""


@pytest.mark.parametrize("which", ["run_page", "comparison_page"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(which, scheme, request, open_page):
    page = open_page(request.getfixturevalue(which), color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) > 10
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}  # WCAG 2 AA


@pytest.mark.parametrize("which", ["run_page", "comparison_page"])
def test_every_control_is_reached_by_tab_with_a_visible_focus(which, request, open_page):
    page = open_page(request.getfixturevalue(which))
    shown = "[...document.querySelectorAll('select, input, summary')].filter((node) => node.checkVisibility())"
    controls, seen = set(page.evaluate(f"{shown}.map((node) => node.id || node.textContent)")), set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "(({ activeElement: n }) => [n.id || n.textContent, getComputedStyle(n).outlineStyle])(document)"
        )
        seen.add(name)
        assert outline != "none" or name in ("", page.evaluate("document.body.id || document.body.textContent"))
    assert controls <= seen
    assert page.locator("select:not(label select):not([aria-label])").count() == 0


@pytest.mark.parametrize("which", ["run_page", "comparison_page"])
def test_it_prints_in_light_colors_without_what_only_a_screen_can_do(which, request, open_page):
    page = open_page(request.getfixturevalue(which), color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--page')").strip() == "#ffffff"
    assert not any(control.is_visible() for control in page.locator(".controls").all())
    assert page.pdf(format="A4")[:5] == b"%PDF-"


def test_a_large_model_is_drawn_quickly_and_stays_bounded(tmp_path, open_page):
    shape = (24, 16)
    rows = [
        make_row("nats", NATS_WEIGHTS, {"role_bias": role_bias}, 0.1, 50.0, shape=shape) for role_bias in ROLE_BIASES
    ]
    heads = [["0" + "12" * 127 + "1"] * shape[1]] * shape[0]
    samples = [make_sample(["token"] * 256, roles=heads)]
    path = write(tmp_path, rows=rows, samples=samples, run=RUN | {"layers": ["nats"] * shape[0]})[2]
    assert path.stat().st_size < 3e6
    page = open_page(path, viewport=PHONE)
    assert page.locator(".heat button").count() == math.prod(shape)
    assert overflow(page) == 0
