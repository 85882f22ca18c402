//! What the tests of queues and pipes share: deadlines, counts of what a process holds, random numbers.
#![allow(dead_code, unused_imports, unused_macros)] // No file uses all of it.

pub mod alone;
pub mod pool;
pub mod quiet;
pub mod rounds;

use futures::FutureExt;
use multiprocess::{Function, Manager, Process, debug};
pub use rounds::{blocking_rounds, rounds};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(20);

/// Nothing here may hang.
#[track_caller]
pub fn within<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let place = std::panic::Location::caller();
    async move { tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not done in time: {place}")) }
}

/// Ends the whole test program if it is not dropped in time: for tests that block.
pub struct Deadline(#[expect(dead_code, reason = "its drop tells")] mpsc::Sender<()>);

impl Deadline {
    pub fn start() -> Self {
        Self::after(2 * PATIENCE)
    }

    pub fn after(limit: Duration) -> Self {
        let (sender, receiver) = mpsc::channel();
        let name = std::thread::current().name().unwrap_or("a test").to_string();
        std::thread::spawn(move || {
            if receiver.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                quiet::give_back();
                // Not by `eprintln`, whose text the harness captures, and loses when the program aborts.
                let _ = rustix::io::write(rustix::stdio::stderr(), format!("{name} was not done in time\n").as_bytes());
                std::process::abort();
            }
        });
        Self(sender)
    }
}

/// How long the tests by chance go on: seconds in `MULTIPROCESS_CHAOS_SECONDS`, by default a few.
pub fn chaos() -> Duration {
    let seconds = std::env::var("MULTIPROCESS_CHAOS_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(4))
}

/// Bytes of this process that are in memory.
pub fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Runs `f` in a child of its own, where nobody else opens or maps anything, and fails as it fails.
pub async fn in_child<F, A, M>(f: F, args: A) -> F::Output
where
    F: Function<A, M>,
    A: Serialize + DeserializeOwned + Send + 'static,
{
    tokio::time::timeout(4 * PATIENCE, Process::spawn(f, args).unwrap()).await.expect("a child done in time").unwrap()
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Holdings {
    pub descriptors: usize,
    /// Of shared memory; what the allocator maps is its own business.
    pub mappings: usize,
}

pub fn holdings() -> Holdings {
    holdings_of(std::process::id())
}

pub fn holdings_of(pid: u32) -> Holdings {
    // Listing one's own directory takes a descriptor for itself.
    let own = usize::from(pid == std::process::id());
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() - own;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    Holdings { descriptors, mappings: maps.lines().filter(|line| line.contains("memfd:")).count() }
}

/// Not one descriptor more; a backlog that grew may have left the few segments that a ring keeps mapped.
pub fn assert_no_growth(before: Holdings, after: Holdings) {
    assert_eq!(before.descriptors, after.descriptors);
    assert!(after.mappings <= before.mappings + 10, "{before:?} {after:?}");
}

/// Returns what there is in the end: some things are closed a moment later.
pub async fn settled(before: Holdings, after: impl Fn() -> Holdings) -> Holdings {
    let start = Instant::now();
    while after().descriptors > before.descriptors && start.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    after()
}

/// The same of what there is `after` all is over: some things are closed a moment later.
pub async fn no_growth(before: Holdings, after: impl Fn() -> Holdings) {
    let start = Instant::now();
    while after().descriptors != before.descriptors && start.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_no_growth(before, after());
}

/// What a process has in memory.
pub fn resident_bytes(pid: u32) -> usize {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Waits until a manager has so many objects.
pub async fn objects_go(manager: &Manager, left: usize) {
    let start = Instant::now();
    while manager.object_count().await.unwrap() != left {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?} objects", manager.object_count().await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Lets this process have `more` descriptors than it has now.
pub fn limit_descriptors(more: usize) {
    let names = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().file_name());
    let open: Vec<u64> = names.filter_map(|name| name.to_str()?.parse().ok()).collect();
    // Listing took one that is free by now.
    let is_open = |n: &u64| open.contains(n) && std::fs::symlink_metadata(format!("/proc/self/fd/{n}")).is_ok();
    let limit = (0..).filter(|n| !is_open(n)).nth(more);
    let old = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let limits = rustix::process::Rlimit { current: limit, maximum: old.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limits).unwrap();
}

/// Whether the process sleeps in the kernel: what one looks for when it must wait.
pub fn is_asleep(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'))
}

/// Whether each thread of the process sleeps in the kernel, and waits for no CPU.
pub fn all_asleep(pid: u32) -> bool {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'))
    })
}

/// Whether the process is in line for something that this one has too.
pub fn is_in_line(pid: u32) -> bool {
    let (dump, is_it) = (debug::dump(), |who: &debug::Participant| who.pid() == Some(pid));
    dump.objects().iter().any(|object| object.waiting().iter().any(is_it))
}

/// Waits until the process is in line for something that this one has too, and sleeps.
pub async fn falls_asleep_in_line(pid: u32) {
    eventually("it is in line", || is_in_line(pid)).await;
    eventually("it sleeps", || is_asleep(pid)).await;
}

/// Stops a process, every thread of it.
pub fn stop(pid: u32) {
    signal(pid, rustix::process::Signal::STOP);
    let start = Instant::now();
    let is_stopped = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('T') || rest.is_empty())
    };
    while !std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| is_stopped(task.unwrap())) {
        assert!(start.elapsed() < PATIENCE, "process {pid} does not stop");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The end of a [`stop`].
pub fn go_on(pid: u32) {
    signal(pid, rustix::process::Signal::CONT);
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

pub async fn pestered<R: DeserializeOwned + 'static>(child: Process<R>) -> R {
    let pid = rustix::process::Pid::from_raw(child.pid() as i32).unwrap();
    let pester = async {
        loop {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::USR1);
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
    };
    within(async {
        tokio::select! { result = child => result.unwrap(), () = pester => unreachable!() }
    })
    .await
}

pub fn handle_signals() {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = nix::sys::signal::SigAction::new(
        nix::sys::signal::SigHandler::Handler(nothing),
        nix::sys::signal::SaFlags::empty(),
        nix::sys::signal::SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    unsafe { nix::sys::signal::sigaction(nix::sys::signal::SIGUSR1, &action).unwrap() };
}

/// Polls `future` until it sleeps, and no longer only looks again: it has its place in line then.
pub async fn falls_asleep<F: Future>(mut future: Pin<&mut F>) {
    struct Woken(AtomicBool);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, SeqCst);
        }
    }
    let woken = Arc::new(Woken(AtomicBool::new(true)));
    let waker = Waker::from(woken.clone());
    while woken.0.swap(false, SeqCst) {
        assert!(future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending(), "it need not wait");
        tokio::task::yield_now().await;
    }
}

/// Waits until a thread of this process sleeps in `epoll_wait`, as one does that blocks for a lock.
pub fn thread_falls_asleep(thread: rustix::thread::Pid) {
    let start = Instant::now();
    let task = format!("/proc/self/task/{}", thread.as_raw_nonzero());
    loop {
        // What a system call is is not told to all; where it is, it is this one.
        let call = std::fs::read_to_string(format!("{task}/wchan")).unwrap_or_default();
        let stat = std::fs::read_to_string(format!("{task}/stat")).unwrap_or_default();
        let sleeps = stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'));
        if sleeps && (call.contains("ep") || call.is_empty() || call == "0") {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "the thread never slept");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asserts a bound on the waiting times, of which `measure` takes some, while others acquire without a break: about a
/// millisecond until the hand-off and 5 ms for the wake, with room for a machine that is busy with other things.
pub async fn assert_nobody_starves(mut measure: impl AsyncFnMut() -> Vec<Duration>) {
    let mean_and_longest = async || {
        let waits = measure().await;
        let (mean, longest) = (waits.iter().sum::<Duration>() / waits.len() as u32, *waits.iter().max().unwrap());
        println!("{} waits, mean {mean:?}, longest {longest:?}", waits.len());
        Ok((mean, longest))
    };
    let is_fair =
        |(mean, longest): &(Duration, Duration)| *mean < Duration::from_millis(30) && *longest < Duration::from_secs(2);
    rounds(mean_and_longest, is_fair).await.unwrap();
}

/// Polls `future` a random number of times and drops it: `None`.
pub async fn polled<T>(random: &mut Random, future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    for _ in 0..random.below(4) {
        if let Some(value) = future.as_mut().now_or_never() {
            return Some(value);
        }
        tokio::task::yield_now().await;
    }
    None
}

/// Polls `future` for a random while and drops it: `None`.
pub async fn cancelled<T>(random: &mut Random, future: impl Future<Output = T>) -> Option<T> {
    match random.below(2) {
        0 => tokio::time::timeout(Duration::from_micros(random.below(200)), future).await.ok(),
        _ => polled(random, future).await,
    }
}

/// xorshift: the same numbers in each run of one seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Mostly small, some large.
    pub fn size(&mut self, largest: usize) -> usize {
        let bits = u64::from(usize::BITS - largest.leading_zeros());
        let class = self.below(bits + 1).min(self.below(bits + 1));
        (self.below(1 << class) as usize).min(largest)
    }
}

/// `size` bytes that tell which message they are, so that a torn one shows.
pub fn payload(producer: u32, number: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8 ^ producer as u8; 20 + size];
    bytes[..4].copy_from_slice(&producer.to_le_bytes());
    bytes[4..12].copy_from_slice(&number.to_le_bytes());
    bytes[12..20].copy_from_slice(&(size as u64).to_le_bytes());
    bytes
}

/// The producer and number of a [`payload`]; panics if it is not whole.
pub fn read_payload(bytes: &[u8]) -> (u32, u64) {
    let producer = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    let number = u64::from_le_bytes(bytes[4..12].try_into().unwrap());
    let size = u64::from_le_bytes(bytes[12..20].try_into().unwrap()) as usize;
    assert_eq!(bytes.len(), 20 + size, "message {number} of {producer} has the size it was sent with");
    let filler = number as u8 ^ producer as u8;
    assert!(bytes[20..] == vec![filler; size][..], "message {number} of {producer} is torn");
    (producer, number)
}

/// Another user: "nobody".
pub const STRANGER: u32 = 65534;

/// Gives a file to another user; false, and a word about it, where this process may not.
pub fn give_to_stranger(path: impl AsRef<std::path::Path>) -> bool {
    let given = std::os::unix::fs::lchown(path, Some(STRANGER), Some(STRANGER));
    given.inspect_err(|error| eprintln!("SKIPPED, as it needs root: a file cannot be given away: {error}")).is_ok()
}

/// The bytes of memory behind all rings that this process has open.
pub fn ring_memory() -> u64 {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let rings = links.filter(|path| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("memfd:multiprocess-ring"))
    });
    rings.map(|path| std::os::linux::fs::MetadataExt::st_blocks(&std::fs::metadata(path).unwrap()) * 512).sum()
}
