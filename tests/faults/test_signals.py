"""SIGINT and SIGTERM at random moments: the right status, one line, and nothing lost.

Shown to fail with a `Keeper.look` that does not save before it ends the run.
"""

import re
import signal
import sys

import pytest
import training

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def step_lost(ended: training.Ended) -> bool:
    """Whether the newest checkpoint is of another step than the one the run says it ended at."""
    at = re.fullmatch(
        r"interrupted at step (\d+); the same command .* goes on from there\n", ended.err
    )
    if at is None:
        assert ended.err == f"{WORDS[ended.signal]}\n"  # training had not begun
        return False
    names = [path.name for path in (ended.workdir / "checkpoints").glob("*.safetensors")]
    steps = [int(re.search(r"step-(\d+)", name)[1]) for name in names]
    return max(steps, default=0) != int(at[1])


@pytest.mark.parametrize("model", training.RUNS)
def test_signalled_and_resumed_until_done(model, data_dir, tmp_path, amount, counted):
    campaign = training.Campaign(model, tmp_path, data_dir)
    wrong, lost, waits_s = [], 0, []
    while len(waits_s) < amount(6, 100) * training.SHARE[model]:
        for ended in campaign.run(list(WORDS), training.wait_until_it_listens):
            if ended.status == 128 + ended.signal:
                lost += step_lost(ended)
                waits_s.append(ended.wait_s)
            elif ended.status == -ended.signal and (ended.workdir / "result.json").exists():
                pass  # the run was complete, and Python, on its way out, listened no more
            elif ended.status != 0:
                wrong.append(ended)
    counted(
        "signals",
        model=model,
        signals=len(waits_s),
        runs=campaign.runs,
        wrong_statuses=len(wrong),
        calls_lost=lost,
        mismatches=campaign.mismatches,
        slowest_exit_s=round(max(waits_s), 2),
    )
    assert (wrong, lost, campaign.mismatches) == ([], 0, 0)
