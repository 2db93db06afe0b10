"""Runs jobs on Ray: on this machine's GPUs, on several processes of its CPU, or on a cluster.

Ray Data sends groups of rows to a pool of actors, one for each GPU, and each actor is a `RowRunner`. A row's results
are committed by the actor, before Ray hears of them. So an actor that dies, or a machine that goes, costs the rows of
its group that were not committed a second run, and no row has two results.

The pack and the pictures have to be at the same paths on every machine, and the folder for results on a shared disk.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .jobs import Job
from .results import Record, Results, open_results
from .worker import RowRunner, WorkersError

LARGEST_GROUP = 16  # rows that one actor gets at once: consecutive rows may share pictures or rounds
NODES = "runner.session:known_node_classes"  # where in the pack a worker gets its node classes
NO_CLUSTER = "no Ray cluster answers at {} ({}): start one with `ray start --head`, or correct the address"
NO_ENTRY = (
    "Ray cannot connect to {} ({}): if a cluster runs there, its machines and this one need one token, which `ray "
    "get-auth-token --generate` makes, or RAY_AUTH_MODE=disabled when they are started"
)
_PACKAGE = __name__.split(".")[0]


def run_on_ray(
    jobs: Sequence[Job],
    results: Results,
    *,
    address: str = "",
    workers: int | None = None,
    batch: int = 1,
    nodes: str,
) -> Iterator[Record]:
    """Runs jobs on a pool of actors; yields the record of each as it is done.

    Args:
        address: of a cluster; empty means this machine.
        workers: actors; None means one for each GPU, or a single one without a GPU.
        batch: rows that are drawn in one pass.
        nodes: "MODULE:FUNCTION" in the pack that returns the node classes.

    Raises WorkersError if Ray cannot be reached, if an actor cannot start, or if its files do not come to `results`.
    """
    import ray
    import ray.data  # it sets up its loggers

    names = {job.key: job.name for job in jobs}
    _check_answers(address)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what matters is in the records, or is raised
    try:
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = workers or max(gpus, 1)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.enable_operator_progress_bars = False
        groups = _groups(jobs, workers, batch)
        rows = ray.data.from_items(groups, override_num_blocks=len(groups)).flat_map(
            _actor_class(),
            fn_constructor_args=(str(Path(__file__).parents[2]), _PACKAGE, results.place, nodes, batch),
            compute=ray.data.ActorPoolStrategy(size=workers),
            **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
        )
        for row in rows.iter_rows():
            record = json.loads(row["record"])
            if record["status"] == "done" and results.find(names[record["key"]]) is None:
                raise WorkersError(
                    f"a worker has done a row, and its files are not in {results.place} on this machine: use a folder "
                    "that all machines share, or an fsspec URL such as s3://bucket/folder"
                )
            yield record
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise WorkersError(_reason(error, address)) from error
    finally:
        ray.shutdown()


class GroupRunner:
    """What an actor does: it runs groups of jobs, and keeps its model from one group to the next."""

    def __init__(self, place: str, nodes: str, batch: int):
        module, _, function = nodes.partition(":")
        classes = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), function)()
        self._runner = RowRunner(open_results(place), node_classes=classes, batch=batch)

    def __call__(self, group: dict[str, str]) -> list[dict[str, str]]:
        jobs = [Job(**job) for job in json.loads(group["jobs"])]
        return [{"record": json.dumps(record)} for record in self._runner.run(jobs)]


def _check_answers(address: str) -> None:
    """Raises WorkersError if nothing answers at HOST:PORT. Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise WorkersError(NO_CLUSTER.format(address, error.strerror or error)) from None


def _reason(error: Exception, address: str) -> str:
    import ray

    if isinstance(error, ConnectionError):
        return NO_ENTRY.format(address or "this machine", error)
    last_line = str(error).strip().splitlines()[-1]
    if isinstance(error, ray.exceptions.ActorDiedError):
        return f"a worker cannot start, since each machine needs the same pack and packages: {last_line}"
    return f"Ray cannot go on: {last_line}"


def _groups(jobs: Sequence[Job], workers: int, batch: int) -> list[dict[str, str]]:
    """Jobs in groups: small enough that all workers end at about the same time, and full batches."""
    size = max(1, min(LARGEST_GROUP, len(jobs) // (8 * workers)))
    size = -(-size // batch) * batch
    groups = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return [{"jobs": json.dumps([dataclasses.asdict(job) for job in group])} for group in groups]


def _actor_class() -> Any:
    """A class that Ray can send to a process that has not imported the pack: it refers to nothing outside itself."""

    class Actor:
        def __init__(self, root: str, package: str, *arguments: Any):
            import importlib
            import sys
            import types

            if package not in sys.modules:  # as quickstart.py does, whatever the pack's folder is called
                sys.modules[package] = types.ModuleType(package)
                sys.modules[package].__path__ = [root]
            self.run = importlib.import_module(f"{package}.runner.table.ray_pool").GroupRunner(*arguments)

        def __call__(self, group: dict[str, str]) -> list[dict[str, str]]:
            return self.run(group)

    return Actor
