"""The report page: safe, self-contained, accessible, honest about what was not measured, and the same every time."""

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qinglan.core.errors import InputError
from qinglan.core.records import Message
from qinglan.core.run import Measure, Report
from qinglan.evals import report as report_module
from qinglan.evals.figures import DotRow, dot_rows
from qinglan.evals.formatting import visible, write_interval, write_number, write_value
from qinglan.evals.report import (
    Choice,
    Figure,
    Page,
    ScoredCompletion,
    Section,
    Table,
    Transcript,
    choose_transcripts,
    fold,
    headline,
    markdown_summary,
    render_page,
    write_duration,
    write_page,
)

WIN = Measure(0.684, 0.654, 0.714, 512, "win rate")
NOTHING = Measure(None, None, None, 0, "rate")
ROWS = {
    "floor": Measure(0.55, 0.53, 0.57, 1200),
    "student": Measure(0.71, 0.69, 0.73, 1200),
    "ceiling": Measure(0.83, 0.81, 0.85, 1200),
    "gap_recovered": Measure(0.571, 0.51, 0.63, 1200, "rate"),
}
METRICS = {"win_rate_vs_sft": WIN, "kl": Measure(7.93, 7.5, 8.31, 512, "nats per completion"), "harm": NOTHING}
ATTACK = "</p><script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)>{{ 7*7 }}"


def small_page(**changes: object) -> Page:
    chart = Figure("Win rates", dot_rows([DotRow("sampled", {"policy": WIN})], reference=0.5), "policy wins 68%", "c")
    table = Table(
        ("group", "accuracy", "pairs", "note"), (("seen", WIN, 512, "x"), ("unseen", NOTHING, None, "y")), "By group"
    )
    completions = (
        ScoredCompletion("SFT", "I do not know.", {"gold": 0.5, "proxy": 1}),
        ScoredCompletion("policy", "", {"gold": math.nan, "proxy": None}),
    )
    transcript = Transcript("worst", (Message(role="user", content="Who?"),), completions)
    section = Section("Does it win?", ("Judged blind.",), (chart,), (table,), (transcript,))
    page = Page("A run", "On a world", ("It wins.", "Often."), ROWS, METRICS, (section, Section("People")))
    return page._replace(config_yaml="seed: 0\n", lineage={"code": {"torch": "2.13"}, "inputs": []}, **changes)


class Reader(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def attacked_page() -> Page:
    """Return a page with the attack in every place that can hold a text from outside."""
    page = small_page()
    transcript = Transcript(
        ATTACK, (Message(role="user", content=ATTACK),), (ScoredCompletion(ATTACK, ATTACK, {ATTACK: 1.0}),)
    )
    figure = Figure(
        ATTACK,
        dot_rows([DotRow(ATTACK, {ATTACK: WIN, "b": WIN})], reference=0.5, reference_label=ATTACK),
        ATTACK,
        ATTACK,
    )
    table = Table((ATTACK, "b"), ((ATTACK, ATTACK),), ATTACK)
    section = Section(ATTACK, (ATTACK,), (figure,), (table,), (transcript,))
    return page._replace(
        title=ATTACK,
        subtitle=ATTACK,
        verdict=(ATTACK,),
        sections=(section,),
        alarms=(ATTACK,),
        config_yaml=ATTACK,
        lineage={ATTACK: ATTACK},
        metrics={ATTACK: WIN._replace(unit=ATTACK)},
        row_names={"floor": ATTACK},
        rows_caption=ATTACK,
    )


def test_texts_from_outside_are_never_markup() -> None:
    html = render_page(attacked_page())
    seen = Reader(html)
    assert {tag for tag, _ in seen.tags} & {"script", "img", "iframe", "link", "object", "form", "a"} <= {"a"}
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]
    assert "49" not in [text.strip() for text in seen.text]  # no template is run inside a text
    assert sum("<script>alert('x')</script>" in text for text in seen.text) >= 10


def test_no_address_is_ever_followed() -> None:
    for page in (small_page(), attacked_page()):
        html = render_page(page)
        for _, attrs in Reader(html).tags:
            for name in ("src", "href", "data", "action", "srcset", "background", "poster", "xlink:href"):
                assert (attrs.get(name) or "#").startswith("#")
            style = attrs.get("style") or ""
            assert "url(" not in style and "@import" not in style
        assert "default-src 'none'" in html
        assert not re.search(r"@import|url\((?!#)", html.split("</style>")[0])
    assert "://" not in render_page(small_page())


def test_a_drawing_with_script_is_refused() -> None:
    for svg in ("<svg><script>1</script></svg>", "<p></p>", '<svg onload="x"></svg>', '<svg><use href="x.svg"/></svg>'):
        page = small_page(sections=(Section("s", figures=(Figure("t", svg, "a"),)),))
        with pytest.raises(ValueError, match="must come from"):
            render_page(page)
    with pytest.raises(SyntaxError):
        render_page(small_page(sections=(Section("s", figures=(Figure("t", "<svg>", "a"),)),)))


def test_what_was_not_measured_says_so() -> None:
    nan = Measure(math.nan, math.nan, math.inf, 0, "rate")
    page = small_page(rows={**ROWS, "ceiling": nan, "gap_recovered": nan}, metrics={"harm": nan, "none": NOTHING})
    html = render_page(page)
    assert html.count("not measured") >= 8  # two drawings of the row, two metrics, two cells, two scores
    text = " ".join(Reader(html.replace("CSP", "")).text)
    assert not re.search(r"\b(nan|NaN|None|inf)\b", text)


def test_page_is_accessible() -> None:
    seen = Reader(render_page(small_page(alarms=("KL jumped",))))
    assert seen.all("html") == [{"lang": "en"}]
    assert len(seen.all("h1")) == 1 and len(seen.all("main")) == 1
    assert len(seen.all("table")) == len(seen.all("caption")) == 3
    assert all(attrs.get("scope") in ("col", "row") for attrs in seen.all("th"))
    drawings = [attrs for _, attrs in seen.tags if attrs.get("role") == "img"]
    assert len(drawings) == len(seen.all("svg")) == 3
    assert all(attrs["aria-label"] for attrs in drawings)
    assert "PPO" not in drawings[0]["aria-label"] and "0.710 [0.690, 0.730]" in drawings[0]["aria-label"]


def test_ids_are_unique_and_links_lead_somewhere() -> None:
    sections = tuple(Section(title) for title in ("Same", "Same", "same", "???", "All numbers too"))
    seen = Reader(render_page(small_page(sections=small_page().sections + sections)))
    ids = [attrs["id"] for _, attrs in seen.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert all(attrs["href"].removeprefix("#") in ids for attrs in seen.all("a") + seen.all("use"))


def test_the_same_page_gives_the_same_bytes(tmp_path) -> None:
    first, second = (write_page(tmp_path / name, small_page()) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 60_000


def test_nearly_empty_pages_render() -> None:
    seen = Reader(render_page(Page("T", "", (), {}, {})))
    assert not seen.all("svg") and not seen.all("table")
    seen = Reader(render_page(Page("T", "", (), {"student": WIN}, {}, (Section("Empty"),))))
    assert "Nothing was measured for this part in this run." in seen.text
    assert len(seen.all("svg")) == 2  # one for wide screens, one for phones


def test_long_texts_are_folded_and_kept_whole() -> None:
    long = "The keeper counts ships. " * 200
    assert "".join(fold(long)) == long and len(fold(long)[0]) <= report_module.LONG_TEXT
    assert fold("x" * 700) == ("x" * 700, "")
    assert len(fold("x" * 5000)[0]) == report_module.LONG_TEXT
    transcript = Transcript("best", (Message(role="user", content=long),), (ScoredCompletion("policy", "short"),))
    seen = Reader(render_page(small_page(sections=(Section("s", transcripts=(transcript,)),))))
    assert (
        "class" in seen.all("details")[0]
        and "".join(seen.text).replace("… show all 5,000 characters", "").count("ships") == 200
    )


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    transcript = Transcript("worst", (Message(role="user", content="q"),), (ScoredCompletion("policy", text),))
    page = Page("T", "", (), {}, {}, (Section("s", transcripts=(transcript,)),))
    html = render_page(page)
    html.encode("utf-8")
    shown = "".join(Reader(html).text)
    assert (visible(text) if text.strip() else "(empty)") in shown


def test_hidden_characters_become_visible() -> None:
    assert visible("a\tb\nc é 漢 👩‍🚀") == "a\tb\nc é 漢 👩‍🚀"
    assert visible("\x00\x1b[31m\x7f") == "␀␛[31m⟨U+007F⟩"
    assert visible("pay \u202eevil\u2066") == "pay ⟨U+202E⟩evil⟨U+2066⟩"
    assert visible("\ud800") == "⟨U+D800⟩"


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = write_page(tmp_path / "deep" / "report.html", small_page())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="must come from"):
        write_page(path, small_page(sections=(Section("s", figures=(Figure("t", "<p/>", "a"),)),)))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match="cannot write"):
        write_page(path / "inside-a-file.html", small_page())


def test_transcripts_are_chosen_by_rule_and_seed() -> None:
    assert choose_transcripts([3.0, 1.0, 2.0, 5.0, 4.0], seed=0) == [
        Choice("worst", 1),
        Choice("median", 0),
        Choice("best", 3),
    ]
    assert choose_transcripts([], 0) == choose_transcripts([None, math.nan], 0) == []
    assert choose_transcripts([None, 2.0], 0) == [Choice("median", 1)]
    assert choose_transcripts([2.0, math.nan, 1.0], 0) == [Choice("worst", 2), Choice("best", 0)]
    tied = [1.0] * 40
    chosen = {seed: tuple(choice.item for choice in choose_transcripts(tied, seed)) for seed in range(8)}
    assert all(len(set(items)) == 3 for items in chosen.values())
    assert len(set(chosen.values())) > 4  # among equals the seed decides
    assert chosen[3] == tuple(choice.item for choice in choose_transcripts(tied, 3))


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats()), max_size=12), st.integers(0, 3))
def test_chosen_transcripts_are_ordered_and_distinct(scores: list[float | None], seed: int) -> None:
    chosen = choose_transcripts(scores, seed)
    found = [scores[choice.item] for choice in chosen]
    known = [score for score in scores if score is not None and not math.isnan(score)]
    assert len({choice.item for choice in chosen}) == len(chosen) == min(len(known), 3)
    assert found == sorted(found)
    if len(known) > 1:
        assert (found[0], found[-1]) == (min(known), max(known))


def test_headline_for_a_terminal() -> None:
    report = Report("instruct-gpt", 252.4, "x", METRICS, ROWS, ["gold falls"], 1014)
    assert headline(report, ["win_rate_vs_sft", "kl", "harm", "absent"]).splitlines() == [
        "Floor                   0.550  [0.530, 0.570]  n=1,200",
        "Student                 0.710  [0.690, 0.730]  n=1,200",
        "Ceiling                 0.830  [0.810, 0.850]  n=1,200",
        "Gap recovered           57.1%  [51.0, 63.0]    n=1,200",
        "win_rate_vs_sft         68.4%  [65.4, 71.4]    n=512",
        "kl                       7.93  [7.50, 8.31]    n=512    nats per completion",
        "harm             not measured                  n=0",
        "Alarm: gold falls",
        "1,014 items could not be scored; they are left out, not counted as wrong.",
        "instruct-gpt, 4 min 12 s, intervals are 95%",
    ]
    assert headline(Report("r", 1, "x", {}, {}, [], 0)) == "r, 1 s, intervals are 95%"


def test_markdown_summary_has_every_metric() -> None:
    text = markdown_summary(Report("r", 30, "x", {**METRICS, "a|b": WIN}, ROWS, [], 3))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)
    assert "| `kl` | 7.93 | [7.50, 8.31] | 512 | nats per completion |" in lines
    assert "| `harm` | not measured |  | 0 | rate |" in lines
    assert "No alarms." in text and "Not scored: 3. Time: 30 s." in text


def test_numbers_are_written_for_people() -> None:
    numbers = (0, 0.0, -0.0001, 0.5, 1.234, 12.345, 1234.5, -2, 1234, 2e-5, None, math.nan, math.inf)
    assert [write_number(x) for x in numbers] == [
        *("0", "0.000", "−1.0e−04", "0.500", "1.23", "12.3", "1,234", "−2", "1,234", "2.0e−05"),
        *["not measured"] * 3,
    ]
    assert write_number(0.7314, "rate") == "73.1%" and write_number(-0.0001, "rate") == "0.0%"
    wide = Measure(0.9, -1.5, 12.0, 8, "logits")
    assert (write_value(wide), write_interval(wide)) == ("0.9", "[−1.5, 12.0]")
    assert write_interval(WIN) == "[65.4, 71.4]"
    assert write_interval(Measure(0.5, None, 0.6, 3)) == write_interval(NOTHING) == ""
    assert [write_duration(s) for s in (0.4, 59.6, 252, 7500)] == ["0 s", "1 min 0 s", "4 min 12 s", "2 h 5 min"]
