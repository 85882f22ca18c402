use super::{Program, status, temporary};
use crate::programs::{processes, until};
use rayon::prelude::*;
use rustix::process::Pid;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The log has so many MiB; by `MIB=1024` it has a GiB.
fn mib() -> u64 {
    std::env::var("MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(if cfg!(debug_assertions) { 48 } else { 256 })
}

type Route = [u64; 4];

type Routes<'a> = HashMap<&'a str, Route>;

fn add<'a>(mut routes: Routes<'a>, (path, more): (&'a str, Route)) -> Routes<'a> {
    let route = routes.entry(path).or_default();
    *route = [route[0] + more[0], route[1] + more[1], route[2] + more[2], route[3].max(more[3])];
    routes
}

fn parse(line: &str) -> (&str, Route) {
    let fields: Vec<_> = line.split(' ').collect();
    let [status, bytes, us] = [3, 4, 5].map(|n| fields[n].parse().unwrap());
    (fields[2], [1, u64::from(status >= 500), bytes, us])
}

/// What the program is to print, by `rayon` and in all the memory that it takes.
fn by_rayon(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let parts = text.par_lines().map(parse).fold(Routes::new, add);
    let whole = parts.reduce(Routes::new, |one, other| other.into_iter().fold(one, add));
    let routes = whole.into_iter().collect::<BTreeMap<_, _>>().into_iter();
    let lines =
        routes.map(|(path, [requests, failures, bytes, us])| format!("{path} {requests} {failures} {bytes} {us}\n"));
    lines.chain(["0 lines could not be read\n".into()]).collect()
}

fn generate(mib: u64, path: &Path, kills: usize) {
    let program = Program::start("log_aggregator", ["generate", &mib.to_string(), path.to_str().unwrap()]);
    let mut killed = 0;
    for n in 0..kills {
        let len = (n as u64 + 1) << 20;
        until("it writes", || std::fs::metadata(path).ok().filter(|file| file.len() > len));
        killed += usize::from(program.kill_a_worker(n));
    }
    program.finish();
    assert!(killed > 0 || kills == 0);
}

/// Its output, and the most memory that any of its processes had, in KiB.
fn aggregate(path: &Path, kills: usize) -> (String, u64) {
    let mut program = Program::start("log_aggregator", [path.to_str().unwrap()]);
    let stdout = program.child().stdout.take().unwrap();
    // It is read as it comes, as it may be more than a pipe holds.
    let stdout = std::thread::spawn(|| std::io::read_to_string(stdout).unwrap());
    let (mut peak, mut killed) = (0, 0);
    while !stdout.is_finished() {
        let own = Pid::from_child(program.child());
        let all = processes(program.child(), "").into_iter().chain([own]);
        peak = all.filter_map(|pid| status(pid, "VmHWM")).fold(peak, u64::max);
        if killed < kills {
            killed += usize::from(program.kill_a_worker(killed));
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    program.finish();
    assert!(killed > 0 || kills == 0);
    (stdout.join().unwrap(), peak)
}

#[test]
fn the_sums_are_those_of_rayon_though_workers_are_killed_and_memory_is_flat() {
    let (small, large) = (temporary("small.log"), temporary("large.log"));
    generate(4, &small, 0);
    generate(mib(), &large, 5);
    assert!(std::fs::metadata(&large).unwrap().len() >= mib() << 20);
    let (_, little) = aggregate(&small, 0);
    let (output, peak) = aggregate(&large, 5);
    let expected = by_rayon(&large);
    assert!(output == expected, "{output}\nand not\n{expected}");
    assert!(peak < little + (8 << 10), "{little} KiB for a small log, {peak} KiB for a large one");
    [small, large].iter().for_each(|path| std::fs::remove_file(path).unwrap());
}

#[test]
fn lines_that_cannot_be_read_are_counted_wherever_they_are() {
    let path = temporary("odd.log");
    // The second line ends where a block does, and so does none of the others; the last one has no end.
    let first = "10.0.3.7 GET /a 200 5 6\n";
    let long = format!("{}\n", "x".repeat((2 << 20) - first.len() - 1));
    let log =
        [first, &long, "10.0.3.7 GET /a 503 50 5\n", "\n", "10.0.3.7 GET /b 200 1 -1\n", "10.0.3.7 GET /b 200 1 1"]
            .concat();
    std::fs::write(&path, log).unwrap();
    assert_eq!(aggregate(&path, 0).0, "/a 2 1 55 6\n/b 1 0 1 1\n3 lines could not be read\n");
    std::fs::remove_file(&path).unwrap();
}
