"""Output that nobody reads any more, and signals at every moment: nothing is lost."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    begin,
    coloured_pictures,
    command,
    environment,
    latest,
    metrics_rows,
    python,
    wait_for,
)

ENDLESS = {"max_steps": 100_000, "log_every": 2, "sample_every": 0}


def shell(line: str, cwd: Path, **options) -> subprocess.Popen:
    """A pipeline in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        ["bash", "-c", line], cwd=cwd, start_new_session=True, text=True, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def training(run_dir: Path, **settings) -> str:
    return " ".join([*python("train.py"), *command(run_dir, **{**ENDLESS, **settings})])


def saved_as_far_as_it_went(run_dir: Path) -> bool:
    last_row = int(metrics_rows(run_dir)[-1][0])
    return latest(run_dir)["step"] >= last_row > 0


def test_ctrl_c_of_a_pipeline_saves(pictures, tmp_path):
    """The terminal sends SIGINT to tee too, which dies before the trainer has said its last."""
    run = tmp_path / "run"
    line = f"{training(run, **pictures)} 2>&1 | tee log; exit ${{PIPESTATUS[0]}}"
    process = shell(f"trap : INT; {line}", tmp_path)
    wait_for(run / "metrics.csv", process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=180)
    assert process.returncode == 130
    assert saved_as_far_as_it_went(run)


@pytest.mark.parametrize("stream", ["2>&1 |", "|"])
def test_a_reader_that_goes_away_costs_nothing(stream, pictures, tmp_path):
    run = tmp_path / "run"
    line = f"{training(run, max_steps=12, **pictures)} {stream} true; exit ${{PIPESTATUS[0]}}"
    process = shell(line, tmp_path)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert latest(run)["step"] == 12
    assert (run / "checkpoints/final_model.pth").exists()


def test_a_full_disk_behind_the_output_costs_nothing(pictures, tmp_path):
    run = tmp_path / "run"
    line = f"{training(run, max_steps=12, **pictures)} > /dev/full 2>&1"
    assert shell(line, tmp_path).wait(timeout=180) == 0
    assert latest(run)["step"] == 12


def test_closed_streams_cost_nothing(pictures, tmp_path):
    run = tmp_path / "run"
    line = f"{training(run, max_steps=12, **pictures)} >&- 2>&-"
    assert shell(line, tmp_path).wait(timeout=180) == 0
    assert latest(run)["step"] == 12


def test_the_closed_terminal_saves(pictures, tmp_path):
    run = tmp_path / "run"
    process = begin([*python("train.py"), *command(run, **ENDLESS, **pictures)], tmp_path)
    wait_for(run / "metrics.csv", process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 129, err
    assert "stopped after" in out
    assert saved_as_far_as_it_went(run)


def test_nohup_goes_on(pictures, tmp_path):
    run = tmp_path / "run"
    line = f"trap '' HUP; exec {training(run, max_steps=60, **pictures)}"
    process = shell(line, tmp_path)
    wait_for(run / "metrics.csv", process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert latest(run)["step"] == 60


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_decoding_stops_at_once(number, status, tmp_path):
    """Enough pictures to decode for a minute; nothing half-done is left."""
    folder = coloured_pictures(tmp_path / "pictures", 1, size=1000)
    for copy in range(6000):
        os.link(folder / "000.png", folder / f"copy{copy}.png")
    data = {"data": folder, "data_dir": tmp_path / "data"}
    line = [*python("train.py"), *command(tmp_path / "run", max_steps=3, **data)]
    process = begin(line, tmp_path)
    while not list((tmp_path / "data").glob("*")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    start = time.monotonic()
    _, err = process.communicate(timeout=180)
    assert time.monotonic() - start < 30
    assert process.returncode == status
    assert "Traceback" not in err
    assert "interrupted" in err.splitlines()[-1]
    assert not list((tmp_path / "data").iterdir())


def test_inference_that_is_stopped_says_one_line(checkpoint, tmp_path):
    line = ["--checkpoint", str(checkpoint), "--num_samples", "100000", "--batch_size", "10"]
    process = begin([*python("inference.py"), *line], tmp_path)
    out = process.stderr.read(20)  # the progress bar
    time.sleep(1)  # a bar that is interrupted while tqdm makes it leaves a traceback of tqdm's
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 143, out + err
    assert "Traceback" not in err
    assert "interrupted" in err.splitlines()[-1]


# torchrun

def torchrun(run: Path, processes: int, **settings) -> list[str]:
    launcher = [*python("torch.distributed.run"), "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "train.py"), *command(run, **{**ENDLESS, **settings})]


def pids_below(parent: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", "train.py"], text=True,
                           capture_output=True, check=False)
    return [int(line) for line in found.stdout.split()]


def said_by_the_scripts(err: str) -> list[str]:
    """Without what torchrun itself reports of the end of its processes."""
    return [line for line in err.splitlines() if "train.py: error:" in line]


def test_a_signal_to_one_of_four_processes_stops_all_after_one_step(pictures, tmp_path):
    run = tmp_path / "run"
    process = begin(torchrun(run, 4, batch_size=8, **pictures), tmp_path)
    wait_for(run / "metrics.csv", process)
    os.kill(pids_below(process.pid)[3], signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert out.count("stopped after") == 1, err
    assert saved_as_far_as_it_went(run)
    assert said_by_the_scripts(err) == []


def test_a_signal_to_one_process_and_then_to_torchrun(pictures, tmp_path):
    run = tmp_path / "run"
    process = begin(torchrun(run, 2, **pictures), tmp_path)
    wait_for(run / "metrics.csv", process)
    os.kill(pids_below(process.pid)[1], signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert out.count("stopped after") == 1, err
    assert saved_as_far_as_it_went(run)


@pytest.mark.parametrize("mistake", [{"data": "nowhere"}, {"dim": 7}])
def test_a_mistake_under_torchrun_is_said_once(mistake, tmp_path):
    process = begin(torchrun(tmp_path / "run", 2, **mistake), tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(said_by_the_scripts(err)) == 1, err
    assert f'{ROOT}/train.py", line' not in err, err  # no traceback of ours


def test_half_of_torchruns_environment_is_no_torchrun(pictures, tmp_path):
    result = subprocess.run(
        [*python("train.py"), *command(tmp_path / "run", max_steps=2, **pictures)], cwd=tmp_path,
        env=environment(RANK="0"), capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
