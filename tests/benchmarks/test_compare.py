"""Verdicts on launches, by hand and from files; whether the trust test could fail."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, launch, results, trust
from benchmarks.peer_workers import ours, slowed
from benchmarks.results import Benchmark, Results
from mnist_jax.errors import WorseError

CONTEXT = {"jax": "0.10.2", "command": ["step"], "left_out": {}}


def made(launches_s, disturbed=(), **changes) -> list[Benchmark]:
    fields = {
        "name": "train_step",
        "framework": "mnist_jax",
        "model": "mlp",
        "batch_size": 100,
        "precision": "float32",
        "mode": "many steps a call",
    }
    return [
        Benchmark.of([*disturbed, seconds], details={"launch": i}, **(fields | changes))
        for i, seconds in enumerate(launches_s)
    ]


NOISE = np.array([1.0, 1.01, 0.99, 1.02, 0.98])


@pytest.mark.parametrize(
    ("b", "word"),
    [
        (NOISE[::-1], "same"),
        (1.2 * NOISE, "slower"),
        (0.8 * NOISE, "faster"),
        (1.04 * NOISE, "same"),  # significant, and within the threshold
        (1.2 * NOISE[:4], "few"),
        (1.1 * np.array([0.5, 2.0, 1.0, 1.5, 0.7]), "same"),  # beyond it, and by chance
    ],
)
def test_verdicts(b, word):
    assert compare.decide(NOISE, b, 0.05).word == word


def test_the_ratio_is_that_of_medians_within_its_interval():
    found = compare.decide(NOISE, 1.2 * NOISE, 0.05)
    assert found.ratio == pytest.approx(1.2)
    assert found.ci95[0] < 1.2 < found.ci95[1]
    assert found.ci95[0] > 1.15


def test_ranks_by_hand():
    # Of the 252 ways to deal ten different values, two set five below the other five.
    a, b = np.arange(5.0), np.arange(5.0) + 10
    assert compare.rank_p(a, b) == pytest.approx(2 / 252)
    assert compare.rank_p(a, a) == 1


def test_one_disturbed_launch_does_not_hide_a_slow_down():
    launches = np.linspace(0.98, 1.02, compare.LAUNCHES)
    a, b = launches.copy(), 1.1 * launches
    a[2], b[4] = 3, 4
    assert compare.decide(a, b, 0.05).word == "slower"
    assert compare.decide(launches, a, 0.05).word == "same"


def run(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["compare", *map(str, words)])
    status = launch.command(compare.Options, compare.measure, "compare", "")
    return status, *capsys.readouterr()


def write(path: Path, benchmarks: list[Benchmark], **context) -> Path:
    results.write(path, CONTEXT | context, benchmarks)
    return path


def test_a_slower_file_ends_with_7(tmp_path: Path, monkeypatch, capsys):
    a = write(tmp_path / "a.json", made(NOISE) + made(NOISE, name="evaluation"))
    b = write(tmp_path / "b.json", made(1.2 * NOISE) + made(NOISE, name="evaluation"), jax="0.12")
    status, out, err = run(monkeypatch, capsys, a, b)
    assert (status, err.count("\n")) == (7, 1)
    assert "B is slower by more than 5% in 1 of 2: train_step, mlp, batch 100" in err
    assert "differs: jax: 0.10.2 in A, 0.12 in B" in out
    assert "date" not in out and "left out" not in out
    assert run(monkeypatch, capsys, b, a)[0] == 0
    assert run(monkeypatch, capsys, a, b, "--threshold=0.3")[0] == 0


def test_samples_that_something_disturbed_count_for_nothing(tmp_path: Path, monkeypatch, capsys):
    a = write(tmp_path / "a.json", made(NOISE))
    b = write(tmp_path / "b.json", made(NOISE, disturbed=(1.5, 3.0)))
    assert run(monkeypatch, capsys, a, b)[0] == 0


def test_one_launch_gives_no_verdict(tmp_path: Path, monkeypatch, capsys):
    a, b = (write(tmp_path / f"{n}.json", made([n])) for n in (1, 2))
    status, out, _ = run(monkeypatch, capsys, a, b)
    assert (status, "few: in 1 of 1 comparisons too few launches a side" in out) == (
        0,
        True,
    )


@pytest.mark.parametrize(("launches", "status"), [(5, 0), (compare.LAUNCHES, 7)])
def test_of_many_comparisons_each_needs_more_launches(
    launches, status, tmp_path: Path, monkeypatch, capsys
):
    """Of nine, each is held to a level that no order of five launches a side can reach."""
    times, names = np.linspace(0.98, 1.02, launches), [f"part {i}" for i in range(9)]
    a, b = (
        write(tmp_path / f"{i}.json", [x for name in names for x in made(i * times, name=name)])
        for i in (1, 2)
    )
    found, out, _ = run(monkeypatch, capsys, a, b)
    assert found == status
    assert ("few: in 9 of 9 comparisons" in out) == (status == 0)


@pytest.mark.parametrize(
    ("field", "value"), [("model", "cnn"), ("batch_size", 10), ("precision", "bfloat16")]
)
def test_files_of_other_work_are_refused(field, value, tmp_path: Path, monkeypatch, capsys):
    a = write(tmp_path / "a.json", made(NOISE))
    b = write(tmp_path / "b.json", made(NOISE, **{field: value}))
    status, _, err = run(monkeypatch, capsys, a, b)
    assert (status, err.startswith(f"error: {field} differs: ")) == (2, True)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "0 files and 0 commands are named"),
        (["x"], 2, "1 files and 0 commands are named"),
        (["nowhere.json", "nowhere.json"], 3, "cannot read nowhere.json"),
        (["x", "y", "--threshold=-1"], 2, "threshold is -1"),
        (["--run", "false", "false"], 2, "'false --output="),
    ],
)
def test_mistakes_are_answered_in_one_line(words, status, message, monkeypatch, capsys):
    found, _, err = run(monkeypatch, capsys, *words)
    last = err.splitlines()[-1]
    assert (found, last.startswith("error: ")) == (status, True)
    assert message.partition(" --output")[0] in last


def test_commands_are_started_in_turn(tmp_path: Path):
    found, log = write(tmp_path / "found.json", made([1.0])), tmp_path / "log"
    measure = f'printf $0 >> {log} && cp {found} "${{1#--output=}}"'
    a, b = compare.interleaved([f"sh -c '{measure}' {name}" for name in "ab"], 2)
    assert log.read_text() == "abba"
    assert [x.details["launch"] for x in a.benchmarks + b.benchmarks] == [0, 1, 0, 1]


def test_what_some_launches_left_out_is_said(tmp_path: Path, monkeypatch, capsys):
    a = write(tmp_path / "a.json", made([1.0]))
    b = write(tmp_path / "b.json", made([1.0]), left_out={"evaluation": "out of memory"})
    commands = [f"sh -c 'cp {file} \"${{0#--output=}}\"'" for file in (a, b)]
    status, out, _ = run(monkeypatch, capsys, "--run", *commands, "--launches=2")
    assert status == 0
    for number in (1, 2):
        assert f"left out of B: launch {number}: evaluation: out of memory" in out
    assert "left out of A" not in out


@pytest.mark.parametrize(("seen", "status"), [(1.2, 0), (1.0, 7)])
def test_the_trust_test_counts_what_is_found(seen, status, tmp_path: Path, monkeypatch, capsys):
    def interleaved(commands, count):
        factor = seen if "slowed 0.1" in commands[1] else 1.0
        a, b = made(NOISE, disturbed=[9.0]), made(factor * NOISE)
        return Results(CONTEXT, a, {}), Results(CONTEXT, b, {})

    monkeypatch.setattr(compare, "interleaved", interleaved)
    options = trust.Options(comparisons=3, output=tmp_path / "trust.json")
    if status:
        with pytest.raises(WorseError):
            trust.measure(options)
    else:
        trust.measure(options)
        rows = results.read(options.output).tables["trust"]
        assert [(row["planted"], row["word"]) for row in rows] == 3 * [
            (False, "same"),
            (True, "slower"),
        ]
        assert "found: 3 of 3" in capsys.readouterr().out
        more = options.output.with_name("again.json")
        trust.measure(trust.Options(again=options.output, output=more, threshold=0.15))
        assert results.read(more).tables == results.read(options.output).tables
        with pytest.raises(WorseError):
            trust.measure(trust.Options(again=options.output, threshold=0.5))


def test_the_planted_slow_down_is_a_tenth_of_the_steps(monkeypatch):
    trained = []
    workload = ours.jobs.Workload(None, lambda _, n: trained.append(n), None, None, {})
    monkeypatch.setattr(ours, "make", lambda: workload)

    def measured(*_):
        planted = ours.make()
        for count in (200, planted.multiple_of):  # the least that a sample may have
            planted.train(None, count)

    monkeypatch.setattr(launch, "command", measured)
    slowed.main(0.1)
    assert trained == [220, 11]
