"""The tables of the two searches, and what their commands refuse."""

import pytest

from examples import columns, command
from examples.beam_search import __main__ as beam_search
from examples.beam_trees import __main__ as beam_trees
from examples.beam_trees import report
from examples.report import Metric
from moe.errors import UsageError


def runs():
    values = {"hard": (0.5, 0.52, 0.54), "soft": (0.81, 0.80, 0.86), "commonest": (0.1, 0.1, 0.1)}
    return [
        {"arm": arm, "width": 0.0, "seed": seed, "seconds": 2.0, "near": x, "far": x / 2}
        for arm, own in values.items()
        for seed, x in enumerate(own)
    ]


def test_a_row_for_each_arm_and_a_column_for_each_metric():
    metrics = [Metric("near", "close by", percent=True), Metric("far", "error", higher=False)]
    names = {"hard": "hard beams", "soft": "soft ones", "commonest": "none"}
    lines = columns.markdown(runs(), metrics, "hard", names).splitlines()
    assert lines[0] == "| arm | close by | error | seconds |"
    assert lines[2] == "| hard beams | 52.00 % ± 2.00 | 0.2600 ± 0.0100 | 2 |"
    assert lines[3] == "| soft ones | 82.33 % ± 3.21, better | 0.4117 ± 0.0161, worse | 2 |"
    lines = columns.differences(runs(), metrics, "hard", names).splitlines()
    assert lines[0] == "| difference to hard beams | close by | error |"
    # By hand: 31, 28 and 32 points of difference, 4.3027 standard errors of 1.2019 points.
    assert lines[2] == (
        "| soft ones | +30.33 % (+25.16 % to +35.50 %) | +0.1517 (+0.1258 to +0.1775) |"
    )
    assert len(lines) == 4
    assert columns.differences(runs()[:3], metrics, "hard", names) == ""
    assert columns.differences(runs(), metrics, "gold", names) == ""
    figure = report.draw(runs(), ["near", "far"], names, "title")
    assert [line.get_label() for line in figure.axes[0].lines[::4]] == list(names.values())


def test_flags_take_the_place_of_the_sizes_own_settings():
    made = command.parser("some", "")
    command.add_overrides(made, beam_trees.WHOLE, beam_trees.REAL)
    flags = made.parse_args(["--epochs=3", "--rate=2e-3"])
    found = command.override(flags, beam_trees.PUBLISHED, beam_trees.WHOLE, beam_trees.REAL)
    assert found == beam_trees.PUBLISHED._replace(epochs=3, rate=2e-3)


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (beam_trees.main, ["--beams=1"], "--arms=greedy"),
        (beam_trees.main, ["--arms=gold,non"], "'non' is none of"),
        (beam_trees.main, ["--rate=0"], "--rate=0: expected numbers above 0"),
        (beam_trees.main, ["--operators=MAX,MEAN"], "'MEAN' is none of MAX, MIN, MED, SM"),
        (beam_trees.main, ["--task=logic", "--operators=MAX"], "is of --task=listops"),
        (beam_trees.main, ["--rate=0.1,1"], "expected one number, such as --rate=0.1"),
        (beam_trees.main, ["--task=sums"], "invalid choice: 'sums'"),
        (beam_search.main, ["--words=0"], "0 is below 1"),
        (beam_search.main, ["--data_dir=/nowhere"], "python -m examples.data cmudict"),
    ],
)
def test_wrong_flags_are_one_line(main, argv, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        main([*argv, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
