"""The parts of a comparison: rows, pairs, budgets, tuning, merging; a small one that is real."""

import json

import numpy as np
import pytest
from scipy import stats

import compare as compare_script
from moe import config as configs
from moe.errors import UsageError
from moe.evaluate import comparison
from moe.evaluate.league import paired, results, rows, runs, standings, stored, tuning
from moe.tasks import Metric, task_of
from tests.moe.conftest import TINY

KEYS = configs.flatten(configs.default())
ACCURACY = Metric("accuracy", higher=True, form=".2%")


def test_rows_have_one_name_however_they_are_typed():
    a, b = rows.parse(["topk:noise=0:k=1", "topk:optimizer.learning_rate=1:k=1"], KEYS, [])
    assert (a.name, a.folder) == ("topk:k=1:noise=0", "topk,k=1,noise=0")
    assert b.overrides(KEYS)["optimizer.learning_rate"] == "1"
    assert rows.parse(["topk:learning_rate=1:k=1"], KEYS, []) == [b]
    (plain,) = rows.parse(["soft_moe"], KEYS, [])
    assert plain.folder == "soft_moe" and plain.overrides(KEYS) == {"router.name": "soft_moe"}
    assert rows.split("topk:moe.layers=0,1;dense") == ["topk:moe.layers=0,1", "dense"]
    (long,) = rows.parse(["topk:moe.layers=" + "1," * 200], KEYS, [])
    assert len(long.folder) < 140


def test_all_stands_for_what_fits():
    names = [row.name for row in rows.parse(["all", "dense_params"], KEYS, ["topk", "dense"])]
    assert names == ["topk", "dense", "dense_params"]


def test_dense_rows_have_the_width_of_k_or_of_all_experts(tiny):
    equal_flops, equal_parameters, few = (
        row.overrides(KEYS)
        for row in rows.parse(["dense", "dense_params", "dense_params:num_experts=2"], KEYS, [])
    )
    assert equal_flops == {"moe.dense": "true"}
    assert equal_parameters["router.topk.k"] == "8" and few["router.topk.k"] == "2"
    sizes = {"data__image_size": "8", "data__channels": "1", "data__num_classes": "10"}
    config = tiny(moe__dense="true", router__topk__k="4", moe__capacity_factor="1", **sizes)
    flops = task_of(config).flops(config)
    sparse = tiny(router__topk__k="4", moe__dispatch="dropless", **sizes)
    assert flops.experts == task_of(sparse).flops(sparse).experts  # of all four experts


def test_a_difference_is_the_paired_t_test_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(size=5)
    found = paired.difference(dict(enumerate(a)), dict(enumerate(b)))
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose(found, (np.mean(a - b), 5, low, high, test.pvalue), rtol=1e-10)


def test_what_cannot_be_said_of_a_difference():
    assert paired.difference({0: 1.0}, {1: 1.0}) is None
    one = paired.difference({0: 1.0, 1: 9.0}, {0: 0.5, 2: 9.0})
    assert one == (0.5, 1, None, None, None) and paired.verdict(one, None, True) == "one seed"
    same = paired.difference({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert same.p is None and paired.verdict(same, None, True) == "no spread"
    equal = paired.difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert equal == (0.0, 2, 0.0, 0.0, 1.0)


def test_holm_as_worked_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 but at least the one before, 0.6 * 1
    adjusted = paired.holm([0.02, None, 0.01, 0.6, 0.03])
    assert adjusted[1] is None
    np.testing.assert_allclose([adjusted[i] for i in (2, 0, 4, 3)], [0.04, 0.06, 0.06, 0.6])
    better = paired.Difference(0.1, 3, 0.05, 0.15, 0.01)
    assert paired.verdict(better, 0.04, True) == "better"
    assert paired.verdict(better, 0.04, False) == "worse"
    assert paired.verdict(better, 0.06, True) == "not told apart"


def test_a_curve_at_a_budget():
    curve = [(10.0, 0.2), (20.0, 0.6), (40.0, 0.8)]
    assert standings.at(curve, 5) is None
    assert standings.at(curve, 10) == 0.2
    assert standings.at(curve, 15) == pytest.approx(0.4)
    assert standings.at(curve, 40 * (1 + 1e-12)) == standings.at(curve, 99) == 0.8


def result(seed, value, flops=1.0, rate=1.0):
    curve = [(5, value / 2, flops / 2), (10, value, flops)]
    return results.Result(seed, value, 1.0, rate, 1, flops, curve, 2.0, {})


def entry(name, *found, settings=None, own=()):
    return standings.Entry(name, name, settings or {"num_steps": 10}, own, results=[*found])


def test_equal_budgets_are_those_of_the_cheapest_row():
    cheap = entry("cheap", result(0, 0.4, flops=1.0, rate=1.0))
    costly = entry("costly", result(0, 0.8, flops=2.0, rate=2.0))
    a, b = standings.standings([cheap, costly], "cheap", ACCURACY)
    assert (a.at_flops, b.at_flops) == (0.4, 0.4)  # half of its own curve
    assert (a.seconds, b.seconds) == (10.0, 5.0)
    assert (a.at_seconds, b.at_seconds) == (0.2, 0.8)
    assert (a.verdict, b.verdict) == ("baseline", "one seed")


def test_flops_follow_the_experts_that_a_router_chose(tiny_text):
    sizes = {"data__vocabulary": "257", "router__name": "sparse_topk", "num_steps": "20"}
    config = tiny_text(moe__dispatch="dropless", moe__layers="0,1", **sizes)
    flops = task_of(config).flops(config)

    def log(step, one, two):
        chosen = {"train/layer_0/experts_per_token": one, "train/layer_1/experts_per_token": two}
        return {"step": step, "train/skipped": 0.0, **chosen}

    scores = {"eval/bits_per_byte": 2.0, "eval/loss": 1.0}
    found = results.result(config, [log(10, 2.0, 2.0), log(20, 1.0, 2.0), {"step": 20} | scores])
    whole, less = flops.training(flops.computed), 3 * flops.experts / 4  # half of a layer of two
    assert found.flops == pytest.approx(config.batch_size * (20 * whole - 10 * less), rel=1e-12)
    assert found.experts == pytest.approx(1.75)
    config = tiny_text(moe__dispatch="capacity", moe__layers="0,1", **sizes)
    slots = task_of(config).flops(config)  # slots are computed, full or not
    found = results.result(config, [log(20, 1.0, 1.0), {"step": 20} | scores])
    assert found.flops == pytest.approx(config.batch_size * 20 * slots.training(slots.computed))


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("train", ("train[:90%]", "train[90%:]")),
        ("train[:50%]", ("train[:45%]", "train[45%:50%]")),
        ("train[20%:]", ("train[20%:92%]", "train[92%:]")),
        ("train[10:110]", ("train[10:100]", "train[100:110]")),
    ],
)
def test_the_validation_split_is_the_last_tenth_of_training(train, expected):
    assert tuning.splits(train) == expected
    assert tuning.splits(train, "validation") == (train, "validation")


@pytest.mark.parametrize("train", ["train[10:]", "train[:1]", "train[5%:100]", "train+test"])
def test_splits_that_cannot_be_divided(train):
    with pytest.raises(UsageError, match="--validation=SPLIT"):
        tuning.splits(train)


def test_the_best_mean_is_chosen_and_of_equal_ones_the_first():
    scores = [({"k": "1"}, [0.1, 0.3]), ({"k": "2"}, [0.2, 0.2]), ({"k": "3"}, [0.9, None])]
    assert tuning.choose(scores, ACCURACY) == {"k": "1"}
    assert tuning.choose(scores, ACCURACY._replace(higher=False)) == {"k": "1"}
    with pytest.raises(UsageError):
        tuning.choose(scores[2:], ACCURACY)


def test_cores_are_divided():
    assert runs.shares(range(5), 2) == [[0, 1], [2, 3, 4]]
    assert runs.shares([3, 7], 3) == [[3], [7], [3]] and runs.shares([], 2) == [[], []]


def write(folder, *entries, baseline="a", data="x", metric=ACCURACY):
    league = stored.League("images", metric, baseline, data, [*entries])
    shown = standings.standings(entries, baseline, ACCURACY)
    stored.write(folder, league, shown, standings.budgets(entries))
    return folder


def test_tables_merge_by_row_and_seed(tmp_path):
    one = write(tmp_path / "1", entry("a", result(0, 0.5)), entry("b", result(0, 0.6)))
    more = entry("a", result(1, 0.4), result(0, 0.5))
    two = write(tmp_path / "2", more, entry("c", result(1, 1)))
    merged = stored.merge([one, two])
    assert {e.name: e.values for e in merged.entries} == {
        "a": {0: 0.5, 1: 0.4},
        "b": {0: 0.6},
        "c": {1: 1},
    }
    league = stored.merge([one, two], "b")
    write(tmp_path / "3", *league.entries, baseline=league.baseline)
    assert stored.read(tmp_path / "3").baseline == "b"
    again = stored.merge([tmp_path / "3"])
    assert [e.values for e in again.entries] == [e.values for e in merged.entries]


@pytest.mark.parametrize(
    ("other", "data", "message"),
    [
        (entry("a", result(0, 0.7)), "x", "has another result"),
        (entry("a", result(1, 0.7), settings={"num_steps": 9}), "x", "num_steps is 10 and 9"),
        (entry("b", result(0, 0.7), settings={"num_steps": 9}), "x", "cannot be compared"),
        (entry("b", result(0, 0.7)), "y", "tested on other examples"),
    ],
)
def test_tables_that_do_not_belong_together(other, data, message, tmp_path):
    one = write(tmp_path / "1", entry("a", result(0, 0.5)))
    two = write(tmp_path / "2", other, baseline=other.name, data=data)
    with pytest.raises(UsageError, match=message):
        stored.merge([one, two])


def test_tables_by_different_metrics_do_not_merge(tmp_path):
    one = write(tmp_path / "1", entry("a", result(0, 0.5)))
    two = write(tmp_path / "2", entry("a", result(1, 0.5)), metric=ACCURACY._replace(name="x"))
    with pytest.raises(UsageError, match=r"1 is by accuracy, .*2 by x: say --metric"):
        stored.merge([one, two])


def test_a_setting_of_a_rows_own_may_differ():
    a = entry("a", result(0, 0.5))
    b = entry("b", result(0, 0.7), settings={"num_steps": 9}, own=["num_steps"])
    stored.check_alike([a, b])


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9, "rows": []}', '{"version": 1}'])
def test_tables_that_are_none(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(UsageError, match=r"table.json"):
        stored.merge([tmp_path])
    with pytest.raises(UsageError, match=r"has no table.json"):
        stored.merge([tmp_path / "none"])


@pytest.fixture
def league(data_dir, tmp_path):
    keys = TINY | {"data.data_dir": str(data_dir), "num_steps": "4", "eval.every": "2"}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    rows = "--rows=topk,sparse_topk:p=1.5"
    return ["--config=configs/digits.py", *overrides, rows, "--seeds=2", f"--out={tmp_path}"]


@pytest.mark.slow
def test_a_league_is_trained_once_and_then_read(league, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        real = comparison.train

        def fail_once(config, workdir):
            if config.router.name == "sparse_topk" and config.seed == 0:
                raise UsageError("no luck today")
            return real(config, workdir)

        patch.setattr(comparison, "train", fail_once)
        with pytest.raises(UsageError, match=r"1 of the runs failed.*p=1.5, seed 0: no luck today"):
            compare_script.main(league)
    half = stored.read(tmp_path)
    assert [sorted(e.values) for e in half.entries] == [[0, 1], [1]]
    compare_script.main(league)  # trains the one that is missing
    table = (tmp_path / "table.md").read_text()
    assert "sparse_topk:p=1.5" in table and "failed" not in table
    for name in ("accuracy.png", "curves.png", "layers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(comparison, "train", None)
    monkeypatch.setattr(comparison, "set_up", None)
    capsys.readouterr()
    compare_script.main(league)  # only reads
    assert (tmp_path / "table.md").read_text() == table
    assert "training in" not in capsys.readouterr().out
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["rows"][1]["own"] == ["router.name", "router.sparse_topk.p"]


def test_what_is_chosen_is_reported_on_test(league, tmp_path, monkeypatch):
    trained = []

    def train(config, workdir):
        from tests.moe.evaluate.test_comparison import write_run

        trained.append(config)
        rate = config.optimizer.learning_rate
        best = {"topk": 0.1, "sparse_topk": 0.2}[config.router.name]
        score = {"eval/accuracy": 1 - abs(rate - best), "eval/loss": 1.0}
        write_run(config, workdir, [{"step": config.num_steps, **score}])

    monkeypatch.setattr(comparison, "train", train)
    compare_script.main([*league, "--tune=learning_rate:0.1,0.2"])
    splits = [(c.data.train_split, c.data.eval_split) for c in trained]
    assert splits == [("train[:90%]", "train[90%:]")] * 4 + [("train", "test")] * 4
    assert {(c.router.name, c.optimizer.learning_rate) for c in trained[4:]} == {
        ("topk", 0.1),
        ("sparse_topk", 0.2),
    }
    table = (tmp_path / "table.md").read_text()
    assert "learning_rate=0.1" in table and "learning_rate=0.2" in table
    trained.clear()
    compare_script.main([*league, "--tune=learning_rate:0.1,0.2"])
    assert not trained


@pytest.mark.slow
def test_runs_side_by_side(league, tmp_path):
    """Each is a process: two at once give the same table as one after the other."""
    compare_script.main([*league, "--jobs=2"])
    first = stored.read(tmp_path)
    assert [sorted(e.values) for e in first.entries] == [[0, 1], [0, 1]]
    log = next((tmp_path / "logs").glob("topk.0.txt")).read_text()
    assert "training in" in log
