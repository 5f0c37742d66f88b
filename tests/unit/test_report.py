"""`report.html`: complete, self-contained, escaped, and honest about what is missing."""

import base64
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftb_llm.config import build_config
from ftb_llm.errors import SetupError
from ftb_llm.journal import Journal
from ftb_llm.report import summary_rows, write_report
from ftb_llm.report.files import read_run, thin
from ftb_llm.report.heatmap import PALETTE, heat_png
from ftb_llm.report.page import PARTS
from ftb_llm.report.sections import _bars, _cosine_to_active, divergence_marks, divergences
from ftb_llm.report.summary import judged_rows
from ftb_llm.report.svg import Axis, Mark, Series, line_chart, nice_ticks, value_axis
from tests.synthetic_run import SWAP_STEP, summary, write_lines, write_run, write_versions

CHANGES = (("reverse_kl", 0.5), ("tv", 0.5), ("tv", 0.25))
OBJECTIVE: dict[str, Any] = {"kind": "ftb", "divergence": "tv", "alpha": None, "beta": 0.5, "tempered": False}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checked(HTMLParser):
    """Collects the visible text and every address; fails on tags that don't match."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: Path) -> Checked:
    checked = Checked()
    checked.feed(page.read_text(encoding="utf-8"))
    checked.close()
    assert checked.open == []
    return checked


def rewrite_objectives(run: Path, objective_at: Callable[[int], dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [row | {"objective": objective_at(row["step"])} for row in rows if row["step"] > 0])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "demo"))


def test_the_page_asks_for_nothing_from_outside(page: Path) -> None:
    checked = read(page)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in checked.addresses)
    assert not {"script", "link", "iframe", "object"} & set(checked.tags)
    text = page.read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_the_page_is_small(page: Path) -> None:
    assert page.stat().st_size < 2_000_000


def test_every_section_is_there_with_its_data(page: Path) -> None:
    text = "\n".join(read(page).text)
    for _, title, _ in PARTS:
        assert title in text
    for words in ("Exact total variation", "before training", "policy after step 400", "north:", "Age of the groups trained on", "not_finite", "✓ met"):
        assert words in text, words
    assert "Not recorded" not in text


def test_text_from_the_run_is_escaped(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    assert "<script>" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "rest &lt;127.0.0.1&gt;" in source


def test_a_change_of_divergence_is_marked_in_the_curves(page: Path) -> None:
    text = "\n".join(read(page).text)
    assert "objective.divergence.name: reverse_kl → hellinger" in text
    assert str(SWAP_STEP) in text
    assert page.read_text(encoding="utf-8").count('class="mark-label"') >= 10  # reward, TV, and each divergence


def test_estimates_stand_beside_exact_values_with_their_error(page: Path) -> None:
    text = divergences(read_run(page.parent))
    charts = re.findall(r"<figure>.*?</figure>", text)
    assert len(charts) == 7 + 2
    assert all('class="band b0"' in chart and ">estimate</span>" in chart and ">exact</span>" in chart for chart in charts[:7])
    assert all(f'class="line c{colour} ' in chart for chart in charts[7:] for colour in range(7))


def test_tv_is_drawn_in_the_scale_of_its_exact_value(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    row = {"divergence/estimate/tv": 0.5, "divergence/stderr/tv": 0.25, "eval/exact_tv": 0.25}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **row}) + "\n" for step in (1, 2)))
    text = divergences(read_run(run))
    assert "estimate from 0.25 to 0.25; exact from 0.25 to 0.25" in text
    assert "half the sum of |p − q|" in text


def test_agreement_is_with_the_divergence_of_the_step() -> None:
    row = {"objective": OBJECTIVE, "divergence/loss/tv": 1.0, "divergence/cosine/hellinger:tv": 0.25, "divergence/cosine/tv:js": 0.5}
    assert [_cosine_to_active(row, name) for name in ("tv", "hellinger", "js", "pearson")] == [1.0, 0.25, 0.5, None]
    assert _cosine_to_active({}, "tv") is None


@pytest.mark.parametrize(
    "changes", [{"divergence": "custom", "custom": "my:member"}, {"kind": "grpo"}, {"kind": "importance"}, {"tempered": True}, {"width": 0.1}]
)
def test_agreement_is_left_out_where_something_else_trains(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", steps=2)
    rewrite_objectives(run, lambda step: OBJECTIVE | changes)
    text = divergences(read_run(run))
    assert "Completions that carry the gradient" in text
    assert "Agreement with the divergence in force" not in text


def test_marks_are_where_the_steps_changed_their_objective(tmp_path: Path) -> None:
    """A schedule's switch and a new width count, a ramp's drift does not."""
    run = write_run(tmp_path / "run", steps=8)
    ramp: dict[str, Any] = {"divergence": "alpha", "alpha": 0.5}
    found: list[dict[str, Any]] = [
        ramp,
        ramp | {"alpha": 0.75},
        {},
        {"width": 0.1},
        {"width": 0.1, "tempered": True},
        {"kind": "grpo"},
        ramp | {"alpha": 1.0},
        ramp,
    ]
    rewrite_objectives(run, lambda step: OBJECTIVE | found[step - 1])
    expected = [(3, "tv"), (4, "tv of width 0.1"), (5, "tv of width 0.1, tempered"), (6, "grpo"), (7, "alpha 1")]
    assert [(mark.step, mark.label) for mark in divergence_marks(read_run(run))] == expected
    (run / "run.db").unlink()
    schedule = [{"step": 8, "name": "alpha", "alpha": 0.5}]
    write_versions(run, (1, "start", build_config({"objective": {"divergence": {"name": "alpha", "alpha": 1.0, "schedule": schedule}}})))
    assert [(mark.step, mark.label) for mark in divergence_marks(read_run(run))] == [*expected, (8, "alpha 0.5")]


def test_a_band_ends_where_the_axis_does() -> None:
    figure = line_chart("wild", [Series(label="one", points=[(0, 1.0), (1, 2.0)], band=[(0, 0.0), (1, 1e300)])])
    corners = re.search(r'class="band b0" d="M(.*?)Z"', figure)
    assert corners
    heights = [float(corner.split()[1]) for corner in corners[1].split("L")]
    assert len(heights) == 4
    assert heights[0] == heights[3]  # no error
    assert (heights[1], heights[2]) == (18.0, 200.0)  # the ends of the axis


def test_the_report_starts_with_the_first_config_not_with_the_newest(page: Path) -> None:
    """config.json is rewritten at each live change; run.db keeps every version."""
    text = read(page).text
    assert text[text.index("objective at the start") + 1] == "reverse_kl, beta 0.5, learning rate 0.003"
    assert text[text.index("start of the run") + 1] == "reverse_kl, beta 0.5, learning rate 0.003"


def test_versions_that_a_resume_added_are_in_the_history(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    (run / "run.db").unlink()
    first, second, third = (build_config({"objective": {"divergence": {"name": name}, "beta": beta}}) for name, beta in CHANGES)
    write_versions(run, (1, "start", first), (15, "rest", second), (11, "resume", second), (13, "resume", third))
    text = read(write_report(run)).text
    assert "objective.beta: 0.5 → 0.25" in text
    assert "no setting changed" in text
    # The change that was to come at step 15 came at 11, when the run went on from step 10.
    rewrite_objectives(run, lambda step: OBJECTIVE | {"divergence": "reverse_kl" if step < 11 else "tv", "beta": 0.5 if step < 13 else 0.25})
    assert [(mark.step, mark.label) for mark in divergence_marks(read_run(run))] == [(11, "tv")]


def test_a_report_leaves_run_db_as_it_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    before = {path.name for path in run.iterdir()}
    write_report(run)
    assert {path.name for path in run.iterdir()} == before | {"report.html"}
    with closing(Journal(run / "run.db")):  # a live run
        assert "start of the run" in read(write_report(run)).text


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    text = "\n".join(read(write_report(tmp_path)).text)
    for words in (
        "No summary.json yet",
        "Not recorded in this run",
        "No exact evaluation",
        "No adapter has been pushed",
        "No accounting yet",
        "No events.jsonl",
        "No config version",
    ):
        assert words in text, words


def test_a_run_without_an_oracle(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    for name in ("first.json", "last.json"):
        (run / "eval" / name).unlink()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({key: value for key, value in row.items() if not key.startswith("eval/")}) + "\n" for row in rows))
    text = "\n".join(read(write_report(run)).text)
    assert "This run's task has no oracle" in text
    assert "No exact evaluation" in text


def test_a_task_without_a_grid_has_its_numbers_but_no_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    last = json.loads((run / "eval" / "last.json").read_text())
    (run / "eval" / "last.json").write_text(json.dumps(last | {"grid_shape": None}))
    checked = read(write_report(run))
    assert "img" not in checked.tags
    assert "Exact TV by prompt" in "\n".join(checked.text)


def test_a_run_that_was_stopped_early_shows_where_it_stood_before(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    (run / "eval" / "last.json").unlink()
    checked = read(write_report(run))
    assert checked.tags.count("img") == 1 + 4 * 2  # the scale; before training and target
    assert "not evaluated" in "\n".join(checked.text)


def test_a_live_run_whose_last_line_is_torn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    assert "not finished" in "\n".join(read(write_report(run)).text)


def test_lines_that_are_no_rows_are_skipped_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join([*lines[:2], "{oops\n", "[]\n", *lines[2:]]))
    text = "\n".join(read(write_report(run)).text)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert f"{name}: 2 lines can't be read and are skipped: 3, 4" in text
    assert [row["step"] for row in read_run(run).rows] == list(range(6))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    (run / "summary.json").write_text("{oops")
    with pytest.raises(SetupError, match=r"summary\.json is not JSON"):
        write_report(run)
    (run / "summary.json").unlink()
    (run / "run.db").write_text("no database " * 100)
    with pytest.raises(SetupError, match=r"run\.db can't be read"):
        write_report(run)


def test_the_summary_is_judged_against_its_goals() -> None:
    rows = {row.label: row for row in judged_rows(summary("demo", 400))}
    assert rows["exact TV to the target"].met
    assert rows["reward"].met is False  # 2.03 is more than 3% below 2.1
    assert rows["training time"].goal == "below 5:00"
    assert rows["cores"].met is None


def test_other_tasks_have_no_known_end() -> None:
    rows = {row.label: row for row in judged_rows(summary("demo", 400) | {"task": "sums"})}
    assert rows["exact TV to the target"].met is None
    assert rows["training time"].goal == ""


@pytest.mark.parametrize("changes", [{"as_shipped": False}, {"state": "stopped"}, {"state": "failed"}])
def test_a_run_of_ones_own_and_one_that_ended_early_show_their_numbers_without_a_verdict(changes: dict[str, Any]) -> None:
    missed = {
        "exact_tv_end": 0.4,
        "mean_staleness_steps": 0.5,
        "push_pause_ms_p50": 1096.0,
        "speed_after_push_ratio": 0.5,
        "peak_rss_gib": 60.0,
        "modes_found": 3,
    }
    rows = judged_rows(summary("demo", 22) | missed | changes)
    assert [row.label for row in rows if row.goal] == ["engine vs learner log-prob per token, max"]
    shown = dict(summary_rows(summary("demo", 22) | missed | changes))
    assert shown["push pause, median"] == "1096 ms"
    assert shown["reward"] == "0.400 → 2.0300 (target 2.1000)"
    assert shown["modes found"] == "3 of 16"
    assert not any("missed" in text for text in shown.values())


@pytest.mark.parametrize(
    ("dtype", "value", "shown"),
    [
        ("float32", 1.2e-6, "1.2e-06 (goal: within 5e-05 in float32)"),
        ("float32", 1e-3, "1.0e-03 (goal: within 5e-05 in float32; missed)"),
        ("bfloat16", 1e-2, "1.0e-02 (goal: within 0.05 in bfloat16)"),
    ],
)
def test_engine_and_learner_are_compared_per_token_and_by_precision(dtype: str, value: float, shown: str) -> None:
    rows = dict(summary_rows(summary("demo", 400) | {"as_shipped": False, "dtype": dtype, "logprob_max_abs_diff_per_token": value}))
    assert rows["engine vs learner log-prob per token, max"] == shown


def test_summary_rows_are_short_text_and_leave_nulls_out() -> None:
    rows = dict(summary_rows(summary("demo", 400)))
    assert rows["exact TV to the target"] == "0.860 → 0.0350 (goal: below 0.05)"
    assert rows["reward"] == "0.400 → 2.0300 (goal: 2.1000 ± 3%; missed)"
    assert rows["groups"] == "3220 generated, 3200 trained, 1 rejected, 11 buffered, 8 leased"
    nulls = dict.fromkeys(summary("demo", 400))
    assert summary_rows(nulls | {"steps": 3}) == [("steps", "3")]
    assert summary_rows({}) == []


def pixels(address: str) -> tuple[int, int, list[tuple[int, ...]]]:
    """A PNG of ours, decoded by hand."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    columns, rows = struct.unpack(">II", data[16:24])
    length = struct.unpack(">I", data[33:37])[0]
    assert data[37:41] == b"IDAT"
    raw = zlib.decompress(data[41 : 41 + length])
    lines = [raw[row * (1 + 3 * columns) + 1 : (row + 1) * (1 + 3 * columns)] for row in range(rows)]
    return rows, columns, [tuple(line[at : at + 3]) for line in lines for at in range(0, 3 * columns, 3)]


def test_heat_maps_are_row_by_row_and_share_a_scale() -> None:
    rows, columns, found = pixels(heat_png([0.0, 1.0, 0.25, 0.04, 0.0, 4.0], 2, 3, highest=1.0))
    assert (rows, columns) == (2, 3)
    assert found[0] == PALETTE[0]
    assert found[1] == PALETTE[-1]
    assert found[3] == PALETTE[1]  # sqrt(0.04) is a fifth of the way
    assert found[5] == PALETTE[-1]  # above the scale: its brightest colour


def test_a_heat_map_of_nothing_is_dark() -> None:
    assert set(pixels(heat_png([0.0] * 4, 2, 2, highest=0.0))[2]) == {PALETTE[0]}


@pytest.mark.parametrize(("low", "high", "ticks"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 400, [0, 100, 200, 300, 400]), (-3, 7, [-2, 0, 2, 4, 6])])
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 5) == pytest.approx(ticks)


def test_axis_ends() -> None:
    axis = Axis(low=0.01, high=100, start=200, end=0, log=True)
    assert [axis.place(value) for value in (0.01, 1, 100)] == pytest.approx([200, 100, 0])
    assert axis.ticks(5) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert value_axis([1e-6, 3.0], top=0, bottom=10, from_zero=False).log
    assert not value_axis([0.0, 3.0], top=0, bottom=10, from_zero=False).log


@pytest.mark.parametrize("points", [[(0, 1.0)], [(5, 0.0), (6, 0.0)], [(0, -1e9), (1, 1e9)], [(1, 1e-300), (2, 1e300)]])
def test_odd_curves_have_finite_places(points: list[tuple[float, float]]) -> None:
    figure = line_chart("odd", [Series(label="one", points=points)], marks=[Mark(step=0, label="here"), Mark(step=99, label="outside")])
    assert "nan" not in figure
    assert "inf" not in figure
    assert all(-1 <= float(number) <= 1041 for number in re.findall(r'[xy12]="(-?[0-9.]+)"', figure))


def test_long_curves_are_thinned_by_means() -> None:
    points = [(float(step), float(step % 2)) for step in range(5000)]
    thinned = thin(points)
    assert len(thinned) == 500
    assert {value for _, value in thinned} == {0.5}
    assert thin([]) == []
    assert thin([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_many_ages_share_bars() -> None:
    assert _bars(Counter({2: 5, 4: 1})) == [("2", 5.0), ("3", 0.0), ("4", 1.0)]
    wide = _bars(Counter(dict.fromkeys(range(90), 1)))
    assert len(wide) == 30
    assert wide[0] == ("0–2", 3.0)
    assert sum(count for _, count in wide) == 90
