"""The runs of a grid on Dask: on processes of this machine, or on any cluster that is running.

Dask starts the processes, gives each its next run, replaces those that die and gives their run to another,
which goes on from the last checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import torch
from distributed import Client, LocalCluster, get_worker, wait
from distributed.scheduler import KilledWorker

from ..errors import StudyError, failure
from ..memory import usable_cores
from .grid_runs import Run, perform

PATIENCE = 30  # seconds for a scheduler to answer and to have a worker
TOPIC = "msunet-ablations"
# A process computes one run at a time, however many threads its worker has: the random state, the number of
# threads and the memory of a training are the process's.
_ONE_AT_A_TIME = threading.Lock()


def on_cluster(
    runs: list[Run],
    levels: dict[Path, tuple[str, ...]],
    before: dict[Path, dict],
    at: Callable[[Path, float], None],
    *,
    jobs: int = 2,
    scheduler: str | None = None,
) -> dict[Path, dict]:
    """What the runs come to, by folder.

    Parameters
    ----------
    runs : to compute, each after the one it starts from
    levels : opt levels to test at, by folder
    before : results that are there already, by folder
    at : told how far each run is, 0 to 1; only in this thread
    jobs : processes to start on this machine, where no scheduler is named
    scheduler : address of a running one, as tcp://host:8786; its workers must see the folders and the data

    Raises
    ------
    StudyError : no scheduler there, no worker, or the scheduler went away
    """
    waiting, working, found, parts = list(runs), {}, {}, {}
    shares = collections.Counter()
    ours = {run.folder for run in runs}

    def hear(event) -> None:
        folder = Path(event[1]["folder"])
        if folder in ours:  # other grids may run on the same cluster
            parts[folder] = event[1]["part"]

    with _client(jobs, scheduler) as client:
        client.subscribe_topic(TOPIC, hear)
        while waiting or working:
            try:
                # One run a worker, the next when one has ended: given all at once, Dask hands them out before
                # it knows how long they take, and a worker that is done early, or came late, stays idle.
                workers = _workers(client)
                shares |= workers  # the most there were: a run keeps its threads, and so its digits
                known = before | found
                ready = [run for run in waiting if run.start is None or run.start.folder in known]
                for run in ready[: max(0, workers.total() - len(working))]:
                    waiting.remove(run)
                    start = known[run.start.folder] if run.start else None
                    key = ("run", f"{run.folder} {time.time_ns()}")
                    future = client.submit(
                        _perform, run, levels.get(run.folder, ()), start, dict(shares), key=key
                    )
                    working[future] = run.folder
                if working:
                    wait(list(working), timeout=1, return_when="FIRST_COMPLETED")
                else:  # all workers are gone, for now
                    time.sleep(1)
            except TimeoutError:  # a second has passed: time to look how far they are
                pass
            except (CancelledError, OSError) as error:
                raise StudyError(
                    "the scheduler went away; run the same command again to go on where the runs are"
                ) from error
            for folder, part in list(parts.items()):
                at(folder, part)
            for future in [future for future in working if future.done()]:
                folder = working.pop(future)
                found[folder] = _result(future)
                at(folder, 1.0)
    return found


def _perform(run: Run, levels: tuple[str, ...], before: dict | None, shares: dict[str, int]) -> dict:
    """In a worker: one run, with this process's share of the machine's cores."""
    worker = get_worker()
    told = 0.0

    def report(part: float) -> None:
        nonlocal told
        if time.monotonic() - told > 1:
            told = time.monotonic()
            worker.log_event(TOPIC, {"folder": str(run.folder), "part": part})

    with _ONE_AT_A_TIME:
        torch.set_num_threads(max(1, usable_cores() // shares.get(worker.ip, 1)))
        return perform(run, levels, before, report)


def _workers(client: Client) -> collections.Counter:
    """How many workers there are on each machine, by its address."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return collections.Counter(worker["host"] for worker in workers.values())


def _result(future) -> dict:
    try:
        return future.result()
    except KilledWorker as error:
        times = "once" if error.allowed_failures == 0 else f"{error.allowed_failures + 1} times"
        return {"failed": f"its worker died {times}; was the memory enough? (its last checkpoint is kept)"}
    except Exception as error:
        return {"failed": failure(error)}


@contextlib.contextmanager
def _client(jobs: int, scheduler: str | None) -> Iterator[Client]:
    """A client of the scheduler that is named, or of processes of our own that end with it."""
    quiet = logging.CRITICAL  # what matters is told by StudyError, in one line
    logging.getLogger("distributed").setLevel(quiet)
    if scheduler is None:
        cluster = LocalCluster(
            jobs, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=quiet
        )
        with cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(scheduler, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise StudyError(
            f"no scheduler answers at {scheduler!r}; start `dask scheduler` and `dask worker ADDRESS`, "
            "or leave it out for processes of this machine"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise StudyError(
                f"scheduler {scheduler} has no worker; start `dask worker {scheduler}`"
            ) from error
        yield client
