//! No program ever becomes a second program: whatever `main` does before `run` or `init`, inside `#[tokio::main]`, and
//! with rights that the program's file gives. Each scenario is a whole program, run as a process of its own. Each of its
//! mains leaves a mark in a file, so that they can be counted, and the one after too many ends at once.
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

use multiprocess::{self as mp, ErrorKind, Manager, Pool, Process, Queue, SharedMemory, StartMethod};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

#[path = "common/alone.rs"]
mod alone;

/// A program: what its `main` does, given the number of its marks, and how many of them there are in the end.
struct Scenario {
    name: &'static str,
    program: fn(Main),
    mains: u64,
    how: How,
}

/// How it is started.
#[derive(Clone, Copy, PartialEq)]
enum How {
    Plainly,
    /// By the name of the dynamic loader.
    ByLoader,
    /// As the first process of a pid namespace.
    AsInit,
    /// From a copy that the user 12345 runs, and whose file gives rights.
    SetUser,
    SetGroup,
    WithCapability,
    /// From a copy that the same user runs, and whose file gives none.
    AsUser,
}

/// One run of `main`: the first is the program itself, the others are in processes that it started.
#[derive(Clone, Copy)]
struct Main(u64);

impl Main {
    fn is_first(self) -> bool {
        self.0 == 1
    }
}

macro_rules! scenarios {
    ($($name:ident $mains:literal $how:ident)*) => {
        &[$(Scenario { name: stringify!($name), program: $name, mains: $mains, how: How::$how }),*]
    };
}

const SCENARIOS: &[Scenario] = scenarios! {
    without_dev_children_start 2 Plainly
    with_a_dev_null_that_cannot_be_opened_children_start 2 Plainly
    without_proc_there_is_an_error 1 Plainly
    without_proc_in_the_started_process_there_is_an_error 2 Plainly
    with_a_cleared_environment_children_start 2 Plainly
    with_descriptor_0_closed_children_start 2 Plainly
    with_dev_null_on_descriptor_0_children_start 2 Plainly
    with_all_descriptors_closed_there_is_an_error 2 Plainly
    with_all_descriptors_closed_and_the_environment_cleared_there_is_an_error 2 ByLoader
    with_all_descriptors_replaced_there_is_an_error 2 Plainly
    a_daemonized_main_is_an_error 2 Plainly
    a_daemonized_main_is_an_error_where_it_is_init 2 AsInit
    a_main_that_daemonizes_after_init_has_children 2 Plainly
    a_main_that_reads_stdin_first_finds_its_end 2 Plainly
    a_slow_main_is_no_error 3 Plainly
    a_slow_main_is_a_warning_and_a_stopped_one_is_an_error 2 Plainly
    a_main_that_ends_is_an_error_with_its_status 2 Plainly
    a_main_that_is_killed_is_an_error_with_its_status 5 Plainly
    a_main_that_executes_itself_again_has_children 4 Plainly
    a_main_that_starts_its_program_again_is_an_error_there 3 Plainly
    a_main_that_closes_descriptors_and_executes_itself_is_an_error 3 Plainly
    a_main_that_has_them_closed_and_executes_itself_is_an_error 3 Plainly
    a_main_that_closes_descriptors_and_starts_its_program_again_is_an_error 3 Plainly
    a_main_that_empties_its_environment_closes_descriptors_and_executes_itself_is_an_error 4 Plainly
    a_main_that_does_so_by_the_loaders_name_is_an_error 4 ByLoader
    a_main_that_starts_another_program_first_has_children 2 Plainly
    a_main_that_becomes_another_user_is_an_error 2 Plainly
    a_main_whose_starter_is_gone_takes_no_role_from_another_process 2 Plainly
    children_start_this_program_as_one_of_its_own 0 Plainly
    children_in_a_multi_thread_runtime_start_this_program_as_one_of_its_own 0 Plainly
    a_program_run_by_the_loaders_name_has_children 3 ByLoader
    an_executed_child_that_cannot_take_its_role_reports_why 3 Plainly
    a_name_cleaner_that_cannot_take_its_role_reports_why 2 Plainly
    a_mark_without_a_role_ends_the_program_in_init 2 Plainly
    inside_a_multi_thread_runtime_everything_runs 0 Plainly
    inside_a_current_thread_runtime_everything_runs 5 Plainly
    without_init_a_runtime_makes_no_difference 1 Plainly
    a_set_user_id_program_has_children_that_gain_nothing 0 SetUser
    a_set_group_id_program_has_children_that_gain_nothing 0 SetGroup
    a_program_with_a_capability_has_children_that_gain_nothing 0 WithCapability
    a_set_user_id_program_takes_no_role_from_its_user 2 AsUser
    a_set_group_id_program_takes_no_role_from_its_user 2 AsUser
    a_program_with_a_capability_takes_no_role_from_its_user 2 AsUser
    a_marked_set_user_id_program_ends_in_init 2 AsUser
    a_marked_set_group_id_program_ends_in_init 2 AsUser
    a_set_user_id_program_ignores_the_variables_of_tests 1 SetUser
};

/// More mains than any scenario has.
const TOO_MANY: u64 = 100;
const DEADLINE: Duration = Duration::from_secs(60);
const USER: u32 = 12345;
const PASSED: &str = "the scenario has passed";
const SKIPPED: &str = "SKIPPED:";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let [_, word, name, marks] = &arguments[..]
        && word == "scenario"
    {
        let scenario = SCENARIOS.iter().find(|scenario| *name == scenario.name).expect("a scenario of this name");
        (scenario.program)(Main(leave_mark(Path::new(marks))));
        return ExitCode::SUCCESS;
    }
    if let [_, word, name, marks] = &arguments[..]
        && word == "as-init"
    {
        unshare(CloneFlags::CLONE_NEWPID).unwrap();
        let mut command = Command::new(&arguments[0]);
        command.arg("scenario").arg(name).arg(marks);
        return ExitCode::from(u8::from(!command.status().unwrap().success()));
    }
    let words: Vec<String> = arguments[1..].iter().map(|word| word.to_string_lossy().into_owned()).collect();
    if words.iter().any(|word| word == "--list") {
        if !words.iter().any(|word| word == "--ignored") {
            SCENARIOS.iter().for_each(|scenario| println!("{}: test", scenario.name));
        }
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = words.iter().filter(|word| !word.starts_with('-')).collect();
    let chosen = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let mut failed = 0;
    for scenario in SCENARIOS.iter().filter(|scenario| chosen(scenario.name)) {
        match run(scenario) {
            Ok(said) => println!("test {} ... ok{said}", scenario.name),
            Err(why) => {
                println!("test {} ... FAILED\n{why}", scenario.name);
                failed += 1;
            }
        }
    }
    println!("{failed} failed");
    ExitCode::from(u8::from(failed > 0))
}

/// One byte for each main. Too many of them end.
fn leave_mark(path: &Path) -> u64 {
    let mut file = std::fs::File::options().append(true).open(path).unwrap();
    file.write_all(b".").unwrap();
    let marks = file.metadata().unwrap().len();
    if marks > TOO_MANY {
        std::process::exit(99);
    }
    marks
}

fn run(scenario: &Scenario) -> Result<String, String> {
    let place = Place::new(scenario.name);
    let marks = place.0.join("marks");
    std::fs::write(&marks, "").unwrap();
    std::fs::set_permissions(&marks, PermissionsExt::from_mode(0o666)).unwrap();
    let Some(mut command) = command(scenario, &place, &marks) else {
        return Ok(String::new());
    };
    // Its output ends with the last process that came of it.
    let (mut read, write) = std::io::pipe().unwrap();
    command.stdout(write.try_clone().unwrap()).stderr(write).stdin(Stdio::piped()).env("RUST_BACKTRACE", "0");
    let mut process = command.spawn().unwrap();
    drop(command);
    // Most do not read it.
    let _ = process.stdin.take().unwrap().write_all(b"a line for the first one\n");
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        read.read_to_end(&mut text).unwrap();
        let _ = send.send(String::from_utf8_lossy(&text).into_owned());
    });
    let text = receive.recv_timeout(DEADLINE);
    if text.is_err() {
        let _ = process.kill();
    }
    let _ = process.wait();
    let mains = std::fs::metadata(&marks).unwrap().len();
    let Ok(text) = text else { return Err(format!("not done after {DEADLINE:?}; {mains} mains")) };
    if let Some(why) = text.lines().find(|line| line.starts_with(SKIPPED)) {
        eprintln!("{}: {why}", scenario.name);
        return Ok(format!(" ({why})"));
    }
    // Said once, where it is true.
    let is_slow = usize::from(scenario.name.contains("multi_thread"));
    let says_slow = ["the fork server has threads", " [fork-server-has-threads]\n"]
        .iter()
        .all(|words| text.matches(words).count() == is_slow);
    let is_late =
        text.contains("has not reached `multiprocess::run` or `init` after 10 s") && text.contains(" [slow-main]\n");
    let is_right = says_slow
        && (is_late || !scenario.name.contains("slow_main_is_a_warning"))
        && text.contains(PASSED)
        && (scenario.mains == mains || scenario.mains == 0 && mains < 40);
    if is_right { Ok(String::new()) } else { Err(format!("{mains} mains\n{text}")) }
}

fn command(scenario: &Scenario, place: &Place, marks: &Path) -> Option<Command> {
    let this = std::env::current_exe().unwrap();
    let skip = |why: &str| eprintln!("{}: {SKIPPED} {why}", scenario.name);
    let is_root = nix::unistd::geteuid().is_root();
    let mut word = "scenario";
    let mut command = match scenario.how {
        How::Plainly => Command::new(this),
        How::ByLoader => {
            let Some(loader) = loader() else {
                skip("no dynamic loader is where it is looked for");
                return None;
            };
            let mut command = Command::new(loader);
            command.arg(this);
            command
        }
        _ if !is_root => {
            skip("this needs root");
            return None;
        }
        How::AsInit => {
            word = "as-init";
            Command::new(this)
        }
        how => {
            let copy = place.copy(&this, how);
            let mut command = Command::new(copy);
            command.uid(USER).gid(USER);
            command
        }
    };
    if scenario.name.contains("ignores_the_variables") {
        command.env("MULTIPROCESS_KILL_AT", "put.written").env("MULTIPROCESS_REFUSE", place.0.join("refuse"));
        command.env("MULTIPROCESS_OLD_KERNEL", "1");
    }
    command.arg(word).arg(scenario.name).arg(marks);
    Some(command)
}

fn loader() -> Option<PathBuf> {
    ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"].iter().map(PathBuf::from).find(|path| path.exists())
}

/// A directory that everybody may read.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("multiprocess-roles-{}-{name}", alone::unique()));
        std::fs::create_dir_all(&path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        Self(path)
    }

    fn copy(&self, program: &Path, how: How) -> PathBuf {
        // Beside the one that is run, for those that start another one.
        for (name, mode) in [("plain", 0o755), ("set-user", 0o4755), ("set-group", 0o2755), ("capable", 0o755)] {
            let copy = self.0.join(name);
            std::fs::copy(program, &copy).unwrap();
            std::fs::set_permissions(&copy, PermissionsExt::from_mode(mode)).unwrap();
        }
        // CAP_NET_BIND_SERVICE, permitted and effective: `struct vfs_cap_data`, second version.
        let words = [0x0200_0001_u32, 1 << 10, 0, 0, 0];
        let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let flags = rustix::fs::XattrFlags::empty();
        let capable = self.0.join("capable");
        if let Err(error) = rustix::fs::setxattr(&capable, "security.capability", &value, flags) {
            eprintln!("{SKIPPED} this file system takes no capabilities: {error}");
        }
        self.0.join(match how {
            How::SetUser => "set-user",
            How::SetGroup => "set-group",
            How::WithCapability => "capable",
            _ => "plain",
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn passed() {
    println!("{PASSED}");
}

fn skipped(why: impl std::fmt::Display) {
    println!("{SKIPPED} {why}");
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn add(a: u64, b: u64) -> u64 {
    a + b
}

/// The rest of a program whose children start.
fn children_start() {
    mp::run(async {
        for _ in 0..3 {
            assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
        }
    });
    passed();
}

/// A process that ends before it has its role is an error by then: nobody waits for a limit of time.
const SOON: Duration = Duration::from_secs(9);

/// What `work` returns, which must not take longer than `limit`.
fn in_time<T>(limit: Duration, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = work();
    assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    done
}

/// The rest of a program none of whose children starts, as each process that is started for one ends for the same reason.
fn no_child_starts(why: &str) {
    no_child_starts_within(SOON, why);
}

fn no_child_starts_within(limit: Duration, why: &str) {
    mp::init();
    let error = in_time(limit, || Process::spawn(add, (1, 2)).unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Spawn);
    assert!(error.to_string().contains(why), "{error}");
    passed();
}

// Before `run`.

/// What is seen below `path` is gone, for this process and those that it starts. False where that may not be done.
fn hide(path: &str) -> bool {
    const NONE: Option<&str> = None;
    let hidden = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE))
        .and_then(|()| mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), NONE));
    if let Err(error) = hidden {
        skipped(format!("{path} cannot be hidden: {error}"));
    }
    hidden.is_ok()
}

fn without_dev_children_start(main: Main) {
    if !main.is_first() || hide("/dev") {
        assert!(!Path::new("/dev/null").exists());
        children_start();
    }
}

fn with_a_dev_null_that_cannot_be_opened_children_start(main: Main) {
    if main.is_first() {
        if !hide("/dev") {
            return;
        }
        std::fs::create_dir("/dev/null").unwrap();
    }
    assert!(!std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    children_start();
}

fn without_proc_there_is_an_error(_: Main) {
    if hide("/proc") {
        no_child_starts("/proc/self/exe");
    }
}

fn without_proc_in_the_started_process_there_is_an_error(main: Main) {
    if !main.is_first() {
        assert!(hide("/proc"));
    } else if unshare(CloneFlags::CLONE_NEWNS).is_err() {
        return skipped("/proc cannot be hidden");
    }
    no_child_starts("the fork server cannot start");
}

fn clear_environment() {
    // SAFETY: `main` has started no thread.
    std::env::vars_os().for_each(|(name, _)| unsafe { std::env::remove_var(name) });
}

fn with_a_cleared_environment_children_start(_: Main) {
    clear_environment();
    children_start();
}

fn with_descriptor_0_closed_children_start(_: Main) {
    nix::unistd::close(0).unwrap();
    children_start();
}

fn with_dev_null_on_descriptor_0_children_start(_: Main) {
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null").unwrap()).unwrap();
    children_start();
}

fn close_from(first: i32) {
    (first..1024).for_each(|fd| _ = nix::unistd::close(fd));
}

fn with_all_descriptors_closed_there_is_an_error(main: Main) {
    if !main.is_first() {
        close_from(3);
    }
    no_child_starts("the socket that its role comes over is closed");
}

fn with_all_descriptors_closed_and_the_environment_cleared_there_is_an_error(main: Main) {
    clear_environment();
    close_from(if main.is_first() { 3 } else { 0 });
    no_child_starts("the socket that its role comes over is closed");
}

fn with_all_descriptors_replaced_there_is_an_error(main: Main) {
    if !main.is_first() {
        close_from(3);
        (0..200).for_each(|_| std::mem::forget(std::fs::File::open("/etc/passwd").unwrap()));
    }
    no_child_starts("something else by now");
}

fn daemonize() {
    // SAFETY: this process has one thread.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Parent { .. } => std::process::exit(0),
        nix::unistd::ForkResult::Child => drop(nix::unistd::setsid().unwrap()),
    }
}

fn a_daemonized_main_is_an_error(_: Main) {
    daemonize();
    no_child_starts("`main` forks or daemonizes before it calls `multiprocess::run` or `init`");
}

/// The fork's parent is then the same one: the process that started both.
fn a_daemonized_main_is_an_error_where_it_is_init(main: Main) {
    if main.is_first() {
        assert_eq!(std::process::id(), 1);
    } else {
        daemonize();
    }
    no_child_starts("`main` forks or daemonizes before it calls `multiprocess::run` or `init`");
}

fn a_main_that_daemonizes_after_init_has_children(_: Main) {
    mp::init();
    daemonize();
    children_start();
}

fn a_main_that_reads_stdin_first_finds_its_end(main: Main) {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).unwrap();
    assert_eq!(text, if main.is_first() { "a line for the first one\n" } else { "" });
    children_start();
}

fn a_slow_main_is_no_error(main: Main) {
    if !main.is_first() {
        std::thread::sleep(Duration::from_millis(1500)); // What is slow.
    }
    mp::run(async {
        let builder = Process::builder().start_method(StartMethod::Spawn);
        assert_eq!(builder.spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
    });
    passed();
}

/// After ten seconds each.
fn a_slow_main_is_a_warning_and_a_stopped_one_is_an_error(main: Main) {
    if !main.is_first() {
        std::thread::sleep(Duration::from_secs(11)); // What is slow.
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP).unwrap();
    }
    no_child_starts_within(Duration::from_secs(40), "it is stopped");
}

fn a_main_that_ends_is_an_error_with_its_status(main: Main) {
    if !main.is_first() {
        std::process::exit(7);
    }
    no_child_starts("exit status: 7");
}

fn a_main_that_is_killed_is_an_error_with_its_status(main: Main) {
    if !main.is_first() {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
    }
    no_child_starts("signal: 9");
}

/// As a program does that wants another environment for itself.
fn a_main_that_executes_itself_again_has_children(_: Main) {
    if std::env::var_os("AGAIN").is_none() {
        let mut again = Command::new(std::env::current_exe().unwrap());
        let error = again.args(std::env::args_os().skip(1)).env("AGAIN", "1").exec();
        panic!("{error}");
    }
    // SAFETY: `main` has started no thread.
    unsafe { std::env::remove_var("AGAIN") };
    children_start();
}

/// This program once more, for the same scenario.
fn again() -> Command {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(std::env::args_os().skip(1)).env("AGAIN", "1");
    again
}

/// Whether this is such a process. Nothing shows it later.
fn is_again() -> bool {
    let is_again = std::env::var_os("AGAIN").is_some();
    // SAFETY: `main` has started no thread.
    unsafe { std::env::remove_var("AGAIN") };
    is_again
}

const REFUSED: Option<i32> = Some(91);

/// The program, the process that it starts, and what that starts.
fn a_main_that_starts_its_program_again_is_an_error_there(main: Main) {
    let is_again = is_again();
    if !main.is_first() && is_again {
        mp::init();
        unreachable!("it takes no role, and is not the program");
    }
    if main.is_first() {
        return children_start();
    }
    let output = again().output().unwrap();
    assert_eq!(output.status.code(), REFUSED, "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("before it calls `multiprocess::run` or `init`"), "{text}");
    children_start();
}

fn closes_and_executes_itself(main: Main, close: fn()) {
    if !main.is_first() && !is_again() {
        close();
        panic!("{}", again().exec());
    }
    no_child_starts("started or executed once more");
}

fn a_main_that_closes_descriptors_and_executes_itself_is_an_error(main: Main) {
    closes_and_executes_itself(main, || close_from(3));
}

fn a_main_that_has_them_closed_and_executes_itself_is_an_error(main: Main) {
    closes_and_executes_itself(main, || {
        // SAFETY: the call takes numbers, and sets a flag of descriptors.
        let done = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    });
}

fn a_main_that_closes_descriptors_and_starts_its_program_again_is_an_error(main: Main) {
    if main.is_first() {
        return no_child_starts("the socket that its role comes over is closed");
    }
    if !is_again() {
        close_from(3);
        assert_eq!(again().status().unwrap().code(), REFUSED);
    }
    mp::init();
    unreachable!("it takes no role");
}

/// As a program does that will have no environment: nothing but that shows it whether it has executed itself.
fn a_main_that_empties_its_environment_closes_descriptors_and_executes_itself_is_an_error(main: Main) {
    if std::env::vars_os().next().is_some() {
        close_from(if main.is_first() { 3 } else { 0 });
        let mut again = Command::new("/proc/self/exe");
        let mut arguments = std::env::args_os();
        again.arg0(arguments.next().unwrap()).args(arguments).env_clear();
        panic!("{}", again.exec());
    }
    no_child_starts("started or executed once more");
}

fn a_main_that_does_so_by_the_loaders_name_is_an_error(main: Main) {
    if std::env::vars_os().next().is_some() {
        close_from(if main.is_first() { 3 } else { 0 });
        let mut again = Command::new(loader().unwrap());
        again.args(std::env::args_os()).env_clear();
        panic!("{}", again.exec());
    }
    no_child_starts("started or executed once more");
}

fn a_main_that_starts_another_program_first_has_children(_: Main) {
    assert!(Command::new("/bin/true").status().unwrap().success());
    children_start();
}

const STRANGER: &str = "its role does not come from its parent, or comes from another user";

/// The role of one user is none for another.
fn a_main_that_becomes_another_user_is_an_error(main: Main) {
    if !nix::unistd::geteuid().is_root() {
        return skipped("this needs root");
    }
    let are_final = rustix::thread::no_new_privs().unwrap();
    if !main.is_first() && are_final {
        // A role of another user is none of more rights then.
        skipped("the started process has `no_new_privs`, as root has dropped capabilities here");
    } else if !main.is_first() {
        nix::unistd::seteuid(nix::unistd::Uid::from_raw(USER)).unwrap();
    }
    no_child_starts(STRANGER);
}

/// What was started takes no role from a process that only has the other end of its socket. It is inherited by this one, which sees its exit
/// code.
fn a_main_whose_starter_is_gone_takes_no_role_from_another_process(main: Main) {
    use nix::sys::wait::{WaitStatus, waitpid};
    if !main.is_first() {
        let heir: i32 = std::env::var("HEIR").unwrap().parse().unwrap();
        alone::until("its starter is gone", || nix::unistd::getppid().as_raw() == heir);
        mp::init();
        unreachable!("it takes no role");
    }
    // SAFETY: `main` has started no thread.
    unsafe { std::env::set_var("HEIR", std::process::id().to_string()) };
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    // SAFETY: this process has one thread.
    let starter = match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Parent { child } => child,
        nix::unistd::ForkResult::Child => {
            mp::init();
            let _ = Process::spawn(add, (1, 2));
            std::process::exit(1);
        }
    };
    let marks = std::env::args_os().nth(3).unwrap();
    let is_asleep = |(pid, _, state): &(u32, u32, char)| *pid as i32 == starter.as_raw() && *state == 'S';
    // It has sent all that it sends, and waits for the answer of the second main.
    alone::until("the starter waits", || {
        std::fs::metadata(&marks).unwrap().len() == 2 && alone::processes().iter().any(is_asleep)
    });
    let pid = rustix::process::Pid::from_raw(starter.as_raw()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let copy = |fd| rustix::process::pidfd_getfd(&pidfd, fd, rustix::process::PidfdGetfdFlags::empty()).ok();
    let kept: Vec<_> = (3..1024).filter_map(copy).collect();
    nix::sys::signal::kill(starter, nix::sys::signal::Signal::SIGKILL).unwrap();
    waitpid(starter, None).unwrap();
    let WaitStatus::Exited(_, code) = waitpid(None, None).unwrap() else { panic!("it was killed") };
    assert_eq!(code, 89);
    drop(kept);
    passed();
}

/// In a child: this program, with children of its own, as any other program has them.
fn starts_the_program() -> String {
    let output = again().output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let shown = std::env::var_os("MULTIPROCESS_STARTED").is_some_and(|value| !value.is_empty());
    assert!(!shown, "a child shows how it was started");
    String::from_utf8(output.stdout).unwrap()
}

async fn children_start_the_program() {
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        let said = Process::builder().start_method(method).spawn(starts_the_program, ()).unwrap().await.unwrap();
        assert!(said.contains(PASSED), "{said}");
    }
    passed();
}

fn children_start_this_program_as_one_of_its_own(_: Main) {
    let is_again = is_again();
    mp::init();
    if is_again {
        return children_start();
    }
    block_on(children_start_the_program());
}

fn children_in_a_multi_thread_runtime_start_this_program_as_one_of_its_own(_: Main) {
    let is_again = is_again();
    if is_again {
        return children_start();
    }
    in_many_threads(|| Box::pin(children_start_the_program()));
}

fn a_program_run_by_the_loaders_name_has_children(_: Main) {
    mp::run(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let builder = Process::builder().start_method(method);
            assert_eq!(builder.spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
        }
    });
    passed();
}

fn an_executed_child_that_cannot_take_its_role_reports_why(_: Main) {
    if std::env::var_os("CLOSE").is_some() {
        close_from(3);
    }
    mp::init();
    block_on(async {
        let builder = Process::builder().start_method(StartMethod::Spawn).env("CLOSE", "1");
        let child = builder.spawn(add, (1, 2)).unwrap();
        let error = tokio::time::timeout(SOON, child).await.expect("soon after its end").unwrap_err();
        assert_eq!((error.kind(), error.exit_status().unwrap().code()), (ErrorKind::ProcessDied, Some(86)));
        assert!(error.to_string().contains("the socket that its role comes over is closed"), "{error}");
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
    });
    passed();
}

fn a_name_cleaner_that_cannot_take_its_role_reports_why(main: Main) {
    if !main.is_first() {
        close_from(3);
    }
    mp::init();
    let name = format!("multiprocess-roles-{}", alone::unique());
    let error = in_time(SOON, || SharedMemory::create(&name, 100).unwrap_err());
    assert!(error.to_string().contains("the socket that its role comes over is closed"), "{error}");
    passed();
}

/// Executes this program by a path that marks it.
fn marked(program: &Path) -> Command {
    let program = std::fs::File::open(program).unwrap();
    let copy = rustix::io::fcntl_dupfd_cloexec(&program, 900).unwrap();
    let mut command = Command::new(format!("/proc/self/./fd/./{}", copy.as_raw_fd()));
    std::mem::forget(copy);
    command.arg0("marked").args(std::env::args_os().skip(1));
    command
}

/// As if its descriptors were gone.
fn a_mark_without_a_role_ends_the_program_in_init(main: Main) {
    mp::init();
    assert!(main.is_first());
    let output = marked(&std::env::current_exe().unwrap()).output().unwrap();
    assert_eq!(output.status.code(), Some(86), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("the socket that its role comes over is closed"), "{text}");
    passed();
}

// Inside a runtime.

#[tokio::main]
async fn in_many_threads(rest: fn() -> std::pin::Pin<Box<dyn Future<Output = ()>>>) {
    mp::init();
    rest().await;
}

#[tokio::main(flavor = "current_thread")]
async fn in_one_thread(rest: fn() -> std::pin::Pin<Box<dyn Future<Output = ()>>>) {
    mp::init();
    rest().await;
}

fn inside_a_multi_thread_runtime_everything_runs(_: Main) {
    in_many_threads(|| Box::pin(everything()));
}

fn inside_a_current_thread_runtime_everything_runs(_: Main) {
    in_one_thread(|| Box::pin(everything()));
}

async fn later(a: u64, b: u64) -> u64 {
    tokio::time::sleep(Duration::from_millis(1)).await;
    a + b
}

fn blocks(numbers: Queue<u64>, sums: Queue<u64>) {
    let sum = numbers.blocking_get().unwrap() + numbers.blocking_get().unwrap();
    sums.blocking_put(sum).unwrap();
}

async fn forwards(from: Queue<u64>, to: Queue<u64>) {
    let task = tokio::spawn(async move { from.get().await.unwrap() });
    to.put(task.await.unwrap()).await.unwrap();
}

async fn has_children_of_its_own() -> u64 {
    let pool = Pool::new(2).unwrap();
    let sum: u64 = pool.map(|x: u64| x + 1, 0..10).await.unwrap().into_iter().sum();
    sum + Process::spawn(later, (1, 2)).unwrap().await.unwrap()
}

fn has_a_runtime_of_its_own() -> u64 {
    tokio::runtime::Runtime::new().unwrap().block_on(later(3, 4))
}

fn panics() {
    panic!("on purpose")
}

static LOADED: std::sync::OnceLock<u64> = std::sync::OnceLock::new();

async fn load() {
    let number = tokio::spawn(async { 7 }).await.unwrap();
    LOADED.set(number).unwrap();
}

async fn everything() {
    mp::preload(load).unwrap();
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        let builder = || Process::builder().start_method(method);
        assert_eq!(builder().spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
        assert_eq!(builder().spawn(later, (1, 2)).unwrap().await.unwrap(), 3);
        assert_eq!(builder().spawn(has_a_runtime_of_its_own, ()).unwrap().await.unwrap(), 7);
    }
    // An executed child has nothing of the fork server's; whether this one is forked the flavour decides.
    let loaded = Process::spawn(|| LOADED.get().copied(), ()).unwrap().await.unwrap();
    assert!(matches!(loaded, None | Some(7)), "{loaded:?}");

    let (numbers, sums) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let child = Process::spawn(blocks, (numbers.clone(), sums.clone())).unwrap();
    numbers.put(20).await.unwrap();
    numbers.put(22).await.unwrap();
    assert_eq!(sums.get().await.unwrap(), 42);
    child.await.unwrap();
    let child = Process::spawn(forwards, (sums.clone(), numbers.clone())).unwrap();
    sums.put(5).await.unwrap();
    assert_eq!(numbers.get().await.unwrap(), 5);
    child.await.unwrap();

    let error = Process::spawn(panics, ()).unwrap().await.unwrap_err();
    assert_eq!((error.kind(), error.panic().unwrap().message()), (ErrorKind::Panicked, "on purpose"));

    let pool = Pool::new(2).unwrap();
    assert_eq!(pool.map(|x: u64| x * x, 0..20).await.unwrap(), (0..20).map(|x| x * x).collect::<Vec<_>>());
    assert_eq!(pool.starmap(later, (0..20).map(|x| (x, x))).await.unwrap(), (0..20).map(|x| 2 * x).collect::<Vec<_>>());
    let read = |numbers: Queue<u64>| numbers.blocking_get().unwrap();
    let reads = pool.apply_async(read, (numbers.clone(),));
    numbers.put(9).await.unwrap();
    assert_eq!(reads.await.unwrap(), 9);
    pool.close();
    pool.join().await.unwrap();

    let manager = Manager::start().await.unwrap();
    let list = manager.list::<u64>().await.unwrap();
    let push = async |list: mp::ListProxy<u64>| list.push(2).await.unwrap();
    list.push(1).await.unwrap();
    Process::spawn(push, (list.clone(),)).unwrap().await.unwrap();
    assert_eq!(list.to_vec().await.unwrap(), [1, 2]);
    manager.shutdown().await.unwrap();

    assert_eq!(Process::spawn(has_children_of_its_own, ()).unwrap().await.unwrap(), 58);
    passed();
}

#[tokio::main]
async fn without_init() {
    let error = Process::spawn(add, (1, 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotInitialized);
    assert_eq!(Pool::new(1).unwrap_err().kind(), ErrorKind::NotInitialized);
    passed();
}

fn without_init_a_runtime_makes_no_difference(_: Main) {
    without_init();
}

// With rights that a file gives.

/// Real, effective and saved user and group, permitted capabilities.
fn rights() -> (Vec<u32>, u64) {
    let (users, groups) = (nix::unistd::getresuid().unwrap(), nix::unistd::getresgid().unwrap());
    let mut ids = [users.real, users.effective, users.saved].map(nix::unistd::Uid::as_raw).to_vec();
    ids.extend([groups.real, groups.effective, groups.saved].map(nix::unistd::Gid::as_raw));
    (ids, rustix::thread::capabilities(None).unwrap().permitted.bits())
}

/// Its children do their work, and none has what this process has not.
fn children_gain_nothing() {
    mp::run(async {
        let (ids, capabilities) = rights();
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            for _ in 0..3 {
                let child = Process::builder().start_method(method).spawn(rights, ()).unwrap();
                let (theirs, more) = child.await.unwrap();
                let is_mine = |at: usize| ids[at / 3 * 3..][..3].contains(&theirs[at]);
                assert!((0..6).all(is_mine), "{theirs:?} of {ids:?}");
                assert_eq!(more & !capabilities, 0, "{more:x} of {capabilities:x}");
            }
        }
        // Not even after this process has given everything up, whatever the file says.
        let (user, group) = (nix::unistd::Uid::from_raw(USER), nix::unistd::Gid::from_raw(USER));
        nix::unistd::setresgid(group, group, group).unwrap();
        nix::unistd::setresuid(user, user, user).unwrap();
        rustix::thread::set_capabilities(
            None,
            rustix::thread::CapabilitySets {
                effective: rustix::thread::CapabilitySet::empty(),
                permitted: rustix::thread::CapabilitySet::empty(),
                inheritable: rustix::thread::CapabilitySet::empty(),
            },
        )
        .unwrap();
        assert_eq!(Process::spawn(rights, ()).unwrap().await.unwrap(), (vec![USER; 6], 0));
    });
    passed();
}

fn a_set_user_id_program_has_children_that_gain_nothing(main: Main) {
    if main.is_first() && !nix::unistd::geteuid().is_root() {
        return skipped("this file system ignores set-user-ID");
    }
    children_gain_nothing();
}

fn a_set_group_id_program_has_children_that_gain_nothing(main: Main) {
    if main.is_first() && nix::unistd::getegid().as_raw() == USER {
        return skipped("this file system ignores set-group-ID");
    }
    children_gain_nothing();
}

fn a_program_with_a_capability_has_children_that_gain_nothing(main: Main) {
    if main.is_first() && rights().1 == 0 {
        return skipped("this file system gives no capabilities");
    }
    children_gain_nothing();
}

fn beside(name: &str) -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().join(name)
}

/// Tries to start a set-user-ID program from a copy of it that belongs to another user.
fn takes_no_role(program: &str) {
    mp::private::use_program(beside(program));
    mp::private::let_an_exec_give_rights();
    no_child_starts("its program's file gave it rights");
}

fn a_set_user_id_program_takes_no_role_from_its_user(_: Main) {
    takes_no_role("set-user");
}

fn a_set_group_id_program_takes_no_role_from_its_user(_: Main) {
    takes_no_role("set-group");
}

fn a_program_with_a_capability_takes_no_role_from_its_user(_: Main) {
    takes_no_role("capable");
}

fn marked_it_ends_in_init(main: Main, program: &str) {
    mp::init();
    assert!(main.is_first());
    let output = marked(&beside(program)).output().unwrap();
    assert_eq!(output.status.code(), Some(90), "{output:?}");
    passed();
}

fn a_marked_set_user_id_program_ends_in_init(main: Main) {
    marked_it_ends_in_init(main, "set-user");
}

fn a_marked_set_group_id_program_ends_in_init(main: Main) {
    marked_it_ends_in_init(main, "set-group");
}

/// Whoever starts it must not be able to kill it in the middle of what it does.
fn a_set_user_id_program_ignores_the_variables_of_tests(_: Main) {
    if !nix::unistd::geteuid().is_root() {
        return skipped("this file system ignores set-user-ID");
    }
    assert!(std::env::var_os("MULTIPROCESS_KILL_AT").is_some());
    mp::init();
    block_on(async {
        let queue = Queue::unbounded().unwrap();
        queue.put(1).await.unwrap();
        assert_eq!(queue.get().await.unwrap(), 1);
    });
    passed();
}
