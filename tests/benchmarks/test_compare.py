"""Verdicts on planted data, on files, and on commands that run in turn."""

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from benchmarks import compare, launch, results
from benchmarks.results import Benchmark, Results
from mnist_jax.errors import UsageError

CONTEXT = {"platform": "cpu", "cpu": "one", "jax": "0.10.2", "command": ["step"], "excluded": {}}
STEADY = np.array([1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.015, 0.985, 1.005, 0.995, 1.0])


def judge(a, b, threshold=0.02, **options) -> compare.Verdict:
    return compare.judge({"": (list(a), list(b))}, threshold, **{"paired": True} | options)[""]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    ("b", "word"),
    [
        (STEADY[::-1], "same"),
        (1.1 * STEADY[::-1], "slower"),
        (0.9 * STEADY[::-1], "faster"),
        (1.02 * STEADY, "same"),  # B ranks above A everywhere, within the threshold
        (1.1 * np.array([0.5, 2.0, 1.0, 1.5, 0.7, 1, 0.8, 1.6, 0.9, 1.1, 0.6]), "same"),
    ],
)
def test_verdicts(b, word, paired):
    assert judge(STEADY, b, paired=paired).word == word


@pytest.mark.parametrize("paired", [True, False])
def test_too_few_launches_get_no_verdict_and_leave_the_others_theirs(paired):
    few, enough = STEADY[: compare.FEWEST - 1], STEADY[: compare.FEWEST]
    sides = {i: (list(few), list(1.5 * few)) for i in range(100)}
    sides["enough"] = list(enough), list(1.5 * enough)
    found = compare.judge(sides, 0.02, paired=paired)
    assert [found[0].word, found["enough"].word] == ["few", "slower"]
    assert judge(STEADY, 1.1 * STEADY[::-1], family=200).word == "same"  # p is 200/2048
    assert compare.judge({"": ([1.0] * 5, [2.0] * 5)}, 0.02, paired=paired)[""].ci95 == ()


def test_probabilities_by_hand():
    a, b = np.arange(1.0, 6), np.arange(1.0, 6) + 10
    assert compare.rank_p(a, b, paired=False) == pytest.approx(1 / 252)
    assert compare.rank_p(a, b, paired=True) == pytest.approx(1 / 32)
    assert compare.rank_p(a, a, paired=True) == 1
    assert compare.holm([0.04, 0.01, 0.02, 0.9]) == pytest.approx([0.08, 0.04, 0.06, 0.9])


def test_a_slow_down_is_found_among_as_many_comparisons_as_a_card_makes():
    """Noise of 2 % in each launch, and of 20 % in both sides of a round alike."""
    rng, words = np.random.default_rng(0), {1.0: [], 1.1: []}
    for _ in range(40):
        for factor, found in words.items():
            drift = rng.lognormal(0, 0.2, compare.LAUNCHES)
            a, b = drift * rng.lognormal(0, 0.02, (2, compare.LAUNCHES))
            family = compare.CARD_CASES if factor > 1 else 1
            found.append(judge(a, factor * b, family=family).word)
    assert words[1.1].count("slower") >= 38
    assert 40 - words[1.0].count("same") <= 2


def made(launches_s, **changes) -> list[Benchmark]:
    fields = {"name": "train_step", "model": "mlp", "batch_size": 100, "mode": "many"} | changes
    times = enumerate(launches_s)
    return [Benchmark(samples_s=[s, 9.0], details={"launch": i}, **fields) for i, s in times]


def write(path: Path, *benchmarks: list[Benchmark], **context) -> Path:
    results.write(path, Results(CONTEXT | context, [b for some in benchmarks for b in some], {}))
    return path


def run(capsys, *words) -> tuple[int, str, str]:
    flags = "files run launches threshold across_devices output self_test model slow_down rounds"
    with mock.patch("sys.argv", ["compare", *map(str, words)]):
        status = launch.main("", compare.measure, flags, launches=2)
    return status, *capsys.readouterr()


def test_a_slower_file_ends_with_7_and_a_missing_case_leaves_out_that_alone(tmp_path: Path, capsys):
    same = made(STEADY, name="evaluation")
    (card := tmp_path / "card").mkdir()  # against a file of one of its parts
    a = write(card / "results.json", made(STEADY), same, made(STEADY, model="cnn"), parts={}).parent
    changes = {"jax": "0.12", "load": [4], "command": ["x"], "excluded": {"cnn": "out of memory"}}
    b = write(tmp_path / "b.json", made(1.2 * STEADY), same, **changes)
    b.write_text(b.read_text().replace('"date": "2', '"date": "1'))
    status, out, err = run(capsys, a, b)
    assert (status, err.count("\n")) == (7, 1)
    assert "B is slower by more than 2% in 1 of 2: train_step, mlp, batch 100" in err
    assert "differs: jax: 0.10.2 in A, 0.12 in B" in out and out.count("differs") == 1
    assert "only in A: train_step, cnn, batch 100" in out
    assert "excluded from B: cnn: out of memory" in out
    assert run(capsys, b, a)[0] == 0
    assert run(capsys, a, b, "--threshold=0.3")[0] == 0


def test_commands_are_compared_within_turns_and_files_by_ranks(tmp_path, monkeypatch, capsys):
    """Each turn takes half as long as the one before. In one A fails, and in another B."""

    def run_command(command, recorder):
        turn, ratio = next(calls) // 2, float(command)
        is_lost = turn == (1 if ratio == 1 else 5)
        recorder.take_in(Results(CONTEXT, made([] if is_lost else [ratio / 2**turn]), {}))

    calls = itertools.count()
    monkeypatch.setattr(compare, "run_command", run_command)
    status, out, _ = run(capsys, "--launches=11", "--run", "1", "1.1")
    assert status == 7 and "| 1.100 | 1.100 to 1.100 |" in out
    files = (write(tmp_path / f"{x}.json", made(x * 0.5 ** np.arange(11))) for x in (1, 1.1))
    status, out, _ = run(capsys, *files)
    assert status == 0 and "| 1.100 |" in out and "--run measures both in turn" in out


def test_other_devices_are_refused_unless_asked_for(tmp_path: Path, capsys):
    a = write(tmp_path / "a.json", made(STEADY))
    b = write(tmp_path / "b.json", made(STEADY), cpu="two")
    status, _, err = run(capsys, a, b)
    assert (status, "cpu: one in A, two in B" in err) == (2, True)
    assert run(capsys, a, b, "--across_devices")[0] == 0
    gpu = write(tmp_path / "gpu.json", made(STEADY / 4.5), platform="gpu")  # counts by its median
    assert [run(capsys, *x, "--across_devices")[0] for x in ((a, gpu), (gpu, a))] == [7, 0]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "error: name two files, or two commands after --run"),
        (["nowhere.json", "nowhere.json"], 3, "error: cannot read nowhere.json as"),
        (["a.json", "b.json", "--self_test"], 2, "error: name two files, or two commands"),
        (["--self_test", "--rounds=0"], 2, "error: numbers are 1 or more; --threshold"),
        (["a.json", "b.json", "--threshold=nan"], 2, "error: numbers are 1 or more; --thres"),
        (["--run", "true", "true"], 2, "error: 'true' wrote no results (exit status 0)"),
        (["--run", "false", "false"], 2, "error: 'false' wrote no results (exit status 1)"),
    ],
)
def test_mistakes_are_answered_in_one_line(words, status, message, capsys):
    found, _, err = run(capsys, *words)
    assert (found, err.splitlines()[-1].startswith(message)) == (status, True)


def test_commands_run_in_turn_and_samples_are_cut_to_equally_many(tmp_path: Path):
    log, sides = tmp_path / "log", []
    for name, extra in (("a", []), ("b", [0.1])):  # the least of a third sample does not count
        file = write(tmp_path / name, [Benchmark(name="x", samples_s=[1.0, 9.0, *extra])])
        command = f"""bash -c 'printf {name} >> {log}; cp {file} "${{0#--output=}}"; exit 6'"""
        sides.append(partial(compare.run_command, command))
    a, b = compare.interleaved(sides, 2)
    assert log.read_text() == "abba"
    assert list(compare.launches(a, b).values()) == [([1.0, 1.0], [1.0, 1.0])]
    write(tmp_path / "b", [Benchmark(name="x", samples_s=[1.0])] * 2)  # two launches in a turn
    with pytest.raises(UsageError, match="measures a case several times; add --launches=1"):
        compare.interleaved(sides, 1)


@pytest.mark.campaign
def test_the_self_test_runs_commands(tmp_path: Path):
    words = f"--self_test --model logistic --rounds=1 --launches=2 --output={tmp_path}/found.json"
    command = [sys.executable, "-m", "benchmarks.compare", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "slow-downs of 10% found: 0 of 1" in done.stdout, done.stderr  # two launches are few
    rows = results.read(tmp_path / "found.json").tables["self_test"]
    assert [(row["planted"], row["word"]) for row in rows] == [(False, "few"), (True, "few")]
