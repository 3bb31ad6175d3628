"""The process: torchrun's others, signals, streams, and how a script starts and ends."""

import errno
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from utils.cli import UserError, brief, is_first_process, one_line, under_torchrun, warn

# How a script starts and ends

# What the script that runs in this thread has to undo.
changes = threading.local()


def script(main: Callable[..., int]) -> Callable[..., int]:
    """Have main undo what it changes of the process: a program of one's own may call it."""
    @wraps(main)
    def wrapper(*args: Any) -> int:
        with ExitStack() as changes.stack, torch.random.fork_rng(devices=[]):
            return main(*args)
    return wrapper


def undo_later(function: Callable, *args: Any) -> None:
    """Call the function when the script ends; outside of a script, never."""
    if hasattr(changes, "stack"):
        changes.stack.callback(function, *args)


def run_script(main: Callable[[], int]) -> NoReturn:
    """Call main and exit with its status; what the user can mend becomes one line and status 1."""
    sys.stdout, sys.stderr = HarmlessStream(sys.stdout), HarmlessStream(sys.stderr)
    for number in END_SIGNALS:
        handle(number, interrupt)
    warnings.showwarning = lambda message, *_: warn(str(message))
    status, problem = 1, ""
    try:
        status = main()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = describe_os_error(error)
    except (torch.OutOfMemoryError, MemoryError):
        problem = OUT_OF_MEMORY
    except RuntimeError as error:  # these have no types of their own
        if isinstance(error.__context__, KeyboardInterrupt | Interrupted):
            # A signal that comes while Python lets go of a lock breaks the lock.
            status, problem = status_of(error.__context__), INTERRUPTED
        elif "can't allocate memory" in str(error):
            problem = OUT_OF_MEMORY
        elif under_torchrun() and "connection" in str(error).lower():
            problem = PROCESS_ENDED
        else:
            raise
    except (KeyboardInterrupt, Interrupted) as error:
        status, problem = status_of(error), INTERRUPTED
    if not is_first_process():
        if problem in (INTERRUPTED, PROCESS_ENDED):
            problem = ""  # rank 0 says it
        elif problem:  # rank 0 has most likely said the same, and torchrun will end this process
            with ended_by_signals():
                time.sleep(10)
    if problem:
        line = one_line(f"{Path(sys.argv[0]).name}: error: {problem}")
        print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()  # here, where a HarmlessStream drops what cannot be written
    sys.exit(status)


INTERRUPTED = "interrupted: what was not finished is not kept"
PROCESS_ENDED = "another process has ended"
OUT_OF_MEMORY = ("out of memory: lower --batch_size, or to train, raise --grad_accum or lower "
                 "--dim or --image_size")


def describe_os_error(error: OSError) -> str:
    """One line: the file, what the system says of it, what to do."""
    remedies = {
        errno.ENOSPC: "free some space, or name another place",
        errno.EDQUOT: "free some space, or name another place",
        errno.EACCES: "allow it, or name another place",
        errno.EROFS: "name another place",
        errno.EEXIST: "name another one",
    }
    reason = error.strerror or str(error)
    remedy = remedies.get(error.errno, "try again, or name another one")
    return f"{error.filename or 'a file'}: {reason}: {remedy}"


# Torchrun's processes

def start_processes() -> tuple[int, int]:
    """Join the other processes if torchrun started this one.

    (rank, world_size), which is (0, 1) without torchrun.  Raises UserError if they do not meet.
    """
    if not under_torchrun():
        return 0, 1
    try:
        with ended_by_signals():
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
            # Long, since the first one may download and decode the data while the others wait.
            patience = timedelta(hours=2)
            store.set_timeout(patience)
            # torchrun's restarts share one store: without a prefix they would find the addresses
            # of the dead in it.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"restart {restart}", store)
            dist.init_process_group(
                take_own_gpu(), store=store, rank=rank, world_size=world_size, timeout=patience)
            undo_later(leave_processes)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = brief(error)
        raise UserError("the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT speak of "
                        f"do not meet ({reason}): start with torchrun, or unset these") from error
    return rank, world_size


def leave_processes() -> None:
    # Before PyTorch 2.6 destroy_process_group keeps the GIL, and waits for threads of gloo that may
    # need it once more.
    time.sleep(0.1)
    dist.destroy_process_group()


def take_own_gpu() -> str:
    """Make the GPU of LOCAL_RANK the current one, and return the backends of the processes."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank < torch.cuda.device_count():  # with --device cpu there may be more processes
        torch.cuda.set_device(local_rank)
    return "cpu:gloo,cuda:nccl"  # numbers and flags are exchanged on the CPU


def from_first_process(load: Callable[[], Any]) -> Any:
    """Call load() in rank 0 alone, and return in every process what it returned there."""
    if not dist.is_initialized():
        return load()
    box = [load() if dist.get_rank() == 0 else None]
    with ended_by_signals():
        dist.broadcast_object_list(box)
    return box[0]


def first_process_first(load: Callable[[], Any]) -> Any:
    """load() in every process: what rank 0 downloads or decodes, the others find done."""
    if not dist.is_initialized():
        return load()
    loaded = load() if dist.get_rank() == 0 else None
    from_first_process(lambda: None)  # the others wait here
    return loaded if dist.get_rank() == 0 else load()


def share_of_this_process(items: Sequence[Any]) -> Sequence[Any]:
    """Every world_size-th of the items, from the one of this rank on."""
    if not dist.is_initialized():
        return items
    return items[dist.get_rank()::dist.get_world_size()]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Make the tensors of every process what they are in the first one."""
    if dist.is_initialized():
        with ended_by_signals():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


# Signals

class Interrupted(BaseException):
    """One of END_SIGNALS, as KeyboardInterrupt is SIGINT, unless something else handles it."""

    def __init__(self, number: int) -> None:
        self.number = number


def status_of(interruption: KeyboardInterrupt | Interrupted) -> int:
    """The exit status of a process that a signal has ended, as a shell has it."""
    return 128 + getattr(interruption, "number", signal.SIGINT)


# The machine goes down, the terminal is closed, a cluster warns of the end.  Windows has the first.
END_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
               if hasattr(signal, name)]
SIGNALS = [signal.SIGINT, *END_SIGNALS]


def interrupt(number: int, frame: Any) -> NoReturn:
    raise Interrupted(number)


def handle(number: int, handler: Any, undo_later: Callable = undo_later) -> None:
    """Set the handler, unless who started this process has it ignore the signal, as nohup does.

    Python has handlers in its main thread alone.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(number) != signal.SIG_IGN:
        before = signal.signal(number, handler)
        undo_later(signal.signal, number, before or signal.SIG_DFL)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, a signal ends the process: while PyTorch waits for others, no handler would run."""
    with ExitStack() as stack:
        for number in SIGNALS:
            handle(number, signal.SIG_DFL, stack.callback)
        yield


class StopSignal:
    """From now on a signal asks for an end after this step; number says which one came.

    A second SIGINT or SIGTERM ends the process at once, unless torchrun started it: that one
    passes on to every process what each may have received itself.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in SIGNALS:
            handle(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        is_second = self.number > 0 and number in (signal.SIGINT, signal.SIGTERM)
        of_torchrun = dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ
        if is_second and not of_torchrun:
            os._exit(128 + number)
        self.number = number

    def requested(self) -> bool:
        """Whether any process was told to stop.

        Asked once per step by all of them, so that all of them stop after the same step.
        """
        if not dist.is_initialized():
            return self.number > 0
        shared = torch.tensor(self.number)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        if int(shared) > 0:  # a signal that came meanwhile counts at the next step, for all
            self.number = int(shared)
        return int(shared) > 0


# Streams

class HarmlessStream:
    """Standard output or error whose reader may go away: what cannot be written is dropped.

    What its encoding lacks, as names of files may have, becomes backslashes and numbers.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or os.fdopen(open_nowhere(), "w")  # it is None if it was closed
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        """All that is still to come, and what waits in the buffer, goes to nowhere."""
        os.dup2(open_nowhere(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)
