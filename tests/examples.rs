//! Every example runs, ends in time and prints what it promises; those from Python, as their originals do.

mod programs;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Child;
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

/// What `mandelbrot` writes.
const PICTURE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/mandelbrot.png");

#[rustfmt::skip]
const EXPECTED: &[(&str, &[&str], Prints)] = &[
    ("array_update", &[], Exactly("[100, 2, 3]\n")),
    ("blackboard", &[], Exactly("[\"factor\", \"subject\"]: 6 lines, each answer whole: true\nthe sum is 63, of 3 marks\n")),
    ("cpu_count", &[], Each(1, 1, |line| line.parse().is_ok_and(|n: usize| n > 0))),
    ("cube", &[], Exactly("27\n")),
    ("daemon", &[], Each(1, 1_000, |line| line == "Running in background...")),
    ("double", &[], Exactly("10\n")),
    ("factorial", &[], Exactly("[1, 2, 6, 24, 120]\n")),
    ("family", &[], Exactly("there are [\"shouter\"]\nIS ANYBODY THERE?\nits parent is this process: true\nthe sum is 10\n\
                             a chain came back: true\nas an argument: Encode\nwith a limit of its own: true\nwith one for all that a future does: true\n\
                             Panicked: by mistake\nsignal: 9 (SIGKILL)\nit was restarted 2 times\n")),
    ("five_workers", &[], Lines(&["Worker 0 is running", "Worker 1 is running", "Worker 2 is running",
                                  "Worker 3 is running", "Worker 4 is running"])),
    ("four_squares", &[], Exactly("[1, 4, 9, 16]\n")),
    ("hello_by_name", &[], Exactly("Hello from Process-1\n")),
    ("lock_acquired", &[], Lines(&["Process 0 acquired lock", "Process 1 acquired lock", "Process 2 acquired lock"])),
    ("lock_and_value", &[], Exactly("Final value: 5\n")),
    ("lock_counter", &[], Exactly("Final Counter: 5\n")),
    ("lock_execution", &[], Exactly("Locked execution\nLocked execution\nLocked execution\n")),
    ("mail_room", &[], Exactly("4 letters came\nsomebody stamped the page: true\n\
                                3 answers go out, and \"Dear ???\" does not\n")),
    ("mandelbrot", &[PICTURE], Each(1, 1, |line| line.starts_with("24 tiles of 480 x 320 pixels by "))),
    ("manager_list", &[], Exactly("[\"Hello\"]\n")),
    ("manager_remote", &[], Exactly("[\"hello\", \"there\"]\n")),
    ("manager_three_workers", &[], Exactly("[\"data\", \"data\", \"data\"]\n")),
    ("one_process", &[], Exactly("Worker process is running\n")),
    ("pids", &[], Each(3, 3, |line| line.strip_prefix("Process ID: ").is_some_and(|pid| pid.parse::<u32>().is_ok()))),
    ("pipe_before_join", &[], Exactly("Hello from sender!\n")),
    ("pipe_between_children", &[], Exactly("Message from sender!\n")),
    ("pipe_hello", &[], Exactly("Hello from process\n")),
    ("power", &[], Exactly("25\n")),
    ("practice_factorials", &[], Exactly("1! = 1\n2! = 2\n3! = 6\n4! = 24\n5! = 120\n6! = 720\n7! = 5040\n8! = 40320\n\
                                          9! = 362880\n10! = 3628800\n")),
    ("practice_list", &[], Exactly("[10, 20, 30]\n")),
    ("producer_consumer", &[], Exactly("Consumer received: Hello from producer\n")),
    ("progress_bar", &[], Exactly("199999 numbers, at most 382 steps\n")),
    ("python_peer", &[], Exactly("Rust heard: {\"mean\": 3, \"median\": 2}\nRust heard: {\"mean\": 3.0, \"median\": 3.0}\n\
                                  Python heard: 4 primes below 10\nPython heard: 168 primes below 1000\n\
                                  Python heard: 78498 primes below 1000000\n")),
    ("queue_after_join", &[], Exactly("Hello from worker!\n")),
    ("queue_before_join", &[], Exactly("Hello from Process!\n")),
    ("queue_between_children", &[], Exactly("Hello from Process\n")),
    ("queue_hello", &[], Exactly("Hello from process\n")),
    ("spawn_cost", &[], Each(5, 5, |line| line.contains(" us"))),
    ("spelling", &[], Exactly("misspelt: [\"qquick\", \"jumsp\"]\nof the first page: [\"qquick\"]\nwords: [true, false]\n\
                               a task: true\nbegun at once, awaited later: [\"dogg\"]\nand of three pages: 2\n\
                               call 1 of one worker: true\ncall 2 of one worker: true\ncall 3 of one worker: true\n\
                               asked to stop, it did: true\nthrough the pipe: hello\nlost: 0, goodbyes: 3\nhere: true\n")),
    ("squares", &[], Exactly("[1, 4, 9, 16, 25]\n")),
    ("stations", &[], Exactly("station north is ready: true\nstation south is ready: true\nstation west is ready: true\neach has measured in both units\na station heard that a storm comes\n\
                               a station heard that a storm comes\na station heard that a storm comes\n\
                               3 lines of log from them\n")),
    ("three_tasks", &[], Lines(&["Task 0 is running", "Task 1 is running", "Task 2 is running"])),
    ("treesum", &["LICENSE-APACHE"], Exactly(
        "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4  LICENSE-APACHE\n")),
    ("unsafe_library", &[], Exactly("a good address: 5 bytes\na bad address: signal 11\nand again a good one: 5 bytes\n")),
    ("value_and_array", &[], Exactly("1 [2, 2, 3]\n")),
    ("value_final", &[], Exactly("Final value: 5\n")),
    ("value_five", &[], Exactly("5\n")),
    ("value_from_ten", &[], Exactly("11\n")),
    ("value_one", &[], Exactly("1\n")),
    ("web_service", &[], Exactly("a quick one: 200\nan endless one: 504\none that crashes: 500\n\
                                  50 crashes, meanwhile all health checks answered: true\nand a quick one: 200\n")),
    ("workshop", &[], Exactly("20 pieces, 0 with two prices, the price is [11, 11] now\ntidied 3 levels deep\n\
                               one key too many: true\n")),
    ("worker_process", &[], Exactly("Worker process\n")),
];

/// Programs with tests of their own: below, and in `examples/heavy/tests`.
const OTHERS: &[&str] = &["crawler", "log_aggregator", "log_listener", "primes", "sweep", "task_queue", "thumbnails"];

#[test]
fn every_example_prints_its_promised_output() {
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
fn the_web_service_ends_in_order_when_all_its_processes_are_terminated() {
    use std::io::{Read, Write};
    let mut service = programs::start(&programs::example("web_service"), ["127.0.0.1:0"]);
    let mut line = String::new();
    BufReader::new(service.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let mut request = std::net::TcpStream::connect(line.trim().strip_prefix("serving at http://").unwrap()).unwrap();
    request.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    request.write_all(b"GET /primes/1000 HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    request.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("168 primes below 1000"), "{answer}");
    kill_process_group(Pid::from_child(&service), Signal::TERM).unwrap();
    let output = programs::finish(service, Duration::from_secs(30));
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}

#[test]
fn every_example_has_an_expectation() {
    let names = |below: &str| {
        let examples = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(below)).unwrap();
        let files = examples.map(|entry| entry.unwrap().path());
        let sources = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
        sources.map(|path| path.file_stem().unwrap().to_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let mut there: BTreeSet<_> =
        ["examples", "examples/heavy", "examples/treesum", "examples/tutorials"].into_iter().flat_map(names).collect();
    assert!(there.remove("picture"), "a test");
    let expected: BTreeSet<_> = EXPECTED.iter().map(|(name, ..)| *name).chain(OTHERS.iter().copied()).collect();
    let expected: BTreeSet<_> = expected.into_iter().map(String::from).collect();
    assert_eq!(there, expected);
}

/// What the Python program prints of which an example is a port; nothing where there is no Python.
fn original(name: &str, arguments: &[&str]) -> Option<String> {
    let script = format!("{}/examples/{name}.py", env!("CARGO_MANIFEST_DIR"));
    let Ok(_) = std::process::Command::new("python3").arg("--version").output() else {
        eprintln!("NOT COMPARED: there is no python3 to run {script}");
        return None;
    };
    let arguments = [&script[..]].into_iter().chain(arguments.iter().copied());
    let output = programs::finish(programs::start(Path::new("python3"), arguments), Duration::from_secs(60));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Without the process that did it.
fn results(stdout: &str) -> Vec<&str> {
    sorted(stdout.lines().map(|line| line.split_once(" says that ").map_or(line, |(_, result)| result)))
}

/// Whether a process of this group is neither stopped nor at its end.
fn group_runs(group: Pid) -> bool {
    let stats = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("stat"));
    let stats = stats.filter_map(|path| std::fs::read_to_string(path).ok());
    stats.into_iter().any(|stat| {
        // State, parent, group.
        let mut rest = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        let state = rest.next().unwrap_or_default();
        let is_one = rest.nth(1) == Some(&group.as_raw_nonzero().to_string());
        is_one && !["T", "t", "Z", "X"].contains(&state)
    })
}

/// Kills a process of the program, if it has one of this name now: whether it had.
fn kill_one(program: &Child, name: &str) -> bool {
    // None ends meanwhile.
    let group = Pid::from_child(program);
    let is_running = kill_process_group(group, Signal::STOP).is_ok();
    programs::until("all of it stands still", || {
        // Again, for one that was being forked and has missed it.
        let _ = kill_process_group(group, Signal::STOP);
        (!group_runs(group)).then_some(())
    });
    let victim = programs::processes(program, name).first().copied();
    let is_killed = victim.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok());
    assert!(!is_running || kill_process_group(group, Signal::CONT).is_ok());
    is_killed
}

#[test]
fn task_queue_behaves_as_its_original_and_without_a_worker_too() {
    let program = programs::start(&programs::example("task_queue"), [""; 0]);
    let output = programs::finish(program, Duration::from_secs(30));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = String::from_utf8(output.stdout).unwrap();
    if let Some(python) = original("task_queue", &[]) {
        assert_eq!(results(&stdout), results(&python));
    }

    let without = programs::with_kills(|| {
        let mut program = programs::start(&programs::example("task_queue"), [""; 0]);
        let mut lines = BufReader::new(program.stdout.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        let is_killed = kill_one(&program, "Process-2");
        let without = [first].into_iter().chain(lines.map(Result::unwrap)).collect::<Vec<_>>().join("\n");
        let output = programs::finish(program, Duration::from_secs(30));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() != is_killed && stderr.contains("Process-2") == is_killed, "{stderr}");
        is_killed.then_some(without)
    });
    // A worker that was killed between the result and the commit leaves a task to be done twice; none is lost before that.
    let (expected, got): (BTreeSet<_>, BTreeSet<_>) =
        (results(&stdout).into_iter().collect(), results(&without).into_iter().collect());
    assert!(results(&without).len() == 30 && got.len() >= 29 && got.is_subset(&expected), "{without}");
}

#[test]
fn the_primes_are_those_of_the_original_though_workers_are_killed() {
    let stdout = programs::with_kills(|| {
        let mut program = programs::start(&programs::example("primes"), [""; 0]);
        let mut kill = || {
            programs::until("it has workers, or has ended", || {
                let is_there = !programs::processes(&program, "PoolWorker").is_empty();
                (is_there || program.try_wait().unwrap().is_some()).then_some(())
            });
            kill_one(&program, "PoolWorker")
        };
        let are_killed = kill() && kill();
        let output = programs::finish(program, Duration::from_secs(30));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        are_killed.then(|| String::from_utf8(output.stdout).unwrap())
    });
    assert!(results(&stdout).contains(&"999999999989 is a prime") && results(&stdout).contains(&"42 is no prime"));
    if let Some(python) = original("primes", &[]) {
        assert_eq!(results(&stdout), results(&python));
    }
}

#[test]
fn the_log_has_each_record_of_each_process_though_the_listener_is_killed() {
    let path = |name: &str| format!("{}/{}-{name}.log", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let (own, pythons) = (path("listener"), path("listener-of-python"));
    let log = programs::with_kills(|| {
        let _ = std::fs::remove_file(&own);
        let program = programs::start(&programs::example("log_listener"), [&own]);
        let kill = |count| {
            let has_lines = || std::fs::read_to_string(&own).ok().filter(|log| log.lines().count() >= count);
            programs::until("the log grows", has_lines);
            kill_one(&program, "listener")
        };
        let are_killed = kill(5) && kill(30);
        let output = programs::finish(program, Duration::from_secs(30));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        are_killed.then(|| std::fs::read_to_string(&own).unwrap())
    });
    let mut lines = results(&log);
    // A record that was written and not committed is written again: one for each time that the listener was killed.
    assert!((80..=82).contains(&lines.len()), "{} lines", lines.len());
    lines.dedup();
    assert_eq!(lines.len(), 80);
    if original("log_listener", &[&pythons]).is_some() {
        assert_eq!(lines, results(&std::fs::read_to_string(&pythons).unwrap()));
        std::fs::remove_file(&pythons).unwrap();
    }
    std::fs::remove_file(&own).unwrap();
}

fn sorted<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut lines: Vec<_> = lines.collect();
    lines.sort_unstable();
    lines
}
