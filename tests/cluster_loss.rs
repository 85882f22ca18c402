//! Hosts, submitters and servers that are killed, stopped, restarted or lose what they have: each item is answered once.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use futures::StreamExt;
use multiprocess::cluster::{Address, Storage};
use multiprocess::{self as mp, ErrorKind, Pool, Process};
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

mod cluster;
mod common;
use cluster::proxy::Proxy;
use cluster::{Host, LEASE, Server, Setup, until};
use common::within;

mp::test_support!();

const MS: Duration = Duration::from_millis(1);

fn square(n: u64) -> u64 {
    n * n
}

fn slow(n: u64) -> u64 {
    std::thread::sleep(10 * MS);
    n
}

/// Adds a line to a file when it begins, and another when it ends.
fn note(file: PathBuf, wait: Duration) {
    add(&file);
    std::thread::sleep(wait);
    add(&file.with_extension("ended"));
}

/// Adds a line, and stays if it is the first; the other file has its process.
fn stays_first(file: PathBuf) {
    std::fs::write(file.with_extension("pid"), std::process::id().to_string()).unwrap();
    add(&file);
    if notes(&file) == 1 {
        std::thread::sleep(Duration::from_secs(60));
    }
    add(&file.with_extension("ended"));
}

/// The host with this pid has reported that it is at a message.
async fn until_it_is_held(pool: &Pool, host: &Host) {
    let pid = host.process.pid();
    until("it is said where", async || pool.hosts().iter().any(|known| known.pid == pid && known.busy == 1)).await;
}

fn add(file: &PathBuf) {
    use std::io::Write;
    std::fs::OpenOptions::new().create(true).append(true).open(file).unwrap().write_all(b"x").unwrap();
}

fn notes(file: &PathBuf) -> usize {
    std::fs::read(file).map_or(0, |bytes| bytes.len())
}

/// All of `0..count` through `pool` while `meddle` goes on: each once, none failed.
async fn each_is_answered_once(pool: &Pool, count: u64, meddle: impl Future<Output = ()>) {
    let mut results = pool.imap_unordered(slow, 0..count).retries(20);
    let answered = async {
        let mut seen = vec![0; count as usize];
        while let Some(result) = results.next().await {
            seen[result.unwrap() as usize] += 1;
        }
        seen
    };
    let limit = Duration::from_secs(120);
    let both = async { tokio::join!(answered, meddle) };
    let (seen, ()) = tokio::time::timeout(limit, both).await.expect("all of it is answered in time");
    assert!(
        seen.iter().all(|times| *times == 1),
        "an item was answered {:?} times",
        seen.iter().find(|times| **times != 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn items_of_a_killed_host_run_on_another_a_lease_later() {
    let server = server!();
    let pool = cluster::pool(&server);
    let file = server.dir().join("notes");
    let mut victim = Host::start(&server, 1);
    let call = pool.apply_async(stays_first, (file.clone(),));
    until("it runs", async || notes(&file) == 1).await;
    let _other = Host::start(&server, 1);
    until("two hosts", async || pool.hosts().len() == 2).await;
    cluster::kill(victim.process.pid(), "KILL");
    let killed = Instant::now();
    within(call).await.unwrap();
    // One lease, the run, and what a busy machine takes.
    assert!(killed.elapsed() < LEASE + Duration::from_secs(8), "{:?}", killed.elapsed());
    assert_eq!((notes(&file), pool.stats().redelivered), (2, 1));
    until("it is struck out", async || pool.hosts().len() == 1).await;
    server.is_empty().await;
    let _ = within(victim.process.join()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_whose_hosts_are_lost_too_often_fails_and_names_them() {
    let server = server!();
    let address = server.address().redeliver(1);
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let file = server.dir().join("notes");
    let call = pool.apply_async(note, (file.clone(), Duration::from_secs(60)));
    let mut names = Vec::new();
    for lost in 1..=2 {
        let host = Host::start(&server, 1);
        until("it runs", async || notes(&file) == lost).await;
        until_it_is_held(&pool, &host).await;
        names.push(format!("(pid {})", host.process.pid()));
        cluster::kill(host.process.pid(), "KILL");
    }
    let _third = Host::start(&server, 1);
    let error = within(call).await.unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::ProcessDied, "{text}");
    assert!(names.iter().all(|name| text.contains(name)) && text.starts_with("item 0 of "), "{text}");
    assert!(text.contains("::note: 2 hosts were lost"), "{text}");
    assert_eq!(notes(&file), 2);
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_no_redelivery_an_item_fails_when_its_first_host_is_lost() {
    let server = server!();
    let pool = Pool::builder().cluster(server.address().redeliver(0)).build().unwrap();
    let file = server.dir().join("notes");
    let host = Host::start(&server, 1);
    let call = pool.apply_async(note, (file.clone(), Duration::from_secs(60)));
    until("it runs", async || notes(&file) == 1).await;
    until_it_is_held(&pool, &host).await;
    cluster::kill(host.process.pid(), "KILL");
    let _other = Host::start(&server, 1);
    let error = within(call).await.unwrap_err();
    assert!(
        error.kind() == ErrorKind::ProcessDied && error.to_string().contains(&host.process.pid().to_string()),
        "{error}"
    );
    assert_eq!(notes(&file), 1);
}

/// Nobody asks for what the lost host had.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_host_is_counted_though_no_other_host_is_there() {
    let server = server!();
    let pools = [0, 3].map(|losses| Pool::builder().cluster(server.address().redeliver(losses)).build().unwrap());
    let host = Host::start(&server, 2);
    let files = ["none", "some"].map(|name| server.dir().join(name));
    let fails = pools[0].apply_async(note, (files[0].clone(), Duration::from_secs(60)));
    let waits = pools[1].apply(note, (files[1].clone(), Duration::from_secs(60))).queue_timeout(Duration::from_secs(5));
    let waits = tokio::spawn(waits.into_future());
    until("both run", async || files.iter().all(|file| notes(file) == 1)).await;
    until("it is said where", async || pools.iter().all(|pool| pool.hosts().iter().any(|host| host.busy == 2))).await;
    cluster::kill(host.process.pid(), "KILL");
    let error = within(fails).await.unwrap_err();
    assert!(
        error.kind() == ErrorKind::ProcessDied && error.to_string().contains(&host.process.pid().to_string()),
        "{error}"
    );
    // It may be tried again, and nobody comes who does.
    assert_eq!(within(waits).await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_the_attempt_counts_those_of_the_caller_and_lost_hosts_and_the_id_stays() {
    let server = server!();
    let pool = cluster::pool(&server);
    let file = server.dir().join("notes");
    let attempts = |file: PathBuf| {
        let (attempt, id) = (mp::current_task().unwrap().attempt(), mp::current_task().unwrap().task_id());
        std::fs::write(file.with_extension(attempt.to_string()), id).unwrap();
        add(&file);
        if attempt == 1 {
            std::thread::sleep(Duration::from_secs(60));
        }
        attempt
    };
    let first = Host::start(&server, 1);
    let call =
        pool.apply(attempts, (file.clone(),)).retries(5).retry_if(|result: &mp::Result<u32>| matches!(result, Ok(0)));
    let call = tokio::spawn(call.into_future());
    until("the second attempt runs", async || notes(&file) == 2).await;
    cluster::kill(first.process.pid(), "KILL");
    let _second = Host::start(&server, 1);
    assert_eq!(within(call).await.unwrap().unwrap(), 2);
    assert_eq!(notes(&file), 3);
    let ids = [0, 1, 2].map(|attempt| std::fs::read_to_string(file.with_extension(attempt.to_string())).unwrap());
    assert!(!ids[0].is_empty() && ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

/// Its server is away for longer than a lease, and nobody is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_for_a_lease_is_no_lost_host() {
    let mut server = server!();
    cluster::log();
    let pool = Pool::builder().cluster(server.address().redeliver(0)).build().unwrap();
    let file = server.dir().join("notes");
    let host = Host::start(&server, 1);
    let call = pool.apply_async(stays_first, (file.clone(),));
    until("it runs", async || notes(&file) == 1).await;
    until_it_is_held(&pool, &host).await;
    let worker: u32 = std::fs::read_to_string(file.with_extension("pid")).unwrap().parse().unwrap();
    server.kill();
    // A lease later the host stops it.
    until("it is stopped", async || !is_there(worker)).await;
    server.run();
    within(call).await.unwrap();
    assert_eq!((notes(&file), pool.stats().redelivered), (2, 0));
}

fn is_there(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}/exe")).exists()
}

/// Computes for a while on the only thread of its runtime, as a program does by mistake, or is stopped.
#[tokio::test(flavor = "multi_thread")]
async fn a_submitter_that_is_stopped_keeps_no_host_from_others() {
    let server = server!();
    let file = server.dir().join("notes");
    let submitter = Process::spawn(submit, (server.url(), file.clone(), 8)).unwrap();
    until("all wait", async || server.messages().await == 8).await;
    cluster::kill(submitter.pid(), "STOP");
    // Not heard of lately by a host that starts now.
    let _host = Host::start(&server, 1);
    let pool = cluster::pool(&server);
    for n in 0..20 {
        assert_eq!(within(pool.apply(square, (n,))).await.unwrap(), n * n);
    }
    cluster::kill(submitter.pid(), "CONT");
    tokio::time::timeout(Duration::from_secs(60), async {
        until("its items run again", async || notes(&file) > 0).await;
    })
    .await
    .unwrap();
    submitter.kill().unwrap();
}

/// What a pool that breaks or is terminated had taken goes to another host; it is no failure of the items.
#[tokio::test(flavor = "multi_thread")]
async fn items_at_a_pool_that_breaks_or_is_terminated_run_elsewhere() {
    let server = server!();
    let pool = cluster::pool(&server);
    let calls = [1, 2, 3, 4].map(|n| pool.apply_async(square, (n,)));
    until("all wait", async || server.messages().await == 4).await;
    let fails = || -> mp::Result<()> {
        std::thread::sleep(300 * MS);
        Err(mp::Error::other("no model here"))
    };
    let broken = Pool::builder().workers(2).initializer(fails, ()).build().unwrap();
    let error = within(broken.serve(server.address())).await.unwrap_err();
    assert!(error.to_string().contains("no model here"), "{error}");
    let file = server.dir().join("notes");
    let local = Pool::new(1).unwrap();
    let serving = local.serve(server.address());
    for (n, call) in (1..).zip(calls) {
        assert_eq!(within(call).await.unwrap(), n * n);
    }
    let call = pool.apply_async(stays_first, (file.clone(),));
    until("it runs", async || notes(&file) == 1).await;
    local.terminate();
    assert_eq!(within(serving).await.unwrap_err().kind(), ErrorKind::Closed);
    let _host = Host::start(&server, 1);
    within(call).await.unwrap();
    assert_eq!((notes(&file), pool.stats().redelivered), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_drain_while_messages_come_lose_none_and_count_as_lost_with_none() {
    let server = server!();
    let pool = Pool::builder().cluster(server.address().redeliver(0)).build().unwrap();
    let local = Pool::new(2).unwrap();
    let _keeps = Host::start(&server, 1);
    let calls = async {
        for n in 0..40 {
            let calls = (0..64).map(|m| pool.apply_async(square, (n * m,)));
            within(futures::future::try_join_all(calls)).await.unwrap();
        }
    };
    let drains = async {
        for _ in 0..20 {
            let serving = local.serve(server.address());
            tokio::time::sleep(40 * MS).await;
            serving.drain(Duration::from_secs(10));
            within(serving).await.unwrap();
        }
    };
    tokio::join!(calls, drains);
    assert_eq!(pool.stats().redelivered, 0);
    server.is_empty().await;
}

/// It has asked for messages, and they are on their way when it has nothing left to do.
#[tokio::test(flavor = "multi_thread")]
async fn messages_that_arrive_bit_by_bit_while_a_host_leaves_are_given_back() {
    let server = server!();
    let proxy = Proxy::before(&server).await;
    let local = Pool::new(2).unwrap();
    let serving = local.serve(proxy.address());
    let pool = cluster::pool(&server);
    until("a host that is known", async || pool.workers() == 2).await;
    until("it has asked for messages", async || server.consumer().await["num_waiting"] == 1).await;
    let client = server.client().await;
    let mut beats = server.subscribe(&client, "mp.pool.beat").await;
    proxy.holds.store(true, SeqCst);
    let calls = [3, 4].map(|n| pool.apply_async(square, (n,)));
    until("both are on their way", async || server.consumer().await["num_ack_pending"] == 2).await;
    serving.drain(Duration::from_secs(10));
    until("it leaves", async || within(beats.next()).await.unwrap().payload.last() == Some(&1)).await;
    proxy.holds.store(false, SeqCst);
    let served = within(serving).await.unwrap();
    assert_eq!((served.items, served.given_back), (0, 2));
    let _host = Host::start(&server, 1);
    assert_eq!(within(futures::future::try_join_all(calls)).await.unwrap(), [9, 16]);
    assert_eq!(pool.stats().redelivered, 0);
    server.is_empty().await;
}

/// One of several servers may learn late that a host has left: what it sends to that host meanwhile nobody gets.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_nobody_got_counts_as_lost_with_a_host_unless_one_has_left_since() {
    let server = server!();
    let pool = Pool::builder().cluster(server.address().redeliver(0)).build().unwrap();
    let client = server.client().await;
    let mut beats = server.subscribe(&client, "mp.pool.beat").await;
    let host = Host::start(&server, 1);
    let greeting = within(beats.next()).await.unwrap();
    until("a host that is known", async || pool.workers() == 1).await;
    host.drain().await;
    until("no host", async || pool.hosts().is_empty()).await;
    let mut farewell = within(beats.next()).await.unwrap();
    while farewell.payload.last() != Some(&1) {
        farewell = within(beats.next()).await.unwrap();
    }
    let before = pool.apply_async(square, (3,));
    until("it is in the stream", async || server.messages().await == 1).await;
    // As if that host had come, and had left only now.
    client.publish(greeting.subject, greeting.payload).await.unwrap();
    until("it has come", async || pool.workers() == 1).await;
    client.publish(farewell.subject, farewell.payload).await.unwrap();
    until("it has left", async || pool.hosts().is_empty()).await;
    let after = pool.apply_async(square, (4,));
    until("both are in the stream", async || server.messages().await == 2).await;
    server.take(&client, 2).await;
    let _host = Host::start(&server, 1);
    assert_eq!(within(before).await.unwrap(), 9);
    let error = within(after).await.unwrap_err();
    assert!(error.kind() == ErrorKind::ProcessDied && error.to_string().contains("lost at once"), "{error}");
    server.is_empty().await;
}

/// As by a server that is slow to renew a lease.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_handed_out_again_to_the_host_that_has_it_counts_as_lost_with_none() {
    let server = server!();
    let pool = Pool::builder().cluster(server.address().redeliver(0)).build().unwrap();
    let file = server.dir().join("notes");
    let client = server.client().await;
    let mut renewals = server.subscribe(&client, "$JS.ACK.>").await;
    let host = Host::of(Setup { grace: Duration::ZERO, ..Setup::of(&server, 2) });
    let call = pool.apply_async(stays_first, (file.clone(),));
    until("it runs", async || notes(&file) == 1).await;
    let first = within(renewals.next()).await.unwrap();
    client.publish(first.subject.clone(), "-NAK".into()).await.unwrap();
    // The subject has how often it was delivered, and its number.
    let (consumer, _) = first.subject.split_once(".1.1.").unwrap();
    let again = format!("{consumer}.2.1.");
    until("it is there again", async || within(renewals.next()).await.unwrap().subject.starts_with(&again)).await;
    let (.., killed) = host.drain().await;
    let _other = Host::start(&server, 1);
    within(call).await.unwrap();
    assert_eq!((killed, notes(&file), pool.stats().redelivered), (1, 2, 0));
    server.is_empty().await;
}

/// Its pull requests are open for a while.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_again_to_a_host_that_drains_goes_on_there() {
    let server = server!();
    let (pool, file) = (cluster::pool(&server), |name| server.dir().join(name));
    let client = server.client().await;
    let mut renewals = server.subscribe(&client, "$JS.ACK.>").await;
    let host = Host::of(Setup { grace: Duration::from_secs(60), ..Setup::of(&server, 2) });
    let call = pool.apply_async(stays_until, (file("begun"), file("may-end")));
    until("it runs", async || notes(&file("begun")) == 1).await;
    let first = within(renewals.next()).await.unwrap();
    let drain = tokio::spawn(host.drain());
    until("it drains", async || pool.workers() == 0).await;
    client.publish(first.subject.clone(), "-NAK".into()).await.unwrap();
    let (consumer, _) = first.subject.split_once(".1.1.").unwrap();
    let again = format!("{consumer}.2.1.");
    until("it is there again", async || within(renewals.next()).await.unwrap().subject.starts_with(&again)).await;
    let _other = Host::start(&server, 1);
    until("another is there", async || pool.workers() == 1).await;
    for _ in 0..3 {
        within(renewals.next()).await.unwrap();
    }
    std::fs::write(file("may-end"), "").unwrap();
    within(call).await.unwrap();
    assert_eq!((within(drain).await.unwrap().0, notes(&file("begun")), pool.stats().redelivered), (1, 1, 0));
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_that_outlasts_its_lease_runs_once() {
    let server = server!();
    let pool = cluster::pool(&server);
    let file = server.dir().join("notes");
    let _hosts = [Host::start(&server, 1), Host::start(&server, 1)];
    within(pool.apply(note, (file.clone(), 3 * LEASE))).await.unwrap();
    assert_eq!((notes(&file), pool.stats().redelivered), (1, 0));
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_frozen_beyond_its_lease_stops_its_items_and_serves_again() {
    let server = server!();
    let pool = cluster::pool(&server);
    let file = server.dir().join("notes");
    let host = Host::start(&server, 1);
    let call = pool.apply_async(stays_first, (file.clone(),));
    until("it runs", async || notes(&file) == 1).await;
    until_it_is_held(&pool, &host).await;
    // Its worker goes on, the process that serves does not.
    host.signal("STOP");
    let other = Host::start(&server, 1);
    until("the other has it", async || notes(&file) == 2).await;
    host.signal("CONT");
    within(call).await.unwrap();
    let ended = file.with_extension("ended");
    assert_eq!(notes(&ended), 1, "the first was stopped");
    other.drain().await;
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    server.is_empty().await;
    let (items, ..) = host.drain().await;
    assert_eq!(items, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_and_restarted_loses_nothing() {
    let mut server = server!();
    let pool = cluster::pool(&server);
    let hosts = [Host::start(&server, 1), Host::start(&server, 1)];
    each_is_answered_once(&pool, 600, async {
        for _ in 0..3 {
            tokio::time::sleep(500 * MS).await;
            server.kill();
            tokio::time::sleep(200 * MS).await;
            server.run();
        }
    })
    .await;
    server.is_empty().await;
    for host in hosts {
        host.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answer_after_a_restart_comes_soon() {
    let mut server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 1);
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    server.kill();
    tokio::time::sleep(300 * MS).await;
    let call = pool.apply_async(square, (4,));
    server.run();
    let listens = Instant::now();
    assert_eq!(within(call).await.unwrap(), 16);
    assert!(listens.elapsed() < Duration::from_secs(8), "{:?}", listens.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn items_of_a_purged_deleted_or_emptied_stream_are_published_again() {
    let mut server = server!();
    let pool = cluster::pool(&server);
    let local = Pool::new(2).unwrap();
    for what in ["purged", "deleted", "empty"] {
        // Nobody serves: they wait.
        let calls: Vec<_> = (0..5).map(|n| pool.apply_async(square, (n,))).collect();
        until("they wait", async || server.messages().await > 0).await;
        match what {
            "purged" => server.purge().await,
            "deleted" => server.delete_stream().await,
            _ => server.restart_empty(),
        }
        let began = Instant::now();
        let serving = local.serve(server.address());
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(within(call).await.unwrap(), (n * n) as u64, "{what}");
        }
        assert!(began.elapsed() < 3 * LEASE + Duration::from_secs(8), "{what}: {:?}", began.elapsed());
        serving.drain(Duration::from_secs(5));
        within(serving).await.unwrap();
        server.is_empty().await;
    }
    assert_eq!(pool.stats().duplicates, 0);
}

fn stays_until(begun: PathBuf, may_end: PathBuf) {
    add(&begun);
    while !may_end.exists() {
        std::thread::sleep(5 * MS);
    }
}

/// In the new stream another message has the same number.
#[tokio::test(flavor = "multi_thread")]
async fn an_item_of_a_stream_that_is_gone_takes_no_message_out_of_the_new_one() {
    let server = server!();
    let pool = cluster::pool(&server);
    let file = |name| server.dir().join(name);
    let host = Host::start(&server, 1);
    let old = pool.apply_async(stays_until, (file("old"), file("old-may-end")));
    until("it runs", async || notes(&file("old")) == 1).await;
    until_it_is_held(&pool, &host).await;
    let other = Host::start(&server, 1);
    until("both are there", async || pool.workers() == 2).await;
    server.delete_stream().await;
    let new = pool.apply_async(stays_until, (file("new"), file("new-may-end")));
    until("the other runs it", async || notes(&file("new")) == 1).await;
    // Each host renews what it has, says so to itself, and looks which stream is there.
    let client = server.client().await;
    let mut renewals = server.subscribe(&client, "mp.pool.h.*.e").await;
    let mut seen = std::collections::HashMap::<String, u32>::new();
    while seen.len() < 2 || seen.values().any(|times| *times < 4) {
        let renewal = within(renewals.next()).await.unwrap();
        *seen.entry(renewal.subject.to_string()).or_default() += 1;
    }
    std::fs::write(file("old-may-end"), "").unwrap();
    within(old).await.unwrap();
    assert_eq!(host.drain().await.0, 1);
    assert_eq!(server.messages().await, 1, "what runs is in the stream");
    std::fs::write(file("new-may-end"), "").unwrap();
    within(new).await.unwrap();
    server.is_empty().await;
    assert_eq!(other.drain().await.0, 1);
}

/// A submitter publishes it so after an outage that was longer than the stream knows duplicates.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_copy_of_a_message_that_runs_is_removed_and_does_not_run() {
    let server = server!();
    let (setup, file) = (Setup { lease: 5 * LEASE, ..Setup::of(&server, 1) }, |name| server.dir().join(name));
    let pool = Pool::builder().cluster(server.address().lease(setup.lease)).build().unwrap();
    let client = server.client().await;
    let mut tasks = server.subscribe(&client, "mp.pool.t.>").await;
    let host = Host::of(setup.clone());
    let call = pool.apply_async(stays_until, (file("begun"), file("may-end")));
    let first = within(tasks.next()).await.unwrap();
    until("it runs", async || notes(&file("begun")) == 1).await;
    until_it_is_held(&pool, &host).await;
    let other = Host::of(setup);
    until("both are there", async || pool.workers() == 2).await;
    let mut copy = first.payload.to_vec();
    // Behind the version, the kind, the submitter and the number: it is to be asked for.
    copy[18] = 1;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Msg-Id", "a copy");
    client.publish_with_headers(first.subject, headers, copy.into()).await.unwrap();
    until("the copy is removed", async || server.stored().await == 2 && server.messages().await == 1).await;
    std::fs::write(file("may-end"), "").unwrap();
    within(call).await.unwrap();
    assert_eq!((notes(&file("begun")), host.drain().await.0, other.drain().await.0), (1, 1, 0));
    server.is_empty().await;
}

fn grow(len: usize) -> Vec<u8> {
    vec![1; len]
}

/// The fetch itself is given up after a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_lost_while_its_answer_is_fetched_counts_as_lost_before_the_fetch_is_given_up() {
    let server = server!();
    // A host that is busy with so large an answer may lose a short lease before it is stopped.
    let lease = 4 * LEASE;
    let pool = Pool::builder().cluster(server.address().lease(lease).redeliver(0)).build().unwrap();
    let host = Host::of(Setup { lease, ..Setup::of(&server, 1) });
    let client = server.client().await;
    let mut pieces = server.subscribe(&client, "mp.pool.h.*.p").await;
    let call = pool.apply_async(grow, (256 << 20,));
    within(pieces.next()).await.unwrap();
    host.signal("STOP");
    let stopped = Instant::now();
    let outcome = tokio::time::timeout(Duration::from_secs(50), call).await.expect("before the fetch is given up");
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::ProcessDied, "{:?}", stopped.elapsed());
    host.signal("CONT");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_memory_storage_may_forget_everything_under_load() {
    let mut server = server!();
    let address = server.address().storage(Storage::Memory);
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let setup = Setup { is_in_memory: true, ..Setup::of(&server, 1) };
    let _hosts = [Host::of(setup.clone()), Host::of(setup)];
    each_is_answered_once(&pool, 400, async {
        for _ in 0..2 {
            tokio::time::sleep(500 * MS).await;
            server.restart_empty();
        }
    })
    .await;
    server.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_for_long_calls_are_unavailable_until_it_is_back() {
    let mut server = server!();
    let address = server.address().offline_timeout(3 * LEASE / 2);
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let _host = Host::start(&server, 1);
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    let pending = pool.apply_async(slow, (1,));
    within(pending).await.unwrap();
    server.kill();
    let began = Instant::now();
    let error = within(pool.apply(square, (4,))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(began.elapsed() >= LEASE, "{:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(within(pool.apply(square, (4,))).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(began.elapsed() < LEASE, "what is asked meanwhile fails at once");
    server.run();
    until("it is back", async || pool.apply(square, (5,)).await.is_ok_and(|n| n == 25)).await;
    server.is_empty().await;
}

/// Its connections stay, and nothing comes by them.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_stopped_makes_calls_unavailable_until_it_goes_on() {
    let server = server!();
    let _host = Host::start(&server, 1);
    let address = server.address().offline_timeout(3000 * MS);
    let pool = Pool::builder().cluster(address).build().unwrap();
    until("it works", async || pool.apply(square, (2,)).await.is_ok_and(|four| four == 4)).await;
    server.signal("STOP");
    let error = within(pool.apply(square, (3,))).await.unwrap_err();
    server.signal("CONT");
    assert!(error.kind() == ErrorKind::Unavailable && error.to_string().contains("has not answered"), "{error}");
    until("it works again", async || pool.apply(square, (4,)).await.is_ok_and(|four| four == 16)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_stopped_makes_calls_that_run_unavailable() {
    let server = server!();
    let file = server.dir().join("notes");
    let _host = Host::start(&server, 1);
    let pool = Pool::builder().cluster(server.address().offline_timeout(3000 * MS)).build().unwrap();
    until("it works", async || pool.apply(square, (2,)).await.is_ok_and(|four| four == 4)).await;
    let call = pool.apply_async(note, (file.clone(), Duration::from_secs(60)));
    until("it runs", async || notes(&file) == 1).await;
    server.signal("STOP");
    let stopped = Instant::now();
    let error = within(call).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Unavailable && error.to_string().contains("has not answered"), "{error}");
    let elapsed = stopped.elapsed();
    assert!(elapsed < Duration::from_secs(15), "before the connection counts as lost: {elapsed:?}");
    // What is asked from then on waits for nothing.
    let asked = Instant::now();
    let error = within(pool.apply(square, (3,))).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Unavailable && asked.elapsed() < 2000 * MS, "{error} {:?}", asked.elapsed());
    server.signal("CONT");
    until("it works again", async || pool.apply(square, (4,)).await.is_ok_and(|four| four == 16)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_was_there_makes_calls_unavailable_and_is_found_when_it_comes() {
    let mut server = server!();
    server.kill();
    let address = server.address().offline_timeout(400 * MS);
    let pool = Pool::builder().cluster(&address).build().unwrap();
    assert_eq!(within(pool.apply(square, (4,))).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let _host = Host::start(&server, 1);
    server.run();
    until("it is there", async || pool.apply(square, (5,)).await.is_ok_and(|n| n == 25)).await;
}

/// The client's own task goes on until it has connected.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_dropped_while_its_server_is_away_leaves_nobody_who_connects_all_the_time() {
    let mut server = server!();
    let proxy = Proxy::before(&server).await;
    let client = server.client().await;
    let mut rolls = server.subscribe(&client, "mp.pool.roll").await;
    let pool = Pool::builder().cluster(proxy.address()).build().unwrap();
    within(rolls.next()).await.unwrap();
    let killed = Instant::now();
    server.kill();
    until("it tries to connect", async || proxy.tried() > killed).await;
    drop(pool);
    // A try may be under way. Others would follow, 2 s apart at most.
    until("nobody tries for 4 s", async || proxy.tried().elapsed() > Duration::from_secs(4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_dropped_while_its_server_is_away_for_a_moment_leaves_nothing_in_the_stream() {
    let mut server = server!();
    let proxy = Proxy::before(&server).await;
    let (pool, waits) = proxy.pool(&server).await;
    let cancelled = pool.apply_async(square, (2,));
    until("both are in the stream", async || server.messages().await == 2).await;
    cancelled.cancel();
    until("one is removed, so that the pool knows of both", async || server.messages().await == 1).await;
    server.kill();
    drop((pool, waits, cancelled));
    let dropped = Instant::now();
    until("it goes on trying to connect", async || proxy.tried() > dropped + Duration::from_secs(3)).await;
    server.run();
    server.is_empty().await;
}

/// Submits, and waits for what it has asked.
async fn submit(address: String, file: PathBuf, waiting: usize) {
    let pool = Pool::builder().cluster(Address::new(address).lease(LEASE)).build().unwrap();
    let calls: Vec<_> = (0..waiting).map(|_| pool.apply_async(note, (file.clone(), Duration::from_secs(60)))).collect();
    let _ = futures::future::join_all(calls).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn items_of_a_killed_submitter_are_stopped_and_removed_and_hosts_go_on() {
    let server = server!();
    let file = server.dir().join("notes");
    let host = Host::start(&server, 1);
    let submitter = Process::spawn(submit, (server.url(), file.clone(), 5)).unwrap();
    until("one runs and four wait", async || notes(&file) == 1 && server.messages().await == 5).await;
    submitter.kill().unwrap();
    let killed = Instant::now();
    until("all of it is removed", async || server.messages().await == 0).await;
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    let pool = cluster::pool(&server);
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    assert_eq!((notes(&file), notes(&file.with_extension("ended"))), (1, 0));
    let (items, ..) = host.drain().await;
    assert_eq!(items, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn items_of_a_killed_submitter_behind_others_are_removed_though_hosts_are_busy() {
    let server = server!();
    let file = server.dir().join("notes");
    let _host = Host::start(&server, 1);
    let pool = cluster::pool(&server);
    let busy = pool.apply_async(note, (file.clone(), Duration::from_secs(60)));
    until("it is busy", async || notes(&file) == 1).await;
    let submitter = Process::spawn(submit, (server.url(), file.clone(), 3)).unwrap();
    until("three wait", async || server.messages().await == 4).await;
    // It has answered when the host looked for it, and dies right after.
    let client = server.client().await;
    let mut looks = server.subscribe(&client, "mp.pool.s.*.q").await;
    within(looks.next()).await.unwrap();
    // Else this client stands for it.
    looks.unsubscribe().await.unwrap();
    submitter.kill().unwrap();
    let killed = Instant::now();
    until("they are removed", async || server.messages().await == 1).await;
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    drop(busy);
    pool.terminate();
    server.is_empty().await;
}

fn random(below: u64) -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() % below
}

/// At random: a worker, a host or the server is killed, or a host is frozen beyond its lease.
async fn soak(server: &mut Server, count: u64) {
    let pool = Pool::builder().cluster(server.address().redeliver(1000)).build().unwrap();
    let mut hosts = [Host::start(server, 2), Host::start(server, 2)];
    let (over, mut is_over) = tokio::sync::oneshot::channel();
    let meddle = async {
        loop {
            let pause = tokio::time::sleep((500 + random(1500) as u32) * MS);
            tokio::select! {
                () = pause => {}
                _ = &mut is_over => return,
            }
            let victim = random(2) as usize;
            match random(4) {
                // Workers are killed by what they run.
                0 | 1 => {
                    hosts[victim].signal("KILL");
                    hosts[victim] = Host::start(server, 2);
                }
                2 => {
                    server.kill();
                    tokio::time::sleep(100 * MS).await;
                    server.run();
                }
                _ => {
                    hosts[victim].signal("STOP");
                    tokio::time::sleep(LEASE + 500 * MS).await;
                    hosts[victim].signal("CONT");
                }
            }
        }
    };
    let answered = async {
        let mut seen = vec![0; count as usize];
        let mut results = pool.imap_unordered(quick, 0..count).retries(10);
        while let Some(result) = results.next().await {
            let n = result.unwrap();
            seen[(n / 3) as usize] += 1;
        }
        let _ = over.send(());
        seen
    };
    let both = async { tokio::join!(answered, meddle) };
    let limit = Duration::from_secs(60 + count / 100);
    let (seen, ()) = tokio::time::timeout(limit, both).await.expect("all of it is answered in time");
    assert!(seen.iter().all(|times| *times == 1));
    server.is_empty().await;
}

fn quick(n: u64) -> u64 {
    std::thread::sleep(MS);
    if random(500) == 0 {
        std::process::abort();
    }
    3 * n
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_items_are_answered_once_each_whatever_is_killed() {
    let mut server = server!();
    soak(&mut server, 10_000).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "minutes: by hand"]
async fn a_hundred_thousand_items_are_answered_once_each_whatever_is_killed() {
    let mut server = server!();
    soak(&mut server, 100_000).await;
}
