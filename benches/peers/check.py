#!/usr/bin/env python3
"""Checks multiprocess against its goals: ratios to other contenders of the same round.

    ./check.py                        every goal; exits with 1 if one is missed
    ./check.py --only W7,W7s --rounds 11
    ./check.py --references           only what the goals refer to: figures, no verdict

Per workload, each round runs every contender once, in a new random order; a figure is the
median over rounds of the ratio within a round. bench.py shows all variants, and the
workloads without a goal.
"""

import argparse
import dataclasses
import pathlib
import random
import sys

import bench

OURS = "multiprocess"


@dataclasses.dataclass
class Goal:
    workload: str
    metric: str
    variants: list[str]  # ours
    factor: float  # at most of a metric where less is better, else at least
    references: list[str]  # the best of them counts; "W5:a/b" is a contender of another workload; of none, 1 counts

    @property
    def more_is_better(self):
        metrics = bench.WORKLOADS[self.workload].metrics
        return next(metric.more_is_better for metric in metrics if metric.key == self.metric)


LARGE_VALUES = [f"{kind}_{mib}_mib" for kind in ["pair_bytes", "pair_f64", "struct_f64"] for mib in [1, 16]]

GOALS = [
    Goal("W1", "seq_p50_us", ["forkserver"], 0.40, ["limits/posix_spawn"]),
    Goal("W1", "burst_us", ["forkserver"], 0.30, ["limits/posix_spawn"]),
    Goal("W1h", "seq_p50_us", ["forkserver"], 0.40, ["limits/posix_spawn"]),
    Goal("W1h", "burst_us", ["forkserver"], 0.30, ["limits/posix_spawn"]),
    Goal("W2", "p50_us", ["pool"], 1 / 20, ["procspawn/pool"]),
    Goal("W2s", "p50_us", ["pool"], 1.2, ["limits/stream_tokio_workers"]),
    Goal("W2b", "p50_us", ["pool"], 1.0, ["limits/stream_tokio_workers"]),
    Goal("W3", "tasks_per_s", ["chunk_default"], 3.0, ["mp/chunk_default"]),
    Goal("W3", "tasks_per_s", ["chunk_1"], 20.0, ["mp/chunk_1"]),
    Goal("W3b", "tasks_per_s", ["chunk_default"], 1.0, ["mp/chunk_1000"]),
    Goal("W3b", "tasks_per_s", ["chunk_default"], 100.0, ["mp/chunk_1"]),
    Goal("W3e", "growth", ["endless"], 1.3, []),
    Goal("W3e", "memory_mib", ["endless"], 16.0, []),
    Goal("W4", "speedup", ["chunk_default", "chunk_1"], 0.97, ["limits/fork_claiming"]),
    Goal("W5", "msgs_per_s", ["bounded", "unbounded"], 2.0, ["iceoryx2/notified", "iceoryx2/polling"]),
    Goal("W5", "msgs_per_s", ["bounded", "unbounded"], 10.0, ["ipc_channel/typed"]),
    Goal("W5x4", "msgs_per_s", ["bounded"], 0.5, ["W5:multiprocess/bounded"]),
    Goal("W5x4", "msgs_per_s", ["unbounded"], 0.5, ["W5:multiprocess/unbounded"]),
    Goal("W6", "mib_per_s", ["bytes", "vec"], 0.45, ["limits/shm_one_copy"]),
    Goal("W6", "mib_per_s", ["bytes", "vec"], 1.3, ["ipc_channel/bytes"]),
    Goal("W7", "p50_us", ["pipe"], 15.0, ["limits/spin_then_eventfd_tokio"]),
    Goal("W7s", "p50_us", ["pipe"], 1.2, ["limits/eventfd_tokio"]),
    Goal("W7s", "cpu_us", ["pipe"], 1.3, ["limits/eventfd_tokio"]),
    Goal("W7b", "per_s", ["pipe"], 1.0, ["limits/stream_tokio"]),
    Goal("W7b", "p50_us", ["pipe"], 1.0, ["limits/stream_tokio"]),
    Goal("W8", "uncontended_ns", ["async"], 1.2, ["inprocess/tokio_mutex"]),
    Goal("W8", "uncontended_ns", ["try"], 3.0, ["limits/futex"]),
    Goal("W8", "contended_ops_per_s", ["blocking"], 0.5, ["limits/pthread_robust"]),
    Goal("W8", "contended_ops_per_s", ["blocking"], 20.0, ["mp/lock"]),
    Goal("W8m", "growth", ["blocking"], 2.0, []),
    Goal("W8n", "create_us", ["lock"], 10.0, []),
    Goal("W9", "increments_per_s", ["lock"], 0.4, ["limits/pthread_robust"]),
    Goal("W9", "increments_per_s", ["fetch_add"], 0.8, ["limits/fetch_add"]),
    Goal("W10", "first_ms", ["array"], 1.1, ["limits/child"]),
    Goal("W10", "again_ms", ["array"], 1.1, ["limits/child"]),
    Goal("W11", "one_client_ops_per_s", ["manager"], 8.0, ["mp/manager_dict"]),
    Goal("W11", "four_clients_ops_per_s", ["manager"], 4.0, ["mp/manager_dict"]),
    Goal("W11", "one_client_ops_per_s", ["manager_batches"], 27.0, ["mp/manager_dict"]),
    Goal("W11n", "rate_256", ["manager"], 0.5, []),
    Goal("W11n", "cpu_growth", ["manager"], 2.0, []),
    Goal("W11s", "p50_us", ["manager"], 1.2, ["limits/stream_tokio"]),
    Goal("W12", "private_kib", ["pool"], 256.0, []),
    Goal("W12", "pss_kib", ["pool"], 512.0, []),
    Goal("W13", "error_ms", ["pool"], 3.0, ["limits/pidfd_tokio"]),
    Goal("W13", "next_task_ms", ["pool"], 1.0, ["procspawn/pool"]),
    Goal("W14", "msgs_per_s", ["send"], 2.0, ["mp/connection"]),
    Goal("W15", "mib_per_s", ["send"], 1.3, ["mp/connection"]),
    Goal("W16", "rate_256", ["chunk_default", "chunk_1", "async_1000", "async_100000"], 0.6, []),
    Goal("W16", "cpu_growth", ["chunk_default", "chunk_1", "async_1000", "async_100000"], 1.5, []),
    # The peer is within the figure: see the README.
    Goal("W17", "ratio", LARGE_VALUES, 3.0, []),
    Goal("W17", "trip", [*LARGE_VALUES, "string_1_mib", "list_f64_1_mib"], 1.3, []),
    Goal("W17", "ratio", ["arrays"], 1 / 4, []),
    Goal("W17", "ratio", ["pairs", "structs"], 1.0, []),
    Goal("W17", "ratio", ["pairs_small", "structs_small"], 1.25, []),
    Goal("W17", "ratio", ["strings", "map"], 1.2, []),
    Goal("W17", "ratio", ["eight", "eight_small"], 1.5, []),
    Goal("W17", "ratio", ["queue_of_eight"], 1.15, []),
    Goal("W20", "last_ms", ["event"], 3.0, ["limits/futex"]),
    # The peer, tokio's mutex, is within the figure.
    *[Goal("W21", f"{runtime}_{tasks}", ["lock"], 1.5, []) for runtime in ("current", "multi") for tasks in (2, 10, 1000)],
    Goal("W5", "msgs_per_s", ["bounded_named"], 1 / 1.15, ["multiprocess/bounded"]),
]


def place(case, workload):
    """The workload and contender of a case as goals name it."""
    other, _, contender = case.rpartition(":")
    return other or workload, contender


def cases(workload, references_only):
    """What the goals of a workload need to run."""
    goals = [goal for goal in GOALS if goal.workload == workload]
    references = {place(case, workload) for goal in goals for case in goal.references}
    if references_only:
        return sorted(case for case in references if not case[1].startswith(OURS))
    return sorted(references | {(workload, f"{OURS}/{variant}") for goal in goals for variant in goal.variants})


def sample(cases, rounds):
    """Each case's answers, round by round, and how many of them other programs disturbed."""
    samples, disturbed = {case: [] for case in cases}, 0
    for round_number in range(rounds):
        for case in random.sample(cases, len(cases)):
            (workload, contender), about = case, bench.WORKLOADS[case[0]]
            bench.progress(f"{workload} round {round_number + 1}/{rounds} {contender}")
            program, variant = contender.split("/")
            words = about.cases_of or workload, variant
            answer, noisy = bench.ask_in_quiet(bench.PROGRAMS[program], *words, busy=about.busy)
            samples[case].append(answer)
            disturbed += noisy
    bench.progress("")
    return samples, disturbed


def best(answers, goal):
    """The best figure among contenders of one round, or None if one of them failed."""
    figures = [answer and answer[goal.metric] for answer in answers]
    return None if None in figures else (max if goal.more_is_better else min)(figures)


def verdicts(goal, samples):
    """A table row, and whether the goal is met, for each variant."""
    references = [samples[place(case, goal.workload)] for case in goal.references]
    theirs = [best(answers, goal) for answers in zip(*references)]
    for variant in goal.variants:
        ours = [answer and answer[goal.metric] for answer in samples[goal.workload, f"{OURS}/{variant}"]]
        theirs = theirs or [1.0] * len(ours)
        ratios = [our / their for our, their in zip(ours, theirs) if our and their]
        ratio, complete = bench.median(ratios), len(ratios) == len(ours)
        met = complete and (ratio >= goal.factor if goal.more_is_better else ratio <= goal.factor)
        verdict = "met" if met else "MISSED" if complete else "FAILED"
        asked = f"{'≥' if goal.more_is_better else '≤'} {goal.factor:g}"
        if goal.references:
            asked += f" × {' or '.join(goal.references)}"
        compared = theirs if goal.references else []
        figures = [bench.cell(values) if any(values) else "" for values in (ratios, ours, compared)]
        yield [goal.workload, variant, goal.metric, asked, *figures, verdict], met


def print_table(header, rows):
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(row)} |")


def reference_rows(workload, samples):
    for (_, contender), answers in samples.items():
        goals = [goal for goal in GOALS if any(place(c, workload) == (workload, contender) for c in goal.references)]
        for key in sorted({goal.metric for goal in goals if goal.workload == workload}):
            yield [workload, contender, key, bench.cell(bench.of(answers, key))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workloads = list(dict.fromkeys(goal.workload for goal in GOALS))
    parser.add_argument("--only", default=",".join(workloads), help="workloads, comma-separated")
    parser.add_argument("--rounds", type=int, help="interleaved repeats (as bench.py)")
    parser.add_argument("--references", action="store_true", help="measure only what the goals refer to")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(workloads):
        parser.error(f"no goals for {', '.join(sorted(unknown))}")

    rows, all_met, runs, disturbed = [], True, 0, 0
    for workload in args.only.split(","):
        needed = cases(workload, args.references)
        absent = {p for _, c in needed if not pathlib.Path(bench.PROGRAMS[p := c.split("/")[0]][0]).exists()}
        if absent:
            sys.exit(f"not built: {', '.join(sorted(absent))}")
        rounds = args.rounds or bench.WORKLOADS[workload].rounds
        samples, noisy = sample(needed, rounds)
        runs, disturbed = runs + rounds * len(needed), disturbed + noisy
        if args.references:
            rows += reference_rows(workload, samples)
            continue
        for goal in (goal for goal in GOALS if goal.workload == workload):
            for row, met in verdicts(goal, samples):
                rows.append(row)
                all_met = all_met and met

    print(f"Median (min–max) over rounds; {disturbed} of {runs} runs disturbed by other programs.\n")
    if args.references:
        print_table(["workload", "contender", "metric", "figure"], rows)
    else:
        print_table(["workload", "variant", "metric", "goal", "ratio", "ours", "reference", ""], rows)
    sys.exit(not all_met)


if __name__ == "__main__":
    main()
