from xml.etree import ElementTree

import pytest

from ftb_llm.bench.figures import divergences_picture, staleness_picture
from ftb_llm.bench.plot import COLOURS, Panel, Point, colour, limits, log_ticks, picture
from tests.bench_results import rows

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    return root


def paths(root: ElementTree.Element, look: str) -> list[ElementTree.Element]:
    return [path for path in root.iter(f"{SVG}path") if path.get("class") == look]


def test_the_picture_stands_by_itself_on_white() -> None:
    root = drawn(staleness_picture(rows()))
    ground, style = root.find(f"{SVG}rect"), root.find(f"{SVG}style")
    assert ground is not None
    assert (ground.get("fill"), ground.get("width")) == ("#fff", root.get("width"))
    assert style is not None
    assert not [value for element in root.iter() for name, value in element.attrib.items() if "href" in name]


def test_staleness_has_a_line_per_objective_with_error_bars_at_every_lag() -> None:
    root = drawn(staleness_picture(rows()))
    # hellinger and grpo, in two panels and the legend; bars at two lags
    assert len(paths(root, "line")) == len(paths(root, "line dashed")) == 3
    assert len(paths(root, "bar")) == 2 * 2 * 2
    assert {path.get("stroke") for path in paths(root, "line dashed")} == {COLOURS["grpo"]}
    words = {text.text for text in root.iter(f"{SVG}text")}
    assert {"0", "50", "hellinger", "grpo", "Final exact TV, hypergrid", "age of the samples, in steps"} <= words


def test_a_target_that_covers_nothing_has_no_shares() -> None:
    root = drawn(staleness_picture([row | {"coverage_target": 0.0} for row in rows()]))
    assert len(paths(root, "bar")) == 2 * 2
    assert len(root.findall(f"{SVG}g")) == 2


def test_lags_rise_and_lines_follow_the_request_whatever_the_order_of_the_rows() -> None:
    names = ["hellinger", "grpo"]
    assert staleness_picture(rows()[::-1], names) == staleness_picture(rows(), names)
    assert divergences_picture(rows()[::-1], names) == divergences_picture(rows(), names)


def test_divergences_has_a_panel_per_quantity_and_lag() -> None:
    root = drawn(divergences_picture(rows()))
    assert len(root.findall(f"{SVG}g")) == 3 * 2
    assert "JSD in nats, hypergrid, 50 steps off-policy" in {text.text for text in root.iter(f"{SVG}text")}


def test_values_are_placed_where_the_axis_says() -> None:
    points = [Point(x=0, y=0.01, low=0.01, high=0.01), Point(x=1, y=0.1, low=0.1, high=0.1), Point(x=2, y=1, low=1, high=1)]
    root = drawn(picture("t", [[Panel(title="p", lines={"js": points}, x_label="x", log=True)]]))
    line = paths(root, "line")[0].get("d")
    assert line is not None
    places = [tuple(map(float, place.split())) for place in line[1:].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # decades are equally high
    assert y2 < y1 < y0


def test_a_value_of_zero_can_stand_on_a_logarithmic_axis() -> None:
    panel = Panel(title="p", lines={"js": [Point(x=0, y=0, low=0, high=0), Point(x=1, y=1, low=1, high=1)]}, x_label="x", log=True)
    low, high = limits([panel])
    assert 0 < low < 1 < high
    drawn(picture("t", [[panel]]))


def test_an_axis_of_shares_holds_zero_to_one() -> None:
    low, high = limits([Panel(title="p", lines={"js": [Point(x=0, y=0.4, low=0.3, high=0.5)]}, x_label="x")])
    assert (low, high) == (0.0, 1.04)


def test_ticks_are_round() -> None:
    assert log_ticks(0.015, 0.6) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5])
    assert log_ticks(1e-5, 1.0) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_colours_are_distinct_and_known_names_keep_theirs() -> None:
    names = ["alpha:0.75", "hellinger", "alpha:1.2", "grpo"]
    found = [colour(name, names) for name in names]
    assert len(set(found)) == 4
    assert (found[1], found[3]) == (COLOURS["hellinger"], COLOURS["grpo"])
    assert len(set(COLOURS.values())) == 12
