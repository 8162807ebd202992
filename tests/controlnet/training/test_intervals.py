"""Steps and minutes between what is done now and then."""

import argparse

import pytest

from controlnet.common.program import interval
from controlnet.training import intervals
from controlnet.training.intervals import Interval


def test_steps_are_counted_from_the_start_of_the_run():
    every = Interval("3")
    assert [done for done in range(1, 11) if every.due(done)] == [3, 6, 9]


def test_minutes_are_counted_from_the_last_time(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(intervals.time, "monotonic", lambda: now)
    every, at = Interval("1.5m"), []
    for done in range(1, 11):
        now += 40
        if every.due(done):
            at.append(done)
    assert at == [3, 6, 9]


@pytest.mark.parametrize("text", ["250", "1", "10m", "0.5m"])
def test_an_interval_is_kept_as_it_is_typed(text):
    assert interval(text) == text


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "m", "0m", "-1m", "infm", "10s", "", "nanm"])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected steps like 250, or minutes like 10m"):
        interval(text)
