"""What `densedino serve` gives of the model's own speed, what batching brings, how it stands twice its capacity.

    python benchmarks/serve.py --side 224 --concurrency 16 --minutes 30

Three ways to get features of the same JPEG files, in turns: the bare model on batches that lie in memory; a server
that batches; a server that runs one image at a time (--max-batch 1). Servers are processes of their own, asked over
HTTP by `--concurrency` connections at once. Figures are medians over rounds. Processor time (of the server with its
decoding processes) is printed too: where others use the machine, its ratios are the steadier ones.

Then requests come at twice the measured rate, whether answered or not, for `--minutes`: how many were answered and
refused, how long the accepted ones took, and what memory the server had at the start and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

QUERY = "/v1/features?format=npy&dtype=float16"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs="+", default=[224], help="pixels; several: a mixture of sizes")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a round")
    parser.add_argument("--minutes", type=float, default=0.5, help="at twice the capacity")
    parser.add_argument("--max-wait", type=float, default=2.0)
    parser.add_argument("--model", default=None)
    parser.add_argument("--weights", default=None)
    args = parser.parse_args()
    files = [jpeg(side, seed) for seed, side in enumerate(args.side * 4)]
    model = [*(["--model", args.model] if args.model else []), *(["--weights", args.weights] if args.weights else [])]
    with Server(8, args.max_wait, model) as batched, Server(1, args.max_wait, model) as single:
        rate = throughput(args, files, batched, single)
    with Server(8, args.max_wait, model) as server:
        asyncio.run(overload(server, files, rate=2 * rate, seconds=60 * args.minutes, bound=args.max_wait))


def jpeg(side: int, seed: int) -> bytes:
    """A photograph-like file: smooth noise."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (side // 16 + 1, side // 16 + 1, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


class Server:
    """`densedino serve` as a process."""

    def __init__(self, max_batch: int, max_wait: float, model: list[str]) -> None:
        command = [sys.executable, "-m", "densedino", "serve", "--port", "0", "--no-browser", "--log", "text"]
        command += ["--max-batch", str(max_batch), "--max-wait", str(max_wait), *model]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().strip().rstrip("/").rpartition(":")[2])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        _, log = self.process.communicate(timeout=60)
        if self.process.returncode:
            raise SystemExit(f"the server ended with status {self.process.returncode}:\n{log}")

    def pids(self) -> list[int]:
        """The server and its decoding processes."""
        own = self.process.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return [own, *map(int, children)]

    def cpu_seconds(self) -> float:
        """Of the server and its decoding processes, so far."""
        return sum(sum(map(int, stat(pid)[11:13])) for pid in self.pids()) / _TICK

    def memory(self) -> float:
        """MB resident, of all of them."""
        return sum(int(stat(pid)[21]) * _PAGE for pid in self.pids()) / 1e6


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@dataclass
class Tally:
    """How requests ended."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


async def ask(port: int, body: bytes, tally: Tally) -> None:
    """One request on a connection of its own."""
    start = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {QUERY} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        status = int(answer.split(b" ", 2)[1]) if answer else 0
    except OSError:
        status = 0
    tally.statuses[status] += 1
    if status == 200:
        tally.seconds.append(time.perf_counter() - start)


async def closed_loop(server: Server, files: list[bytes], concurrency: int, seconds: float) -> tuple[float, float]:
    """Images per second, and processor seconds per image, with so many requests always open."""
    tally, end = Tally(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        turn = number
        while time.perf_counter() < end:
            await ask(server.port, files[turn % len(files)], tally)
            turn += 1

    before, start = server.cpu_seconds(), time.perf_counter()
    await asyncio.gather(*map(client, range(concurrency)))
    done = max(1, tally.statuses[200])
    return done / (time.perf_counter() - start), (server.cpu_seconds() - before) / done


def bare(files: list[bytes], model: str | None, weights: str | None, seconds: float) -> tuple[float, float]:
    """The same of the model alone, on prepared batches of eight of one size."""
    import densedino as dd

    dino = dd.load(model, weights=weights)
    groups: dict[tuple[int, ...], list] = {}
    for prepared in (dino.transform(file) for file in files):
        groups.setdefault(tuple(prepared.pixels.shape), []).append(prepared)
    batches = [(group * 8)[:8] for group in groups.values()]
    dino.run(batches[0])
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        for batch in batches:
            dino.run(batch)
            count += len(batch)
    return count / (time.perf_counter() - start), (time.process_time() - cpu) / count


def throughput(args: argparse.Namespace, files: list[bytes], batched: Server, single: Server) -> float:
    rounds: dict[str, list[tuple[float, float]]] = {"bare model": [], "server": [], "server, one by one": []}
    for server in (batched, single):
        asyncio.run(closed_loop(server, files, args.concurrency, 2.0))
    for _ in range(args.rounds):
        rounds["bare model"].append(bare(files, args.model, args.weights, args.seconds / 2))
        rounds["server"].append(asyncio.run(closed_loop(batched, files, args.concurrency, args.seconds)))
        rounds["server, one by one"].append(asyncio.run(closed_loop(single, files, args.concurrency, args.seconds)))
    medians = {name: [statistics.median(column) for column in zip(*r, strict=True)] for name, r in rounds.items()}
    print(f"sides {args.side}, {args.concurrency} connections, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, (rate, cpu) in medians.items():
        print(f"{name:<20}{rate:8.1f} images/s {1000 * cpu:8.1f} ms of processor time per image")
    one, many, alone = medians["server, one by one"], medians["server"], medians["bare model"]
    print(f"batching: {many[0] / one[0]:.2f}x the images, {one[1] / many[1]:.2f}x by processor time")
    print(f"server ÷ bare model: {many[0] / alone[0]:.2f} of the images, {alone[1] / many[1]:.2f} by processor time")
    return many[0]


async def overload(server: Server, files: list[bytes], *, rate: float, seconds: float, bound: float) -> None:
    await closed_loop(server, files, 16, min(20.0, seconds))  # whatever grows at first has grown
    tally, tasks, memory = Tally(), set(), [server.memory()]
    start, sent = time.perf_counter(), 0
    while (now := time.perf_counter() - start) < seconds:
        while sent < now * rate:
            task = asyncio.create_task(ask(server.port, files[sent % len(files)], tally))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        if now > len(memory) * seconds / 20:
            memory.append(server.memory())
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    took = np.array(tally.seconds or [0.0])
    print(f"at {rate:.0f} requests/s for {seconds:.0f} s: {sent} sent, {dict(tally.statuses)} by status (0: no answer)")
    print(
        f"accepted ones took {np.percentile(took, 50):.2f} s (median), {np.percentile(took, 99):.2f} s (p99); "
        f"may wait {bound:g} s"
    )
    print(f"memory in MB, at the start {memory[0]:.0f}, the highest {max(memory):.0f}, at the end {memory[-1]:.0f}")


if __name__ == "__main__":
    main()
