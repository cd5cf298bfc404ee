"""Steps of long runs: the plan, and what is done in a time box."""

import time
from functools import partial

import pytest

from xai_companion.steps import TIME_BOX, OutOfTime, Step, out_of_time, plan, read_plan, take_steps


def test_a_plan_by_hand():
    steps = [Step("a", 59.9, print), Step("b", 5, print, lambda: True), Step("c, the last", 3605, print)]
    said = "plan: 2 of 3 steps left, about 61:04 min (estimated)\nplan:     0:59  a\nplan:    60:05  c, the last"
    assert plan(steps) == said and read_plan(f"words\n{said}\nplan: words\n") == [(59, "a"), (3605, "c, the last")]
    assert out_of_time("cell [3]: OutOfTime: the next step: none") == "the next step: none" and not out_of_time("cell [3]: ValueError: OutOfTime")


def test_a_step_that_fails_does_not_end_the_others(monkeypatch, capsys):
    "What there is is stored, and the error comes at the end"
    ran, stored = [], []

    def broken():
        raise ValueError("no such kernel")
    steps = [Step("a", 5, broken), Step("b", 5, partial(ran.append, "b"), lambda: "b" in ran)]
    monkeypatch.setenv(TIME_BOX, "inf")
    with pytest.raises(RuntimeError, match="failed: a. The other steps are done") as end:
        take_steps(steps, lambda: stored.append(list(ran)))
    assert str(end.value.__cause__) == "no such kernel" and ran == ["b"] and stored == [["b"]]
    said = capsys.readouterr()
    many = [Step(f"{name}", 5, broken) for name in range(5)]
    with pytest.raises(RuntimeError, match="failed: 0; 1; 2 and 2 more. The other"):
        take_steps(many)
    monkeypatch.setenv(TIME_BOX, str(time.time() + 60))  # the failure is told also where the time ends first
    with pytest.raises(OutOfTime, match="goes on with it, after those that failed: a$"):
        take_steps([steps[0], Step("long", 100, broken)])
    assert "step: 1 of 2 failed after 0:00 min" in said.out and "step: 2 of 2 took" in said.out and "no such kernel" in said.err


def test_what_is_done_in_a_time_box(monkeypatch, capsys):
    ran, stored = [], []
    steps = [Step(name, seconds, partial(ran.append, name), lambda name=name: name in ran) for name, seconds in (("a", 5), ("b", 100), ("c", 101))]

    def take(until):
        monkeypatch.setenv(TIME_BOX, str(until))
        take_steps(steps, lambda: stored.append(list(ran)))
    monkeypatch.setattr("xai_companion.steps.time.time", lambda: 1000.0)
    monkeypatch.delenv(TIME_BOX, raising=False)
    take_steps(steps)
    assert not ran and not capsys.readouterr().out  # elsewhere the work is done where it is asked for
    with pytest.raises(OutOfTime, match="the plan only"):
        take(0)
    assert not ran and not stored and capsys.readouterr().out == plan(steps) + "\n"
    ran.append("a")
    for until, left in ((1100, "1:40"), (900, "0:00")):
        with pytest.raises(OutOfTime, match=f"the next step, c, takes about 1:41 min and {left} are left"):
            take(until)
        assert ran == ["a", "b"] and stored.pop() == ["a", "b"] and not stored
    said = capsys.readouterr().out
    assert said.count("step: 2 of 3, b ...") == 1 and "step: 1 of 3" not in said
    take("inf")
    assert ran == ["a", "b", "c"] and not stored and "step: 3 of 3 took 0:00 min" in capsys.readouterr().out
