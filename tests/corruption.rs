//! Memory that a dying worker wrote into: each word that processes share may be anything, and still the program lives,
//! nothing panics, no loop is endless, each wait ends, and objects that were not hit work as ever.
//!
//! A trial is a process of its own: it makes one object of each kind, a pool, a manager and a partner process that uses
//! some of them, writes into what it has mapped, and then uses everything. What it does follows from its number alone, but
//! for the timing of other processes. The harness ends a trial that hangs, and looks for processes that it left behind.
//!
//! `cargo test --test corruption` runs trials for some seconds. By hand:
//!
//! | variable | meaning |
//! |---|---|
//! | `MULTIPROCESS_CORRUPTION=100000,10000` | so many trials with one damage each, and so many with several |
//! | `MULTIPROCESS_CORRUPTION_FROM=7` | the number of the first trial of either sort, 0 unless said otherwise |
//! | `MULTIPROCESS_CORRUPTION_JOBS=4` | so many at a time, by default as many as there are CPUs |
//!
//! One trial again, with what it says: `target/debug/deps/corruption-.. trial single 17` (or `several`, `known`, `lane`).
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

use multiprocess::{self as mp, ErrorKind, Process};
use std::collections::BTreeMap;
use std::future::Future;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// For an object that was not hit: longer than anything takes on a busy machine.
const RIGHT: Duration = Duration::from_secs(40);
/// For one that was: each wait that damage makes endless takes so long.
const HIT: Duration = Duration::from_millis(150);
/// A trial takes less, whatever happens.
const TRIAL: Duration = Duration::from_secs(90);
/// How long the trials of a test run go on, of either sort.
const SHORT: [Duration; 2] = [Duration::from_secs(14), Duration::from_secs(8)];
const MARK: &str = "MULTIPROCESS_CORRUPTION_TRIAL";

fn main() -> ExitCode {
    mp::init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["trial", sort, number] => {
            trial::run(sort, number.parse().unwrap());
            ExitCode::SUCCESS
        }
        _ if words.contains(&"--list") => {
            if !words.contains(&"--ignored") {
                println!("damage_ends_no_program_and_no_wait_is_endless: test");
            }
            ExitCode::SUCCESS
        }
        _ => harness(),
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(format!("MULTIPROCESS_CORRUPTION{name}")).ok()
}

fn harness() -> ExitCode {
    let jobs = variable("_JOBS").and_then(|jobs| jobs.parse().ok());
    let jobs = jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, |cpus| cpus.get()));
    let from: u64 = variable("_FROM").and_then(|from| from.parse().ok()).unwrap_or_default();
    let counts: Option<Vec<u64>> = variable("").map(|counts| counts.split(',').map(|n| n.parse().unwrap()).collect());
    let mut failed = trials("lane", 0, 1, None, jobs);
    // What has gone wrong once.
    failed += trials("known", 0, trial::KNOWN.len() as u64, None, jobs);
    for (at, sort) in ["single", "several"].into_iter().enumerate() {
        let to = counts.as_ref().map_or(u64::MAX, |counts| from + counts.get(at).copied().unwrap_or_default());
        let until = counts.is_none().then(|| Instant::now() + SHORT[at]);
        failed += trials(sort, from, to, until, jobs);
    }
    println!("{failed} failed");
    ExitCode::from((failed > 0) as u8)
}

/// What became of all trials of a sort.
#[derive(Default)]
struct Outcomes {
    /// By what was hit and how its uses ended.
    ends: BTreeMap<(String, String), u64>,
    slowest: Duration,
}

fn trials(sort: &str, from: u64, to: u64, until: Option<Instant>, jobs: usize) -> usize {
    let (next, done, failed) = (AtomicU64::new(from), AtomicU64::new(0), AtomicUsize::new(0));
    let outcomes = Mutex::new(Outcomes::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while until.is_none_or(|until| Instant::now() < until) && failed.load(SeqCst) < 20 {
                    let number = next.fetch_add(1, SeqCst);
                    if number >= to {
                        return;
                    }
                    let start = Instant::now();
                    match one(sort, number) {
                        Ok(said) => outcomes.lock().unwrap().add(&said, start.elapsed()),
                        Err(why) => {
                            failed.fetch_add(1, SeqCst);
                            println!("trial {sort} {number} FAILED: {why}");
                        }
                    }
                    let done = done.fetch_add(1, SeqCst) + 1;
                    if done.is_multiple_of(100) {
                        println!("{done} trials ({sort})");
                    }
                }
            });
        }
    });
    let (outcomes, failed) = (outcomes.into_inner().unwrap(), failed.into_inner());
    println!("{} trials ({sort}), {failed} failed, the slowest took {:.1?}", done.into_inner(), outcomes.slowest);
    outcomes.ends.iter().for_each(|((hit, end), count)| println!("    {hit:10} {end:16} {count}"));
    failed
}

impl Outcomes {
    fn add(&mut self, said: &str, took: Duration) {
        self.slowest = self.slowest.max(took);
        for line in said.lines().filter_map(|line| line.strip_prefix("end ")) {
            if let Some((hit, end)) = line.split_once(' ') {
                *self.ends.entry((hit.to_string(), end.to_string())).or_default() += 1;
            }
        }
    }
}

/// Runs one trial in a process of its own; what it said, or what was wrong.
fn one(sort: &str, number: u64) -> Result<String, String> {
    let mark = format!("{sort}-{number}-{}", std::process::id());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["trial", sort, &number.to_string()]).env(MARK, &mark).env("RUST_BACKTRACE", "1");
    let (mut read, write) = std::io::pipe().unwrap();
    let mut process = command.stdin(Stdio::null()).stdout(write.try_clone().unwrap()).stderr(write).spawn().unwrap();
    drop(command);
    let text = std::thread::spawn(move || {
        let mut text = Vec::new();
        read.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    });
    let deadline = Instant::now() + TRIAL;
    let status = loop {
        match process.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => {
                // Its threads, to find the loop.
                eprintln!("{}", stacks(process.id()));
                process.kill().unwrap();
                process.wait().unwrap();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(3)),
        }
    };
    let left = left_behind(&mark);
    // The output ends when the last of them has ended.
    let text = text.join().unwrap();
    match status {
        None => Err(format!("not done after {TRIAL:?}\n{text}")),
        Some(status) if !status.success() => Err(format!("{status}\n{text}")),
        Some(_) if !left.is_empty() => Err(format!("it left processes behind: {left:?}\n{text}")),
        Some(_) => Ok(text),
    }
}

fn stacks(pid: u32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        format!("{} {} {}", read("comm").trim(), read("wchan"), read("stat").split(' ').nth(2).unwrap_or_default())
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What a trial has started and what does not end soon, which is then killed.
fn left_behind(mark: &str) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let left = marked(mark);
        if left.is_empty() || Instant::now() > deadline {
            left.iter().for_each(|pid| drop(Command::new("kill").args(["-9", &pid.to_string()]).status()));
            return left.iter().map(|pid| pid.to_string()).collect();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn marked(mark: &str) -> Vec<u32> {
    let mark = format!("{MARK}={mark}");
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // One that has ended and is not reaped has no environment any more.
    let is_marked = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
    };
    pids.filter(is_marked).collect()
}

mod trial {
    use super::*;

    /// Bits of every number that travels, so that a payload is told from the length before it.
    const PAYLOAD: u64 = 0xa5a5_0000_0000_0000;

    /// What a process has mapped of shared objects, and what that belongs to.
    struct Mapping {
        start: u64,
        len: u64,
        offset: u64,
        name: String,
        inode: u64,
    }

    fn mappings() -> Vec<Mapping> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut all: Vec<_> = maps.lines().filter_map(mapping).collect();
        // In the order in which they were made, wherever they lie and how often.
        all.sort_by_key(|mapping| (mapping.inode, mapping.offset));
        all.dedup_by_key(|mapping| (mapping.inode, mapping.offset));
        all
    }

    /// What this process only reads, a wild write of its cannot change.
    fn mapping(line: &str) -> Option<Mapping> {
        let (head, name) = line.split_once("/memfd:multiprocess-")?;
        let mut words = head.split_whitespace();
        words.clone().nth(1).filter(|access| access.contains('w'))?;
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end, offset) = (hex(start)?, hex(end)?, hex(words.nth(1)?)?);
        let inode = words.nth(1)?.parse().ok()?;
        let name = name.trim_end_matches(" (deleted)").to_string();
        Some(Mapping { start, len: end - start, offset, name, inode })
    }

    /// Which object each memory belongs to: what is new belongs to what was made last.
    #[derive(Default)]
    struct Owners(BTreeMap<u64, &'static str>);

    impl Owners {
        fn made<T>(&mut self, what: &'static str, made: T) -> T {
            mappings().iter().for_each(|mapping| _ = self.0.entry(mapping.inode).or_insert(what));
            made
        }
    }

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }

        fn below(&mut self, end: usize) -> usize {
            (self.next() % end.max(1) as u64) as usize
        }

        fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
            &all[self.below(all.len())]
        }
    }

    /// The words of a mapping that may be hit: not the payloads of messages, nor the elements of an array.
    fn targets(mapping: &Mapping, memory: &std::fs::File, random: &mut Random) -> Vec<u64> {
        let len = mapping.len.min(128 << 10);
        let mut bytes = vec![0; len as usize];
        memory.read_exact_at(&mut bytes, mapping.start).unwrap();
        let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
        let all: Vec<usize> = match (mapping.name.as_str(), mapping.offset) {
            ("shared array", 4096..) => Vec::new(),
            ("ring", 4096..) => (0..words.len()).filter(|at| *at < 40 || is_length(words[*at])).collect(),
            ("lane", 4096..) => (0..words.len()).filter(|at| is_length(words[*at])).collect(),
            ("family", _) => (0..64).collect(),
            _ => (0..words.len()).collect(),
        };
        // Words that say something are hit more often than those that were never used.
        let telling: Vec<usize> = all.iter().copied().filter(|at| words[*at] != 0).collect();
        let chosen = if random.below(10) < 7 && !telling.is_empty() { telling } else { all };
        chosen.into_iter().map(|at| mapping.start + 8 * at as u64).collect()
    }

    fn is_length(word: u64) -> bool {
        (1..1 << 16).contains(&word)
    }

    /// Writes somewhere; whose that was.
    fn damage(owners: &Owners, random: &mut Random) -> Option<&'static str> {
        let memory = std::fs::OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap();
        let mappings = mappings();
        let mapping = random.of(&mappings);
        let targets = targets(mapping, &memory, random);
        let at = *targets.get(random.below(targets.len()))?;
        let mut word = [0; 8];
        memory.read_exact_at(&mut word, at).unwrap();
        let seen = u64::from_ne_bytes(word);
        let other = random.next();
        let written = match random.below(10) {
            0..4 => seen ^ 1 << random.below(64),
            4 => seen & !(0xff << (8 * random.below(8))) | (other & 0xff) << (8 * random.below(8)),
            5 => 0,
            6 => u64::MAX,
            7 => other,
            8 => other % 128,
            _ => seen.wrapping_add(1 << random.below(40)),
        };
        memory.write_all_at(&written.to_ne_bytes(), at).unwrap();
        let owner = owners.0.get(&mapping.inode).copied().unwrap_or("unknown");
        println!(
            "hit {owner}: {} at {:#x}: {seen:#x} -> {written:#x}",
            mapping.name,
            mapping.offset + at - mapping.start
        );
        Some(owner)
    }

    /// What was hit, and how to judge what follows.
    struct Judge {
        hit: Vec<&'static str>,
    }

    impl Judge {
        /// Whether the memory of this one may be wrong. The table of processes is everybody's.
        fn is_hit(&self, what: &str) -> bool {
            self.hit.iter().any(|hit| *hit == what || matches!(*hit, "family" | "unknown"))
        }

        /// Awaits a use of `what`, which yields whether it was right. Only one of an object that was hit may fail.
        async fn uses(&self, what: &'static str, doing: &str, uses: impl Future<Output = mp::Result<bool>>) {
            let is_hit = self.is_hit(what);
            let end = tokio::time::timeout(if is_hit { HIT } else { RIGHT }, uses).await;
            if !is_hit {
                match end {
                    Ok(Ok(true)) => return,
                    Ok(Ok(false)) => panic!("{what} was not hit and is wrong: {doing}"),
                    Ok(Err(error)) => panic!("{what} was not hit: {doing}: {error:?}"),
                    Err(_) => panic!("{what} was not hit, and does not end: {doing}"),
                }
            }
            let end = match end {
                Ok(Ok(true)) => "right".to_string(),
                Ok(Ok(false)) => "wrong".to_string(),
                Ok(Err(error)) => {
                    if error.kind() == ErrorKind::Corrupt {
                        println!("{doing}: {error}");
                        assert!(
                            error.to_string().contains("damaged") || error.to_string().contains("result is not"),
                            "{error}"
                        );
                    }
                    format!("{:?}", error.kind())
                }
                Err(_) => "out of time".to_string(),
            };
            println!("end {what} {end}");
        }
    }

    /// Damages that once had consequences: whose, in which memory, to which word from its beginning, and what is set there.
    pub(super) const KNOWN: &[(&str, &str, usize, Change)] = &[
        // A pipe to a manager whose segment is none: a reader and a sender called each other for ever.
        ("manager", "ring", 17, Change::To(12345 << 12)),
        ("manager", "ring", 33, Change::To(12345 << 12)),
        ("manager", "ring", 8, Change::To(u64::from_be_bytes(*b"mpDamage"))),
        // Marks beyond the entries of an event.
        ("event", "event", 2, Change::Flip(1 << 61)),
        ("event", "event", 2, Change::Flip(1 << 62)),
        ("idle", "ring", 128, Change::Flip(3 << 61)),
        ("pool", "board", 0, Change::Flip(3 << 61)),
        // A move by a row that there is not.
        ("semaphore", "semaphore", 3, Change::To(500 << 32 | 3)),
        ("rwlock", "read-write lock", 4, Change::To(470 << 32 | 3)),
        // More rows than there are.
        ("condition", "condition", 75, Change::To(u64::MAX)),
        // Counts at their ends.
        ("queue", "ring", 18, Change::To(u64::MAX)),
        ("queue", "ring", 65, Change::To(u64::MAX << 8 | 1)),
        // Nobody is woken for a lock whose last wake is in the future.
        ("lock", "lock", 2, Change::To(u64::MAX)),
        // Latches that look held.
        ("wide", "shared value", 2, Change::To(1 << 16)),
        ("queue", "ring", 16, Change::To(1 << 50)),
        // A worker that takes what there is not, or no longer looks where it should.
        ("pool", "lane", 32, Change::To(7 << 32)),
        ("pool", "lane", 48, Change::To(u64::MAX)),
        ("pool", "lane", 96, Change::Flip(0x7fff)),
        ("pool", "lane", 224, Change::To(0)),
        // Values that were begun and never sent, memory that ends beyond all addresses, and a robust lock that looks held.
        ("broadcast", "recent", 3, Change::To(u64::MAX)),
        ("broadcast", "recent", 5, Change::To(u64::MAX)),
        ("watch", "recent", 3, Change::To(1 << 40)),
        ("watch", "recent", 4, Change::To(0)),
        ("watch", "recent", 2, Change::To(1 << 50)),
        // More leases than there are, and a table of them elsewhere.
        ("leased", "ring", 34, Change::To(u64::MAX)),
        ("leased", "ring", 35, Change::To(12345 << 12)),
        ("leased", "ring", 38, Change::To(1)),
        // Marks beyond the entries of a token and of a child of it, and a value of a oneshot that was never sent.
        ("token", "event", 2, Change::Flip(1 << 61)),
        ("oneshot", "ring", 17, Change::To(12345 << 12)),
        ("oneshot", "ring", 18, Change::To(u64::MAX)),
        // This process's own place in its family.
        ("family", "family", 0, Change::To(0)),
        ("family", "family", 0, Change::To(u64::MAX)),
    ];

    pub(super) enum Change {
        To(u64),
        Flip(u64),
    }

    /// The word of a lane that says how many results there are is damaged while the worker is at work: the pool has another worker then.
    async fn damage_a_lane() {
        let pool = mp::Pool::builder().workers(1).build().unwrap();
        let first = pool.apply(std::process::id, ()).await.unwrap();
        let waits = |has_begun: mp::Event, go_on: mp::Event| {
            has_begun.set();
            go_on.blocking_wait()
        };
        let (has_begun, go_on) = (mp::Event::new().unwrap(), mp::Event::new().unwrap());
        let running = pool.apply_async(waits, (has_begun.clone(), go_on));
        has_begun.wait_timeout(RIGHT).await.unwrap();
        let mut owners = Owners::default();
        owners.made("pool", ());
        write(&owners, &("pool", "lane", 48, Change::To(u64::MAX)));
        let lost = tokio::time::timeout(RIGHT, running).await.expect("in time").unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::Corrupt, "{lost}");
        let second = tokio::time::timeout(RIGHT, pool.apply(std::process::id, ())).await.expect("in time").unwrap();
        assert_ne!(second, first);
        assert!(!std::path::Path::new(&format!("/proc/{first}")).exists(), "the first has ended");
        let doubled = tokio::time::timeout(RIGHT, pool.map(double, 0..1000_u64)).await.expect("in time").unwrap();
        assert!(doubled.into_iter().eq((0..1000).map(|n| 2 * n)));
        assert_eq!(pool.apply(std::process::id, ()).await.unwrap(), second, "it stays");
        let totals = pool.stats().totals;
        assert_eq!((totals.restarted, totals.died), (1, 0), "{totals:?}");
        println!("end lane replaced");
    }

    fn known(owners: &Owners, number: usize) -> Vec<&'static str> {
        write(owners, &KNOWN[number])
    }

    fn write(owners: &Owners, (owner, name, word, change): &(&'static str, &str, usize, Change)) -> Vec<&'static str> {
        let memory = std::fs::OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap();
        let is_its = |mapping: &&Mapping| {
            owners.0.get(&mapping.inode) == Some(owner) && mapping.name == *name && mapping.offset == 0
        };
        let all = mappings();
        let its: Vec<_> = all.iter().filter(is_its).collect();
        assert!(!its.is_empty(), "there is no {name} of {owner}");
        for mapping in its {
            let (at, mut seen) = (mapping.start + 8 * *word as u64, [0; 8]);
            memory.read_exact_at(&mut seen, at).unwrap();
            let written = match change {
                Change::To(value) => *value,
                Change::Flip(bits) => u64::from_ne_bytes(seen) ^ bits,
            };
            memory.write_all_at(&written.to_ne_bytes(), at).unwrap();
        }
        println!("hit {owner}: word {word} of {name}");
        vec![*owner]
    }

    pub(super) fn run(sort: &str, number: u64) {
        // A panic of a task would be caught.
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            usual(panic);
            std::process::abort();
        }));
        let several = sort == "several";
        let mut random = Random(number.wrapping_mul(2).wrapping_add(several.into()).wrapping_mul(0x9e37_79b9));
        let known = (sort == "known").then_some(number as usize);
        let flavor = random.below(2);
        let mut runtime = match flavor {
            0 => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
        match sort {
            "lane" => runtime.block_on(damage_a_lane()),
            _ => runtime.block_on(objects(several, known, random)),
        }
        drop(runtime);
        assert_quiet();
        std::io::stdout().flush().unwrap();
    }

    /// Nothing spins once everything is gone.
    fn assert_quiet() {
        let spent = || {
            let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
            let mut words = stat.rsplit(')').next().unwrap().split_whitespace().skip(11);
            words.next().unwrap().parse::<u64>().unwrap() + words.next().unwrap().parse::<u64>().unwrap()
        };
        let before = spent();
        std::thread::sleep(Duration::from_millis(40));
        assert!(spent() - before <= 2, "it works on though there is nothing to do");
    }

    fn double(n: u64) -> u64 {
        n.wrapping_mul(2)
    }

    /// Uses some of it from elsewhere, until it is killed.
    async fn partner(
        (mut pipe, requests, replies): (mp::Connection<u64, u64>, mp::Queue<u64>, mp::Queue<u64>),
        (lock, condition, event): (mp::Lock, mp::Condition, mp::Event),
        (rwlock, semaphore): (mp::RwLock, mp::Semaphore),
    ) {
        let echo = async {
            while let Ok(n) = pipe.recv().await {
                if pipe.send(n + 1).await.is_err() {
                    break;
                }
            }
        };
        let serve = async {
            while let Ok(n) = requests.get().await {
                if replies.put(n + 1).await.is_err() {
                    break;
                }
            }
        };
        let churn = async {
            loop {
                drop(lock.acquire_timeout(HIT).await);
                drop(rwlock.read_timeout(HIT).await);
                drop(semaphore.acquire_timeout(HIT).await);
                let _ = event.wait_timeout(Duration::from_millis(2)).await;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let waits = async {
            loop {
                if let Ok(guard) = condition.lock_timeout(HIT).await {
                    drop(condition.wait_timeout(guard, HIT).await);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::join!(echo, serve, churn, waits);
        std::future::pending::<()>().await;
    }

    async fn objects(several: bool, known_one: Option<usize>, mut random: Random) {
        let mut owners = Owners::default();
        owners.made("family", mp::Lock::new().unwrap());
        let queue = owners.made("queue", mp::Queue::<u64>::unbounded().unwrap());
        let bounded = owners.made("bounded", mp::Queue::<u64>::bounded(4).unwrap());
        let joinable = owners.made("joinable", mp::JoinableQueue::<u64>::unbounded().unwrap());
        let (requests, replies) =
            owners.made("served", (mp::Queue::<u64>::unbounded().unwrap(), mp::Queue::<u64>::bounded(8).unwrap()));
        let idle = owners.made("idle", mp::Queue::<u64>::unbounded().unwrap());
        let (mut near, far) = owners.made("pipe", mp::pipe::<u64, u64>().unwrap());
        let lock = owners.made("lock", mp::Lock::new().unwrap());
        let rlock = owners.made("rlock", mp::RLock::new().unwrap());
        let semaphore = owners.made("semaphore", mp::Semaphore::new(3).unwrap());
        let limited = owners.made("limited", mp::BoundedSemaphore::new(2).unwrap());
        let rwlock = owners.made("rwlock", mp::RwLock::new().unwrap());
        let event = owners.made("event", mp::Event::new().unwrap());
        let condition = owners.made("condition", mp::Condition::new().unwrap());
        let barrier = owners.made("barrier", mp::Barrier::new(2).unwrap());
        let number = owners.made("number", mp::Value::new(7_u64).unwrap());
        let wide = owners.made("wide", mp::Value::new([3_u64; 5]).unwrap());
        let huge = owners.made("huge", mp::Value::new([4_u64; 700]).unwrap());
        let array = owners.made("array", mp::Array::from_slice(&[1_u64; 64]).unwrap());
        let (state, mut watcher) = owners.made("watch", mp::watch(PAYLOAD).unwrap());
        let (news, mut listener) = owners.made("broadcast", mp::broadcast::<u64>(4).unwrap());
        let token = owners.made("token", mp::CancellationToken::new().unwrap());
        let child = owners.made("token", token.child_token().unwrap());
        let (sender, receiver) = owners.made("oneshot", mp::oneshot().unwrap());
        let (gone, unsent) = owners.made("oneshot", mp::oneshot::<u64>().unwrap());
        let leased = owners.made("leased", mp::Queue::<u64>::unbounded().unwrap());
        (0..6).for_each(|n| leased.try_put(PAYLOAD + n).unwrap());
        let lease = leased.try_lease().unwrap();
        drop(leased.try_lease().unwrap());
        let manager = mp::Manager::start().await.unwrap();
        let dict = manager.dict::<u64, u64>().await.unwrap();
        dict.insert(PAYLOAD, PAYLOAD).await.unwrap();
        owners.made("manager", ());
        let pool = mp::Pool::builder().workers(2).build().unwrap();
        pool.map(double, 0..8_u64).chunksize(1).await.unwrap();
        owners.made("pool", ());
        let handles = (
            (far, requests.clone(), replies.clone()),
            (lock.clone(), condition.clone(), event.clone()),
            (rwlock.clone(), semaphore.clone()),
        );
        let mut partner = Process::builder().daemon(true).spawn(partner, handles).unwrap();
        near.send(PAYLOAD).await.unwrap();
        near.recv().await.unwrap();
        owners.made("served", ());
        // What lies there when the damage comes.
        (0..20).for_each(|n| queue.try_put(PAYLOAD + n).unwrap());
        (0..2).for_each(|n| bounded.try_put(PAYLOAD + n).unwrap());
        (0..3).for_each(|n| joinable.try_put(PAYLOAD + n).unwrap());
        let held = random.below(2) == 0;
        let permit = held.then(|| semaphore.try_acquire().ok()).flatten();
        let reader = held.then(|| rwlock.try_read().ok()).flatten();
        // Who waits when it comes.
        let waits = tokio::spawn({
            let (idle, event) = (idle.clone(), event.clone());
            async move { tokio::join!(idle.get_timeout(HIT), event.wait_timeout(HIT)) }
        });
        tokio::time::sleep(Duration::from_millis(random.below(4) as u64)).await;
        let hits = if several { 2 + random.below(19) } else { 1 };
        let hit = match known_one {
            Some(number) => known(&owners, number),
            None => (0..hits).filter_map(|_| damage(&owners, &mut random)).collect(),
        };
        let judge = Judge { hit };
        let judge = &judge;
        macro_rules! uses {
            ($what:literal, $doing:literal, $uses:expr) => {
                judge.uses($what, $doing, async { $uses })
            };
        }
        drop((permit, reader));
        let queues = async {
            for n in 0..20 {
                uses!("queue", "get what lay there", Ok(queue.get().await? == PAYLOAD + n)).await;
            }
            for n in 0..3 {
                uses!("queue", "put and get", {
                    queue.put(PAYLOAD + n).await?;
                    Ok(queue.get_timeout(RIGHT).await? == PAYLOAD + n && queue.try_get().is_err())
                })
                .await;
            }
            uses!("queue", "grow", {
                for n in 0..6000 {
                    queue.put(PAYLOAD + n).await?;
                }
                let mut is_right = queue.len() == 6000;
                for n in 0..6000 {
                    is_right &= queue.get().await? == PAYLOAD + n;
                }
                Ok(is_right)
            })
            .await;
            queue.close();
            uses!("queue", "end", Ok(queue.get().await.is_err_and(|error| error.kind() == ErrorKind::Closed))).await;
        };
        let limits = async {
            for n in 0..2 {
                uses!("bounded", "get what lay there", Ok(bounded.get().await? == PAYLOAD + n)).await;
            }
            for n in 0..9 {
                uses!("bounded", "put and get", {
                    bounded.put(PAYLOAD + n).await?;
                    Ok(bounded.get().await? == PAYLOAD + n)
                })
                .await;
            }
            uses!("bounded", "fill", {
                for n in 0..4 {
                    bounded.try_put(PAYLOAD + n)?;
                }
                Ok(bounded.try_put(PAYLOAD).is_err_and(|error| error.kind() == ErrorKind::Full))
            })
            .await;
            for _ in 0..3 {
                uses!("joinable", "get and be done", {
                    joinable.get().await?;
                    joinable.task_done()?;
                    Ok(true)
                })
                .await;
            }
            uses!("joinable", "join", joinable.join().await.map(|()| true)).await;
        };
        let sent = async {
            for n in 0..3 {
                uses!("watch", "send and see", {
                    state.send(PAYLOAD + n)?;
                    watcher.changed().await?;
                    Ok(watcher.get()? == PAYLOAD + n)
                })
                .await;
                uses!("broadcast", "send and receive", {
                    news.send(PAYLOAD + n)?;
                    Ok(listener.recv().await? == PAYLOAD + n)
                })
                .await;
            }
            uses!("oneshot", "send and receive", {
                sender.send(PAYLOAD)?;
                Ok(receiver.await? == PAYLOAD)
            })
            .await;
            drop(gone);
            uses!("oneshot", "end", Ok(unsent.await.is_err_and(|error| error.kind() == ErrorKind::Closed))).await;
            drop((state, news));
            uses!("watch", "end", Ok(watcher.changed().await.is_err_and(|error| error.kind() == ErrorKind::Closed)))
                .await;
            uses!("broadcast", "end", Ok(listener.recv().await.is_err_and(|error| error.kind() == ErrorKind::Closed)))
                .await;
        };
        let leases = async {
            uses!("leased", "commit", Ok(lease.commit()? == PAYLOAD)).await;
            for n in 1..6 {
                uses!("leased", "lease", Ok(leased.lease().await?.commit()? == PAYLOAD + n)).await;
            }
            leased.close();
            uses!("leased", "end", Ok(leased.lease().await.is_err_and(|error| error.kind() == ErrorKind::Closed)))
                .await;
        };
        let served = async {
            uses!("served", "request and reply", {
                let mut is_right = true;
                for n in 0..20 {
                    requests.put(PAYLOAD + n).await?;
                    is_right &= replies.get().await? == PAYLOAD + n + 1;
                }
                Ok(is_right)
            })
            .await;
            uses!("pipe", "there and back", {
                let mut is_right = true;
                for n in 0..20 {
                    near.send(PAYLOAD + n).await?;
                    is_right &= near.recv().await? == PAYLOAD + n + 1;
                }
                Ok(is_right && near.try_recv().is_err_and(|error| error.kind() == ErrorKind::Empty))
            })
            .await;
        };
        let locks = async {
            for _ in 0..3 {
                uses!("lock", "take", {
                    let guard = lock.acquire_timeout(RIGHT).await?;
                    let is_held = lock.try_acquire().is_err();
                    drop(guard);
                    Ok(is_held)
                })
                .await;
                uses!("rlock", "take twice", {
                    let guard = rlock.acquire().await?;
                    drop((rlock.acquire().await?, guard));
                    Ok(true)
                })
                .await;
                uses!("semaphore", "take", {
                    let permits = (semaphore.acquire().await?, semaphore.acquire().await?);
                    drop(permits);
                    Ok(semaphore.available() <= 3)
                })
                .await;
                uses!("limited", "take both", {
                    let permits = (limited.acquire().await?, limited.acquire().await?);
                    let is_out = limited.try_acquire().is_err();
                    drop(permits);
                    Ok(is_out && limited.release().is_err())
                })
                .await;
                uses!("rwlock", "read and write", {
                    drop(rwlock.read().await?);
                    let guard = rwlock.write().await?;
                    let is_held = rwlock.try_read().is_err();
                    drop(guard);
                    Ok(is_held)
                })
                .await;
            }
        };
        let signals = async {
            uses!("event", "set and wait", {
                event.clear();
                let (waited, ()) = tokio::join!(event.wait(), async { event.set() });
                waited.map(|()| event.is_set())
            })
            .await;
            uses!("token", "cancel", {
                let was_cancelled = child.is_cancelled();
                let (waited, ()) = tokio::join!(child.cancelled_timeout(RIGHT), async { token.cancel() });
                waited.map(|()| !was_cancelled && child.is_cancelled() && token.is_cancelled())
            })
            .await;
            uses!("condition", "wait and notify", {
                let guard = condition.lock().await?;
                let waits = async { condition.wait(guard).await.map(drop) };
                let tells = async {
                    loop {
                        condition.notify_all();
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                };
                tokio::select! {
                    waited = waits => waited.map(|()| true).map_err(Into::into),
                    () = tells => Ok(false),
                }
            })
            .await;
            condition.notify_one();
            uses!("condition", "give up", {
                let guard = condition.lock().await?;
                drop(condition.wait_timeout(guard, Duration::from_millis(3)).await);
                Ok(condition.waiting() <= 2)
            })
            .await;
            for _ in 0..2 {
                uses!("barrier", "come", {
                    let (one, two) = tokio::join!(barrier.wait_timeout(RIGHT), barrier.wait_timeout(RIGHT));
                    Ok(one?.index() + two?.index() == 1)
                })
                .await;
                barrier.abort();
                barrier.reset();
                uses!("barrier", "reset", Ok(!barrier.is_broken() && barrier.waiting() == 0)).await;
            }
        };
        let values = async {
            uses!("number", "get, set and lock", {
                number.set(8);
                *number.lock().await? += 1;
                Ok(number.fetch_add(1) == 9 && number.get() == 10)
            })
            .await;
            let wide = wide.clone();
            let huge = huge.clone();
            let set = tokio::task::spawn_blocking(move || {
                wide.set([5; 5]);
                huge.set([6; 700]);
                (wide.get() == [5; 5], huge.get() == [6; 700])
            });
            // A lock that looks held is passed over after five seconds.
            let (five, six) = tokio::time::timeout(RIGHT, set).await.expect("a value is set in time").unwrap();
            uses!("wide", "set", Ok(five)).await;
            uses!("huge", "set", Ok(six)).await;
            uses!("array", "lock", {
                array.lock().await?[3] = 9;
                Ok(array.get(3) == Some(9) && array.to_vec().len() == 64)
            })
            .await;
            uses!("array", "set", {
                drop(array.lock().await?);
                array.set(4, 11);
                Ok(array.get(4) == Some(11))
            })
            .await;
        };
        let managed = async {
            for n in 0..5 {
                uses!("manager", "insert and get", {
                    dict.insert(n, PAYLOAD + n).await?;
                    Ok(dict.get(&n).await? == Some(PAYLOAD + n))
                })
                .await;
            }
            uses!("manager", "make", {
                let list = manager.list::<u64>().await?;
                list.extend((0..100).collect()).await?;
                Ok(list.len().await? == 100)
            })
            .await;
        };
        let pooled = async {
            uses!("pool", "map", {
                let doubled = pool.map(double, 0..40_u64).chunksize(3).await?;
                Ok(doubled.into_iter().eq((0..40).map(|n| 2 * n)))
            })
            .await;
            uses!("pool", "large", {
                let sum = pool.apply(|bytes: Vec<u8>| bytes, (vec![7_u8; 100_000],)).await?;
                Ok(sum == vec![7; 100_000])
            })
            .await;
            recovers(judge, &pool).await;
        };
        tokio::join!(queues, limits, sent, leases, served, locks, signals, values, managed, pooled);
        let (item, _) = waits.await.unwrap();
        println!("end idle {:?}", item.map_err(|error| error.kind()));
        std::hint::black_box(mp::debug::dump());
        let ends = async {
            let _ = pool.shutdown_within().await;
            let _ = manager.shutdown().await;
            partner.kill().unwrap();
            partner.wait().await.unwrap();
        };
        tokio::time::timeout(TRIAL / 3, ends).await.expect("all children end in time");
    }

    trait Ends {
        async fn shutdown_within(&self) -> mp::Result<()>;
    }

    impl Ends for mp::Pool {
        async fn shutdown_within(&self) -> mp::Result<()> {
            self.terminate();
            tokio::time::timeout(TRIAL / 4, self.join()).await.expect("a pool ends in time")
        }
    }

    /// A pool replaces a worker whose lane was hit.
    async fn recovers(judge: &Judge, pool: &mp::Pool) {
        if judge.is_hit("family") {
            return;
        }
        let start = Instant::now();
        let mut right = 0;
        while right < 4 {
            let done = tokio::time::timeout(4 * HIT, pool.apply(double, (21_u64,)).timeout(HIT)).await;
            right = if done.is_ok_and(|done| done.is_ok_and(|n| n == 42)) { right + 1 } else { 0 };
            if start.elapsed() > RIGHT / 16 {
                // A worker that is not woken any more looks like one that has much to do.
                return println!("end pool stays away");
            }
        }
        println!("end pool is back");
    }
}
