"""curves.png: which fields of a log are drawn, and where."""

import pytest

from tdkd import curves

figure = pytest.importorskip("matplotlib.figure")

LOG = [
    {"step": 1, "loss": 3.0, "td_error_p05": -2.0, "td_error_p50": -1.0, "td_error_p95": 0.5},
    {"step": 2, "eval_loss": 2.5},
    {"step": 3, "loss": 2.0, "td_error_p05": -1.0, "td_error_p50": -0.5, "td_error_p95": 0.0},
    {"step": 3, "train_runtime": 9.0},
]


def lines_of(log, title):
    axis = figure.Figure().subplots()
    curves.panel(axis, log, title, curves.PANELS[title])
    return axis, {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def test_a_panel_draws_the_fields_that_there_are():
    axis, lines = lines_of(LOG, "loss")
    assert lines == {"loss": [[1, 3], [3, 2]], "eval_loss": [[2, 2.5]]}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["loss", "eval_loss"]
    axis, lines = lines_of(LOG, "TD error, median and 5 to 95 %")
    assert lines == {"td_error_p50": [[1, -1], [3, -0.5]]}
    (band,) = axis.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, -2), (1, 0.5), (3, -1), (3, 0)}
    assert axis.get_legend() is None


def test_a_picture_has_the_panels_of_its_log(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "panel", lambda axis, log, title, fields: drawn.append(title))
    path = tmp_path / "curves.png"
    assert curves.draw(path, LOG)
    assert drawn == ["loss", "TD error, median and 5 to 95 %"]
    del drawn[:]
    every = {name: 1.0 for fields in curves.PANELS.values() for name in fields}
    assert curves.draw(path, [{"step": 1, **every}])
    assert drawn == list(curves.PANELS)
    assert {"set size", "kappa, nats"} <= set(drawn)
    assert path.read_bytes().startswith(b"\x89PNG")
    path.unlink()
    assert not curves.draw(path, [{"step": 1, "train_runtime": 9.0}])
    assert not path.exists()
