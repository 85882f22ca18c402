#!/usr/bin/env python3
"""Runs workloads for all contenders, interleaved, and prints markdown tables.

    ./bench.py W5                    one workload
    ./bench.py all --save results    every workload, raw samples kept as JSON
    ./bench.py W5 --only limits,ipc_channel --rounds 11
    ./bench.py W5 --against limits/pipe
    ./bench.py --render results/W5.json

Each round runs every contender once, in a new random order; a cell is the median over
rounds (min–max); a ratio is formed within each round. A run waits until other programs
leave the CPUs alone, and is repeated if they did not; runs that stayed disturbed are
counted above the table. See README.md for the workloads.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
RUST = HERE / "target/release"
PYTHON = str(HERE / "venv/bin/python")

# To add a contender: a program that speaks the protocol of common/src/cli.rs, and a line here.
PROGRAMS = {
    "multiprocess": [HERE / "multiprocess/target/release/multiprocess-contender"],
    "limits": [RUST / "limits"],
    "inprocess": [RUST / "inprocess"],
    "command": [RUST / "command"],
    "procspawn": [RUST / "procspawn"],
    "crossmist": [HERE / "crossmist/target/release/crossmist-contender"],
    "ipc_channel": [RUST / "ipc_channel"],
    "iceoryx2": [RUST / "iceoryx2"],
    "interprocess": [RUST / "interprocess"],
    "mp": [PYTHON, HERE / "python/std_mp.py"],
    "futures": [PYTHON, HERE / "python/futures_ppe.py"],
    "loky": [PYTHON, HERE / "python/loky_executor.py"],
    "mpire": [PYTHON, HERE / "python/mpire_pool.py"],
    "aiomultiprocess": [PYTHON, HERE / "python/aiomultiprocess_pool.py"],
}

RUN_LIMIT_S = 120
QUIET_LIMIT_S = 20  # how long a run waits for other programs
QUIET_SHARE = 0.08  # of all CPUs, what others may use
ATTEMPTS = 3
LESS, MORE = False, True  # which way is better


@dataclasses.dataclass
class Metric:
    key: str
    title: str
    more_is_better: bool


@dataclasses.dataclass
class Workload:
    title: str
    metrics: list[Metric]  # the first one ranks and forms the ratio
    reference: str
    rounds: int = 7
    cases_of: str = ""  # the workload that contenders are asked for, if another
    busy: bool = False  # whether a program of ours keeps every CPU busy meanwhile


CALL_METRICS = [
    Metric("p50_us", "p50 µs", LESS),
    Metric("p99_us", "p99 µs", LESS),
    Metric("per_s", "round trips/s", MORE),
]
SPAWN_METRICS = [
    Metric("seq_p50_us", "one by one p50 µs", LESS),
    Metric("seq_p99_us", "p99 µs", LESS),
    Metric("burst_us", "100 at once, µs each", LESS),
]

WORKLOADS = {
    "W0": Workload(
        "Unit costs of the machine",
        [
            Metric("syscall_ns", "system call ns", LESS),
            Metric("futex_wake_nobody_ns", "futex wake of nobody ns", LESS),
            Metric("eventfd_write_ns", "eventfd write ns", LESS),
            Metric("pause_ns", "spin hint ns", LESS),
            Metric("fetch_add_ns", "fetch_add ns", LESS),
            Metric("fence_ns", "store and fence ns", LESS),
            Metric("private_fault_ns", "private page fault ns", LESS),
            Metric("shared_fault_ns", "shared page fault ns", LESS),
            Metric("memcpy_cold_mib_s", "memcpy to new shared memory MiB/s", MORE),
            Metric("memcpy_warm_mib_s", "memcpy to mapped shared memory MiB/s", MORE),
        ],
        "limits/unit_costs",
    ),
    "W1": Workload("Spawn a no-op function process and join it", SPAWN_METRICS, "limits/posix_spawn", 5),
    "W1h": Workload("W1 from a parent with 256 MiB of touched heap", SPAWN_METRICS, "limits/posix_spawn", 5),
    "W2": Workload("Pool.apply of i64 -> i64 on a warm pool of 2", CALL_METRICS, "procspawn/pool"),
    "W2s": Workload(
        "W2 with a pause of 1 ms before each call, so that the worker sleeps",
        CALL_METRICS[:2],
        "limits/stream_tokio_workers",
    ),
    "W2b": Workload(
        "W2 while every CPU is also kept busy by another process",
        [CALL_METRICS[0], CALL_METRICS[2]],
        "limits/stream_tokio_workers",
        cases_of="W2",
        busy=True,
    ),
    "W3": Workload("Pool.map of 100k tiny tasks on 2 workers", [Metric("tasks_per_s", "tasks/s", MORE)], "mp/chunk_default"),
    "W3b": Workload("Unordered streaming of 100k tiny tasks on 2 workers", [Metric("tasks_per_s", "tasks/s", MORE)], "mp/chunk_1"),
    "W3e": Workload(
        "Unordered streaming of 1,000,000 tiny tasks of an endless source on 2 workers",
        [
            Metric("growth", "cost of an item, 10^5 to 10^6 by 10^3 to 10^4", LESS),
            Metric("memory_mib", "growth of memory MiB", LESS),
            Metric("tasks_per_s", "tasks/s", MORE),
        ],
        "multiprocess/endless",
    ),
    "W4": Workload(
        "Speed-up of 64 CPU-bound tasks of about 20 ms on 2 workers",
        [Metric("speedup", "speed-up", MORE), Metric("task_ms", "one task ms", LESS)],
        "limits/fork_claiming",
        5,
    ),
    "W5": Workload("Queue of 64-byte messages, 1 producer", [Metric("msgs_per_s", "messages/s", MORE)], "ipc_channel/typed"),
    "W5x4": Workload("Queue of 64-byte messages, 4 producers", [Metric("msgs_per_s", "messages/s", MORE)], "ipc_channel/typed"),
    "W6": Workload("Queue or pipe of 1 MiB messages", [Metric("mib_per_s", "MiB/s", MORE)], "ipc_channel/bytes"),
    "W7": Workload("Pipe ping-pong of 64 bytes", CALL_METRICS, "limits/stream_tokio"),
    "W7s": Workload(
        "W7 with a pause of 1 ms before each round trip, so that the other side sleeps",
        [*CALL_METRICS[:2], Metric("cpu_us", "CPU of both processes, µs each", LESS)],
        "limits/stream_tokio",
    ),
    "W7b": Workload(
        "W7 while every CPU is also kept busy by another process",
        [CALL_METRICS[2], *CALL_METRICS[:2]],
        "limits/stream_tokio",
        cases_of="W7",
        busy=True,
    ),
    "W8": Workload(
        "Lock and unlock",
        [Metric("uncontended_ns", "uncontended ns", LESS), Metric("contended_ops_per_s", "2 processes contending, ops/s", MORE)],
        "inprocess/tokio_mutex",
    ),
    "W8m": Workload(
        "5 µs under one lock, by 2, 8 and 32 processes",
        [
            Metric("growth", "CPU of an acquisition, the dearest to that of 2", LESS),
            Metric("cpu_us_2", "2 processes, CPU µs each", LESS),
            Metric("cpu_us_8", "8 processes", LESS),
            Metric("cpu_us_32", "32 processes", LESS),
        ],
        "multiprocess/blocking",
    ),
    "W8n": Workload(
        "Create a lock",
        [Metric("create_us", "p50 µs", LESS), Metric("create_p99_us", "p99 µs", LESS)],
        "multiprocess/lock",
    ),
    "W9": Workload("Increment a shared value under its lock, 2 processes", [Metric("increments_per_s", "increments/s", MORE)], "mp/value"),
    "W10": Workload(
        "Child sums 64 MiB of f64 that the parent wrote",
        [Metric("again_ms", "again ms", LESS), Metric("first_ms", "first time ms", LESS)],
        "limits/in_process",
    ),
    "W11": Workload(
        "Manager dict set and get",
        [Metric("one_client_ops_per_s", "1 client, ops/s", MORE), Metric("four_clients_ops_per_s", "4 clients, ops/s", MORE)],
        "mp/manager_dict",
    ),
    "W11n": Workload(
        "Manager dict set and get by 4 to 256 clients",
        [
            Metric("rate_256", "ops/s of 256 clients by those of 4", MORE),
            Metric("cpu_growth", "CPU of the manager per operation, 256 clients by 4", LESS),
            *[Metric(f"ops_per_s_{clients}", f"{clients} clients, ops/s", MORE) for clients in (4, 16, 64, 256)],
            Metric("cpu_us_4", "CPU µs of the manager per operation, 4 clients", LESS),
            Metric("cpu_us_256", "256 clients", LESS),
        ],
        "multiprocess/manager",
    ),
    "W11s": Workload(
        "Manager dict set with a pause of 1 ms before each, so that the other side sleeps",
        [Metric("p50_us", "p50 µs", LESS)],
        "limits/stream_tokio",
    ),
    "W12": Workload(
        "Memory of an idle worker in a pool of 8",
        [Metric("pss_kib", "PSS KiB", LESS), Metric("private_kib", "private KiB", LESS)],
        "procspawn/pool",
        3,
    ),
    "W13": Workload(
        "Error after a worker is killed in its task",
        [Metric("error_ms", "until the error ms", LESS), Metric("next_task_ms", "until the next task is done ms", LESS)],
        "procspawn/pool",
        5,
    ),
    "W14": Workload("64-byte messages over an authenticated Unix socket", [Metric("msgs_per_s", "messages/s", MORE)], "mp/connection"),
    "W15": Workload("1 MiB messages over an authenticated Unix socket", [Metric("mib_per_s", "MiB/s", MORE)], "mp/connection"),
    "W16": Workload(
        "Tiny tasks on pools of 2 to 1024 workers",
        [
            Metric("rate_256", "tasks/s with 256 workers by those with 2", MORE),
            Metric("cpu_growth", "CPU of the caller per task, the dearest pool by that of 2", LESS),
            *[Metric(f"per_s_{workers}", f"tasks/s with {workers}", MORE) for workers in (2, 8, 32, 128, 256, 1024)],
        ],
        "multiprocess/chunk_1",
    ),
    "W17": Workload(
        "Values: the codec, and the trip through a queue",
        [
            Metric("ratio", "codec, to the peer", LESS),
            Metric("codec_us", "encode and decode µs", LESS),
            Metric("trip", "put and get, to bare bytes", LESS),
        ],
        "multiprocess/pair_bytes_1_mib",
        3,
    ),
    "W22": Workload(
        "Tasks of 10 to 1000 µs, by the time of one alone times their number, over the workers",
        [
            Metric(f"us_{us}_kib_{kib}", f"{us} µs, {kib} KiB", LESS)
            for kib in (0, 1, 64)
            for us in (10, 30, 100, 300, 1000)
        ]
        + [
            Metric("caller_cpu_us", "CPU µs of the calling process per task of 100 µs, 1 KiB", LESS),
            Metric("late_p50_ms", "p50 ms from a result's making to its stream", LESS),
            Metric("late_p90_ms", "p90", LESS),
            Metric("late_p99_ms", "p99", LESS),
            Metric("beside_p50_ms", "p50 ms of an apply beside a map of 1 ms", LESS),
            Metric("beside_max_ms", "longest", LESS),
        ],
        "inprocess/rayon",
        3,
    ),
    "W18": Workload(
        "Latency of tasks of 100 µs that arrive at set times",
        [
            Metric(f"load_{load}_{q}_us", f"{load} % load, {q} µs", LESS)
            for load in (50, 60)
            for q in ("p50", "p90", "p99", "p999")
        ],
        "inprocess/tokio_spawn_blocking",
        3,
    ),
    "W20": Workload(
        "512 sleeping processes woken at once: from the call to the last of them awake",
        [Metric("last_ms", "last awake, ms", LESS)],
        "limits/futex",
    ),
    "W21": Workload(
        "A lock that goes from task to task of one process, by the time of tokio's mutex",
        [
            Metric(f"{runtime}_{tasks}", f"{tasks} tasks, {threads}", LESS)
            for runtime, threads in (("current", "one thread"), ("multi", "two threads"))
            for tasks in (2, 10, 1000)
        ],
        "multiprocess/lock",
    ),
}


@contextlib.contextmanager
def busy_cpus():
    loops = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(os.cpu_count())]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def ask(command, *words):
    """The last line a contender prints, as JSON; None if it fails or runs out of time."""
    env = os.environ | {"PYTHONPATH": str(HERE / "python")}
    process = subprocess.Popen([*map(str, command), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, err = process.communicate(timeout=RUN_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        err = f"ran past {RUN_LIMIT_S} s"
    if process.returncode == 0 and (lines := out.strip().splitlines()):
        return json.loads(lines[-1])
    print(f"failed: {' '.join(words)} of {command[-1]}: {err.strip()[-300:]}", file=sys.stderr)
    return None


class OthersCpu:
    """Measures the share of all CPUs that programs other than ours used since its creation."""

    def __init__(self):
        self.start = self._now()

    def share(self):
        busy, own, at = (now - then for now, then in zip(self._now(), self.start))
        return max(0.0, busy - own) / max(at, 0.25) / os.cpu_count()

    @staticmethod
    def _now():
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, stat.readline().split()[1:])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.monotonic()


def wait_until_quiet():
    deadline = time.monotonic() + QUIET_LIMIT_S
    while time.monotonic() < deadline:
        others = OthersCpu()
        time.sleep(0.25)
        if others.share() < QUIET_SHARE:
            return


def ask_in_quiet(command, *words, busy):
    """What `ask` returns, and whether other programs disturbed it to the last attempt."""
    for _ in range(ATTEMPTS):
        wait_until_quiet()
        others = OthersCpu()
        with busy_cpus() if busy else contextlib.nullcontext():
            answer = ask(command, *words)
        if others.share() < QUIET_SHARE:
            return answer, False
    return answer, True


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run(name, programs, rounds):
    """Runs a workload; returns its raw samples."""
    asked, busy = WORKLOADS[name].cases_of or name, WORKLOADS[name].busy
    listings = {program: ask(command, "list") for program, command in programs.items()}
    cases = [(p, variant) for p, listing in listings.items() for variant in listing["cases"].get(asked, [])]
    cannot = {p: listing["cannot"][asked] for p, listing in listings.items() if asked in listing["cannot"]}
    samples, disturbed = {f"{p}/{v}": [] for p, v in cases}, 0
    for round_number in range(rounds):
        for program, variant in random.sample(cases, len(cases)):
            progress(f"{name} round {round_number + 1}/{rounds} {program}/{variant}")
            answer, noisy = ask_in_quiet(programs[program], asked, variant, busy=busy)
            samples[f"{program}/{variant}"].append(answer)
            disturbed += noisy
    progress("")
    return {
        "workload": name,
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "rounds": rounds,
        "runs": rounds * len(cases),
        "disturbed": disturbed,
        "samples": samples,
        "cannot": cannot,
    }


def median(values):
    return sorted(values)[(len(values) - 1) // 2] if values else None


def number(value):
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    if value >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def cell(values):
    """Median (min–max) of one contender's samples of one metric."""
    if not values:
        return ""
    real = [value for value in values if value is not None]
    if not real:
        return "never"
    note = f", never {len(values) - len(real)}×" if len(real) < len(values) else ""
    return f"{number(median(real))} ({number(min(real))}–{number(max(real))}{note})"


def of(samples, key):
    return [sample[key] for sample in samples if sample and key in sample]


def ratios(samples, reference, key):
    """Contender by reference, round by round."""
    pairs = [(s.get(key), r.get(key)) for s, r in zip(samples, reference) if s and r]
    return [mine / theirs for mine, theirs in pairs if mine and theirs]


def render(result, against=None):
    """The markdown table of one `run`."""
    workload = WORKLOADS[result["workload"]]
    reference = against or workload.reference
    first, samples = workload.metrics[0], result["samples"]

    def rank(contender):
        typical = median([v for v in of(samples[contender], first.key) if v is not None])
        if typical is None:
            return float("inf")
        return -typical if first.more_is_better else typical

    header = ["contender", *(metric.title for metric in workload.metrics), f"ratio to {reference}"]
    rows = []
    for contender in sorted(samples, key=rank):
        cells = [cell(of(samples[contender], metric.key)) for metric in workload.metrics]
        rows.append([contender, *cells, cell(ratios(samples[contender], samples.get(reference, []), first.key))])
    better = "more" if first.more_is_better else "less"
    lines = [
        f"### {result['workload']}: {workload.title}",
        "",
        f"{result['when']}, {result['rounds']} rounds, median (min–max), {better} is better; "
        f"{result['disturbed']} of {result['runs']} runs disturbed by other programs.",
        "",
        *(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]),
    ]
    if result["cannot"]:
        reasons = "; ".join(f"{program}: {reason}" for program, reason in result["cannot"].items())
        lines += ["", f"Cannot: {reasons}."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", help="W0 ... W22, or all")
    parser.add_argument("--rounds", type=int, help="interleaved repeats")
    parser.add_argument("--only", default=",".join(PROGRAMS), help="programs, comma-separated")
    parser.add_argument("--against", help="the contender that ratios refer to")
    parser.add_argument("--save", type=pathlib.Path, help="directory for raw samples")
    parser.add_argument("--render", type=pathlib.Path, nargs="+", help="raw samples to print again")
    args = parser.parse_args()
    if args.render:
        for path in args.render:
            print(render(json.loads(path.read_text()), args.against))
        return
    programs = {program: PROGRAMS[program] for program in args.only.split(",")}
    for program in [p for p, command in programs.items() if not pathlib.Path(command[0]).exists()]:
        print(f"{program} is not built: left out", file=sys.stderr)
        del programs[program]
    for name in WORKLOADS if args.workload == "all" else [args.workload]:
        result = run(name, programs, args.rounds or WORKLOADS[name].rounds)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            (args.save / f"{name}.json").write_text(json.dumps(result))
        print(render(result, args.against), flush=True)


if __name__ == "__main__":
    main()
