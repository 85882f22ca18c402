//! The treesum example against the real `sha256sum`, Ctrl-C, kills and wrong usage.

mod programs;
#[path = "common/rounds.rs"]
mod rounds;

use programs::{example, finish, start};
use rounds::blocking_rounds;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(30);

/// A directory that goes with the test, holding a copy of the program whose path tells its processes apart.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let place = Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id())));
        // What a run that was aborted with this pid has left.
        let _ = fs::remove_dir_all(&place.0);
        fs::create_dir_all(place.tree()).expect("target/tmp can be written");
        let program = example("treesum");
        fs::hard_link(&program, place.program())
            .or_else(|_| fs::copy(&program, place.program()).map(drop))
            .expect("target/tmp can be written");
        place
    }

    fn tree(&self) -> PathBuf {
        self.0.join("tree")
    }

    fn program(&self) -> PathBuf {
        self.0.join("treesum")
    }

    fn start(&self, arguments: &[&OsStr]) -> Child {
        start(&self.program(), arguments)
    }

    fn run(&self, arguments: &[&OsStr]) -> Output {
        finish(self.start(arguments), DEADLINE)
    }

    /// A file as large as you like that takes no room; summing it takes as long as it would.
    fn hole(&self, len: u64) -> PathBuf {
        let path = self.tree().join("hole");
        File::create(&path).and_then(|file| file.set_len(len)).expect("target/tmp can be written");
        path
    }

    /// The pids of the program's processes, as far as `which` picks them.
    fn processes(&self, which: impl Fn(&Path) -> bool) -> Vec<Pid> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
        let ours = entries.filter(|process| fs::read_link(process.join("exe")).is_ok_and(|exe| exe == self.program()));
        let pids =
            ours.filter(|process| which(process)).filter_map(|process| process.file_name()?.to_str()?.parse().ok());
        pids.filter_map(Pid::from_raw).collect()
    }

    /// A worker that has this file open.
    fn worker_at(&self, file: &Path) -> Pid {
        let has_it = |process: &Path| {
            let fds = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
            fds.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == file))
        };
        until("a worker has the file open", || self.processes(has_it).first().copied())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        match look() {
            Some(found) => return found,
            None if started.elapsed() < DEADLINE => std::thread::sleep(Duration::from_millis(2)),
            None => panic!("not within {DEADLINE:?}: {what}"),
        }
    }
}

#[test]
fn output_equals_that_of_sha256sum_and_is_accepted_by_it() {
    let place = Place::new("odd-names");
    let tree = place.tree();
    let write = |name: &[u8], bytes: &[u8]| fs::write(tree.join(OsStr::from_bytes(name)), bytes).unwrap();
    fs::create_dir_all(tree.join("a/deep/er/nest")).unwrap();
    write(b"empty", b"");
    write(b"two words ", b"spaces");
    write(b"new\nline", b"newline");
    write(b"car\rriage", b"return");
    write(b"back\\slash", b"backslash");
    write(b"not\xfftext", b"bytes");
    write(b"-q", b"like an option");
    write(b"a-b", b"sorts before a/");
    write(b"a/deep/er/nest/egg", b"nested");
    write(b"a/large", &(0..5_000_000u32).map(|n| (n % 251) as u8).collect::<Vec<_>>());
    (0..700).for_each(|n| write(format!("a/deep/{n}").as_bytes(), &vec![b'x'; n]));
    std::os::unix::fs::symlink(tree.join("empty"), tree.join("link")).unwrap();
    std::os::unix::fs::symlink(&tree, tree.join("a/loop")).unwrap();
    let _socket = UnixListener::bind(tree.join("socket")).unwrap();
    assert!(Command::new("mkfifo").arg(tree.join("fifo")).status().unwrap().success());

    let output = place.run(&[tree.as_ref()]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("710 files") && stderr.contains("times as fast"), "{stderr}");

    let mut files = Vec::new();
    let mut directories = vec![tree];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap()) {
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => directories.push(entry.path()),
                kind if kind.is_file() => files.push(entry.path().into_os_string()),
                _ => {}
            }
        }
    }
    files.sort();
    let theirs = Command::new("sha256sum").arg("--").args(&files).output().unwrap();
    assert!(output.stdout == theirs.stdout, "ours:\n{}", String::from_utf8_lossy(&output.stdout));

    let mut check = Command::new("sha256sum");
    let mut check = check.args(["-c", "--strict", "--quiet"]).stdin(Stdio::piped()).spawn().unwrap();
    check.stdin.take().unwrap().write_all(&output.stdout).unwrap();
    assert!(check.wait().unwrap().success());
}

#[test]
fn a_file_that_cannot_be_read_is_a_line_and_exit_code_1_and_no_stop() {
    let place = Place::new("unreadable");
    fs::write(place.tree().join("good"), "good").unwrap();
    // Everybody may open this regular file and nobody can read its first byte, root neither.
    let unreadable = OsStr::new("/proc/self/mem");
    let missing = place.tree().join("missing");
    let output = place.run(&["-q".as_ref(), unreadable, missing.as_ref(), place.tree().as_ref()]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.lines().count() == 2 && stderr.contains("/proc/self/mem") && stderr.contains("missing"), "{stderr}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.lines().count() == 1 && stdout.ends_with("/good\n"), "{stdout}");
}

#[test]
fn stats_end_with_a_lane_for_each_worker_and_a_bar_for_each_time() {
    let place = Place::new("stats");
    place.hole(64 << 20);
    (0..200).for_each(|n| fs::write(place.tree().join(n.to_string()), vec![b'x'; 20_000]).unwrap());
    let output = place.run(&["-q".as_ref(), "--stats".as_ref(), "-j".as_ref(), "2".as_ref(), place.tree().as_ref()]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && output.stdout.split(|byte| *byte == b'\n').count() == 202, "{stderr}");
    let (lanes, bars) = stderr.split_once("how long batches of files took\n").expect("two pictures");
    let inside = |line: &str| line.split('|').nth(1).map(str::to_string);
    let lanes: Vec<_> = lanes.lines().filter(|line| line.contains('|')).collect();
    assert!((1..=2).contains(&lanes.len()), "{stderr}");
    for lane in &lanes {
        let drawn = inside(lane).unwrap();
        assert!(drawn.chars().count() == 60 && drawn.contains(|level| ('▁'..='█').contains(&level)), "{stderr}");
        assert!(lane.contains(" %, ") && lane.ends_with(" batches"), "{stderr}");
    }
    let batches = |line: &str| line.rsplit(' ').nth(1).unwrap().parse::<u32>().unwrap();
    let counts = bars.lines().map(|line| line.rsplit(' ').next().unwrap().parse::<u32>().unwrap());
    assert_eq!(counts.sum::<u32>(), lanes.iter().map(|line| batches(line)).sum::<u32>(), "{stderr}");
    assert!(
        bars.lines().any(|line| inside(line).unwrap() == "█".repeat(60)),
        "the longest is as long as can be: {stderr}"
    );
}

#[test]
fn a_killed_worker_costs_nothing_but_time() {
    let place = Place::new("killed-worker");
    let hole = place.hole(256 << 20);
    let child = place.start(&["-q".as_ref(), place.tree().as_ref()]);
    kill_process(place.worker_at(&hole), Signal::KILL).unwrap();
    let output = finish(child, DEADLINE);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.starts_with(b"a6d72ac7690f53be6ae46ba88506bd97302a093f7108472bd9efc3cefda06484  "));
}

#[test]
fn progress_goes_on_within_one_large_file() {
    let place = Place::new("large-file");
    place.hole(1 << 40);
    let mut child = place.start(&[place.tree().as_ref()]);
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map(|line| line.unwrap());
    let (sender, received) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.take_while(|line| sender.send(line.clone()).is_ok()).count());
    let summed =
        |line: &str| line.split(", ").nth(1).and_then(|part| part.split_once('/')).map(|(now, _)| now.to_owned());
    let (start, mut shown) = (Instant::now(), Vec::<String>::new());
    // On a busy machine it may not come far between two lines.
    while shown.len() < 2 || summed(&shown[0]) == summed(shown.last().unwrap()) {
        assert!(start.elapsed() < DEADLINE, "{shown:?}");
        shown.push(received.recv_timeout(DEADLINE).expect("a line of progress"));
    }
    assert!(shown.iter().all(|line| line.contains("0/1 files") && line.contains("/1024.00 GiB")), "{shown:?}");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(finish(child, DEADLINE).status.code(), Some(130));
}

/// Runs something that would take hours and ends it, and has `check` look at how it ended, after looking at what it left.
fn interrupted(name: &str, end: impl Fn(Pid), check: impl Fn(Output)) {
    // One at a time, as each takes all CPUs.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let place = Place::new(name);
    let hole = place.hole(1 << 40);
    let interrupt = || {
        let child = place.start(&["-q".as_ref(), "-j".as_ref(), "2".as_ref(), place.tree().as_ref()]);
        place.worker_at(&hole);
        let started = Instant::now();
        end(Pid::from_child(&child));
        let output = finish(child, DEADLINE);
        until("no process of it is left", || place.processes(|_| true).is_empty().then_some(()));
        let took = started.elapsed();
        assert!(output.stdout.is_empty());
        check(output);
        took
    };
    blocking_rounds(interrupt, |took| *took < Duration::from_secs(1));
}

fn ends_quietly(output: Output, code: i32) {
    assert_eq!((output.status.code(), &*output.stderr), (Some(code), &b""[..]));
}

#[test]
fn an_interrupt_ends_it_at_once_with_130_and_nothing_left() {
    let end = |pid| kill_process(pid, Signal::INT).unwrap();
    interrupted("interrupt", end, |output| ends_quietly(output, 130));
}

#[test]
fn ctrl_c_in_a_terminal_goes_to_the_workers_too_and_changes_nothing() {
    let end = |group| kill_process_group(group, Signal::INT).unwrap();
    interrupted("ctrl-c", end, |output| ends_quietly(output, 130));
}

#[test]
fn sigterm_to_all_its_processes_ends_it_at_once_with_143() {
    let end = |group| kill_process_group(group, Signal::TERM).unwrap();
    interrupted("terminate", end, |output| ends_quietly(output, 143));
}

#[test]
fn killed_it_leaves_nothing_either() {
    let end = |pid| kill_process(pid, Signal::KILL).unwrap();
    interrupted("killed", end, |output| assert_eq!(output.status.signal(), Some(9)));
}

#[test]
fn wrong_usage_is_exit_code_2_and_the_usage_on_stderr() {
    let place = Place::new("usage");
    for arguments in [&[][..], &["-q"], &["-j", "0", "."], &["-j"], &["--stats"], &["--surprise", "."]] {
        let output = place.run(&arguments.iter().map(OsStr::new).collect::<Vec<_>>());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains("usage: treesum"), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty());
    }
}
