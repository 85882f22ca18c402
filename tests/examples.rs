//! Every example runs, ends in time and prints what it promises.

mod programs;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

/// What an example prints.
enum Prints {
    Exactly(&'static str),
    /// These lines, in any order: they come from processes that run at the same time.
    Lines(&'static [&'static str]),
    /// That many lines, at least and at most, and what holds for each.
    Each(usize, usize, fn(&str) -> bool),
}
use Prints::*;

#[rustfmt::skip]
const EXPECTED: &[(&str, &[&str], Prints)] = &[
    ("cpu_count", &[], Each(1, 1, |line| line.parse().is_ok_and(|n: usize| n > 0))),
    ("cube", &[], Exactly("27\n")),
    ("daemon", &[], Each(1, 1_000, |line| line == "Running in background...")),
    ("double", &[], Exactly("10\n")),
    ("factorial", &[], Exactly("[1, 2, 6, 24, 120]\n")),
    ("five_workers", &[], Lines(&["Worker 0 is running", "Worker 1 is running", "Worker 2 is running",
                                  "Worker 3 is running", "Worker 4 is running"])),
    ("four_squares", &[], Exactly("[1, 4, 9, 16]\n")),
    ("hello_by_name", &[], Exactly("Hello from Process-1\n")),
    ("manager_list", &[], Exactly("[\"Hello\"]\n")),
    ("manager_three_workers", &[], Exactly("[\"data\", \"data\", \"data\"]\n")),
    ("one_process", &[], Exactly("Worker process is running\n")),
    ("pids", &[], Each(3, 3, |line| line.strip_prefix("Process ID: ").is_some_and(|pid| pid.parse::<u32>().is_ok()))),
    ("pipe_before_join", &[], Exactly("Hello from sender!\n")),
    ("pipe_between_children", &[], Exactly("Message from sender!\n")),
    ("pipe_hello", &[], Exactly("Hello from process\n")),
    ("power", &[], Exactly("25\n")),
    ("practice_factorials", &[], Exactly("1! = 1\n2! = 2\n3! = 6\n4! = 24\n5! = 120\n6! = 720\n7! = 5040\n8! = 40320\n\
                                          9! = 362880\n10! = 3628800\n")),
    ("producer_consumer", &[], Exactly("Consumer received: Hello from producer\n")),
    ("queue_after_join", &[], Exactly("Hello from worker!\n")),
    ("queue_before_join", &[], Exactly("Hello from Process!\n")),
    ("queue_between_children", &[], Exactly("Hello from Process\n")),
    ("queue_hello", &[], Exactly("Hello from process\n")),
    ("spawn_cost", &[], Each(5, 5, |line| line.contains(" us"))),
    ("squares", &[], Exactly("[1, 4, 9, 16, 25]\n")),
    ("three_tasks", &[], Lines(&["Task 0 is running", "Task 1 is running", "Task 2 is running"])),
    ("treesum", &["LICENSE-APACHE"], Exactly(
        "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4  LICENSE-APACHE\n")),
    ("worker_process", &[], Exactly("Worker process\n")),
];

#[test]
fn every_example_prints_what_it_promises() {
    for (name, arguments, prints) in EXPECTED {
        let output = programs::finish(programs::start(&programs::example(name), *arguments), Duration::from_secs(30));
        let stdout = String::from_utf8(output.stdout).unwrap();
        let as_promised = match prints {
            Exactly(text) => stdout == *text,
            Lines(lines) => sorted(stdout.lines()) == sorted(lines.iter().copied()),
            Each(least, most, holds) => (*least..=*most).contains(&stdout.lines().count()) && stdout.lines().all(holds),
        };
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && as_promised, "{name}: {}\n{stdout}\n{stderr}", output.status);
    }
}

#[test]
fn every_example_has_an_expectation() {
    let examples = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).unwrap();
    let there: BTreeSet<_> =
        examples.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_string()).collect();
    let expected: BTreeSet<_> = EXPECTED.iter().map(|(name, ..)| name.to_string()).collect();
    assert_eq!(there, expected);
}

fn sorted<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut lines: Vec<_> = lines.collect();
    lines.sort_unstable();
    lines
}
