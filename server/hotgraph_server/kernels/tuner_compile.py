"""Compiles the kernels of candidate tunings beside each other, in processes without a GPU. It measures nothing.

A kernel takes Triton about a second of one core, and a tuning run tries hundreds. Compiled kernels stay in Triton's cache on
disk, where the process that has the GPU finds them, and later the daemon those that were chosen.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Any

import torch

from hotgraph_server.kernels.few_rows_cuts import Tuning
from hotgraph_server.kernels.tuner import Choices, Report
from hotgraph_server.kernels.tuning import ChainShape

MAX_PROCESSES = 32
_POLL_SECONDS = 0.5

logger = logging.getLogger("hotgraph.kernels")

Target = tuple[str, int, int]
"""A backend, its architecture, and threads of a warp, as Triton's GPUTarget has them."""


class CompilePool:
    """Processes that compile what they are told, for one chain."""

    def __init__(self, shape: ChainShape, target: Target | None = None, num_processes: int | None = None) -> None:
        """target: None for that of the current GPU."""
        self._shape = shape
        usable = len(os.sched_getaffinity(0))
        self._executor = ProcessPoolExecutor(
            num_processes or min(usable, MAX_PROCESSES),
            mp_context=multiprocessing.get_context("spawn"),  # a fork of a process that has a GPU cannot compile
            initializer=_become_compiler,
            initargs=(target or _current_target(),),
        )

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def compiled(self, choices: Mapping[int, Choices], until: float, report: Report) -> Mapping[int, Choices]:
        """See `tuner.Bench`; `until` is by time.monotonic. The rest is given up, and what cannot be compiled is logged."""
        futures: dict[Future[None], tuple[int, str, Tuning]] = {}
        all_cuts = [(rows, name, cuts) for rows, of_rows in choices.items() for name, cuts in of_rows.items()]
        # What differs least from the rule comes first for every product, for the case that the time does not suffice.
        for index in range(max(len(cuts) for _, _, cuts in all_cuts)):
            for rows, name, cuts in all_cuts:
                if index < len(cuts):
                    futures[self._submitted(name, rows, cuts[index])] = (rows, name, cuts[index])
        waiting: set[Future[None]] = set(futures)
        while waiting and (left := until - time.monotonic()) > 0:
            _, waiting = wait(waiting, min(left, _POLL_SECONDS))
            report("compiling", len(futures) - len(waiting), len(futures))
        for future in waiting:
            future.cancel()
        errors = {future: future.exception() for future in set(futures) - waiting}
        ready = {futures[future] for future, error in errors.items() if error is None}
        failed = [(futures[future], error) for future, error in errors.items() if error is not None]
        if failed:
            (rows, name, cut), error = failed[0]
            what = f"{name} for {rows} rows as {cut}: {type(error).__name__}: {error}"
            logger.warning("%d tunings cannot be compiled and are left aside, such as %s", len(failed), what[:500])
        return {
            rows: {
                name: [cut for index, cut in enumerate(cuts) if index == 0 or (rows, name, cut) in ready]
                for name, cuts in of_rows.items()
            }
            for rows, of_rows in choices.items()
        }

    def _submitted(self, name: str, rows: int, cut: Tuning) -> Future[None]:
        try:
            return self._executor.submit(compile_one, self._shape, name, rows, cut)
        except (
            BrokenExecutor
        ) as error:  # a process was killed, for want of memory perhaps: the others are given up, too
            future: Future[None] = Future()
            future.set_exception(error)
            return future

    def close(self) -> None:
        """Ends the processes, each after what it is compiling."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def compile_one(shape: ChainShape, name: str, num_rows: int, tuning: Tuning) -> None:
    """In a process that has become a compiler: leaves one product's kernels in Triton's cache on disk."""
    from hotgraph_server.kernels.tuner_gpu import Chain

    chain = Chain(shape, torch.device("cpu"), num_layers=1, names=[name])
    chain.resize(num_rows)
    chain.launch(name, 0, tuning)


def _current_target() -> Target:
    from triton.runtime.driver import driver  # type: ignore[import-untyped]  # it comes without types

    target = driver.active.get_current_target()
    return target.backend, target.arch, target.warp_size


def _become_compiler(target: Target) -> None:
    """From now on this process compiles what it launches, for a GPU that it does not have, and launches nothing."""
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]  # as above
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]  # as above

    class Driver:
        """The little that Triton asks of a driver before it launches."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget(*target)

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*arguments: object, **options: object) -> None:
            kernel.warmup(*arguments, grid=grid, **options)

        return compile_only

    driver.set_active(Driver())
    JITFunction.__getitem__ = launcher  # of this process alone: its only use is to compile
