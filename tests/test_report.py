"""The report: hostile text stays text, missing figures stay missing, nothing loads, and a browser shows what it says."""

import base64
import hashlib
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread, imsave

from explain.report import ReportInputs, write_report

FAILURE = "propose: HTTP 429 after 5 attempts"
UNDEFINED = "correlation undefined: the predictions do not vary"
TOKENS = ["The", " cat", " sat", "\n", " on", " it"]
ACTIVATIONS = [0.0, 1.0, 2.0, 4.0, 8.0, -4.0]
HOSTILE = [
    "</script><script>hacked=1</script>", '"><img src=x onerror=hacked=1>', "' onmouseover='hacked=1", "&lt;b&amp;", "<!--",
]  # fmt: skip
TURNING = "".join(map(chr, (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
PRINTED = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=TURNING)


def example(kind: str, window: int, tokens: list[str] = TOKENS, activations: list[float] = ACTIVATIONS) -> dict[str, Any]:
    ids = list(range(len(tokens)))
    return {"window": window, "kind": kind, "token_ids": ids, "tokens": tokens, "activations": activations}


def unit(dictionary: str, latent: int, tokens: list[str] = TOKENS) -> dict[str, Any]:
    train = [example("top", 1, tokens), example("sampled", 2, tokens)]
    test = [example(kind, 3 + i, tokens) for i, kind in enumerate(("top", "sampled", "random"))]
    facts = {"dictionary": dictionary, "hook": "blocks.0.hook_resid_post", "latent": latent}
    return {**facts, "density": 0.01 / (latent + 1), "max_activation": 8.0, "train": train, "test": test}


COUNTS = ("concept_fires", "concept_silent", "other_fires", "other_silent")
KEYS = (
    "ev_correlation", "rsquared", "absolute_dev_explained", "rsquared_centred", "lookup_correlation", "shuffled_correlation",
    "population_correlation", "hard_correlation", "label_mass",
)  # fmt: skip


def line(of: dict[str, Any], state: str, reason: str | None = None, description: str | None = None) -> dict[str, Any]:
    figures = {key: 0.9 - 0.1 * of["latent"] if state == "scored" else None for key in KEYS}
    worth = {"balanced_accuracy": 0.75, "intervals": {"balanced_accuracy": [0.5, 1.0]}, "counts": dict.fromkeys(COUNTS, 3.0)}
    picked = {"accuracy": 0.8125, "interval": [0.4, 1.0], "reason": None}
    figures |= {"outputs": picked if state == "scored" else None}
    figures |= {"detection": worth if state == "scored" else None, "fuzzing": None}
    figures["intervals"] = {"ev_correlation": [0.31, 0.97], "rsquared": None} if state == "scored" else None
    facts = {key: of[key] for key in ("dictionary", "hook", "latent", "density", "max_activation")}
    name = f"{of['dictionary']}/{of['latent']}"
    return {"unit": name, **facts, "state": state, "reason": reason, "description": description, **figures, "test_tokens": 18}


def png() -> bytes:
    file = io.BytesIO()
    imsave(file, [[[0.2, 0.4, 0.6], [1.0, 1.0, 1.0]]], format="png")
    return file.getvalue()


def inputs(text: str = "plain") -> ReportInputs:
    """Five units, `text` wherever a run shows text that it did not make itself."""
    units = [unit("sae", 0, [*TOKENS[:5], text]), *(unit("sae", n) for n in (1, 2, 3)), unit("neurons", 4)]
    units[0] |= {"promoted": [[text, 2.0], [" dog", 1.5]], "suppressed": [[text, -1.0]]}
    mean = {"mean": 0.8, "standard_error": 0.1, "units": 3}
    none = {"mean": None, "standard_error": None, "units": 0}
    over, no = {"mean": 0.5, "interval": [0.42, 0.58], "units": 3}, {"mean": None, "interval": None, "units": 0}
    by = {"balanced_accuracy": 0.75, "f1": 0.7, "auc": None, "population_precision": 0.125, "units": 2}
    by["hard_balanced_accuracy"] = 0.625
    margins = {"shuffled": over, "lookup": no}
    means = {
        "detection": {"description": by, "lookup": by, "shuffled": {**by, "balanced_accuracy": 0.5}, "margins": margins}
    }
    accuracy = {"description": 0.8125, "lookup": None, "shuffled": 0.25, "chance": 0.2}
    means["outputs"] = {"accuracy": accuracy, "units": 2, "margins": {"chance": over, "shuffled": over, "lookup": no}}
    counts = {"latents": 64, "eligible": 60, "chosen": 4, "scored": 2, "undefined": 1, "failed": 1}
    figures = {
        "l0": 12.5, "mse": 3.25, "explained_variance": 0.9, "dead_fraction": 0.0, "tokens": 1000, "ce_tokens": 500,
        "ce_clean": 3.0, "ce_spliced": 3.1, "ce_ablated": 8.0, "ce_recovered": None, "density_histogram": [1] * 24,
    }  # fmt: skip
    sides = {"without_special": figures, "with_special": figures}
    return ReportInputs(
        title=f"run {text}",
        facts={"model": text, f"key {text}": 1, "seed": 0, "note": None},
        metrics=[{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}],
        evaluation={**figures, **sides, "hook": text, "held_out_sequences": 8, "ce_sequences": 4, "density_edges_log10": []},
        summary={
            "backend": "openai", "instrument": text, "splits": {"train": [0, 8]},
            "compared": {f"neurons {text}": {"ev_correlation": {
                "sae": 0.8125, f"neurons {text}": 0.3125, "difference": 0.5, "interval": [0.25, 0.75], "units": [3, 2],
            }}},
            "dictionaries": {
                "sae": {**counts, **dict.fromkeys(KEYS, mean), "margins": margins, **means, "failure_reasons": [text]},
                "neurons": {**counts, **dict.fromkeys(KEYS, none), "margins": dict.fromkeys(margins, no), "failure_reasons": []},
            },
        },
        scores=[
            line(units[0], "scored", description=f"about {text}"), line(units[1], "scored", description="felines"),
            line(units[2], "undefined", UNDEFINED, "constant"), line(units[3], "failed", FAILURE),
            line(units[4], "failed", f"propose: {text}"),
        ],
        units=units,
        predictions={"sae/0": [[0.0, 0.0, 5.0, 0.0, 10.0, 0.0]] * 3, "sae/1": [[1.0]]},
        histograms={"sae/0": ([0.5, 1.0, 2.0, 4.0, 8.0], [0, 3, 5, 1]), "sae/1": ([0.5, 1.0], [0])},
        steering=[{"unit": "sae/0", "prompt": text, "edit": "clamp 5x max", "baseline": text, "steered": text}],
        plots={"training": png()},
    )  # fmt: skip


EMPTY = ReportInputs("empty", {}, [], None, None, [], [], {}, {}, [], {})


class Node:
    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes, self.children, self.text = tag, attributes, list[Node](), ""

    def all(self, tag: str, class_: str | None = None) -> list["Node"]:
        own = [self] if self.tag == tag and (class_ is None or class_ in (self.attributes.get("class") or "").split()) else []
        return own + [found for child in self.children for found in child.all(tag, class_)]

    @property
    def skeleton(self) -> Any:
        return self.tag, sorted(self.attributes), [child.skeleton for child in self.children]


class Page(HTMLParser):
    """A tree whose nodes hold all the text below them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.root = Node("root", {})
        self.open = [self.root]
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [self.root], "an element was not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), "an attribute stands twice"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in ("meta", "input", "img"):
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.text += data

    def feature(self, name: str) -> Node:
        return next(f for f in self.root.all("details", "feature") if f.attributes["id"] == name)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(write_report(inputs(), tmp_path / "index.html"))


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.text(st.one_of(PRINTED, st.just("\n"))), st.sampled_from(HOSTILE)))
def test_any_text_stays_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("report")
    page, plain = (Page(write_report(inputs(t), folder / f"{i}.html")) for i, t in enumerate((text, "plain")))
    assert page.root.skeleton == plain.root.skeleton
    shown = text.replace("\n", "↵")
    feature = page.feature("sae-0")
    tokens = [token for span in feature.all("span", "text") for token in span.all("i")]
    assert [t.text for t in tokens] == ["The", " cat", " sat", "↵", " on", shown] * 5
    assert all(t.attributes["title"].startswith(f"‘{shown}’ (5): -4") for t in tokens[5::6])
    assert page.root.all("h1")[0].text == f"run {shown}"
    assert [code.text for code in feature.all("code")] == [shown, " dog", shown]
    assert [dd.text for dd in feature.all("div", "steering")[0].all("dd")] == [shown * 2] * 2
    assert f"about {shown}" in feature.all("span", "description")[0].text
    for raw in HOSTILE:
        assert raw not in page.source


def test_invisible_and_turning_characters_are_drawn(tmp_path: Path) -> None:
    page = Page(write_report(inputs("a\x00\r\t\x7f\u202eb\ud800"), tmp_path / "index.html"))
    assert page.root.all("h1")[0].text == "run a␀␍⇥␡⟨U+202E⟩b\\ud800"


def test_units_without_a_score_say_why_and_show_no_zero(page: Page) -> None:
    for name, reason in (("sae-2", UNDEFINED), ("sae-3", FAILURE)):
        feature = page.feature(name)
        assert "data-score" not in feature.attributes
        score = feature.all("span", "score")[0]
        assert (score.text, score.all("abbr")[0].attributes["title"]) == ("–", reason)
        assert not score.all("circle")
        assert reason in feature.all("span", "description")[0].text
        assert reason in feature.all("article")[0].all("p", "reason")[0].text
        figures = feature.all("article")[0].all("dl")[1].all("dd")
        assert [dd.text for dd in figures] == ["–"] * len(KEYS)
    assert page.feature("sae-1").all("span", "score")[0].text == "0.80"


def test_missing_figures_are_dashes_with_a_reason(page: Page) -> None:
    tiles = {tile.all("span")[0].text: tile.all("strong")[0] for tile in page.root.all("div", "tile")}
    assert {name: value.text for name, value in tiles.items()} == {
        "L0": "12.5", "Explained variance": "0.9", "CE recovered": "–", "Dead fraction": "0",
        "Mean score, sae": "0.80", "Mean score, neurons": "–",
    }  # fmt: skip
    assert all(value.all("abbr")[0].attributes["title"] for value in tiles.values() if value.text == "–")
    assert not re.search(r">[^<]*\b(nan|None|inf)\b", page.source.split("<script>")[0].split("</style>")[1])


def test_colours_are_shares_of_the_maximum(page: Page, tmp_path: Path) -> None:
    tested = page.feature("sae-0").all("div", "strips")[0].all("i")
    assert [t.attributes.get("style") for t in tested] == [
        None, "--a:0.12", "--a:0.25;--p:0.50", "--a:0.50", "--a:1.00;--p:1.00", "--a:0.50",
    ]  # fmt: skip
    assert [t.attributes.get("class") for t in tested] == [None] * 5 + ["n"]
    assert tested[2].attributes["title"] == "‘ sat’ (2): 2, predicted 5"
    # Predictions of another length belong to other examples: none is drawn
    assert not any("--p" in (t.attributes.get("style") or "") for t in page.feature("sae-1").all("i"))

    odd = unit("sae", 0)
    odd["max_activation"] = 2.0
    odd["train"] = [example("top", 1, activations=[float("nan"), 8.0, 2.0, 1.0, 0.001, 0.0])]
    tokens = Page(write_report(replace(EMPTY, units=[odd]), tmp_path / "odd.html")).feature("sae-0").all("i")[-6:]
    assert [t.attributes.get("style") for t in tokens] == [None, "--a:1.00", "--a:1.00", "--a:0.50", None, None]
    assert tokens[0].attributes["title"] == "‘The’ (0): not a number"


def test_examples_are_grouped_and_the_histogram_is_labelled(page: Page) -> None:
    feature = page.feature("sae-0")
    assert [h.text for h in feature.all("div", "right")[0].all("h3")] == [
        "Held-out windows, strongest", "Held-out windows, sampled where it fires, weak to strong",
        "Held-out windows, drawn at random", "Training windows, strongest",
        "Training windows, sampled where it fires, weak to strong", "Steering",
    ]  # fmt: skip
    svg = feature.all("svg", "histogram")[0]
    assert [bar.text for bar in svg.all("rect")] == ["1 to 2: 3 tokens", "2 to 4: 5 tokens", "4 to 8: 1 tokens"]
    assert "activation, log scale" in [text.text for text in svg.all("text")]
    assert any(h.text == "Activations above 0, density 1\N{NO-BREAK SPACE}%" for h in feature.all("h3"))
    assert "The unit never fired." in page.feature("sae-1").text


def test_nothing_is_loaded_and_only_our_script_may_run(page: Page) -> None:
    nodes = [node for tag in ("img", "a", "link", "script", "iframe", "object", "svg") for node in page.root.all(tag)]
    assert all(node.attributes.get("src", "data:").startswith("data:") for node in nodes)
    assert all(node.attributes.get("href", "#").startswith("#") for node in nodes)
    assert not re.search(r"url\(|@import|https?:", page.source)
    policy = next(m.attributes["content"] for m in page.root.all("meta") if "http-equiv" in m.attributes)
    script = page.root.all("script")
    digest = base64.b64encode(hashlib.sha256(script[0].text.encode()).digest()).decode()
    assert len(script) == 1
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy


def test_an_empty_and_an_unfinished_run_still_make_a_page(tmp_path: Path) -> None:
    empty = Page(write_report(EMPTY, tmp_path / "new" / "index.html"))
    assert "This run has explained no unit." in empty.root.text
    assert all(tile.all("strong")[0].text == "–" for tile in empty.root.all("div", "tile"))
    full = inputs()
    under_way = Page(write_report(replace(full, scores=full.scores[:1]), tmp_path / "index.html"))
    assert under_way.feature("sae-1").attributes["data-state"] == "not scored"
    without_units = Page(write_report(replace(full, units=[]), tmp_path / "index.html"))
    assert "No examples recorded." in without_units.feature("sae-1").text


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_report(inputs(), tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def show(browser: Any, path: Path, anchor: str = "", width: int = 1200, scheme: str = "light") -> None:
    """Open the page afresh at a width and in a colour scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(path.as_uri() + anchor)


def colour(browser: Any, node: Any, name: str) -> tuple[float, ...]:
    """Return a computed colour as r, g, b in 0..255 and alpha."""
    value = browser.execute_script("return getComputedStyle(arguments[0])[arguments[1]]", node, name)
    numbers = [float(n) for n in re.findall(r"[\d.]+", value)]
    return (*numbers[:3], numbers[3] if len(numbers) > 3 else 1.0)


def luminance(rgb: tuple[float, ...]) -> float:
    """Return the relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (channel / 255 for channel in rgb[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_row_opens_to_tokens_coloured_in_order(browser: Any, tmp_path: Path) -> None:
    show(browser, write_report(inputs(HOSTILE[0]), tmp_path / "index.html"))
    row = browser.find_element("id", "sae-0")
    tokens = row.find_elements("css selector", ".strips i")[:6]
    assert not tokens[0].is_displayed()
    row.find_element("tag name", "summary").click()
    assert tokens[0].is_displayed()
    colours = [colour(browser, token, "backgroundColor") for token in tokens]
    alphas = [c[3] for c in colours[:5]]
    assert alphas == sorted(alphas)
    assert len(set(alphas)) == 5
    assert colours[5][2] > colours[5][0], "a negative activation is blue"
    assert colours[4][0] > colours[4][2], "a positive one orange"
    browser.find_element("id", "swap").click()
    assert [colour(browser, token, "backgroundColor")[3] for token in tokens[:5]] == [0, 0, 0.5, 0, 1]
    assert browser.execute_script("return window.hacked") is None
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_filters_hide_and_columns_sort(browser: Any, tmp_path: Path) -> None:
    show(browser, write_report(inputs("zebra"), tmp_path / "index.html"))

    def shown() -> list[str]:
        return [row.get_attribute("id") for row in browser.find_elements("css selector", ".feature") if row.is_displayed()]

    everything = ["sae-0", "sae-1", "sae-2", "sae-3", "neurons-4"]
    assert shown() == everything
    text = browser.find_element("id", "filter-text")
    for typed, found in (("FELINE", ["sae-1"]), ("about zebra", ["sae-0"]), ("sat↵ onzebra", ["sae-0"]), ("nowhere", [])):
        text.clear()
        text.send_keys(typed)
        assert shown() == found, typed
        assert browser.find_element("id", "count").text == f"{len(found)} of 5"
    text.clear()
    assert shown() == everything
    browser.find_element("css selector", "#filter-state [value=failed]").click()
    assert shown() == ["sae-3", "neurons-4"]
    browser.find_element("css selector", "#filter-dictionary [value=sae]").click()
    assert shown() == ["sae-3"]
    browser.execute_script("location.hash = '#sae-1'")  # a link to a hidden feature brings it back
    assert "sae-1" in shown()
    score = browser.find_element("css selector", "[data-key=score]")
    for order in (["sae-0", "sae-1"], ["sae-1", "sae-0"]):
        score.click()
        assert shown()[:2] == order
        assert set(shown()[2:]) == {"sae-2", "sae-3", "neurons-4"}, "units without a score stay last"


def test_the_hash_opens_a_feature_and_scrolls_to_it(browser: Any, tmp_path: Path) -> None:
    units = [unit("sae", n) for n in range(80)]
    many = replace(EMPTY, units=units, scores=[line(u, "scored", description="a description") for u in units])
    show(browser, write_report(many, tmp_path / "index.html"), "#sae-60")
    row = browser.find_element("id", "sae-60")
    assert row.get_attribute("open")
    assert len(browser.find_elements("css selector", ".feature[open]")) == 1
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    top = browser.execute_script("return arguments[0].getBoundingClientRect().top", row)
    toolbar = browser.execute_script("return document.getElementById('toolbar').getBoundingClientRect().bottom")
    assert toolbar - 8 <= top <= toolbar + 40


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (400, "light"), (400, "dark")])
def test_the_page_is_legible(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    show(browser, write_report(inputs("wordwithoutanyspace" * 12), tmp_path / "index.html"), "#sae-0", width, scheme)
    picture = imread(io.BytesIO(browser.get_screenshot_as_png()))[..., :3]
    assert picture.shape[1] == width
    assert len({tuple(pixel) for pixel in picture[::3, ::3].reshape(-1, 3).tolist()}) > 60, "the screenshot is blank"
    assert (luminance(colour(browser, browser.find_element("tag name", "body"), "backgroundColor")) < 0.1) == (scheme == "dark")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    strongest, negative = browser.find_elements("css selector", "#sae-0 .strips i")[4:6]
    browser.execute_script("for (const node of arguments) node.style.setProperty('--a', 1)", strongest, negative)
    for token in (strongest, negative):
        light, dark = (luminance(colour(browser, token, name)) + 0.05 for name in ("color", "backgroundColor"))
        assert max(light, dark) / min(light, dark) > 4.5, "text on the full colour"


def test_the_policy_stops_what_escaping_would_let_through(browser: Any, tmp_path: Path) -> None:
    path = write_report(inputs(), tmp_path / "index.html")
    hole = "<h2>Features</h2><script>hacked=1</script><img src='missing.png' onerror='hacked=1'>"
    source = path.read_text(encoding="utf-8")
    assert source.count("<h2>Features</h2>") == 1
    path.write_text(source.replace("<h2>Features</h2>", hole), encoding="utf-8")
    show(browser, path)
    assert browser.execute_script("return window.hacked") is None
    refused = [entry["message"] for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]
    assert len(refused) >= 2


def test_choices_and_comparisons_stand_in_the_report(page: Page) -> None:
    (table,) = [table for table in page.root.all("table") if "Which of several texts" in table.text]
    (row,) = [[cell.text for cell in row.all("td")] for row in table.all("tr")[1:]]
    assert row[1:5] == ["0.81", "–", "0.25", "0.20"]
    assert row[-3:] == ["0.50 0.42 to 0.58 n = 3", "0.50 0.42 to 0.58 n = 3", "2"]
    (compared,) = [table for table in page.root.all("table") if "beside other dictionaries" in table.text]
    (row,) = [[cell.text for cell in row.all("td")] for row in compared.all("tr")[1:]]
    assert row[-3:] == ["0.81", "0.31", "0.50 0.25 to 0.75 n = 3 and 2"]
    assert "0.81 0.40 to 1.00" in page.feature("sae-0").text


def test_judgements_stand_in_the_report(page: Page) -> None:
    (table,) = [table for table in page.root.all("table") if "judged by" in table.text]
    rows = [[cell.text for cell in row.all("td")] for row in table.all("tr")[1:]]
    figures = {"description": "0.75", "lookup": "0.75", "shuffled": "0.50"}
    assert [row[2:8] for row in rows] == [[value, "0.70", "–", "0.12", "0.62", "2"] for value in figures.values()]
    assert [row[8:] for row in rows] == [["0.50 0.42 to 0.58 n = 3", "– n = 0"], ["", ""], ["", ""]]  # margins over both controls
    text = page.feature("sae-0").all("article")[0].text
    assert "Detection, balanced accuracy" in text
    assert "0.50 to 1.00" in text
    assert "yes 3 + 3, no 3 + 3" in text
    assert "Fuzzing" not in text
    assert "Detection" not in page.feature("sae-3").all("article")[0].text  # which failed
