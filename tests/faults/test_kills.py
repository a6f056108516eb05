"""SIGKILL at random moments, resumed until done: the end is that of a run nobody disturbed.

Shown to fail with the running metric sums left out of the checkpoint.
"""

import signal

import pytest
import training


@pytest.mark.parametrize("model", training.RUNS)
def test_killed_and_resumed_until_done(model, data_dir, tmp_path, amount, counted):
    campaign, kills = training.Campaign(model, tmp_path, data_dir), 0
    while kills < amount(10, 300) * training.SHARE[model]:
        for ended in campaign.run([signal.SIGKILL]):
            assert ended.status in (0, -signal.SIGKILL), ended.err
            kills += ended.status != 0
    mismatches = campaign.mismatches
    counted("kills", model=model, kills=kills, runs=campaign.runs, mismatches=mismatches)
    assert mismatches == 0
