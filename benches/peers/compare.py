#!/usr/bin/env python3
"""Compares two builds of the contender `multiprocess`, by the same benchmark source: ratios new/old of runs in turn, medians (least-most).

    ./compare.py SECONDS OLD NEW W2/pool W3/chunk_1 W8/async ..

OLD and NEW are programs: `benches/peers/multiprocess` built with the path of its dependency set to a checkout of either commit.
"""
import json
import random
import statistics
import subprocess
import sys
import time


def run(program, case):
    output = subprocess.run([program, *case.split("/")], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(output.stdout.splitlines()[-1])


def main():
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    seconds, old, new, *cases = sys.argv[1:]
    got, end = {}, time.monotonic() + float(seconds)
    while time.monotonic() < end:
        for case in cases:
            order = random.sample([old, new], 2)
            results = {program: run(program, case) for program in order}
            for metric, value in results[old].items():
                if value:
                    got.setdefault((case, metric), []).append(results[new][metric] / value)
    print("| workload | metric | new / old | rounds |\n|---|---|---|---|")
    for (case, metric), ratios in sorted(got.items()):
        print(f"| {case} | {metric} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {len(ratios)} |")


if __name__ == "__main__":
    main()
