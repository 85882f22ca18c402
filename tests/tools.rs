//! Programs under tools, and built for them: valgrind, and compilers that count what runs.

use multiprocess::{self as mp, ErrorKind, Event, Manager, Pool, Process, Queue};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

mod common;
use common::Deadline;

mp::test_support!();

/// Valgrind makes everything some fifty times slower, and reads the symbols of the program first.
const LIMIT: Duration = Duration::from_secs(110);

fn text_of(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn under_valgrind_a_parent_has_children_queues_and_a_pool_and_there_is_no_error() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        return eprintln!("SKIPPED: there is no valgrind here");
    }
    let _deadline = Deadline::after(LIMIT);
    let mut command = Command::new("valgrind");
    command.args(["-q", "--error-exitcode=99"]).arg(std::env::current_exe().unwrap());
    let output = command.args(["valgrind_scenario", "--exact", "--ignored", "--nocapture"]).output().unwrap();
    let text = text_of(&output);
    assert!(output.status.success() && text.contains("all of it has run") && !text.contains("uninitialised"), "{text}");
}

/// They are drawn by `benches/peers/growth.py`, of what `cargo bench --bench growth` prints.
#[test]
fn the_plots_of_growth_are_drawn_from_its_figures_and_nothing_else_is() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("growth-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let figures = directory.join("figures");
    let draw = |text: &str| {
        std::fs::write(&figures, text).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/growth.py");
        Command::new("python3").arg(script).arg("--from").arg(&figures).arg("--to").arg(&directory).output()
    };
    let good = "workers\tmap, an item\t2\t1e-7\nworkers\tmap, an item\t1024\t1.5e-7\nworkers\tapply\t2\t3e-6\n";
    let Ok(output) = draw(good) else {
        return eprintln!("SKIPPED: there is no python3 here");
    };
    assert!(output.status.success(), "{}", text_of(&output));
    let picture = std::fs::read_to_string(directory.join("workers.svg")).unwrap();
    assert_eq!((picture.matches("<polyline").count(), picture.matches("<circle").count()), (2, 3), "{picture}");
    for text in ["map, an item", "apply", "100 ns", "10 µs", "1024"] {
        assert!(picture.contains(text), "{text}: {picture}");
    }
    assert_eq!(std::fs::read_to_string(directory.join("figures.tsv")).unwrap(), good);
    for bad in ["", "workers\tx\t2", "nothing\tx\t2\t1", "workers\tx\t0\t1", "workers\tx\t2\t0", "workers\tx\t2\tnan"] {
        let output = draw(bad).unwrap();
        assert!(!output.status.success(), "{bad:?}: {}", text_of(&output));
    }
    let _ = std::fs::remove_dir_all(directory);
}

fn of_a_cluster(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/cluster").join(file)
}

/// A directory that goes with its test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_unit_of_a_clusters_host_is_taken_by_systemd() {
    let _deadline = Deadline::after(LIMIT);
    let scratch = Scratch::new("unit");
    let verify = |text: &str| {
        let file = scratch.0.join("thumbs.service");
        std::fs::write(&file, text).unwrap();
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(file).output()
    };
    let least =
        verify("[Unit]\nWants=network-online.target\nAfter=network-online.target\n[Service]\nExecStart=/bin/true\n");
    if !least.is_ok_and(|output| output.status.success()) {
        return eprintln!("SKIPPED: there is no systemd-analyze here, or it verifies no unit");
    }
    // Units of this machine that it wants may have faults of their own.
    let faults = |output: &std::process::Output| text_of(output).matches("thumbs.service:").count();
    let unit = std::fs::read_to_string(of_a_cluster("thumbs.service")).unwrap();
    // The program is not installed here.
    let installed = "ExecStart=/usr/local/bin/thumbs serve";
    assert!(unit.contains(installed), "{unit}");
    let output = verify(&unit.replace(installed, "ExecStart=/bin/true serve")).unwrap();
    assert!(output.status.success() && faults(&output) == 0, "{}", text_of(&output));
    let output = verify(&unit.replace("KillMode=mixed", "KilMode=mixed")).unwrap();
    assert!(text_of(&output).contains("KilMode"), "it does not tell of errors: {}", text_of(&output));
}

/// A job of Slurm is a script of bash whose first comments are options of `sbatch`.
#[test]
fn the_script_for_slurm_starts_a_host_on_each_node() {
    let _deadline = Deadline::after(LIMIT);
    let (scratch, script) = (Scratch::new("slurm"), of_a_cluster("thumbs.slurm"));
    let text = std::fs::read_to_string(&script).unwrap();
    let head = text.lines().take_while(|line| line.starts_with('#'));
    let options: Vec<_> = head.filter_map(|line| line.strip_prefix("#SBATCH ")).collect();
    assert_eq!(options.len(), text.matches("#SBATCH").count(), "one behind the first command is ignored");
    assert!(options.iter().all(|option| option.starts_with("--") && option.contains('=')), "{options:?}");
    if Command::new("bash").arg("--version").output().is_err() {
        return eprintln!("SKIPPED: there is no bash here");
    }
    let checked = Command::new("bash").arg("-n").arg(&script).output().unwrap();
    assert!(checked.status.success() && checked.stderr.is_empty(), "{}", text_of(&checked));
    // A dry run: it says what it was to start.
    let srun = scratch.0.join("srun");
    std::fs::write(&srun, "#!/bin/sh\nprintf '%s ' \"$@\"\n").unwrap();
    std::fs::set_permissions(&srun, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", scratch.0.display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash").arg(&script).env("PATH", path).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "--kill-on-bad-exit=0 ./thumbs serve ", "{}", text_of(&output));
    match Command::new("sbatch").arg("--test-only").arg(&script).output() {
        Ok(output)
            if !["nable to contact", "configuration source"].iter().any(|why| text_of(&output).contains(why)) =>
        {
            assert!(output.status.success(), "{}", text_of(&output));
        }
        _ => eprintln!("SKIPPED in part: there is no sbatch here, which knows its options"),
    }
}

#[test]
fn the_manifest_of_a_clusters_hosts_is_one_of_kubernetes() {
    let _deadline = Deadline::after(LIMIT);
    let manifest = of_a_cluster("thumbs.yaml");
    let read = "import json, sys, yaml\nprint(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    match Command::new("python3").args(["-c", read]).arg(&manifest).output() {
        Ok(output) if output.status.success() => {
            let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let (spec, pod) = (&all[0]["spec"], &all[0]["spec"]["template"]);
            assert_eq!((all.as_array().unwrap().len(), &all[0]["kind"]), (1, &"Deployment".into()));
            assert_eq!(spec["selector"]["matchLabels"], pod["metadata"]["labels"]);
            assert_eq!(pod["spec"]["containers"][0]["args"][0], "serve");
            let grace = pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
            assert!(grace > 30, "the program drains for 30 s");
        }
        Ok(output) if !String::from_utf8_lossy(&output.stderr).contains("No module named") => {
            panic!("{}", text_of(&output));
        }
        _ => eprintln!("SKIPPED: there is no python3 with the module yaml here"),
    }
}

#[tokio::test]
#[ignore = "the other test runs it, under valgrind"]
async fn valgrind_scenario() -> mp::Result<()> {
    let _deadline = Deadline::after(LIMIT);
    assert_eq!(Process::spawn(|a: u32, b: u32| a + b, (1, 2))?.await?, 3);
    let error = Process::spawn(|| -> u32 { panic!("on purpose") }, ())?.await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Panicked);
    let queue = Queue::bounded(2)?;
    let put = async |queue: Queue<Vec<u8>>| queue.put(vec![7; 100_000]).await.is_ok();
    let child = Process::spawn(put, (queue.clone(),))?;
    assert_eq!(queue.get().await?, vec![7; 100_000]);
    assert!(child.await?);
    let mut endless = Process::spawn(async || std::future::pending::<()>().await, ())?;
    endless.kill()?;
    assert!(!endless.wait().await?.success() && !endless.is_alive());
    let event = Event::new()?;
    let child = Process::spawn(|event: Event| event.set(), (event.clone(),))?;
    event.wait().await?;
    child.await?;
    let pool = Pool::new(1)?;
    assert_eq!(pool.apply(|n: u32| n + 1, (1,)).await?, 2);
    assert_eq!(pool.map(|n: u32| 2 * n, 0..5).await?, [0, 2, 4, 6, 8]);
    pool.shutdown(Duration::from_secs(30)).await;
    let manager = Manager::start().await?;
    let list = manager.list::<u32>().await?;
    list.extend(vec![1, 2]).await?;
    assert_eq!(list.to_vec().await?, [1, 2]);
    manager.shutdown().await?;
    println!("all of it has run");
    Ok(())
}

/// Calls whose failure the crate sees, unlike `tests/faults.rs` by the kernel's interface: also those that its dependencies make.
const INJECTED: [(&str, &str); 16] = [
    ("poll", "ENOMEM"),
    ("ppoll", "ENOMEM"),
    ("memfd_create", "EMFILE"),
    ("fallocate", "ENOSPC"),
    ("socketpair", "EMFILE"),
    ("sendmsg", "ENOBUFS"),
    ("recvmsg", "ENOMEM"),
    ("recvfrom", "ENOMEM"),
    ("eventfd2", "EMFILE"),
    ("epoll_ctl", "ENOMEM"),
    ("pidfd_open", "EMFILE"),
    ("pidfd_send_signal", "EAGAIN"),
    ("clone", "EAGAIN"),
    ("clone3", "EAGAIN"),
    ("fcntl", "EMFILE"),
    ("execve", "ENOMEM"),
];

/// The first `execve` is that of the program itself.
#[test]
fn single_calls_that_strace_lets_fail_end_in_a_result_or_an_error() {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    let can_trace = Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).status();
    if !can_trace.is_ok_and(|status| status.success()) {
        return eprintln!("SKIPPED: there is no strace here, or it may not trace");
    }
    let _deadline = Deadline::after(2 * LIMIT);
    let cases: Vec<_> = (2..=6).flat_map(|when| INJECTED.map(|(call, errno)| (call, errno, when))).collect();
    let (next, injected) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let one_after_the_other = || {
            while let Some(case) = cases.get(next.fetch_add(1, Relaxed)) {
                injected.fetch_add(fails_by_strace(*case), Relaxed);
            }
        };
        (0..4).for_each(|_| drop(scope.spawn(one_after_the_other)));
    });
    let injected = injected.into_inner();
    println!("{} cases, {injected} calls failed", cases.len());
    assert!(injected > cases.len() / 2, "{injected} of {} calls failed", cases.len());
}

/// The `when`-th such call of each thread fails; returns how many did. strace ends when all that it traces have ended.
fn fails_by_strace((call, errno, when): (&str, &str, u32)) -> usize {
    let case = format!("{call} number {when} fails with {errno}");
    let log = std::env::temp_dir().join(format!("multiprocess-strace-{}-{call}-{when}", common::alone::unique()));
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", &format!("trace={call}"), "-o"]).arg(&log);
    command.args(["-e", &format!("inject={call}:error={errno}:when={when}")]).arg(std::env::current_exe().unwrap());
    command.args(["strace_scenario", "--exact", "--ignored", "--nocapture"]);
    // It ends itself long before.
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = text_of(&output);
    assert!(output.status.success() && text.contains("each use has ended"), "{case}: {text}");
    let log_text = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(log).unwrap();
    log_text.matches("(INJECTED)").count()
}

#[test]
#[ignore = "the other test runs it, under strace"]
fn strace_scenario() {
    let _deadline = Deadline::after(Duration::from_secs(50));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return println!("no runtime; each use has ended") };
    runtime.block_on(async {
        // Each by itself: the failure of one is no reason to leave the others out.
        let uses: [Pin<Box<dyn Future<Output = mp::Result<()>>>>; 4] = [
            Box::pin(async { Process::spawn(|a: u32, b: u32| a + b, (1, 2))?.await.map(|sum| assert_eq!(sum, 3)) }),
            Box::pin(async {
                let queue = Queue::bounded(2)?;
                let put = async |queue: Queue<Vec<u8>>| queue.put(vec![7; 100_000]).await.is_ok();
                let mut child = Process::spawn(put, (queue.clone(),))?;
                child.wait().await?;
                queue.close();
                queue.get().await.map(|bytes| assert_eq!(bytes, vec![7; 100_000]))
            }),
            Box::pin(async {
                let pool = Pool::new(1)?;
                pool.map(|n: u32| 2 * n, 0..5).await.map(|all| assert_eq!(all, [0, 2, 4, 6, 8]))?;
                pool.shutdown(Duration::from_secs(5)).await;
                Ok(())
            }),
            Box::pin(async {
                let manager = Manager::start().await?;
                let list = manager.list::<u32>().await?;
                list.extend(vec![1, 2]).await?;
                list.to_vec().await.map(|all| assert_eq!(all, [1, 2]))?;
                manager.shutdown().await
            }),
        ];
        for this in uses {
            // 10 s on a machine that has nothing else to do.
            let this = tokio::time::timeout(Duration::from_secs(20), this).await.expect("it ends in time");
            println!("{:?}", this.map_err(|error| error.to_string()));
        }
    });
    drop(runtime);
    println!("each use has ended");
}

/// Where the libraries are that were built for the tests.
fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_path_buf()
}

/// This crate as it was built for the tests, the newest first: one that is older may have been built beside other libraries
/// than there are now.
fn built_crates() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(libraries()).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("libmultiprocess-") && name.ends_with(".rlib")
    });
    found.sort_by_key(|path| std::cmp::Reverse(path.metadata().unwrap().modified().unwrap()));
    found
}

fn rustc() -> Command {
    let mut rustc = Command::new(Path::new(env!("CARGO")).with_file_name("rustc"));
    rustc.args(["--edition", "2024", "-L"]).arg(format!("dependency={}", libraries().display()));
    rustc
}

fn has_compiler() -> bool {
    let has_one = rustc().arg("--version").output().is_ok_and(|output| output.status.success());
    if !has_one {
        eprintln!("SKIPPED: there is no rustc here");
    }
    has_one
}

fn new_folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("multiprocess-{name}-{}", common::alone::unique()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Compiles `source` against the library that was built for the tests.
fn compile_in(folder: &Path, name: &str, source: &str, flags: &[&str]) {
    let file = format!("{name}.rs");
    std::fs::write(folder.join(&file), source).unwrap();
    let mut said = String::new();
    for library in built_crates() {
        let mut rustc = rustc();
        rustc.arg(&file).args(flags).current_dir(folder);
        let output = rustc.arg("--extern").arg(format!("multiprocess={}", library.display())).output().unwrap();
        if output.status.success() {
            return;
        }
        said += &text_of(&output);
    }
    panic!("{said}");
}

/// A program.
fn compile(source: &str, name: &str, flags: &[&str]) -> PathBuf {
    let folder = new_folder(name);
    compile_in(&folder, "main", source, &[&["-o", "main"][..], flags].concat());
    folder.join("main")
}

/// Runs a program, whose lines are `name: what it found`.
fn found_by(program: &mut Command, name: &str) -> String {
    let output = program.output().unwrap();
    let text = text_of(&output);
    assert!(output.status.success(), "{text}");
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    found.unwrap_or_else(|| panic!("no line of {name}: {text}")).to_string()
}

/// A library that holds the crate, and functions of its own.
const LIBRARY: &str = r#"
use multiprocess::{self as mp, Process};

pub fn double(n: u32) -> u32 {
    2 * n
}

pub fn start() -> mp::Result<Process<u32>> {
    Process::spawn(double, (4,))
}
"#;

const WITH_LIBRARY: &str = r#"
use multiprocess::{self as mp, Manager, Pool, Process, StartMethod};

fn one() -> u32 {
    1
}

async fn forked() -> mp::Result<u32> {
    Process::spawn(one, ())?.await
}

async fn executed() -> mp::Result<u32> {
    Process::builder().start_method(StartMethod::Spawn).spawn(one, ())?.await
}

async fn pooled() -> mp::Result<u32> {
    Pool::new(1)?.apply(one, ()).await
}

async fn managed() -> mp::Result<()> {
    Manager::start().await?.create(one, ()).await.map(drop)
}

fn main() {
    mp::run(async {
        println!("library: {:?}", part::start().unwrap().await.unwrap());
        println!("forked: {}", forked().await.unwrap_err());
        println!("executed: {}", executed().await.unwrap_err());
        println!("pooled: {}", pooled().await.unwrap_err());
        println!("managed: {}", managed().await.unwrap_err());
    })
}
"#;

#[test]
fn a_function_that_is_not_in_the_dynamic_library_of_the_crate_is_an_error_that_names_it() {
    if !has_compiler() {
        return;
    }
    let _deadline = Deadline::after(LIMIT);
    let folder = new_folder("dylib");
    let dynamic = ["-C", "prefer-dynamic"];
    compile_in(&folder, "part", LIBRARY, &[&dynamic[..], &["--crate-type", "dylib"]].concat());
    compile_in(&folder, "main", WITH_LIBRARY, &[&dynamic[..], &["-L", ".", "--extern", "part=libpart.so"]].concat());
    let standard = rustc().args(["--print", "target-libdir"]).output().unwrap();
    let path = format!("{}:{}", String::from_utf8(standard.stdout).unwrap().trim(), folder.display());
    let found = |name: &str| found_by(Command::new(folder.join("main")).env("LD_LIBRARY_PATH", &path), name);
    assert_eq!(found("library"), "8", "what is in the same library runs");
    for name in ["forked", "executed", "pooled", "managed"] {
        let error = found(name);
        assert!(error.contains("lives in another dynamic library") && error.contains("`rlib`"), "{name}: {error}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

const ABORTS: &str = r#"
use multiprocess::{self as mp, Pool, Process, StartMethod};

fn fails() -> u32 {
    panic!("the disk is full")
}

async fn fails_later() -> u32 {
    fails()
}

fn main() {
    mp::run(async {
        let line = |name: &str, done: mp::Result<u32>| {
            let error = done.unwrap_err();
            println!("{name}: {:?} {error}", error.kind());
        };
        line("forked", Process::spawn(fails, ()).unwrap().await);
        line("later", Process::spawn(fails_later, ()).unwrap().await);
        let executed = Process::builder().start_method(StartMethod::Spawn);
        line("executed", executed.spawn(fails, ()).unwrap().await);
        let pool = Pool::new(1).unwrap();
        line("pooled", pool.apply(fails, ()).await);
        println!("after: {}", pool.apply(|| 5, ()).await.unwrap());
    })
}
"#;

const TWO_VERSIONS: &str = r#"
use multiprocess as first;

fn main() {
    first::run(async {
        println!("own: {}", first::Process::spawn(|| 1, ()).unwrap().await.unwrap());
        println!("before: {}", second::Process::spawn(|| 1, ()).map(drop).unwrap_err());
        second::init();
        println!("after: {}", second::Process::spawn(|| 1, ()).map(drop).unwrap_err());
        println!("still: {}", first::Process::spawn(|| 1, ()).unwrap().await.unwrap());
    })
}
"#;

/// The crate once more, as another version and for panics that abort, against the dependencies of the one that was built for
/// the tests. It is kept for the next test.
fn second_version() -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock();
    let first = built_crates().remove(0);
    let built = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libmultiprocess-second.rlib");
    if built(&kept) > built(&first) {
        return kept;
    }
    // The library names the files of those that it uses.
    let known = std::fs::read(first.with_extension("rmeta")).unwrap();
    let names: HashSet<&[u8]> = known.windows(17).filter(|word| word[0] == b'-').map(|word| &word[1..]).collect();
    let mut rustc = rustc();
    rustc.args(["--crate-type", "rlib", "--crate-name", "multiprocess", "--cap-lints", "allow", "-C", "panic=abort"]);
    rustc.args(["-C", "metadata=second", "-C", "extra-filename=-second"]).env("CARGO_PKG_VERSION", "0.0.1");
    for entry in std::fs::read_dir(libraries()).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let parts = file.strip_prefix("lib").and_then(|file| file.strip_suffix(".rlib")?.rsplit_once('-'));
        if let Some((name, _)) = parts.filter(|(_, hash)| names.contains(hash.as_bytes()))
            && name != "multiprocess"
        {
            rustc.arg("--extern").arg(format!("{name}={}", path.display()));
        }
    }
    let (source, folder) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs"), new_folder("second"));
    let output = rustc.arg(source).arg("--out-dir").arg(&folder).output().unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    std::fs::copy(folder.join(kept.file_name().unwrap()), &kept).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    kept
}

#[test]
#[ignore = "it compiles the crate a second time, which takes a minute"]
fn second_build_with_panics_that_abort_brings_the_message_of_each_panic() {
    if !has_compiler() {
        return;
    }
    let _deadline = Deadline::after(3 * LIMIT);
    let folder = new_folder("abort");
    std::fs::write(folder.join("main.rs"), ABORTS).unwrap();
    let mut rustc = rustc();
    rustc
        .args(["main.rs", "-C", "panic=abort", "--extern"])
        .arg(format!("multiprocess={}", second_version().display()));
    let output = rustc.current_dir(&folder).output().unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    let found = |name: &str| found_by(&mut Command::new(folder.join("main")), name);
    for name in ["forked", "later", "executed", "pooled"] {
        let error = found(name);
        assert!(error.starts_with("Panicked ") && error.contains("the disk is full"), "{name}: {error}");
    }
    assert_eq!(found("after"), "5", "another worker has taken its place");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
#[ignore = "it compiles the crate a second time, which takes a minute"]
fn second_build_in_one_program_is_named_as_the_cause_of_its_errors() {
    if !has_compiler() {
        return;
    }
    let _deadline = Deadline::after(3 * LIMIT);
    let (folder, second) = (new_folder("versions"), format!("second={}", second_version().display()));
    let flags = ["-o", "main", "-C", "panic=abort", "--extern", &second];
    compile_in(&folder, "main", TWO_VERSIONS, &flags);
    let found = |name: &str| found_by(&mut Command::new(folder.join("main")), name);
    assert_eq!((found("own"), found("still")), ("1".into(), "1".into()));
    for name in ["before", "after"] {
        let error = found(name);
        assert!(error.contains("2 copies of the crate") && error.contains("0.0.1"), "{name}: {error}");
        assert!(error.contains("cargo tree -d") && !error.contains("same build"), "{name}: {error}");
    }
    assert!(found("after").starts_with("another version of the crate"), "{}", found("after"));
    std::fs::remove_dir_all(folder).unwrap();
}

/// Each calls a function of its own so often that the number is found in what its process has written.
const COUNTED: &str = r#"
use multiprocess::{self as mp, Pool, Process};

fn call(times: u32) -> u32 {
    (0..times).for_each(|n| one(n));
    std::process::id()
}

#[inline(never)]
fn one(n: u32) {
    std::hint::black_box(n);
}

fn last() {
    call(600_011);
}

fn main() -> mp::Result<()> {
    mp::run(async {
        println!("500009 {}", Process::spawn(call, (500_009,))?.await?);
        println!("500029 {}", Process::spawn(async |times: u32| call(times), (500_029,))?.await?);
        let exec = Process::builder().start_method(mp::StartMethod::Spawn);
        println!("500041 {}", exec.spawn(call, (500_041,))?.await?);
        let pool = Pool::builder().workers(1).finalizer(last, ()).build()?;
        println!("1100068 {}", pool.apply(call, (500_057,)).await?);
        pool.shutdown(std::time::Duration::from_secs(20)).await;
        let manager = mp::Manager::start().await?;
        let object = manager.create(|| 500_069, ()).await?;
        println!("500069 {}", object.call(|times: &mut u32| call(*times), ()).await?);
        manager.shutdown().await
    })
}
"#;

/// What is in memory is what each process has counted, in words of 8 bytes.
#[test]
fn coverage_counters_of_each_kind_of_child_are_in_their_own_file() {
    if !has_compiler() {
        return;
    }
    let _deadline = Deadline::after(LIMIT);
    let program = compile(COUNTED, "counters", &["-C", "instrument-coverage"]);
    let folder = program.parent().unwrap();
    for named in [true, false] {
        let place = folder.join(if named { "named" } else { "default" });
        std::fs::create_dir(&place).unwrap();
        let mut command = Command::new(&program);
        command.current_dir(&place).env_remove("LLVM_PROFILE_FILE");
        if named {
            command.env("LLVM_PROFILE_FILE", place.join("of_%p.profraw"));
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text_of(&output));
        let files: Vec<PathBuf> = std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()).collect();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let (count, pid) = line.split_once(' ').unwrap();
            let file = files.iter().find(|path| path.to_string_lossy().ends_with(&format!("_{pid}.profraw")));
            let file = file.unwrap_or_else(|| panic!("{line}: none of {files:?}"));
            let count = count.parse::<u64>().unwrap().to_le_bytes();
            let bytes = std::fs::read(file).unwrap();
            assert!(bytes.chunks_exact(8).any(|word| word == count), "{line}: not in {file:?}");
        }
    }
    std::fs::remove_dir_all(folder).unwrap();
}

/// The compiler names one file for all processes (`default_%m.profraw`), into which each adds what it has counted.
#[test]
fn pgo_counters_of_each_kind_of_child_are_in_one_file() {
    if !has_compiler() {
        return;
    }
    let _deadline = Deadline::after(LIMIT);
    let place = std::env::temp_dir().join(format!("multiprocess-profile-{}", common::alone::unique()));
    let program = compile(COUNTED, "merged", &["-C", &format!("profile-generate={}", place.display())]);
    let output = Command::new(&program).env_remove("LLVM_PROFILE_FILE").output().unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    let of_each = [500_009, 500_029, 500_041, 500_057 + 600_011, 500_069_u64];
    let files: Vec<PathBuf> = std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let bytes = std::fs::read(&files[0]).unwrap();
    let all = of_each.iter().sum::<u64>().to_le_bytes();
    assert!(bytes.chunks_exact(8).any(|word| word == all), "the counts of some are not in {files:?}");
    std::fs::remove_dir_all(program.parent().unwrap()).unwrap();
    std::fs::remove_dir_all(place).unwrap();
}
