"""The state a network runs in for a while: without dropout, without autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's own mode again afterwards, on an exception too."""
    in_training = [m for m in module.modules() if m.training]
    if in_training:  # the walk takes a while, and this is called for each evaluation
        module.eval()
    try:
        yield
    finally:
        for m in in_training:
            m.training = True


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off inside, on the kinds of device that have it: what is fp32 stays fp32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
