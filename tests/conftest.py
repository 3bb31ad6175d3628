import os
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import coloured_pictures, save_network, tiny

import data

# One thread, here and in the processes started from here: another number rounds differently.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What starts the tests in the background, or by nohup, has them ignore signals, and with them all
# that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Drawing the 10,000 shapes takes seconds: once per kind of them.
data.draw_shapes = cache(data.draw_shapes)


# The marks of a test that needs a GPU
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TWO_GPUS = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shape() -> tuple[int, ...]:
    return (4, 3, 8, 8)


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """The settings of a folder of ten: quicker to load than the shapes are to draw."""
    folder = coloured_pictures(tmp_path / "pictures")
    return {"data": folder, "data_dir": tmp_path / "data"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights everywhere, so that its pictures are not all alike."""
    torch.manual_seed(1)
    return save_network(tmp_path_factory.mktemp("checkpoint") / "model.pth", tiny())
