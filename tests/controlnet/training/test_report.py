"""The page of a run."""

import math
from xml.etree import ElementTree

import numpy as np

from controlnet.training.charts import BOTTOM, LEFT, RIGHT, TOP, chart
from controlnet.training.report import MOST_POINTS, PANELS, Curve, Curves, scalars, section, write_report
from controlnet.training.run_state import RunFolder


def curve(values, steps=None):
    made = Curve()
    for step, value in zip(steps or range(1, len(values) + 1), values, strict=True):
        made.add(step, value)
    return made


def test_a_page_has_every_curve_and_every_grid(tmp_path):
    run, curves = RunFolder(tmp_path / "a <b> & c"), Curves()
    (run.path / "samples").mkdir(parents=True)
    for step in range(1, 101):
        curves.add({"step": step, "loss": math.nan if step == 7 else 1 / step, "lr": 1e-3, "grid": "x.png"})
        if step % 50 == 0:
            curves.add({"step": step, "validation_loss": 0.5, "control_measure": 0.1 * step, "zero_convs": [1.0, 2.0]})
            run.grid(step).touch()
    write_report(run, curves, 200, set_in=50)
    page = ElementTree.fromstring(run.report.read_text().removeprefix("<!doctype html>"))
    assert [image.get("src") for image in page.iter("img")] == ["samples/000100.png", "samples/000050.png"]
    assert len([*page.iter("svg")]) == 5 and len([*page.iter("polyline")]) == 6  # no iou, two zero convolutions
    assert "control set in at step 50" in run.report.read_text() and "step 100 of 200" in run.report.read_text()
    points = [pair.split(",") for pair in next(page.iter("polyline")).get("points").split()]
    np.testing.assert_allclose(np.array(points, float), [[LEFT, BOTTOM], [RIGHT, TOP]])  # the measure: 5 and 10
    assert [panel.name for panel in PANELS if section(panel, curves)] == [
        "control_measure",
        "validation_loss",
        "loss",
        "zero_convs",
        "lr",
    ]
    assert "step 100" in section(PANELS[0], curves) and "layer 1" in section(PANELS[5], curves)
    assert run.report.read_text().count("<title>control sets in</title>") == 5
    write_report(run, curves, 100, set_in=None)
    assert "http-equiv" not in run.report.read_text() and "has not set in" in run.report.read_text()


def test_a_long_curve_is_drawn_by_means():
    points = curve([float(i % 2) for i in range(10 * MOST_POINTS)]).points()
    assert len(points) == MOST_POINTS and points[0] == (10, 0.5) and points[-1] == (10 * MOST_POINTS, 0.5)
    assert curve([math.nan, 2.0, math.inf, 4.0]).points() == [(2, 2), (4, 4)] and curve([math.nan]).points() == []


def test_a_chart_spans_its_field_and_shows_names_as_they_are():
    drawn = chart("loss", {"<b>": [(0, 1.0), (10, 3.0)], "flat": [(5, 2.0)], "absent": []}, set_in=5)
    assert 'points="48.0,148.0 392.0,26.0"' in drawn and 'points="220.0,87.0 220.0,87.0"' in drawn
    assert 'd="M220.0 26V148"' in drawn and "control sets in" in drawn
    assert "&lt;b&gt; 3" in drawn and "<b>" not in drawn and "absent" not in drawn
    assert "nothing yet" in chart("loss", {})
    assert all(
        f">{label}<" in chart("flat", {"a": [(0, 0.1136), (9, 0.1138)]}) for label in ("0.1136", "0.1137", "0.1138")
    )
    assert "nan" not in (one := chart("one", {"a": [(3, 0.5)]})) and "control sets in" not in one


def test_numbers_of_a_log_line_have_names():
    values = {"step": 3, "loss": 0.5, "grid": "000003.png", "zero_convs": [1.0, 2.0]}
    assert scalars(values) == {"loss": 0.5, "zero_convs/0": 1.0, "zero_convs/1": 2.0}


def test_a_value_is_that_of_its_step():
    curves = Curves()
    curves.add({"step": 3, "validation_loss": 0.5, "memory_gb": 1.0})
    assert curves.at("validation_loss", 3) == 0.5 and curves.at("validation_loss", 4) is None
    assert curves.at("loss", 3) is None and "memory_gb" not in curves
