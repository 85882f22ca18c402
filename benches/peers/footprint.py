#!/usr/bin/env python3
"""What a process touches in a round trip, which is two waits: distinct cache lines and pages, medians.

    ./footprint.py W7s limits/eventfd_tokio multiprocess/pipe

Needs valgrind (lackey). What is cold after a sleep costs a miss each, so this is what W7s and W11s pay beside system calls.
"""
import re, statistics, subprocess, sys, tempfile, time
from pathlib import Path

from bench import PROGRAMS

LIBC = "libc.so.6"


def wait_range(maps):
    """Addresses of epoll_wait in the traced process."""
    mapped = next(line.split() for line in maps.splitlines() if LIBC in line and "r-xp" in line)
    base = int(mapped[0].split("-")[0], 16) - int(mapped[2], 16)
    symbols = subprocess.run(["nm", "-DS", mapped[5]], capture_output=True, text=True, check=True).stdout
    start, size = re.search(r"^(\w+) (\w+) \w epoll_wait@", symbols, re.M).groups()
    return range(base + int(start, 16), base + int(start, 16) + int(size, 16))


def trace(program, workload, variant):
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=lackey", "--trace-mem=yes", f"--log-file={folder}/%p"]
        traced = subprocess.Popen([*command, *program, workload, variant], stdout=subprocess.DEVNULL)
        maps = ""
        while traced.poll() is None:
            now = Path(f"/proc/{traced.pid}/maps").read_text()
            maps = now if LIBC in now else maps
            time.sleep(0.1)
        yield wait_range(maps)
        yield from (line for line in open(f"{folder}/{traced.pid}") if line[:2] in ("I ", " L", " S", " M"))


def footprint(lines):
    wait, inside, waits = next(lines), False, []
    for line in lines:
        address = int(line[3:].split(",")[0], 16)
        if line[0] == "I":
            if address in wait and not inside:
                waits.append((set(), set()))
            inside = address in wait
        if waits:
            waits[-1][line[0] != "I"].add(address >> 6)
    waits = waits[len(waits) // 2 :]  # The first ones set things up.
    trips = [(code | waits[i + 1][0], data | waits[i + 1][1]) for i, (code, data) in enumerate(waits[:-1])]
    count = lambda of: round(statistics.median(len(of(*trip)) for trip in trips))
    pages = lambda lines: {line >> 6 for line in lines}
    return {
        "code lines": count(lambda code, _: code),
        "code pages": count(lambda code, _: pages(code)),
        "data lines": count(lambda _, data: data),
        "data pages": count(lambda _, data: pages(data)),
    }


if __name__ == "__main__":
    workload, *contenders = sys.argv[1:]
    for contender in contenders:
        program, variant = contender.split("/")
        print(contender, footprint(trace(PROGRAMS[program], workload, variant)))
