//! A pool on other hosts: calls, errors, limits, what cannot cross, hosts that come and go.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use futures::{StreamExt, TryStreamExt};
use multiprocess::cluster::{Address, HostInfo};
use multiprocess::{self as mp, ErrorKind, Pool, PoolBuilder, StartMethod};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

mod cluster;
mod common;
mod suite;
use cluster::build::OtherBuild;
use cluster::{Host, until};
use common::{resident_bytes, within};

mp::test_support!();

const MS: Duration = Duration::from_millis(1);

/// Cluster pools, each with a host of its own.
struct Clusters {
    /// They end before their server.
    hosts: std::cell::RefCell<Vec<Host>>,
    server: cluster::Server,
}

impl Clusters {
    fn new() -> Option<Self> {
        Some(Self { server: cluster::Server::start(cluster::binary()?, ""), hosts: Default::default() })
    }
}

impl suite::Pools for Clusters {
    fn with(&self, places: usize, options: impl FnOnce(PoolBuilder) -> PoolBuilder) -> mp::Result<Pool> {
        let mut hosts = self.hosts.borrow_mut();
        let url = format!("{}-{}", self.server.url(), hosts.len());
        hosts.push(Host::of(cluster::Setup { url: url.clone(), ..cluster::Setup::of(&self.server, places) }));
        options(Pool::builder().cluster(Address::new(url).lease(cluster::LEASE))).build()
    }
}

/// All that pools promise wherever their items run.
mod equality {
    crate::suite::everywhere!(crate::Clusters::new());
    crate::suite::with_processes!(crate::Clusters::new());
}

fn square(n: u64) -> u64 {
    n * n
}

fn slow(n: u64) -> u64 {
    std::thread::sleep(20 * MS);
    n
}

/// And the process that serves.
fn slow_at(n: u64) -> (u64, u32) {
    (slow(n), mp::parent_process().unwrap().pid())
}

fn forever() {
    loop {
        std::thread::sleep(MS);
    }
}

/// Dies at 3, panics at 5.
fn perilous(n: u64) -> u64 {
    match n {
        3 => std::process::abort(),
        5 => panic!("five"),
        n => n,
    }
}

/// Adds a line to a file: how often it ran.
fn note(file: PathBuf, wait: Duration) {
    use std::io::Write;
    std::fs::OpenOptions::new().create(true).append(true).open(file).unwrap().write_all(b"x").unwrap();
    std::thread::sleep(wait);
}

/// Adds a line, and stays if it is the first.
fn stays_first(file: PathBuf) {
    note(file.clone(), Duration::ZERO);
    if notes(&file) == 1 {
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn notes(file: &PathBuf) -> usize {
    std::fs::read(file).map_or(0, |bytes| bytes.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_run_at_a_host_and_leave_nothing_behind() {
    let server = server!();
    let pool = cluster::pool(&server);
    let host = Host::start(&server, 2);
    assert_eq!(within(pool.apply(square, (7,))).await.unwrap(), 49);
    let squares = within(pool.map(square, 0..10_000)).await.unwrap();
    assert!(squares.iter().enumerate().all(|(n, square)| *square == (n * n) as u64));
    let mut some: Vec<u64> = within(pool.imap_unordered(square, 0..1000).try_collect()).await.unwrap();
    some.sort_unstable();
    assert!(some.iter().enumerate().all(|(n, square)| *square == (n * n) as u64) && some.len() == 1000);
    let futures = futures::stream::iter(0..500).map(|n| pool.apply_async(square, (n,))).buffer_unordered(64);
    assert_eq!(within(futures.try_collect::<Vec<u64>>()).await.unwrap().len(), 500);
    assert_eq!(pool.workers(), 2);
    // The word that a message is done may come after its last result.
    let is_counted = async || (pool.stats().round_trip.count(), pool.stats().runs.count()) == (11_501, 11_501);
    until("all items counted", is_counted).await;
    assert_eq!((pool.stats().duplicates, pool.stats().redelivered), (0, 0));
    let (items, given_back, killed) = host.drain().await;
    assert_eq!((items, given_back, killed), (11_501, 0, 0));
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failure_of_an_item_fails_no_other_and_names_the_host() {
    let server = server!();
    let pool = cluster::pool(&server);
    let host = Host::start(&server, 2);
    let results: Vec<_> = within(pool.imap(perilous, 0..10).chunksize(5).collect()).await;
    let kinds: Vec<_> = results.iter().map(|result| result.as_ref().copied().map_err(|error| error.kind())).collect();
    for (n, kind) in kinds.iter().enumerate() {
        match n {
            3 => assert_eq!(*kind, Err(ErrorKind::ProcessDied)),
            5 => assert_eq!(*kind, Err(ErrorKind::Panicked)),
            n => assert_eq!(*kind, Ok(n as u64)),
        }
    }
    let pid = format!("(pid {})", host.process.pid());
    for n in [3, 5] {
        let text = results[n].as_ref().unwrap_err().to_string();
        assert!(text.contains(&pid), "{text}");
    }
    // As on this machine.
    let local = Pool::new(1).unwrap();
    let here: Vec<_> = within(local.imap(perilous, 0..10).chunksize(5).collect()).await;
    for results in [&results, &here] {
        let text = results[3].as_ref().unwrap_err().to_string();
        assert!(text.contains("item 3 of ") && text.contains("::perilous"), "{text}");
    }
    assert_eq!(results[5].as_ref().unwrap_err().panic().unwrap().message(), "five");
    let began = Instant::now();
    let error = within(pool.apply(forever, ()).timeout(100 * MS)).await.unwrap_err();
    assert!(
        error.kind() == ErrorKind::Timeout && error.to_string().contains(&pid) && error.to_string().contains("forever")
    );
    assert!(began.elapsed() < 10 * Duration::from_secs(1));
    assert_eq!(within(pool.apply(square, (2,))).await.unwrap(), 4);
    server.is_empty().await;
}

fn allocate(bytes: usize) -> usize {
    std::hint::black_box(vec![1_u8; bytes]).len()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_limit_of_a_worker_at_a_host_is_told_as_such() {
    let server = server!();
    let pool = cluster::pool(&server);
    let local = Pool::builder().workers(1).memory_limit(1 << 30).build().unwrap();
    let _serving = local.serve(server.address());
    let results: Vec<_> = within(pool.imap(allocate, [1 << 10, 2 << 30, 2 << 10]).chunksize(3).collect()).await;
    let error = results[1].as_ref().unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::MemoryLimit, "{text}");
    assert!(text.contains(&format!("(pid {})", std::process::id())) && text.contains("item 1 of "), "{text}");
    assert_eq!((*results[0].as_ref().unwrap(), *results[2].as_ref().unwrap()), (1 << 10, 2 << 10));
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_refused_and_a_task_that_sends_some_is_unharmed() {
    let server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 1);
    let tells = |n: u64| mp::current_task().unwrap().blocking_emit(n).is_ok();
    assert!(within(pool.apply(tells, (1,))).await.unwrap(), "it is discarded");
    let mut call = pool.apply(tells, (1,));
    let events: Vec<_> = within(call.events::<u64>().collect()).await;
    assert_eq!((events.len(), events[0].as_ref().unwrap_err().kind()), (1, ErrorKind::Unsupported));
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
async fn totals_count_each_kind_of_failure() {
    let server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 2);
    let results: Vec<_> = within(pool.imap(perilous, 0..10).chunksize(5).collect()).await;
    assert_eq!(results.iter().filter(|result| result.is_err()).count(), 2);
    within(pool.apply(forever, ()).timeout(100 * MS)).await.unwrap_err();
    let running = pool.apply_async(forever, ());
    until("it runs", async || pool.stats().running > 0).await;
    running.cancel();
    within(running).await.unwrap_err();
    let counted = async || {
        let totals = pool.stats().totals;
        let ended = (totals.done, totals.died, totals.panicked, totals.timed_out, totals.cancelled, totals.failed);
        ended == (8, 1, 1, 1, 1, 0)
    };
    until("each is counted as what it is", counted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_happen_at_the_host_and_attempts_are_counted() {
    let server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 1);
    let second = || match mp::current_task().unwrap().attempt() {
        0 => std::process::abort(),
        attempt => attempt,
    };
    assert_eq!(within(pool.apply(second, ()).retries(3)).await.unwrap(), 1);
    assert_eq!(within(pool.apply(second, ())).await.unwrap_err().kind(), ErrorKind::ProcessDied);
    assert_eq!(pool.stats().redelivered, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_dropped_is_stopped_at_its_host_and_one_that_waits_is_removed() {
    let server = server!();
    let pool = cluster::pool(&server);
    let host = Host::start(&server, 1);
    assert_eq!(within(pool.apply(square, (2,))).await.unwrap(), 4);
    for _ in 0..3 {
        assert!(tokio::time::timeout(200 * MS, pool.apply(forever, ())).await.is_err());
    }
    // The one slot is free again.
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    let running = pool.apply_async(forever, ());
    let waiting = pool.apply_async(forever, ());
    until("two messages", async || server.messages().await == 2).await;
    waiting.cancel();
    until("one message", async || server.messages().await == 1).await;
    assert_eq!(within(waiting).await.unwrap_err().kind(), ErrorKind::Cancelled);
    running.cancel();
    assert_eq!(within(running).await.unwrap_err().kind(), ErrorKind::Cancelled);
    server.is_empty().await;
    assert_eq!(within(pool.apply(square, (4,))).await.unwrap(), 16);
    let (items, _, killed) = host.drain().await;
    assert_eq!((items, killed), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn pool_that_ends_removes_its_items() {
    let server = server!();
    let _host = Host::start(&server, 1);
    let pool = cluster::pool(&server);
    let endless: Vec<_> = (0..3).map(|_| pool.apply_async(forever, ())).collect();
    until("three messages", async || server.messages().await == 3).await;
    pool.terminate();
    for result in endless {
        assert_eq!(within(result).await.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    within(pool.join()).await.unwrap();
    server.is_empty().await;
    let pool = cluster::pool(&server);
    let last = pool.apply_async(slow, (5,));
    pool.close();
    within(pool.join()).await.unwrap();
    assert_eq!(within(last).await.unwrap(), 5);
    assert_eq!(within(pool.apply(square, (1,))).await.unwrap_err().kind(), ErrorKind::Closed);
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_host_items_wait_and_one_that_comes_takes_them() {
    let server = server!();
    let pool = cluster::pool(&server);
    let local = Pool::new(1).unwrap();
    assert_eq!(within(local.apply(square, (6,))).await.unwrap(), 36);
    let mut soonest = Duration::MAX;
    // On a busy machine it may take longer.
    for attempt in 0..10 {
        let waiting = pool.apply_async(square, (6,));
        until("a message", async || server.messages().await == 1).await;
        assert!(pool.hosts().is_empty() && pool.workers() == 0 && !waiting.ready());
        let comes = Instant::now();
        let serving = local.serve(server.address());
        assert_eq!(within(waiting).await.unwrap(), 36);
        soonest = soonest.min(comes.elapsed());
        serving.drain(Duration::from_secs(5));
        let served = within(serving).await.unwrap();
        assert_eq!((served.items, served.given_back, served.killed), (1, 0, 0));
        until("no host", async || pool.hosts().is_empty() && pool.workers() == 0).await;
        if attempt > 0 && soonest <= 100 * MS {
            break;
        }
    }
    assert!(soonest <= 100 * MS, "a host that came took {soonest:?} to take an item");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_field_of_a_host_is_true() {
    let server = server!();
    let pool = cluster::pool(&server);
    let (local, began) = (Pool::new(2).unwrap(), Instant::now());
    let serving = local.serve(server.address());
    until("a host that is known", async || pool.workers() == 2).await;
    let known = || pool.hosts().pop().expect("one host");
    assert_eq!(within(pool.map(square, 0..100)).await.unwrap().len(), 100);
    let running = pool.apply_async(forever, ());
    until("its figures are those of now", async || (known().busy, known().tasks) == (1, 100)).await;
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_string();
    let (host, own) = (known(), std::process::id());
    assert_eq!((host.name, host.hostname, host.pid), (format!("{hostname} (pid {own})"), hostname, own));
    assert!((host.slots, host.build_matches, pool.hosts().len()) == (2, true, 1));
    let (before, seen) = (known(), Instant::now());
    assert!(before.age <= began.elapsed() && before.last_heard <= before.age, "{before:?}");
    // A beat that comes in between makes it younger.
    let is_older = async || {
        let (now, passed) = (known(), seen.elapsed());
        now.age > before.age && now.age <= began.elapsed() && now.last_heard <= before.last_heard + passed
    };
    until("it grows older", is_older).await;
    running.cancel();
    until("its slot is free", async || known().busy == 0).await;
    drop(serving);
    until("it has gone", async || pool.hosts().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_timeout_bounds_the_wait_for_a_host_and_behind_others() {
    let server = server!();
    let pool = cluster::pool(&server);
    let began = Instant::now();
    let error = within(pool.apply(square, (1,)).queue_timeout(300 * MS)).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Timeout && began.elapsed() >= 300 * MS, "{error}");
    server.is_empty().await;
    let _host = Host::start(&server, 1);
    assert_eq!(within(pool.apply(square, (5,)).queue_timeout(Duration::from_secs(15))).await.unwrap(), 25);
    let running = pool.apply_async(forever, ());
    until("a message that runs", async || {
        server.messages().await == 1 && pool.hosts().iter().any(|host| host.busy == 1)
    })
    .await;
    let error = within(pool.apply(square, (1,)).queue_timeout(300 * MS)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    running.cancel();
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_joins_gets_its_share_and_one_that_drains_is_not_noticed() {
    let server = server!();
    let pool = cluster::pool(&server);
    let first = Host::start(&server, 1);
    let mut results = pool.imap_unordered(slow_at, 0..400);
    for _ in 0..20 {
        within(results.next()).await.unwrap().unwrap();
    }
    let second = Host::start(&server, 2);
    until("two hosts", async || pool.hosts().len() == 2).await;
    let joined = Instant::now();
    let (mut all, mut at_second) = (Vec::new(), 0);
    // Its share is two thirds.
    while at_second < 10 {
        let (n, host) = within(results.next()).await.unwrap().unwrap();
        at_second += usize::from(host == second.process.pid());
        all.push((n, host));
    }
    assert!(joined.elapsed() < Duration::from_secs(1), "{:?}", joined.elapsed());
    let (items, _, killed) = first.drain().await;
    assert!(items >= 20 && killed == 0);
    all.extend(within(results.try_collect::<Vec<_>>()).await.unwrap());
    assert_eq!(all.len(), 380);
    assert_eq!((pool.stats().redelivered, pool.stats().duplicates), (0, 0));
    let (others, _, killed) = second.drain().await;
    assert_eq!((items + others, killed), (400, 0));
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn item_that_overruns_the_grace_of_a_drain_is_killed_and_runs_elsewhere() {
    let server = server!();
    let pool = cluster::pool(&server);
    let file = server.dir().join("notes");
    let local = Pool::new(1).unwrap();
    let serving = local.serve(server.address());
    let call = pool.apply_async(stays_first, (file.clone(),));
    until("it runs", async || notes(&file) == 1).await;
    serving.drain(50 * MS);
    let served = within(serving).await.unwrap();
    assert_eq!((served.items, served.given_back, served.killed), (0, 1, 1));
    let _host = Host::start(&server, 1);
    within(call).await.unwrap();
    assert_eq!((notes(&file), pool.stats().redelivered), (2, 0), "nobody was lost");
    server.is_empty().await;
}

/// `queue_timeout` bounds the wait for its first beginning, as on one machine.
#[tokio::test(flavor = "multi_thread")]
async fn an_item_that_had_begun_and_was_given_back_does_not_fail_by_its_queue_timeout() {
    let server = server!();
    let pool = cluster::pool(&server);
    let file = server.dir().join("notes");
    let local = Pool::new(1).unwrap();
    let serving = local.serve(server.address());
    until("a host that is known", async || pool.workers() == 1).await;
    let limit = Duration::from_secs(5);
    let asked = Instant::now();
    let call = tokio::spawn(pool.apply(stays_first, (file.clone(),)).queue_timeout(limit).into_future());
    until("it runs", async || notes(&file) == 1).await;
    serving.drain(Duration::ZERO);
    assert_eq!(within(serving).await.unwrap().killed, 1);
    until("its time to begin is over", async || asked.elapsed() > limit + 300 * MS).await;
    let _host = Host::start(&server, 1);
    within(call).await.unwrap().unwrap();
    assert_eq!(notes(&file), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_that_was_given_back_before_it_began_keeps_its_queue_timeout() {
    let server = server!();
    let pool = cluster::pool(&server);
    let local = Pool::new(1).unwrap();
    let running = local.apply_async(forever, ());
    let serving = local.serve(server.address());
    until("a host that is known", async || pool.workers() == 1).await;
    let call = tokio::spawn(pool.apply(square, (3,)).queue_timeout(Duration::from_secs(8)).into_future());
    until("the host has it", async || pool.hosts().iter().any(|host| host.busy == 1)).await;
    drop(serving);
    assert_eq!(within(call).await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
    running.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_dropped_gives_everything_back() {
    let server = server!();
    let pool = cluster::pool(&server);
    let file = server.dir().join("notes");
    let local = Pool::new(1).unwrap();
    let serving = local.serve(server.address());
    let call = pool.apply_async(stays_first, (file.clone(),));
    until("it runs", async || notes(&file) == 1).await;
    drop(serving);
    let began = Instant::now();
    let _host = Host::start(&server, 1);
    within(call).await.unwrap();
    assert!(notes(&file) == 2 && began.elapsed() < Duration::from_secs(10));
    assert_eq!(within(local.apply(square, (2,))).await.unwrap(), 4, "the pool goes on for others");
}

fn grow(len: usize) -> Vec<u8> {
    vec![len as u8; len]
}

fn count(bytes: Vec<u8>) -> usize {
    bytes.iter().filter(|byte| **byte == 7).count()
}

async fn large_values_cross(server: &cluster::Server) {
    let pool = cluster::pool(server);
    let _host = Host::start(server, 2);
    for len in [100, 60 << 10, 64 << 10, 256 << 10, 600_000, 5 << 20] {
        assert_eq!(within(pool.apply(count, (vec![7; len],))).await.unwrap(), len);
        let grown = within(pool.apply(grow, (len,))).await.unwrap();
        assert!(grown.len() == len && grown.iter().all(|byte| *byte == len as u8));
    }
    let sizes = within(pool.map(count, (0..20).map(|n| vec![7; n * 30_000]))).await.unwrap();
    assert!(sizes.iter().enumerate().all(|(n, size)| *size == n * 30_000));
    // What is known to be quick travels together: the heads of all are larger than some servers let through.
    for len in [1, 200, 3000, 7000] {
        let quick = (0..2000).map(|n| pool.apply_async(count, (vec![7; if n % 2 == 0 { len } else { 200 }],)));
        let sizes = within(futures::future::try_join_all(quick)).await.unwrap();
        assert!(sizes.iter().enumerate().all(|(n, size)| *size == if n % 2 == 0 { len } else { 200 }));
    }
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_arguments_and_results_cross_in_pieces() {
    let server = server!();
    large_values_cross(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_cross_a_server_that_lets_little_through() {
    let server = server!("max_payload: 64KB\n");
    large_values_cross(&server).await;
}

/// Its stream is lost, too, so that each message is published again.
#[tokio::test(flavor = "multi_thread")]
async fn quick_calls_that_travelled_together_are_answered_though_the_server_lets_less_through_than_before() {
    let mut server = server!();
    let pool = cluster::pool(&server);
    let host = Host::start(&server, 1);
    for _ in 0..50 {
        assert_eq!(within(pool.apply(count, (vec![7; 100],))).await.unwrap(), 100);
    }
    host.drain().await;
    let client = server.client().await;
    let mut tasks = server.subscribe(&client, "mp.pool.t.>").await;
    let calls: Vec<_> = (0..64).map(|n| pool.apply_async(count, (vec![7; 6000 + n],))).collect();
    let (mut orders, mut largest) = (0, 0);
    while orders < 64 {
        let payload = within(tasks.next()).await.unwrap().payload;
        // Behind the version, the kind, the submitter, the number, and whether it is to be asked for.
        orders += u32::from_le_bytes(payload[19..23].try_into().unwrap());
        largest = payload.len().max(largest);
    }
    assert!(largest > 17 << 10, "the largest message has {largest} bytes");
    server.restart_empty_with("max_payload: 16KB\n");
    let _host = Host::start(&server, 1);
    let counts = within(futures::future::try_join_all(calls)).await.unwrap();
    assert!(counts.into_iter().eq(6000..6064));
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_source_is_pulled_as_far_ahead_as_hosts_are_there_for() {
    let server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 2);
    let pulled = Arc::new(AtomicU64::new(0));
    let counter = pulled.clone();
    let source = (0..).inspect(move |_| _ = counter.fetch_add(1, SeqCst));
    let mut results = pool.imap_unordered(slow, source);
    for _ in 0..20 {
        within(results.next()).await.unwrap().unwrap();
    }
    tokio::time::sleep(500 * MS).await;
    // Four chunks for each slot, of one item each, as each takes 20 ms.
    let ahead = pulled.load(SeqCst) - 20;
    assert!(ahead <= 16, "{ahead} items are pulled and not taken");
    assert!(server.messages().await <= 16);
    drop(results);
    server.is_empty().await;
    assert_eq!(within(pool.apply(square, (2,))).await.unwrap(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_stream_makes_submitters_wait_and_fails_nothing() {
    let server = server!();
    let address = server.address().most_waiting(5, 1 << 20);
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let calls: Vec<_> = (0..30).map(|n| pool.apply_async(slow, (n,))).collect();
    until("a full stream", async || server.messages().await == 5).await;
    let local = Pool::new(2).unwrap();
    let _serving = local.serve(&address);
    let results = within(futures::future::try_join_all(calls)).await.unwrap();
    assert_eq!(results, (0..30).collect::<Vec<_>>());
    server.is_empty().await;
}

/// Larger ones than the stream may hold travel past it.
#[tokio::test(flavor = "multi_thread")]
async fn an_argument_that_the_stream_has_no_room_for_arrives() {
    let server = server!();
    let address = server.address().most_waiting(1000, 64 << 10);
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let local = Pool::new(1).unwrap();
    let _serving = local.serve(&address);
    assert_eq!(within(pool.apply(count, (vec![7; 100 << 10],))).await.unwrap(), 100 << 10);
    let sizes = within(pool.map(count, (0..20).map(|_| vec![7; 10 << 10]))).await.unwrap();
    assert_eq!(sizes, [10 << 10; 20]);
}

/// Quick calls wait for each other, to travel together, and not for the end of longer ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_quick_call_beside_a_map_of_long_items_is_answered_before_it_ends() {
    let server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 2);
    for n in 0..20 {
        assert_eq!(within(pool.apply(square, (n,))).await.unwrap(), n * n);
    }
    let mut results = pool.imap_unordered(slow, 0..u64::MAX);
    let mut read = 0;
    let mut next = async || {
        within(results.next()).await.unwrap().unwrap();
        read += 1;
        read
    };
    while next().await < 20 {}
    let mut quick = pool.apply_async(square, (7,));
    let answered = loop {
        tokio::select! {
            answer = &mut quick => break answer.unwrap(),
            read = next() => assert!(read < 600, "it waits for the end of the others"),
        }
    };
    assert_eq!(answered, 49);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_worker_processes_cannot_serve() {
    let server = server!();
    for pool in [Pool::in_process().unwrap(), cluster::pool(&server)] {
        let error = within(pool.serve(server.address())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_submitters_share_the_hosts() {
    let server = server!();
    let _hosts = [Host::start(&server, 1), Host::start(&server, 1)];
    let pools = [cluster::pool(&server), cluster::pool(&server)];
    let all = pools.iter().map(|pool| pool.map(slow, 0..50));
    for results in within(futures::future::try_join_all(all)).await.unwrap() {
        assert_eq!(results, (0..50).collect::<Vec<_>>());
    }
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unsupported_operation_of_a_cluster_pool_names_the_place_to_do_it() {
    let pool = Pool::builder().cluster("nats://127.0.0.1:1/pool").build().unwrap();
    let errors =
        [pool.resize(3).await.unwrap_err(), pool.checkout().await.map(drop).unwrap_err(), pool.revive().unwrap_err()];
    for error in errors {
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("hosts"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn options_of_worker_processes_belong_to_the_pool_that_serves() {
    let builder = || Pool::builder().cluster("nats://127.0.0.1:1/pool");
    let second = Duration::from_secs(1);
    let wrong = [
        ("workers", builder().workers(2)),
        ("idle_timeout", builder().idle_timeout(second)),
        ("initializer", builder().initializer(|| (), ())),
        ("finalizer", builder().finalizer(|| (), ())),
        ("max_tasks_per_worker", builder().max_tasks_per_worker(1)),
        ("tasks_jitter", builder().tasks_jitter(1)),
        ("max_age", builder().max_age(second)),
        ("recycle_above", builder().recycle_above(1 << 30)),
        ("memory_limit", builder().memory_limit(1 << 30)),
        ("descriptor_limit", builder().descriptor_limit(100)),
        ("nice", builder().nice(1)),
        ("cpus", builder().cpus([0])),
        ("env", builder().env("A", "b")),
        ("start_method", builder().start_method(StartMethod::default())),
        ("keep_stderr", builder().keep_stderr(3)),
        ("backtraces", builder().backtraces(true)),
        ("initializer_timeout", builder().initializer_timeout(second)),
        ("exit_timeout", builder().exit_timeout(second)),
    ];
    for (option, builder) in wrong {
        let error = builder.build().map(drop).unwrap_err().to_string();
        assert!(error.contains(&format!("`{option}`")) && error.contains("serves"), "{error}");
    }
    // Also if it comes first.
    let error =
        Pool::builder().workers(2).cluster("nats://127.0.0.1:1/pool").build().map(drop).unwrap_err().to_string();
    assert!(error.contains("`workers`"), "{error}");
    builder().grace(second).max_waiting(5).build().unwrap();
    let wrong = Pool::builder().cluster(Address::new("nats://127.0.0.1:1/a.b")).build().map(drop).unwrap_err();
    assert!(wrong.to_string().contains("nats://127.0.0.1:1/a.b"));
}

/// Takes anything.
fn takes<T>(_: T) {}

/// Everything that belongs to this host is refused as an argument, by name, and other items go on.
#[tokio::test(flavor = "multi_thread")]
async fn handle_of_one_host_is_refused_as_argument_and_its_kind_is_named() {
    let server = server!();
    let pool = cluster::pool(&server);
    let manager = within(mp::Manager::start()).await.unwrap();
    macro_rules! refused {
        ($($kind:literal $type:ty = $value:expr;)*) => {$(
            let error = within(pool.apply(takes::<$type>, ($value,))).await.unwrap_err();
            let text = error.to_string();
            assert!(error.kind() == ErrorKind::Encode && text.contains($kind) && text.contains("takes"), "{}: {text}", $kind);
        )*};
    }
    let (left, right) = mp::pipe::<u8, u8>().unwrap();
    let (sender, receiver) = mp::simplex::<u8>().unwrap();
    refused! {
        "a `Queue`" mp::Queue<u8> = mp::Queue::unbounded().unwrap();
        "a `JoinableQueue`" mp::JoinableQueue<u8> = mp::JoinableQueue::unbounded().unwrap();
        "a `Sender` of a pipe" mp::Connection<u8, u8> = left;
        "a `Sender` of a pipe" mp::Sender<u8> = sender;
        "a `Receiver` of a pipe" mp::Receiver<u8> = receiver;
        "a lock" mp::Lock = mp::Lock::new().unwrap();
        "a rlock" mp::RLock = mp::RLock::new().unwrap();
        "a read-write lock" mp::RwLock = mp::RwLock::new().unwrap();
        "a semaphore" mp::Semaphore = mp::Semaphore::new(1).unwrap();
        "a semaphore" mp::BoundedSemaphore = mp::BoundedSemaphore::new(1).unwrap();
        "a condition" mp::Condition = mp::Condition::new().unwrap();
        "an event" mp::Event = mp::Event::new().unwrap();
        "a barrier" mp::Barrier = mp::Barrier::new(1).unwrap();
        "a shared value" mp::Value<u32> = mp::Value::new(1).unwrap();
        "a shared array" mp::Array<u32> = mp::Array::zeroed(4).unwrap();
        "a `SharedMemory`" mp::SharedMemory = mp::SharedMemory::create(&format!("mp-cluster-{}", std::process::id()), 100).unwrap();
        "a proxy" mp::ListProxy<u8> = manager.list().await.unwrap();
        "a `Fd`" mp::Fd<std::fs::File> = mp::Fd::new(std::fs::File::open("/dev/null").unwrap());
        "a `Queue`" Vec<Option<mp::Queue<u8>>> = vec![None, Some(mp::Queue::unbounded().unwrap())];
    }
    drop(right);
    // Others of the same call go on.
    let _host = Host::start(&server, 1);
    let queues = [None, Some(mp::Queue::<u8>::unbounded().unwrap()), None];
    let results: Vec<_> = within(pool.imap(takes::<Option<mp::Queue<u8>>>, queues).collect()).await;
    let kinds = results.iter().map(|result| result.as_ref().map_err(|error| error.kind()).err());
    assert_eq!(kinds.collect::<Vec<_>>(), [None, Some(ErrorKind::Encode), None]);
    server.is_empty().await;
}

fn makes_queue(n: u64) -> Option<mp::Queue<u8>> {
    (n == 1).then(|| mp::Queue::unbounded().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn handle_of_one_host_is_refused_as_result() {
    let server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 1);
    let results: Vec<_> = within(pool.imap(makes_queue, 0..3).collect()).await;
    let error = results[1].as_ref().unwrap_err();
    let text = error.to_string();
    assert!(error.kind() == ErrorKind::Encode && text.contains("makes_queue") && text.contains("a `Queue`"), "{text}");
    assert!(text.contains("on host") && results[0].is_ok() && results[2].is_ok(), "{text}");
}

fn task_id(file: PathBuf) -> (String, u32) {
    let task = mp::current_task().unwrap();
    if notes(&file) == 0 {
        note(file, Duration::ZERO);
        std::process::abort();
    }
    (task.task_id(), task.attempt())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_has_an_id_that_no_other_has_whichever_submitter_call_and_item() {
    let server = server!();
    let _host = Host::start(&server, 2);
    let id = |_: u64| mp::current_task().unwrap().task_id();
    let mut all = std::collections::HashSet::new();
    for _ in 0..2 {
        let pool = cluster::pool(&server);
        for _ in 0..2 {
            all.extend(within(pool.map(id, 0..100)).await.unwrap());
        }
        all.insert(within(pool.apply(id, (0,))).await.unwrap());
    }
    assert_eq!(all.len(), 402);
    let pool = cluster::pool(&server);
    let (_, attempt) = within(pool.apply(task_id, (server.dir().join("notes"),)).retries(1)).await.unwrap();
    assert_eq!(attempt, 1);
}

/// The program that runs an item.
fn program(_: u64) -> PathBuf {
    std::fs::read_link("/proc/self/exe").unwrap()
}

/// What processes of another build do in the tests below.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of other tests, in a process of another build"]
async fn part_of_another_build() {
    let Some((role, url)) = cluster::build::role() else { return };
    let address = Address::new(url).lease(cluster::LEASE);
    if role == "serve" {
        Pool::new(1).unwrap().serve(address).await.unwrap();
    } else {
        let pool = Pool::builder().cluster(address).build().unwrap();
        let programs = within(pool.map(program, 0..100)).await.unwrap();
        let own = std::env::current_exe().unwrap();
        let answers = programs.iter().filter(|program| **program == own).count();
        // It appears whole.
        let (file, unnamed) = (PathBuf::from(&role), PathBuf::from(role).with_extension("part"));
        std::fs::write(&unnamed, answers.to_string()).unwrap();
        std::fs::rename(unnamed, file).unwrap();
    }
}

/// As during a rolling update.
#[tokio::test(flavor = "multi_thread")]
async fn hosts_of_two_builds_serve_one_pool_and_each_submitter_is_answered_by_its_own() {
    let server = server!();
    let (pool, other) = (cluster::pool(&server), OtherBuild::in_folder(server.dir()));
    let _host = Host::start(&server, 1);
    let theirs = other.start("part_of_another_build", "serve", &server.url());
    until("both hosts are known", async || pool.hosts().len() == 2).await;
    let matches = |host: &HostInfo| (host.pid == theirs.pid(), host.build_matches);
    let mut known: Vec<_> = pool.hosts().iter().map(matches).collect();
    known.sort_unstable();
    assert_eq!((known, pool.workers()), (vec![(false, true), (true, false)], 1));
    let answered = server.dir().join("answered");
    let _submitter = other.start("part_of_another_build", answered.to_str().unwrap(), &server.url());
    let own = std::env::current_exe().unwrap();
    assert_eq!(within(pool.map(program, 0..100)).await.unwrap(), vec![own; 100]);
    until("the other is answered", async || answered.exists()).await;
    assert_eq!(std::fs::read_to_string(answered).unwrap(), "100");
    until("nothing is left", async || server.messages().await == 0).await;
    assert_eq!(server.consumers().await, 2);
}

#[tokio::test]
async fn a_submitter_that_sees_hosts_of_another_build_only_warns_of_it_and_its_queue_timeout_names_it() {
    use tracing_subscriber::layer::SubscriberExt;
    let server = server!();
    let warnings = cluster::Warnings::default();
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let pool = Pool::builder().cluster(server.address()).build().unwrap();
    let other = OtherBuild::in_folder(server.dir());
    let hosts = [0, 1].map(|_| other.start("part_of_another_build", "serve", &server.url()));
    until("its hosts are known", async || pool.hosts().len() == 2).await;
    assert!(pool.hosts().iter().all(|host| !host.build_matches) && pool.workers() == 0);
    let call = pool.apply(square, (1,)).queue_timeout(Duration::from_secs(4));
    let error = within(call).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(error.to_string().contains("2 hosts serve this pool, all of another build"), "{error}");
    let warned = warnings.list();
    let of_it: Vec<_> =
        warned.iter().filter(|text| text.contains("another build") && text.contains("hosts=2")).collect();
    assert_eq!(of_it.len(), 1, "{warned:?}");
    drop(hosts);
    // One that comes is found.
    let _host = Host::start(&server, 1);
    assert_eq!(within(pool.apply(square, (2,))).await.unwrap(), 4);
}

/// Submits items in many messages; by how many bytes it and its host have grown since a fifth of them was answered.
async fn grown(url: String, host: u32, items: u64) -> (usize, usize) {
    let pool = Pool::builder().cluster(Address::new(url).lease(cluster::LEASE)).build().unwrap();
    let resident = || (resident_bytes(std::process::id()), resident_bytes(host));
    let mut results = pool.imap_unordered(square, 0..items).chunksize(10);
    let mut at_a_fifth = (0, 0);
    for n in 1..=items {
        within(results.next()).await.unwrap().unwrap();
        if n == items / 5 {
            at_a_fifth = resident();
        }
    }
    let now = resident();
    (now.0.saturating_sub(at_a_fifth.0), now.1.saturating_sub(at_a_fifth.1))
}

/// `MULTIPROCESS_CLUSTER_ITEMS` sets how many; a million is the promise.
#[tokio::test(flavor = "multi_thread")]
async fn memory_of_submitter_and_host_does_not_grow_with_the_items_that_pass() {
    let server = server!();
    let items = std::env::var("MULTIPROCESS_CLUSTER_ITEMS").map_or(50_000, |items| items.parse().unwrap());
    let host = Host::start(&server, 2);
    let submitter = mp::Process::spawn(grown, (server.url(), host.process.pid(), items)).unwrap();
    let limit = Duration::from_secs(60 + items / 2000);
    let grown = tokio::time::timeout(limit, submitter).await.expect("all of it is answered in time").unwrap();
    println!("{items} items: submitter and host have grown by {grown:?} bytes");
    assert!(grown.0 < 1 << 20 && grown.1 < 1 << 20, "{grown:?} bytes more after {items} items");
    server.is_empty().await;
}
