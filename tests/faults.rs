//! Single system calls that fail: each kind that the crate makes, at each call of a use of it, ends in a result or an error
//! value in time, and the program goes on. The calls are refused by `os::refuse`, in whichever process makes them, which debug
//! builds only have.
//!
//! By default some of all cases run; `MULTIPROCESS_FAULTS=all` runs all, and `MULTIPROCESS_FAULTS="pools: mmap number 3"`
//! those that begin so.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use multiprocess::connection::{Listener, connect};
use multiprocess::{self as mp, Lock, Manager, Pool, Process, Queue, SharedMemory, Stdio};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::future::IntoFuture;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

mod common;
use common::alone;

mp::test_support!();

/// In which every use must have ended, one way or another.
const LIMIT: Duration = Duration::from_secs(10);
const ERRNOS: [Errno; 5] = [Errno::NOMEM, Errno::MFILE, Errno::AGAIN, Errno::NOBUFS, Errno::INTR];

/// What refuses: see `os::refuse`.
struct Control(std::fs::File);

impl Control {
    fn write(&self, at: u64, word: u64) {
        self.0.write_all_at(&word.to_ne_bytes(), 8 * at).unwrap();
    }

    fn read(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        self.0.read_exact_at(&mut word, 8 * at).unwrap();
        u64::from_ne_bytes(word)
    }

    /// The `left`-th call of this kind fails.
    fn arm(&self, call: &str, errno: Errno, left: u32) {
        self.write(0, name(call) << 40 | (errno.raw_os_error() as u64) << 32 | u64::from(left));
    }

    fn left(&self) -> u32 {
        self.read(0) as u32
    }

    fn disarm(&self) {
        self.write(0, 0);
    }

    fn refused(&self) -> u64 {
        self.read(1)
    }

    /// How often `this` makes each kind of call, whichever process does.
    fn counts(&self, this: fn() -> mp::Result<()>) -> BTreeMap<u64, u32> {
        const MADE: std::ops::Range<u64> = 2..258;
        MADE.for_each(|at| self.write(at, 0));
        in_time(this).expect("in time").unwrap();
        let made = MADE.map(|at| self.read(at)).filter(|word| *word != 0);
        made.map(|word| (word >> 40, word as u32)).collect()
    }
}

/// Each kind of call that the source asks for.
fn calls() -> BTreeSet<String> {
    fn add(directory: &Path, all: &mut BTreeSet<String>) {
        for path in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                add(&path, all);
            } else {
                let text = std::fs::read_to_string(path).unwrap();
                let asked = text.split("refuse::at").skip(1).filter_map(|rest| rest.split_once("(\""));
                let asked = asked.filter(|(way, _)| ["", "_waiting"].contains(way));
                all.extend(asked.filter_map(|(_, rest)| rest.split('"').next()).map(String::from));
            }
        }
    }
    let mut all = BTreeSet::new();
    add(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
    all
}

/// How `os::refuse` knows a call.
fn name(call: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    call.bytes().fold(0xcbf2_9ce4_8422_2325, step) >> 40
}

/// Whatever `future` waits for comes from the child, or not at all. The child's result is left for its `join`.
async fn unless_it_ends<T>(
    child: &mut Process<mp::Result<()>>,
    future: impl Future<Output = mp::Result<T>>,
) -> mp::Result<T> {
    let mut future = std::pin::pin!(future);
    tokio::select! {
        biased;
        done = &mut future => return done,
        ended = child.wait() => ended.map(drop)?,
    }
    // It has done its part by then.
    match tokio::time::timeout(Duration::from_secs(3), future).await {
        Ok(done) => done,
        Err(_) => {
            child.join().await??;
            Err(mp::Error::other("the child has ended, and what it should have sent is not there"))
        }
    }
}

async fn spawns() -> mp::Result<()> {
    assert_eq!(Process::spawn(|a: u32, b: u32| a + b, (1, 2))?.await?, 3);
    let large = Process::spawn(|bytes: Vec<u8>| bytes, (vec![1; 100_000],))?.await?;
    assert_eq!(large.len(), 100_000);
    let mut endless = Process::spawn(async || std::future::pending::<()>().await, ())?;
    let killed = endless.kill();
    if killed.is_err() {
        endless.kill()?;
    }
    endless.wait().await.map(drop)
}

async fn queues() -> mp::Result<()> {
    async fn echo(from: Queue<Vec<u8>>, to: Queue<Vec<u8>>) -> mp::Result<()> {
        for _ in 0..3 {
            to.put(from.get().await?).await?;
        }
        Ok(())
    }
    let (there, back) = (Queue::bounded(1)?, Queue::bounded(1)?);
    let mut child = Process::builder().daemon(true).spawn(echo, (there.clone(), back.clone()))?;
    for size in [1, 200_000, 1] {
        unless_it_ends(&mut child, async { Ok(there.put(vec![7; size]).await?) }).await?;
        assert_eq!(unless_it_ends(&mut child, back.get()).await?, vec![7; size]);
    }
    child.await?
}

async fn handles() -> mp::Result<()> {
    async fn answer(queue: Queue<Queue<u32>>) -> mp::Result<()> {
        queue.get().await?.put(5).await?;
        Ok(())
    }
    let queue = Queue::unbounded()?;
    let mut child = Process::builder().daemon(true).spawn(answer, (queue.clone(),))?;
    let inner = Queue::unbounded()?;
    unless_it_ends(&mut child, async { Ok(queue.put(inner.clone()).await?) }).await?;
    assert_eq!(unless_it_ends(&mut child, inner.get()).await?, 5);
    child.await?
}

async fn locks() -> mp::Result<()> {
    async fn holds(lock: Lock, has: Queue<()>, may_go: Queue<()>) -> mp::Result<()> {
        let guard = lock.acquire().await?;
        has.put(()).await?;
        may_go.get().await?;
        drop(guard);
        Ok(())
    }
    let (lock, has, may_go) = (Lock::new()?, Queue::unbounded()?, Queue::unbounded()?);
    let mut child = Process::builder().daemon(true).spawn(holds, (lock.clone(), has.clone(), may_go.clone()))?;
    unless_it_ends(&mut child, has.get()).await?;
    let waiting = async {
        tokio::task::yield_now().await;
        may_go.put(()).await?;
        Ok(())
    };
    // If the child cannot be told it keeps the lock.
    let taking = async {
        drop(lock.acquire().await?);
        Ok(())
    };
    let done = tokio::try_join!(taking, waiting);
    if done.is_err() {
        child.kill()?;
    }
    done.map(drop).and(child.await?)
}

async fn deaths() -> mp::Result<()> {
    async fn holds(lock: Lock, has: Queue<()>) -> mp::Result<()> {
        let _guard = lock.acquire().await?;
        has.put(()).await?;
        std::future::pending().await
    }
    let (lock, has) = (Lock::new()?, Queue::unbounded()?);
    let mut child = Process::builder().daemon(true).spawn(holds, (lock.clone(), has.clone()))?;
    unless_it_ends(&mut child, has.get()).await?;
    child.kill().or_else(|_| child.kill())?;
    match lock.acquire().await.map(drop) {
        Err(error) if error.kind() != mp::ErrorKind::OwnerDied => Err(error.into()),
        _ => Ok(()),
    }
}

async fn blocks() -> mp::Result<()> {
    let queue = Queue::<u32>::bounded(1)?;
    let other = queue.clone();
    let thread = std::thread::spawn(move || other.blocking_get());
    std::thread::yield_now();
    let put = queue.put(1).await;
    // Whoever waits must not wait for ever if nothing came.
    queue.close();
    let got = thread.join().unwrap();
    put?;
    assert_eq!(got?, 1);
    Ok(())
}

async fn pools() -> mp::Result<()> {
    let pool = Pool::new(2)?;
    let doubled = pool.map(|n: u32| 2 * n, 0..20u32).await?;
    assert_eq!(doubled, (0..20).map(|n| 2 * n).collect::<Vec<_>>());
    let large = pool.apply(|bytes: Vec<u8>| bytes.len(), (vec![1; 500_000],)).await?;
    assert_eq!(large, 500_000);
    // Each is its own, whichever could not be received before.
    for n in 1..=4u8 {
        let len = 300_000 + usize::from(n);
        match pool.apply(|n: u8, bytes: Vec<u8>| vec![n; bytes.len()], (n, vec![n; len])).await {
            Ok(result) => assert_eq!((result[0], result.len()), (n, len), "the result of another call"),
            Err(error) if n == 4 => return Err(error),
            Err(_) => {}
        }
    }
    pool.shutdown(Duration::from_secs(2)).await;
    Ok(())
}

async fn managers() -> mp::Result<()> {
    async fn push(list: mp::ListProxy<u32>) -> mp::Result<()> {
        list.push(4).await
    }
    let manager = Manager::start().await?;
    let list = manager.list::<u32>().await?;
    list.extend(vec![1, 2, 3]).await?;
    Process::builder().daemon(true).spawn(push, (list.clone(),))?.await??;
    assert_eq!(list.to_vec().await?, [1, 2, 3, 4]);
    manager.shutdown().await
}

async fn memory() -> mp::Result<()> {
    let memory = SharedMemory::anonymous(10_000)?;
    memory.write(5_000, b"anonymous")?;
    let name = format!("multiprocess-fault-{}", alone::unique());
    let named = SharedMemory::create(&name, 10_000)?;
    named.write(0, b"named")?;
    let mut text = [0; 5];
    SharedMemory::open(&name)?.read(0, &mut text)?;
    assert_eq!(&text, b"named");
    named.unlink()
}

async fn connections() -> mp::Result<()> {
    let path = std::env::temp_dir().join(format!("multiprocess-fault-{}", alone::unique()));
    let listener = Listener::bind(path.to_str().unwrap()).authkey(b"key").await?;
    let connecting = connect(path.to_str().unwrap(), Some(b"key")).handshake_timeout(Duration::from_secs(3));
    // Nobody is accepted if the client cannot connect.
    let (there, here) = tokio::try_join!(connecting.into_future(), listener.accept())?;
    there.send_bytes(b"hello").await?;
    assert_eq!(here.recv_bytes().await?, b"hello");
    Ok(())
}

async fn streams() -> mp::Result<()> {
    use std::io::{Read, Write};
    let repeat =
        || std::io::copy(&mut std::io::stdin(), &mut std::io::stdout()).map(drop).map_err(|error| error.to_string());
    let piped = Process::builder().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn(repeat, ())?;
    let (mut there, mut back) = (child.take_stdin().unwrap(), child.take_stdout().unwrap());
    there.write_all(b"hello").and_then(|()| there.flush()).map_err(|error| mp::Error::other(error.to_string()))?;
    drop(there);
    let mut text = String::new();
    back.read_to_string(&mut text).map_err(|error| mp::Error::other(error.to_string()))?;
    child.await?.map_err(mp::Error::other)?;
    assert_eq!(text, "hello");
    let pool = Pool::builder().workers(1).keep_stderr(3).build()?;
    assert_eq!(pool.apply(|n: u32| n + 1, (1,)).await?, 2);
    pool.shutdown(Duration::from_secs(2)).await;
    Ok(())
}

/// Handles that go past their manager, under a lease.
async fn leases() -> mp::Result<()> {
    async fn push(lists: Queue<mp::ListProxy<u32>>) -> mp::Result<()> {
        lists.get().await?.push(4).await
    }
    let (manager, lists) = (Manager::start().await?, Queue::unbounded()?);
    let list = manager.list::<u32>().await?;
    let mut child = Process::builder().daemon(true).spawn(push, (lists.clone(),))?;
    unless_it_ends(&mut child, async { Ok(lists.put(list.clone()).await?) }).await?;
    child.await??;
    assert_eq!(list.to_vec().await?, [4]);
    manager.shutdown().await
}

/// What starts threads.
async fn tasks() -> mp::Result<()> {
    mp::preloaded().await?;
    assert_eq!(mp::Task::of(|n: u32| n + 1, (1,)).run().await?, 2);
    assert_eq!(Pool::in_process()?.apply(|n: u32| n + 1, (1,)).await?, 2);
    let pool = Pool::new(1)?;
    // Their results are fetched by a thread, as nobody waits for them.
    let results: Vec<_> = (0..3).map(|_| pool.apply_async(|len: usize| vec![1_u8; len], (500_000,))).collect();
    let stopped = async || mp::current_task().unwrap().cancellation().cancelled().await;
    drop(tokio::time::timeout(Duration::from_millis(50), pool.apply(stopped, ())).await);
    for result in results {
        assert_eq!(result.await?.len(), 500_000);
    }
    // A manager whose object blocks has another thread lead.
    let manager = Manager::start().await?;
    let (slow, quick) = (manager.create(|| 0_u32, ()).await?, manager.list::<u32>().await?);
    let sleeping = slow.call(|_: &mut u32| std::thread::sleep(Duration::from_millis(30)), ());
    let (slept, pushed) = tokio::join!(sleeping, quick.push(1));
    slept.and(pushed)?;
    manager.shutdown().await
}

/// The same in a process that begins: its first child, pool, manager and name.
fn begins() -> mp::Result<()> {
    let mut inner = std::process::Command::new(std::env::current_exe().unwrap());
    inner.args(["first_uses_in_this_process", "--exact", "--ignored", "--nocapture"]);
    let output = inner.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Ok(()),
        Some(ERROR) => Err(mp::Error::other(said.trim())),
        _ => panic!("{}: {said}", output.status),
    }
}

/// How a process ends whose use has ended in an error value.
const ERROR: i32 = 17;

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn first_uses_in_this_process() {
    let done = run(async {
        assert_eq!(Process::spawn(|| 1, ())?.await?, 1);
        assert_eq!(Pool::new(1)?.apply(|| 2, ()).await?, 2);
        let manager = Manager::start().await?;
        manager.list::<u32>().await?.push(1).await?;
        manager.shutdown().await?;
        memory().await
    });
    if let Err(error) = done {
        eprintln!("{error}");
        std::process::exit(ERROR);
    }
}

/// All that a builder sets in a child and in a worker.
async fn attributes() -> mp::Result<()> {
    let cpus = rustix::thread::sched_getaffinity(None).unwrap();
    let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| cpus.is_set(*cpu)).unwrap();
    let nice = rustix::process::getpriority_process(None).unwrap();
    let builder = Process::builder().nice(nice).cpus([cpu]).descriptor_limit(300).memory_limit(64 << 30);
    let child = builder.own_group(true).current_dir("/").spawn(|n: u32| n + 1, (1,))?;
    assert_eq!(child.await?, 2);
    let pool =
        Pool::builder().workers(1).nice(nice).cpus([cpu]).descriptor_limit(300).memory_limit(64 << 30).build()?;
    assert_eq!(pool.apply(|n: u32| n + 1, (1,)).await?, 2);
    pool.shutdown(Duration::from_secs(2)).await;
    Ok(())
}

/// Waits on a clock that stands, by timers of the kernel.
fn timers() -> mp::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    runtime.block_on(async {
        let lock = Lock::new()?;
        let _held = lock.try_acquire()?;
        let late = lock.acquire_timeout(Duration::from_millis(2)).await.map(drop).unwrap_err();
        if late.kind() == mp::ErrorKind::Timeout { Ok(()) } else { Err(late.into()) }
    })
}

/// Takes the place of a socket file whose listener is gone.
async fn stale_files() -> mp::Result<()> {
    let path = std::env::temp_dir().join(format!("multiprocess-stale-{}", alone::unique()));
    let _ = std::fs::remove_file(&path);
    drop(std::os::unix::net::UnixListener::bind(&path)?);
    let listener = Listener::bind(path.to_str().unwrap()).authkey(b"key").await?;
    drop(listener);
    Ok(())
}

type Use = (&'static str, fn() -> mp::Result<()>);

fn run(future: impl Future<Output = mp::Result<()>>) -> mp::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

const USES: [Use; 17] = [
    ("spawns", || run(spawns())),
    ("queues", || run(queues())),
    ("handles", || run(handles())),
    ("locks", || run(locks())),
    ("deaths", || run(deaths())),
    ("blocks", || run(blocks())),
    ("pools", || run(pools())),
    ("managers", || run(managers())),
    ("memory", || run(memory())),
    ("connections", || run(connections())),
    ("streams", || run(streams())),
    ("leases", || run(leases())),
    ("tasks", || run(tasks())),
    ("attributes", || run(attributes())),
    ("timers", timers),
    ("stale files", || run(stale_files())),
    ("begins", begins),
];

/// `None` if it hangs.
fn in_time(this: fn() -> mp::Result<()>) -> Option<mp::Result<()>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(this()));
    match receiver.recv_timeout(LIMIT) {
        Ok(result) => Some(result),
        Err(mpsc::RecvTimeoutError::Timeout) => None,
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("a use panicked"),
    }
}

fn name_of(errno: Errno) -> &'static str {
    let names = ["ENOMEM", "EMFILE", "EAGAIN", "ENOBUFS", "EINTR"];
    ERRNOS.iter().position(|other| *other == errno).map_or("?", |at| names[at])
}

/// How many places of a use at which one kind of call is made are tried.
fn places() -> u32 {
    if std::env::var_os("MULTIPROCESS_FAULTS").is_some() { u32::MAX } else { 40 }
}

/// One of so many cases runs, the same in each run; the others are for other errnos and places.
fn is_chosen(case: &str) -> bool {
    match std::env::var("MULTIPROCESS_FAULTS") {
        Ok(which) => which == "all" || case.starts_with(&which),
        // FNV-1a.
        Err(_) => {
            let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            case.bytes().fold(0xcbf2_9ce4_8422_2325, mix).is_multiple_of(73)
        }
    }
}

#[test]
#[ignore = "the other test runs it, in a process of its own"]
fn each_single_fault_in_this_process() {
    let path = PathBuf::from(std::env::var_os("MULTIPROCESS_REFUSE").expect("run by the other test"));
    let control = Control(std::fs::File::options().read(true).write(true).open(path).unwrap());
    let calls = calls();
    let names: BTreeSet<_> = calls.iter().map(|call| name(call)).collect();
    assert_eq!(names.len(), calls.len(), "each has a name of its own");
    let only = std::env::var("MULTIPROCESS_FAULTS_OF").ok();
    let (mut cases, mut ran, mut never) = (0, 0, calls.clone());
    let chosen = |(name, _): &&Use| only.as_deref().is_none_or(|only| only == *name);
    for (name_of_use, this) in USES.iter().filter(chosen) {
        in_time(*this).expect("in time").unwrap();
        let counts = control.counts(*this);
        never.retain(|call| !counts.contains_key(&name(call)));
        for call in &calls {
            let count = counts.get(&name(call)).copied().unwrap_or_default();
            for (at, errno) in (1..=count.min(places())).flat_map(|at| ERRNOS.map(|errno| (at, errno))) {
                cases += 1;
                // Without the count, which is not the same in each run.
                let case = format!("{name_of_use}: {call} number {at} fails with {}", name_of(errno));
                if !is_chosen(&case) {
                    continue;
                }
                ran += 1;
                control.arm(call, errno, at);
                let Some(result) = in_time(*this) else {
                    eprintln!("HANGS {case}");
                    std::process::exit(3);
                };
                control.disarm();
                eprintln!("{case}: {}", result.err().map_or("done".to_string(), |error| error.to_string()));
                match in_time(*this) {
                    Some(Ok(())) => {}
                    Some(Err(error)) => panic!("after {case}: {error}"),
                    None => panic!("after {case} it hangs"),
                }
            }
        }
    }
    println!("{ran} of {cases} cases of {} kinds of calls, {} calls refused", calls.len(), control.refused());
    assert!(control.refused() > 0, "nothing was refused");
    assert!(only.is_some() || never.is_empty(), "no use makes one of these: {never:?}");
}

/// A handle arrives, and the end of its lease is refused; nothing else is sent from here to the manager.
async fn refuse_the_end_of_a_lease(control: &Control) -> mp::Result<()> {
    let manager = Manager::builder().bind("127.0.0.1:0").authkey(b"key").start().await?;
    let there = Manager::connect(&manager.address().await?.unwrap_or_default(), b"key").await?;
    let queue = Queue::unbounded()?;
    queue.put(manager.list::<u32>().await?).await?;
    assert_eq!(there.object_count().await?, 1);
    let before = control.refused();
    control.arm("sendmsg", Errno::NOBUFS, 1);
    let list = queue.get().await?;
    assert_eq!(control.refused(), before + 1, "the end of the lease was refused");
    drop(list);
    let start = std::time::Instant::now();
    while there.object_count().await? > 0 {
        assert!(start.elapsed() < LIMIT, "it is not sent again");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    manager.shutdown().await
}

#[test]
#[ignore = "the other test runs it, in a process of its own"]
fn refused_descriptors_in_this_process() {
    let path = PathBuf::from(std::env::var_os("MULTIPROCESS_REFUSE").expect("run by the other test"));
    let control = Control(std::fs::File::options().read(true).write(true).open(path).unwrap());
    run(refuse_the_end_of_a_lease(&control)).unwrap();
}

/// A child of a group that cannot be watched at first is joined all the same.
async fn refuse_to_watch_a_member(control: &Control) -> mp::Result<()> {
    let (mut group, go_on) = (mp::Group::new(), mp::Event::new()?);
    let waits = async |go_on: mp::Event| go_on.wait().await.is_ok();
    group.spawn(waits, (go_on.clone(),))?;
    // It has what it sleeps on by then: the call that is refused is one of this process.
    common::falls_asleep_in_line(mp::active_children()[0].pid()).await;
    let before = control.refused();
    control.arm("epoll_ctl", Errno::NOMEM, 1);
    let early = tokio::time::timeout(Duration::from_millis(100), group.join_next()).await;
    assert!(early.is_err() && group.len() == 1, "{early:?}");
    assert_eq!(control.refused(), before + 1, "it could not be watched");
    go_on.set();
    let ended = tokio::time::timeout(LIMIT, group.join_next()).await.expect("in time");
    assert!(ended.expect("a member")?, "it was not killed, and its result has come");
    Ok(())
}

#[test]
#[ignore = "the other test runs it, in a process of its own"]
fn unwatched_members_in_this_process() {
    let path = PathBuf::from(std::env::var_os("MULTIPROCESS_REFUSE").expect("run by the other test"));
    let control = Control(std::fs::File::options().read(true).write(true).open(path).unwrap());
    run(refuse_to_watch_a_member(&control)).unwrap();
}

/// The worker of an order that cannot be sent must not run the function with something else.
async fn refuse_a_large_argument(control: &Control) -> mp::Result<()> {
    let mut refused = 0;
    for _ in 0..20 {
        let pool = Pool::new(1)?;
        assert_eq!(pool.apply(|n: u32| n, (1,)).await?, 1);
        control.arm("fallocate", Errno::MFILE, 1);
        let len = pool.apply(|bytes: Vec<u8>| bytes.len(), (vec![1; 500_000],)).await;
        refused += u32::from(control.left() == 0);
        control.disarm();
        match len {
            Ok(len) => assert_eq!(len, 500_000, "an argument that was not sent"),
            Err(error) => assert_eq!(error.kind(), mp::ErrorKind::Io, "{error}"),
        }
        assert_eq!(pool.apply(|bytes: Vec<u8>| bytes.len(), (vec![1; 600_000],)).await?, 600_000);
    }
    assert!(refused > 0, "no memory was refused");
    Ok(())
}

#[test]
#[ignore = "the other test runs it, in a process of its own"]
fn unsent_arguments_in_this_process() {
    let path = PathBuf::from(std::env::var_os("MULTIPROCESS_REFUSE").expect("run by the other test"));
    let control = Control(std::fs::File::options().read(true).write(true).open(path).unwrap());
    run(refuse_a_large_argument(&control)).unwrap();
}

#[test]
fn an_argument_that_cannot_be_sent_is_an_error_and_runs_no_function() {
    in_process_of_its_own("unsent_arguments_in_this_process");
}

/// A supervised child that cannot be watched at first runs on, and is not started again.
async fn refuse_to_watch_a_supervised_child(control: &Control) -> mp::Result<()> {
    let go_on = mp::Event::new()?;
    // Without a runtime: the call that is refused is one of this process.
    let waits = |go_on: mp::Event| go_on.blocking_wait().map(|()| std::process::id());
    let mut child = mp::Process::builder().restart(mp::Restart::on_failure()).spawn(waits, (go_on.clone(),))?;
    let pid = child.pid();
    let start = std::time::Instant::now();
    // The runtime, and so the task that watches it, stands until the others of this family have nothing to do.
    let child_pid = pid.expect("it runs");
    while !(common::is_in_line(child_pid) && common::is_asleep(child_pid)) {
        assert!(start.elapsed() < LIMIT, "it does not wait");
        std::thread::sleep(Duration::from_millis(1));
    }
    let before = control.refused();
    control.arm("epoll_ctl", Errno::NOMEM, 1);
    while control.refused() == before {
        assert!(start.elapsed() < LIMIT, "it could be watched");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((child.pid(), child.restarts()), (pid, 0));
    go_on.set();
    let ended = tokio::time::timeout(LIMIT, child.wait()).await.expect("in time");
    assert_eq!((Some(ended??), child.restarts()), (pid, 0), "it was not killed, and its result has come");
    Ok(())
}

#[test]
#[ignore = "the other test runs it, in a process of its own"]
fn unwatched_supervised_child_in_this_process() {
    let path = PathBuf::from(std::env::var_os("MULTIPROCESS_REFUSE").expect("run by the other test"));
    let control = Control(std::fs::File::options().read(true).write(true).open(path).unwrap());
    run(refuse_to_watch_a_supervised_child(&control)).unwrap();
}

#[test]
fn a_supervised_child_that_cannot_be_watched_for_a_while_runs_on() {
    in_process_of_its_own("unwatched_supervised_child_in_this_process");
}

/// Counts the warnings that no thread can be had.
struct Warnings(std::sync::Arc<std::sync::atomic::AtomicU32>);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        let mut text = String::new();
        event.record(&mut |_: &tracing::field::Field, value: &dyn std::fmt::Debug| text += &format!("{value:?} "));
        let is_one = *event.metadata().level() == tracing::Level::WARN && text.contains("no thread can be had");
        self.0.fetch_add(u32::from(is_one), std::sync::atomic::Ordering::Relaxed);
    }
}

/// A server that was killed is restarted once a thread can be had, and until then there is one warning.
async fn refuse_threads_to_the_restart(control: &Control) -> mp::Result<()> {
    use tracing_subscriber::layer::SubscriberExt;
    let warnings = std::sync::Arc::default();
    let subscriber = tracing_subscriber::registry().with(Warnings(std::sync::Arc::clone(&warnings)));
    tracing::subscriber::set_global_default(subscriber).map_err(mp::Error::other)?;
    assert_eq!(Process::spawn(|| 1, ())?.await?, 1);
    let tasks = std::fs::read_dir("/proc/self/task")?.map(|task| task.map(|task| task.path().join("children")));
    let children = tasks.map(|path| path.and_then(std::fs::read_to_string)).collect::<std::io::Result<String>>()?;
    let is_server = |pid: &&str| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("mp-server"))
    };
    let server = children.split_whitespace().find(is_server).expect("the fork server").parse().unwrap();
    let (before, start) = (control.refused(), std::time::Instant::now());
    control.arm("clone", Errno::AGAIN, 1);
    rustix::process::kill_process(rustix::process::Pid::from_raw(server).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    while control.refused() < before + 4 {
        assert!(start.elapsed() < 2 * LIMIT, "it is not tried again");
        if control.left() == 0 {
            control.arm("clone", Errno::AGAIN, 1);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    control.disarm();
    assert_eq!(Process::spawn(|| 2, ())?.await?, 2);
    assert_eq!(warnings.load(std::sync::atomic::Ordering::Relaxed), 1);
    Ok(())
}

#[test]
#[ignore = "the other test runs it, in a process of its own"]
fn restart_without_threads_in_this_process() {
    let path = PathBuf::from(std::env::var_os("MULTIPROCESS_REFUSE").expect("run by the other test"));
    let control = Control(std::fs::File::options().read(true).write(true).open(path).unwrap());
    run(refuse_threads_to_the_restart(&control)).unwrap();
}

#[test]
fn restart_of_the_fork_server_without_threads_warns_once() {
    in_process_of_its_own("restart_without_threads_in_this_process");
}

/// Results that come at the same time and that nobody fetches take fewer threads than there are.
async fn count_threads_of_unfetched_results(control: &Control) -> mp::Result<()> {
    const RESULTS: u32 = 8;
    const ALL: u32 = 1 << 20;
    let pool = Pool::new(RESULTS as usize)?;
    let wait = |begun: Queue<()>, go_on: mp::Event| -> mp::Result<Vec<u8>> {
        begun.blocking_put(())?;
        go_on.blocking_wait()?;
        Ok(vec![7; 400_000])
    };
    for round in 0.. {
        let (begun, go_on) = (Queue::unbounded()?, mp::Event::new()?);
        let calls: Vec<_> = (0..RESULTS).map(|_| pool.apply_async(wait, (begun.clone(), go_on.clone()))).collect();
        for _ in 0..RESULTS {
            begun.get().await?;
        }
        // It only counts.
        control.arm("clone", Errno::AGAIN, ALL);
        go_on.set();
        let start = std::time::Instant::now();
        while pool.stats().running > 0 {
            assert!(start.elapsed() < LIMIT, "the results are not fetched");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let threads = ALL - control.left();
        control.disarm();
        for call in calls {
            assert_eq!(call.await??, vec![7; 400_000]);
        }
        // On a busy machine they may come one by one.
        if threads < RESULTS {
            return Ok(());
        }
        assert!(round < 10, "{threads} threads for {RESULTS} results, each time");
    }
    Ok(())
}

#[test]
#[ignore = "the other test runs it, in a process of its own"]
fn threads_of_unfetched_results_in_this_process() {
    let path = PathBuf::from(std::env::var_os("MULTIPROCESS_REFUSE").expect("run by the other test"));
    let control = Control(std::fs::File::options().read(true).write(true).open(path).unwrap());
    run(count_threads_of_unfetched_results(&control)).unwrap();
}

#[test]
fn results_that_nobody_fetches_do_not_take_a_thread_each() {
    in_process_of_its_own("threads_of_unfetched_results_in_this_process");
}

#[test]
fn a_member_of_a_group_that_cannot_be_watched_for_a_while_is_not_lost() {
    in_process_of_its_own("unwatched_members_in_this_process");
}

#[test]
fn descriptors_refused_by_the_kernel_are_sent_again_without_another_call() {
    in_process_of_its_own("refused_descriptors_in_this_process");
}

#[test]
fn each_single_fault_ends_in_a_result_or_an_error_in_time() {
    in_process_of_its_own("each_single_fault_in_this_process");
}

/// Runs an ignored test of this file in a process, whose family shares a control.
fn in_process_of_its_own(test: &str) {
    if !cfg!(debug_assertions) {
        return eprintln!("SKIPPED: calls are refused in debug builds only");
    }
    let path = std::env::temp_dir().join(format!("multiprocess-refuse-{}-{test}", alone::unique()));
    std::fs::write(&path, [0; 4096]).unwrap();
    let mut inner = std::process::Command::new(std::env::current_exe().unwrap());
    inner.args([test, "--exact", "--ignored", "--nocapture"]);
    let output = inner.env("MULTIPROCESS_REFUSE", &path).output().unwrap();
    std::fs::remove_file(&path).unwrap();
    let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let last: Vec<&str> = told.lines().rev().take(30).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    assert!(output.status.success(), "{}\n{said}\n{}", output.status, last.join("\n"));
}
