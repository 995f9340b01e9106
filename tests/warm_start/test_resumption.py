"""Runs of ``verl-pte warm-start`` that were stopped, and what they may go on with."""

import os
import signal
import subprocess

import torch
from warm_start_run import COMMAND, SAMPLED, arguments, assert_same_to_rounding, log, run, wait_for, weights

from verl_pte.distill.folder import RunFolder


def test_a_killed_run_ends_in_the_adapter_of_an_uninterrupted_one(sampled, folder):
    """Killed twice, with steps after the checkpoint that are lost and a line that is half written."""
    output = folder / "killed"
    for steps in (2, 5):  # before the first checkpoint, and after it
        process = subprocess.Popen([COMMAND, *arguments(folder, output, *SAMPLED)], stderr=subprocess.DEVNULL)
        try:
            path = output / "log.jsonl"
            wait_for(lambda path=path, steps=steps: path.exists() and path.read_text().count("\n") >= steps, process)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        assert not (output / "adapter").exists()
    with (output / "log.jsonl").open("a") as half:
        half.write('{"step": 7, "k')
    (output / "checkpoint.pt.unfinished").write_bytes(b"half")
    (output / "adapter.unfinished").mkdir(exist_ok=True)
    result = run(folder, output, *SAMPLED)
    assert result.exit_code == 0 and "going on after step" in result.output, result.output
    assert log(output) == log(sampled)
    expected, found = weights(sampled), weights(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_killed_between_the_last_checkpoint_and_the_adapter(whole, folder, monkeypatch):
    output = folder / "last"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda self, model: os.kill(os.getpid(), signal.SIGINT))
        assert run(folder, output).exit_code == 130
    assert not (output / "adapter").exists()
    assert run(folder, output).exit_code == 0
    assert log(output) == log(whole)
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(whole).items())


def test_a_run_may_go_on_with_other_memory_settings_only(sampled, folder, monkeypatch):
    """Stopped two steps after a checkpoint."""
    output, add = folder / "other memory", RunFolder.add

    def stop_after_step_5(self, record) -> None:
        add(self, record)
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add", stop_after_step_5)
        assert run(folder, output, *SAMPLED).exit_code == 130
    for changed, message in (
        ("--lr=0.5", "--lr 0.5: --output"),
        ("--steps=9", "--steps 9: "),
        ("--pte=window=24", "--pte window 24: "),
        ("--max-prompt-length=500", "--max-prompt-length 500: "),
        ("--prompt-column=text", "--prompts 5 of digest"),
    ):
        result = run(folder, output, *SAMPLED, changed)
        assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output
        assert "holds a run with" in result.output
    result = run(folder, output, *SAMPLED, "--micro-batch=1", "--max-num-seqs=2", "--pte=chunk_tokens=8")
    assert result.exit_code == 0 and "going on after step 3" in result.output, result.output
    assert_same_to_rounding(sampled, output)
