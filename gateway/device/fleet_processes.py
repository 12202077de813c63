"""A fleet over several processes: each gets its share of the plan on stdin and reports on stdout, once a second and last.

Keys travel over the pipe, never on a command line.
"""

import asyncio
import contextlib
import dataclasses
import gc
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from gateway.device.fleet import Fleet, FleetPlan
from gateway.device.fleet_report import FleetReport
from gateway.errors import DeviceError

__all__ = ["run_fleet", "split_plan"]

_LINE_BYTES_MAX: Final = 1024 * 1024


def split_plan(plan: FleetPlan, processes: int) -> list[FleetPlan]:
    """A share for each process, none without a device or a bad actor."""
    shares = []
    for number in range(processes):
        devices = plan.devices[number::processes]
        bad = {
            kind: share
            for kind, count in plan.bad.items()
            if (share := count // processes + (number < count % processes))
        }
        if devices or bad:
            shares.append(
                msgspec.structs.replace(
                    plan, devices=devices, bad=bad, arrivals_per_s=plan.arrivals_per_s / processes
                )
            )
    return shares


async def run_fleet(plans: Sequence[FleetPlan], show: Callable[[FleetReport], None]) -> FleetReport:
    """Run them all; `show` is told how it stands about once a second. Raises DeviceError when a process breaks.

    Cancelling ends the processes.
    """
    latest = [FleetReport() for _ in plans]
    processes = [await _start() for _ in plans]

    async def follow(number: int, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(plans[number]) + b"\n")
        await process.stdin.drain()
        while line := await process.stdout.readline():
            latest[number] = msgspec.json.decode(line, type=FleetReport)
        if await process.wait() != 0:
            raise DeviceError(f"a process of the simulation ended with status {process.returncode}")

    async def tell() -> None:
        while True:
            await asyncio.sleep(1)
            show(FleetReport.sum(latest))

    try:
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(tell())
            following = [
                tasks.create_task(follow(number, process)) for number, process in enumerate(processes)
            ]
            await asyncio.wait(following)
            telling.cancel()
    except* DeviceError as broken:
        raise broken.exceptions[0] from None
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return FleetReport.sum(latest)


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway.device.fleet_processes",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES_MAX,
    )


@dataclasses.dataclass
class _Child:
    """The other end of the pipe."""

    plan: FleetPlan

    async def run(self) -> None:
        fleet = Fleet(self.plan)
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look at it again
        loop = asyncio.get_running_loop()
        # Ctrl-C reaches all processes of the terminal; the parent decides.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        reporting = loop.create_task(self._report(fleet))
        running = loop.create_task(fleet.run())
        await asyncio.wait({running, reporting}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, reporting):
            if task.done():
                task.result()
            task.cancel()
        _write(fleet.snapshot())

    async def _report(self, fleet: Fleet) -> None:
        while True:
            await asyncio.sleep(self.plan.report_every_s)
            _write(fleet.snapshot())


def _write(report: FleetReport) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def _main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=FleetPlan)
    factory: Any = None
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        pass  # asyncio's own loop does as well, at twice the cost
    with contextlib.suppress(BrokenPipeError), asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_Child(plan).run())  # without a reader there is nobody to simulate for


if __name__ == "__main__":
    _main()
