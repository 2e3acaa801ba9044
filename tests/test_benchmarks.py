"""The benchmarks, on inputs too small to time anything."""

import csv
import itertools

import numpy as np
import pytest

from benchmarks import (
    __main__,
    accelerator,
    accuracy,
    depth,
    exactly_k,
    memory,
    moe_layer,
    regression,
    topk,
    trainers,
)
from benchmarks.candidates import candidates
from benchmarks.report import markdown, write_csv
from benchmarks.timing import Candidate

TINY = topk.Size(4, 8, 2)


def absent(problem):
    import no_such_peer  # noqa: F401


def test_a_table_has_every_candidate_and_its_error(tmp_path):
    ours = [c for c in candidates() if c.name in ("hard", "mask p=2")]
    found = [*ours, Candidate("a peer", absent, "mask p=2", "no_such_peer")]
    table = topk.Table("topk", "Masks", "", topk.SHOW, topk.compare(found, [TINY], 0.01))
    write_csv(table, tmp_path)
    with (tmp_path / "topk.csv").open() as file:
        rows = {row["candidate"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {c.name for c in found}
    assert rows.pop("a peer")["status"] == "not installed"
    for row in rows.values():
        assert row["status"] == "ok" and float(row["ms"]) > 0
        assert float(row["error"]) < 1e-6 and float(row["gradient_error"]) < 1e-6
    assert "| a peer | cpu | not installed |" in markdown(table)


def test_a_candidate_that_fails_says_why():
    def broken(problem):
        raise ValueError("first line\nsecond line")

    (row,) = topk.compare([Candidate("broken", broken, "hard")], [TINY], 0.01)
    assert row["status"] == "ValueError: first line" and "ms" not in row


def test_the_accuracy_check_can_fail(monkeypatch):
    monkeypatch.setattr(accuracy, "sparse_topk_mask", lambda x, k, **_: x)
    assert {row["result"] for row in accuracy.check(TINY, strengths=(1.0,))} == {"FAIL"}


def test_the_fit_that_others_are_held_to():
    y = np.float32([[3, 1, 2, 0]])
    v, gradient, _ = regression.exact(regression.Problem(y, np.float32([[1, 2, 4, 8]])))
    assert v.tolist() == [[3, 1.5, 1.5, 0]] and gradient.tolist() == [[1, 3, 3, 8]]


def test_without_an_accelerator_its_table_says_so():
    (table,) = accelerator.tables(quick=False)
    assert "no GPU or TPU" in markdown(table) and not table.rows


def test_an_unknown_section_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--only=nothing", f"--out={tmp_path}"])
    assert "topk" in capsys.readouterr().err


@pytest.mark.slow
def test_dropless_layers_are_checked_against_the_dense_dispatch():
    rows = moe_layer._compare(moe_layer.Problem(2, 8, 8, 16, 4, "float32"), 0.01)
    assert {row["status"] for row in rows} == {"ok"}
    errors = [row["error"] for row in rows if "dropless" in row["candidate"]]
    assert len(errors) == 2 and max(errors) < 1e-5


def test_the_memory_of_whole_arrays_is_measured_against_that_of_chunks():
    for table in memory.tables(quick=True):
        whole, ours = table.rows[-2:]
        assert whole["status"] == ours["status"] == "ok" and ours["error"] < 1e-5
        assert table.name == "attention" or ours["xla_mib"] < whole["xla_mib"] / 2


def test_a_trainer_of_another_loss_is_told_apart():
    ours = [7.6, 7.4, 7.2, 7.0]
    near = trainers.compare_losses([7.6, 7.40005, 7.2, 6.0], ours)
    assert "status" not in near and near["error"] < 1e-4  # of the first three
    assert "another loss" in trainers.compare_losses([7.6, 7.401], ours)["status"]
    assert "another loss" in trainers.compare_losses([float("nan")], ours)["status"]


@pytest.mark.slow
def test_both_trainers_make_the_same_model_of_the_same_weights(monkeypatch):
    monkeypatch.setattr(trainers, "QUICK", trainers.QUICK | {"model.depth": "1"})
    for table in trainers.tables(quick=True):
        ours, *theirs = table.rows
        assert ours["status"] == "ok" and ours["ratio"] == 1
        installed = [row for row in theirs if row["status"] != "not installed"]
        for row in installed:  # a machine without a C++ compiler has no torch.compile
            assert "another loss" not in row["status"]
            assert "ms" not in row or row.get("equal", 1) == 1


def test_marginals_that_times_are_held_to_are_those_of_all_sets():
    x = np.random.default_rng(1).standard_normal((2, 6))
    sets = np.array(list(itertools.combinations(range(6), 3)))
    weight = np.exp(x[:, sets].sum(-1))
    has = (sets[:, :, None] == np.arange(6)).any(1)
    right = weight @ has / weight.sum(-1, keepdims=True)
    np.testing.assert_allclose(exactly_k.marginals(x, 3), right, rtol=1e-12)


@pytest.mark.slow
def test_tokens_that_skip_a_block_leave_as_they_came():
    rows = depth.compare(depth.Problem(2, 16, 16, 32, 2, "float32"), 0.01)
    assert {row["status"] for row in rows} == {"ok"} and len(rows) == 10
    assert {row.get("error", 0) for row in rows} == {0} and rows[1]["slots"] == 8
