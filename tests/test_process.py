"""utils/process.py: torchrun's processes, signals at every moment, output that nobody reads."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import GPU, TWO_GPUS
from helpers import (
    ROOT,
    TORCHRUN,
    begin,
    begin_training,
    called,
    coloured_pictures,
    command,
    differing,
    environment,
    everything,
    flags,
    latest,
    metrics_rows,
    python,
    refused,
    succeeded,
    succeeds_under_torchrun,
    torchrun,
    train,
    wait_for,
)

import train as train_module
from utils import device
from utils.cli import UserError
from utils.process import SIGNALS, Interrupted, StopSignal, run_script, script

# How a script ends

def broken_lock(interruption: BaseException) -> RuntimeError:
    """What Python makes of a signal that comes while it lets go of a lock."""
    error = RuntimeError("cannot release un-acquired lock")
    error.__context__ = interruption
    return error


@pytest.mark.parametrize(("error", "status", "words"), [
    (UserError("try another"), 1, "try another"),
    (OSError(28, "No space left on device", "x.png"), 1, "x.png: No space left on device"),
    (FileExistsError(17, "File exists", "runs/x"), 1, "runs/x: File exists: name another one"),
    (MemoryError(), 1, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (broken_lock(KeyboardInterrupt()), 130, "interrupted"),
    (broken_lock(Interrupted(signal.SIGTERM)), 143, "interrupted"),
])
def test_an_error_is_one_line_and_a_status(error, status, words, capsys):
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_other_memory_errors_keep_their_traceback():
    def main() -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_script(main)


def test_a_warning_of_a_library_is_one_line(tmp_path, monkeypatch):
    def load(*arguments, **options):
        warnings.warn("this is\ndeprecated", stacklevel=1)
        raise OSError

    monkeypatch.setattr("utils.sampler.load_network", load)
    result = called("inference.py", "--checkpoint", "x.pth", cwd=tmp_path)
    assert result.stderr.splitlines()[0] == "warning: this is deprecated"


# Streams

ENDLESS = {"max_steps": 100_000, "log_every": 2, "sample_every": 0}


def shell(line: str, cwd: Path, **options) -> subprocess.Popen:
    """A pipeline in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        ["bash", "-c", line], cwd=cwd, start_new_session=True, text=True, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def training(run_dir: Path, *extra: dict, **settings) -> str:
    """The line that a shell gets."""
    return " ".join([*python("train.py"), *command(run_dir, ENDLESS, *extra, **settings)])


def saved_as_far_as_it_went(run_dir: Path) -> bool:
    """Whether latest.pth holds the last step that metrics.csv speaks of, or a later one."""
    last_row = int(metrics_rows(run_dir)[-1][0])
    return latest(run_dir)["step"] >= last_row > 0


def test_ctrl_c_of_a_pipeline_saves(pictures, tmp_path):
    """The terminal sends SIGINT to tee too, which dies before the trainer has said its last."""
    run = tmp_path / "run"
    line = f"{training(run, pictures)} 2>&1 | tee log; exit ${{PIPESTATUS[0]}}"
    process = shell(f"trap : INT; {line}", tmp_path)
    wait_for(run / "metrics.csv", process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=180)
    assert process.returncode == 130
    assert saved_as_far_as_it_went(run)


@pytest.mark.parametrize("stream", ["2>&1 | true", "| true", ">&- 2>&-"])
def test_a_reader_that_goes_away_costs_nothing(stream, pictures, tmp_path):
    run = tmp_path / "run"
    line = f"{training(run, pictures, max_steps=12)} {stream}; exit ${{PIPESTATUS[0]}}"
    process = shell(line, tmp_path)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert latest(run)["step"] == 12
    assert (run / "checkpoints/final_model.pth").exists()


def test_a_full_disk_behind_the_output_costs_nothing(pictures, tmp_path):
    run = tmp_path / "run"
    line = f"{training(run, pictures, max_steps=12)} > /dev/full 2>&1"
    assert shell(line, tmp_path).wait(timeout=180) == 0
    assert latest(run)["step"] == 12


# Signals

@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_the_closed_terminal_and_slurms_warning_save(number, pictures, tmp_path):
    run = tmp_path / "run"
    process = begin_training(run, ENDLESS, pictures)
    wait_for(run / "metrics.csv", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 128 + number, err
    assert "stopped after" in out
    assert saved_as_far_as_it_went(run)


def test_nohup_goes_on(pictures, tmp_path):
    run = tmp_path / "run"
    line = f"trap '' HUP; exec {training(run, pictures, max_steps=60)}"
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
    process = begin_training(tmp_path / "run", data, max_steps=3)
    while not list((tmp_path / "data").glob("*")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    start = time.monotonic()
    _, err = process.communicate(timeout=180)
    assert time.monotonic() - start < 30
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert "interrupted" in err.splitlines()[-1]
    assert not list((tmp_path / "data").iterdir())


def test_a_signal_while_the_flags_are_exchanged_counts_at_the_next_step(monkeypatch):
    stop = object.__new__(StopSignal)  # without handlers
    stop.number = 0
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(
            "torch.distributed.all_reduce", lambda *arguments: stop(signal.SIGTERM, None))
        assert not stop.requested()  # as in the other processes
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *arguments: None)
    assert stop.requested()
    assert stop.number == signal.SIGTERM


# What a program of one's own finds afterwards

def changeable() -> list:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    return [*handlers, warnings.showwarning, sys.stdout, sys.stderr, torch.cuda.current_device,
            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
            torch.backends.cuda.cudnn_sdp_enabled(), dist.is_initialized()]


@pytest.mark.parametrize("main", ["train", "inference", "evaluate"])
def test_main_leaves_the_process_as_it_was(main, checkpoint, pictures, tmp_path, monkeypatch):
    lines = {
        "train": command(tmp_path / "run", pictures, max_steps=2),
        "inference": flags(checkpoint=checkpoint, num_samples=2, output_dir=tmp_path),
        "evaluate": flags(checkpoint=checkpoint, metric="bpd", num_images=2),
    }
    select_device = device.select_device

    def as_on_a_gpu(name: str) -> torch.device:
        device.set_up_cuda(torch.device("cuda", 0))
        return select_device(name)

    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    for module in ("train", "utils.sampler"):
        monkeypatch.setattr(f"{module}.select_device", as_on_a_gpu)
    before = changeable()
    assert importlib.import_module(main).main(lines[main]) == 0
    assert changeable() == before
    with pytest.raises(SystemExit):
        importlib.import_module(main).main(["--nothing"])
    assert changeable() == before


def test_ctrl_c_is_ones_own_again_after_main(pictures, tmp_path):
    source = tmp_path / "own.py"
    source.write_text(OWN_PROGRAM)
    line = [sys.executable, str(source), *command(tmp_path / "run", pictures, max_steps=2)]
    result = subprocess.run(
        line, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert result.stdout.splitlines()[-2:] == ["interrupted", "cleaned up"], result.stderr


OWN_PROGRAM = """
import os
import signal
import sys
import time

import train

train.main(sys.argv[1:])
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
finally:
    print("cleaned up")
"""


def test_a_thread_undoes_its_own_changes_alone():
    def within() -> int:
        stop = StopSignal()
        with ThreadPoolExecutor() as pool:
            assert pool.submit(script(lambda: StopSignal().number)).result(timeout=100) == 0
        assert signal.getsignal(signal.SIGINT) is stop
        return 0

    before = changeable()
    assert script(within)() == 0
    assert changeable() == before


def test_the_random_numbers_of_a_program_are_its_own(pictures, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_module.main(command(tmp_path / "run", pictures, max_steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_main_runs_in_a_thread(pictures, tmp_path):
    before = changeable()
    with ThreadPoolExecutor() as pool:
        line = command(tmp_path / "run", pictures, max_steps=2)
        assert pool.submit(train_module.main, line).result(timeout=100) == 0
    assert latest(tmp_path / "run")["step"] == 2
    assert changeable() == before


def test_a_second_signal_of_torchrun_is_the_first_once_more(monkeypatch):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    for run_id, statuses in (("1", []), (None, [143])):
        stop = object.__new__(StopSignal)  # without handlers
        stop.number = 0
        if run_id:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        stop(signal.SIGTERM, None)
        stop(signal.SIGTERM, None)
        assert ended == statuses


# torchrun's variables

def test_a_world_of_one_is_no_torchrun(checkpoint, pictures, tmp_path, monkeypatch):
    """Clusters set the variables for every process, with a port that may be taken."""
    for name, value in {**TORCHRUN, "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    line = ("--checkpoint", str(checkpoint), "--num_images", "2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        succeeded(called("evaluate.py", "--metric", "bpd", *line, cwd=tmp_path))
        succeeded(train(tmp_path / "run", pictures, max_steps=2))


@pytest.mark.parametrize("name", TORCHRUN)
def test_some_of_torchruns_variables_are_no_torchrun(name, tmp_path, monkeypatch):
    """RANK=1, left from elsewhere, does not silence a script."""
    monkeypatch.setenv(name, "1")
    refused(train(tmp_path / "run", data="nowhere"), 1, "nowhere")
    refused(called("evaluate.py", "--metric", "bpd", cwd=tmp_path), 1, "no checkpoint")


@pytest.mark.parametrize(("name", "value"), [
    ("MASTER_PORT", "many"), ("WORLD_SIZE", "x"), ("RANK", "first")])
def test_variables_of_torchrun_that_make_no_sense(name, value, tmp_path, monkeypatch):
    for key, sensible in {**TORCHRUN, name: value}.items():
        monkeypatch.setenv(key, sensible)
    monkeypatch.setattr("utils.process.time.sleep", lambda seconds: None)
    refused(train(tmp_path / "run"), 1, "torchrun", "MASTER_PORT")


def test_waiting_for_processes_that_never_come_can_be_interrupted(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as first_process:  # one that never answers
        port = first_process.getsockname()[1]
        variables = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        process = subprocess.Popen(
            [*python("train.py"), *command(tmp_path / "run")], cwd=tmp_path,
            env=environment(**variables), stderr=subprocess.PIPE, text=True)
        first_process.settimeout(100)
        first_process.accept()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err


def test_of_torchruns_processes_only_the_first_says_that_it_was_interrupted(
    tmp_path, monkeypatch
):
    def interrupted(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.open_run", interrupted)
    monkeypatch.setattr("utils.process.is_first_process", lambda: False)
    result = train(tmp_path / "run")
    assert (result.returncode, result.stderr) == (130, "")


# torchrun's processes

SHARED = {"grad_accum": 2, "max_steps": 40, "log_every": 1, "sample_every": 20}


def train_by_two(run_dir: Path, *extra: str | dict) -> str:
    """Two processes train to the end; what they printed."""
    process = begin_training(run_dir, SHARED, *extra, processes=2)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two processes that nothing interrupts, with its data beside it."""
    root = tmp_path_factory.mktemp("whole")
    train_by_two(root / "run", data_of(root))
    return root / "run"


def data_of(root: Path) -> dict[str, Path]:
    """Ten pictures, quicker to load than the shapes are to draw."""
    folder = root / "pictures"
    if not folder.exists():
        coloured_pictures(folder)
    return {"data": folder, "data_dir": root / "data"}


GRADIENT = """
import copy
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import Batches
from ddpm import DDPM
from helpers import random_unet, tiny
from train import TrainingState, train_step
from utils.device import select_device
from utils.process import take_own_gpu

config = tiny(batch_size=8, grad_accum=2, dropout=0.0, grad_clip=0.0)
dist.init_process_group(take_own_gpu())  # one process too, which torchrun's are not
rank, world_size = dist.get_rank(), dist.get_world_size()
device = select_device(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), np.uint8)
batches = Batches(images, config, device, rank, world_size)
state = TrainingState(config, device)
torch.manual_seed(0)
state.model.load_state_dict(random_unet(config).state_dict())
before = DDPM(copy.deepcopy(state.model), config).to(device)
ddpm = DDPM(DistributedDataParallel(state.model), config).to(device)

def training_losses(x_start):
    t = torch.randint(30, (len(x_start),), device=device)
    noise = torch.randn_like(x_start)
    loss = before.training_loss(x_start, t, noise) / 2  # of two micro-batches
    loss.backward()
    return DDPM.training_losses(ddpm, x_start, t, noise)

gradients = []
ddpm.training_losses = training_losses
state.optimizer.register_step_pre_hook(
    lambda *_: gradients.extend(p.grad.clone() for p in state.model.parameters()))
losses, _, _ = train_step(ddpm, state, batches, config)
assert len(losses) == 8 // world_size

rounding = {"cpu": 1e-5, "cuda": 1e-3}[device.type]
for gradient, p in zip(gradients, before.model.parameters(), strict=True):
    mine = p.grad.clone()
    dist.all_reduce(p.grad)
    torch.testing.assert_close(gradient, p.grad / world_size, atol=rounding, rtol=10 * rounding)
if world_size > 1:  # of the last layer
    assert not torch.allclose(gradient, mine, atol=rounding, rtol=10 * rounding)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("device", "processes"), [
    ("cpu", 2),
    pytest.param("cuda", 1, marks=GPU),
    pytest.param("cuda", 2, marks=TWO_GPUS),
])
def test_the_gradient_is_that_of_the_whole_batch(device, processes, tmp_path):
    succeeds_under_torchrun(GRADIENT, tmp_path, device, processes=processes)


def test_two_processes_decode_once_and_see_as_many_images_as_one(whole):
    assert len(list((whole.parent / "data").iterdir())) == 1
    assert latest(whole)["images_seen"] == 40 * 4


def test_both_draw_for_themselves(whole, tmp_path):
    # Did both draw the same, it would be what one process draws for half of the batch.
    half = {"batch_size": 2, "max_steps": 1}
    succeeded(train(tmp_path / "half", SHARED, data_of(whole.parent), half))
    assert metrics_rows(whole)[0][2] != metrics_rows(tmp_path / "half")[0][2]


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("train.start_processes", lambda: (0, 2))
    for batch_size, accum, multiple in ((5, 1, 2), (6, 2, 4)):
        settings = {"batch_size": batch_size, "grad_accum": accum}
        result = train(tmp_path / "run", settings)
        refused(result, 1, f"batch_size={batch_size} does not divide among 2 processes",
                f"multiple of {multiple}")
    assert not (tmp_path / "run").exists()


APART = """
import os

folder = f"machine {os.environ['RANK']}"
os.makedirs(folder, exist_ok=True)
os.chdir(folder)

from train import main
from utils.process import run_script

run_script(main)
"""


def test_a_finished_run_is_finished_where_only_the_first_machine_has_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    (tmp_path / "apart.py").write_text(APART)
    line = command(Path("run"), SHARED, "--resume", max_steps=1)
    outputs = []
    for _ in range(2):
        process = begin(torchrun(str(tmp_path / "apart.py"), *line), tmp_path)
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        outputs.append(out)
    assert "finished 1 steps" in outputs[0]
    assert "already finished" in outputs[1]
    assert not (tmp_path / "machine 1/run").exists()


def rank_of(pid: str) -> int | None:
    """That torchrun gave to the process; None where it is not its child any more."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    for variable in variables:
        name, _, value = variable.partition(b"=")
        if name == b"RANK":
            return int(value)
    return None


def second_of(process: subprocess.Popen) -> int:
    """The process of rank 1."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (second,) = [pid for pid in path.read_text().split() if rank_of(pid) == 1]
    return int(second)


def test_a_dead_rank_takes_the_others_down_and_torchrun_starts_again(whole, tmp_path):
    process = begin_training(
        tmp_path / "run", SHARED, "--resume", data_of(whole.parent), save_minutes=0.0,
        processes=2, options=("--max-restarts=1",))
    wait_for(tmp_path / "run/metrics.csv", process)
    os.kill(second_of(process), signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert time.monotonic() - killed < 60
    assert out.count("training a U-Net") == 2
    assert out.count("steps 0 to 40") == 1  # the second time it went on
    assert differing(everything(tmp_path / "run"), everything(whole)) == []


def test_sigterm_to_torchrun_saves_and_nothing_is_lost(whole, tmp_path):
    data = data_of(whole.parent)
    grids = {"sample_every": 2, "sample_steps": 30, "num_samples": 2000}
    process = begin_training(tmp_path / "run", SHARED, data, grids, processes=2)
    wait_for(tmp_path / "run/metrics.csv", process)  # a long grid comes next
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "stopped after" in out, err
    assert 0 < latest(tmp_path / "run")["step"] < 40

    out = train_by_two(tmp_path / "run", "--resume", data)
    assert "2 x cpu" in out
    assert out.count("training a U-Net") == 1
    assert differing(everything(tmp_path / "run"), everything(whole)) == []


def said_by_the_scripts(err: str) -> list[str]:
    """Without what torchrun itself reports of the end of its processes."""
    return [line for line in err.splitlines() if "train.py: error:" in line]


@pytest.mark.parametrize("also_to_torchrun", [False, True])
def test_a_signal_to_one_process_stops_all_after_one_step(also_to_torchrun, pictures, tmp_path):
    run = tmp_path / "run"
    process = begin_training(run, ENDLESS, pictures, processes=2)
    wait_for(run / "metrics.csv", process)
    second = second_of(process)
    os.kill(second, signal.SIGSTOP)
    os.kill(second, signal.SIGTERM)
    if also_to_torchrun:  # which passes it on: a second signal
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    os.kill(second, signal.SIGCONT)
    out, err = process.communicate(timeout=120)
    assert out.count("stopped after") == 1, err
    assert saved_as_far_as_it_went(run)
    assert said_by_the_scripts(err) == []


@pytest.mark.parametrize("mistake", [{"data": "nowhere"}, {"dim": 7}])
def test_a_mistake_under_torchrun_is_said_once(mistake, tmp_path):
    process = begin_training(tmp_path / "run", ENDLESS, mistake, processes=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(said_by_the_scripts(err)) == 1, err
    assert f'{ROOT}/train.py", line' not in err, err  # no traceback of ours
