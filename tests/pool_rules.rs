//! What a pool promises when things go wrong: deaths, deadlines, cancellations, lifetimes.

use futures::{FutureExt, StreamExt, TryStreamExt};
use multiprocess::{self as mp, ErrorKind, Pool, Process, Queue};
use std::collections::HashSet;
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

mod common;
use common::pool::{Gate, MS, all_serve, die, is_gone, kill, nap, pid, say_and_stay, say_and_wait, square, stuck};
use common::{
    Deadline, Random, chaos, eventually, falls_asleep, go_on, holdings, in_child, is_asleep, resident, rounds, stop,
    within,
};

multiprocess::test_support!();
common::quiet::quiet_stderr!();

/// Rule 1, 4: the steps at which a worker can be killed, by its own hand, at the third item it comes to.
#[cfg(debug_assertions)]
#[tokio::test]
async fn rule_1_rule_4_a_worker_killed_at_any_step_costs_at_most_the_item_it_was_at() -> mp::Result<()> {
    let _deadline = Deadline::start();
    for (point, loses) in [("lane.started:3", true), ("lane.written:3", true), ("lane.published:3", false)] {
        let pool = Pool::builder().workers(1).env("MULTIPROCESS_KILL_AT", point).build()?;
        let results: Vec<_> = pool.imap(square, 0..12).chunksize(4).collect().await;
        assert_eq!(results.len(), 12, "{point}");
        for (n, result) in results.iter().enumerate() {
            match result {
                Ok(value) => assert_eq!(*value, square(n as i64), "{point}"),
                Err(error) => {
                    assert!(loses, "{point}: a result that was written counts: {error}");
                    assert_eq!(error.kind(), ErrorKind::ProcessDied);
                    assert_eq!(error.exit_status().and_then(|status| status.signal()), Some(9));
                }
            }
        }
        let lost = results.iter().filter(|result| result.is_err()).count();
        assert_eq!(lost, if loses { 4 } else { 0 }, "{point}: one of three, each time");
        let again: Vec<_> = pool.imap(square, 0..12).chunksize(4).retries(1).try_collect().await?;
        assert_eq!(again, (0..12).map(square).collect::<Vec<_>>(), "{point}");
    }
    Ok(())
}

/// `lane`, `result_notification`: killed before it starts anything, all of the order goes to somebody else; killed between a start and
/// its look for sleepers, the results before it come although nobody told of them, and the pool slept.
#[cfg(debug_assertions)]
#[tokio::test]
async fn rule_1_a_worker_killed_between_its_moves_loses_nothing_it_has_not_begun_or_has_done() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).env("MULTIPROCESS_KILL_AT", "lane.ordered:2").build()?;
    let results: Vec<_> = within(pool.imap(square, 0..12).chunksize(3).try_collect()).await?;
    assert_eq!(results, (0..12).map(square).collect::<Vec<_>>(), "without a retry: nobody had begun them");
    let pool = Pool::builder().workers(1).env("MULTIPROCESS_KILL_AT", "lane.started:2").build()?;
    let gate = Gate::new("rule_1");
    let wait = |gate: Gate| {
        gate.pass();
        7
    };
    let mut results = std::pin::pin!(pool.imap(wait, [gate.clone(), gate.clone()]).chunksize(2));
    let mut first = std::pin::pin!(results.next());
    falls_asleep(first.as_mut()).await;
    // Polled once more before the item goes on, and then only if it is woken.
    let (first, ()) = futures::join!(within(first), async { gate.open() });
    assert_eq!(first.expect("a result")?, 7);
    assert_eq!(within(results.next()).await.expect("a result").unwrap_err().kind(), ErrorKind::ProcessDied);
    assert!(within(results.next()).await.is_none());
    gate.remove();
    Ok(())
}

/// `lane`, `spsc`: the pool's own process is killed after it has given an order and before it has notified the worker, or while it
/// reads results. Its workers end with it, and no other process hangs.
#[cfg(debug_assertions)]
#[tokio::test]
async fn rule_11_a_pool_killed_in_the_middle_of_a_move_takes_its_workers_along() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool_of_its_own = async |pids: Queue<u32>| -> mp::Result<()> {
        let pool = Pool::new(2)?;
        let tell = |pids: Queue<u32>| pids.blocking_put(pid()).expect("put");
        loop {
            pool.apply(tell, (pids.clone(),)).await?;
        }
    };
    for point in ["lane.read:3", "lane.given:3"] {
        let pids = Queue::unbounded()?;
        let builder = Process::<()>::builder().env("MULTIPROCESS_KILL_AT", point);
        let error = within(builder.spawn(pool_of_its_own, (pids.clone(),))?).await.unwrap_err();
        assert_eq!(error.exit_status().and_then(|status| status.signal()), Some(9), "{error}");
        let mut workers = HashSet::new();
        while let Ok(worker) = pids.try_get() {
            workers.insert(worker);
        }
        assert!(!workers.is_empty());
        eventually("its workers are gone", || workers.iter().all(|worker| is_gone(*worker))).await;
    }
    Ok(())
}

/// Of many quick items a worker tells together, but not for as long as one of them turns out to be slow.
#[tokio::test]
async fn quick_items_are_reported_while_a_slow_item_runs() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let (begun, go) = (Queue::<u32>::unbounded()?, Queue::<u32>::unbounded()?);
    let work = |(n, begun, go): (u64, Option<Queue<u32>>, Option<Queue<u32>>)| {
        if let (Some(begun), Some(go)) = (begun, go) {
            begun.blocking_put(0).expect("put");
            go.blocking_get().expect("get");
        }
        n
    };
    // Two in a row are slow, when it is known that most are quick.
    let slow = move |n: u64| (n % 20 >= 18).then(|| (begun.clone(), go.clone())).unzip();
    let (told, heard) = (slow.clone(), slow.clone());
    let items = (0..60).map(move |n| {
        let (begun, go) = told(n);
        (n, begun, go)
    });
    let mut results = std::pin::pin!(pool.imap(work, items).chunksize(1));
    for n in 0..60 {
        // Everything before a slow one comes while it is at work.
        if let (Some(begun), Some(go)) = heard(n) {
            let mut next = std::pin::pin!(results.next());
            begun.get().await?;
            falls_asleep(next.as_mut()).await;
            // Polled once more before the item goes on, and then only if it is woken.
            let start = Instant::now();
            let (next, put) = futures::join!(within(next), go.put(0));
            put?;
            assert!(start.elapsed() < Duration::from_secs(10), "it was polled for its deadline only");
            assert_eq!(next.expect("a result each")?, n);
        } else {
            assert_eq!(within(results.next()).await.expect("a result each")?, n);
        }
    }
    Ok(())
}

#[tokio::test]
async fn pool_34_rule_5_a_busy_worker_killed_fails_its_item_at_once_and_an_idle_one_costs_nothing() -> mp::Result<()> {
    let _deadline = Deadline::start();
    rounds(killed_at_work_and_idle, |took| *took < 100 * MS).await
}

/// Returns after which time the call of a killed worker has failed.
async fn killed_at_work_and_idle() -> mp::Result<Duration> {
    let pool = Pool::new(2)?;
    let pids = Queue::unbounded()?;
    let busy = pool.apply_async(say_and_stay, (pids.clone(),));
    let victim = pids.get().await?;
    let start = Instant::now();
    kill(victim, rustix::process::Signal::KILL);
    let error = busy.await.unwrap_err();
    let took = start.elapsed();
    // Rule 5: the error names the worker, the item, the signal and the age.
    let text = error.to_string();
    for part in ["PoolWorker-", &format!("pid {victim}"), "say_and_stay", "SIGKILL", "old"] {
        assert!(text.contains(part), "{text} says {part}");
    }
    let idle = pool.apply(pid, ()).await?;
    kill(idle, rustix::process::Signal::KILL);
    for n in 0..50 {
        // Whoever is handed to it before its death is known is handed on.
        assert_eq!(pool.apply(square, (n,)).await?, n * n);
    }
    eventually("the pool is back to size", || pool.workers() == 2).await;
    Ok(took)
}

/// `lane`: stopped between an item's start and the note of it. The time of the item before is not counted, and yet there
/// is an end.
#[cfg(debug_assertions)]
#[tokio::test]
async fn rule_3_an_item_whose_start_is_not_noted_has_its_full_time_and_no_more() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).env("MULTIPROCESS_STOP_AT", "lane.started:2").build()?;
    let mut results = pool.imap(nap, [600, 1]).chunksize(2).timeout(1000 * MS);
    assert_eq!(within(results.next()).await.expect("a result each")?, 600);
    let start = Instant::now();
    assert_eq!(within(results.next()).await.expect("a result each").unwrap_err().kind(), ErrorKind::Timeout);
    assert!(start.elapsed() >= 900 * MS, "{:?}", start.elapsed());
    Ok(())
}

/// Who idles, in the order in which a pool looks for one.
async fn idle_workers(pool: &Pool, count: usize) -> Vec<u32> {
    // One that still comes up may sleep, too.
    all_serve(pool, count).await;
    let mut pids = Vec::new();
    eventually("all have worked", || {
        let workers = pool.stats().workers;
        pids = workers.iter().map(|worker| worker.pid).collect();
        workers.len() == count && workers.iter().all(|worker| !worker.is_busy && is_asleep(worker.pid))
    })
    .await;
    pids
}

/// `lane`: what a stopped worker was given and has not begun is taken back and given to another; it was never begun, so
/// that costs no retry.
#[tokio::test]
async fn an_item_given_to_an_idle_worker_that_is_stopped_is_taken_over_by_another() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let pids = idle_workers(&pool, 2).await;
    stop(pids[0]);
    assert_eq!(within(pool.apply(pid, ())).await?, pids[1], "without any deadline");
    for _ in 0..20 {
        assert_eq!(within(pool.apply(pid, ()).timeout(Duration::from_secs(10))).await?, pids[1]);
    }
    let all = within(pool.map(|_: u32| pid(), 0..20).chunksize(1).timeout(Duration::from_secs(10))).await?;
    assert!(all.iter().all(|pid| *pid == pids[1]), "{all:?}");
    let all = within(pool.map(|_: u32| pid(), 0..20).chunksize(7)).await?;
    assert!(all.iter().all(|pid| *pid == pids[1]), "{all:?}");
    go_on(pids[0]);
    // It gives up what others did, and is one of the pool again.
    let barrier = mp::Barrier::new(2)?;
    let meet = |barrier: mp::Barrier| barrier.blocking_wait().map(|_| pid());
    let both = futures::future::try_join_all((0..2).map(|_| pool.apply(meet, (barrier.clone(),))));
    let mut both = within(both).await?.into_iter().collect::<mp::Result<Vec<_>>>()?;
    both.sort_unstable();
    let mut pids = pids;
    pids.sort_unstable();
    assert_eq!(both, pids);
    Ok(())
}

#[tokio::test]
async fn a_checkout_passes_over_a_worker_that_is_stopped_and_waits_if_all_are() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let pids = idle_workers(&pool, 2).await;
    stop(pids[0]);
    for _ in 0..3 {
        let worker = within(pool.checkout()).await?;
        assert_eq!(within(worker.apply(pid, ())).await?, pids[1]);
    }
    stop(pids[1]);
    let mut checkout = Box::pin(pool.checkout());
    assert!(futures::poll!(&mut checkout).is_pending());
    go_on(pids[0]);
    let first = within(checkout).await?;
    assert_eq!(within(first.apply(pid, ())).await?, pids[0]);
    let mut checkout = Box::pin(pool.checkout());
    assert!(futures::poll!(&mut checkout).is_pending());
    drop(first);
    let second = within(checkout).await?;
    assert_eq!(within(second.apply(pid, ())).await?, pids[0]);
    Ok(())
}

#[tokio::test]
async fn calls_that_wait_at_a_checked_out_worker_do_not_keep_others_from_taking_over() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(3)?;
    let pids = idle_workers(&pool, 3).await;
    let worker = within(pool.checkout()).await?;
    let out = within(worker.apply(pid, ())).await?;
    let gate = Queue::<()>::unbounded()?;
    let pass = |gate: Queue<()>| gate.blocking_get();
    let busy = futures::future::join_all((0..8).map(|_| worker.apply(pass, (gate.clone(),))));
    let mut busy = Box::pin(busy);
    assert!(futures::poll!(&mut busy).is_pending());
    let others: Vec<_> = pids.into_iter().filter(|pid| *pid != out).collect();
    stop(others[0]);
    for _ in 0..3 {
        assert!(within(pool.apply(pid, ())).await? != others[0]);
    }
    for _ in 0..8 {
        gate.put(()).await?;
    }
    within(busy).await;
    Ok(())
}

#[tokio::test]
async fn stopped_worker_whose_item_had_a_deadline_is_replaced_after_another_has_run_the_item() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let pids = idle_workers(&pool, 2).await;
    stop(pids[0]);
    assert_eq!(within(pool.apply(pid, ()).timeout(50 * MS)).await?, pids[1]);
    eventually("it is replaced", || is_gone(pids[0]) && pool.stats().workers.len() == 2).await;
    Ok(())
}

#[tokio::test]
async fn an_item_that_its_only_worker_does_not_begin_times_out_and_the_worker_is_replaced() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    for chunk in [1, 10] {
        let pids = idle_workers(&pool, 1).await;
        stop(pids[0]);
        let start = Instant::now();
        let results: Vec<_> = within(pool.imap(square, 0..4).chunksize(chunk).timeout(100 * MS).collect()).await;
        assert!(start.elapsed() >= 100 * MS, "{:?}", start.elapsed());
        let error = results[0].as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        for part in ["not begun within 100ms", &format!("pid {}", pids[0])] {
            assert!(error.to_string().contains(part), "{error} says {part}");
        }
        let others: Vec<_> = results[1..].iter().map(|result| result.as_ref().ok().copied()).collect();
        assert_eq!(others, [Some(1), Some(4), Some(9)], "the one at its front, and no other");
        assert!(is_gone(pids[0]));
    }
    // A retry runs in the worker that replaces it.
    let pids = idle_workers(&pool, 1).await;
    stop(pids[0]);
    let replaced = within(pool.apply(pid, ()).timeout(100 * MS).retries(1)).await?;
    assert!(replaced != pids[0] && is_gone(pids[0]));
    // One that is checked out as well.
    let worker = pool.checkout().await?;
    stop(replaced);
    assert_eq!(within(worker.apply(pid, ()).timeout(100 * MS)).await.unwrap_err().kind(), ErrorKind::Timeout);
    drop(worker);
    assert!(within(pool.apply(pid, ())).await? != replaced);
    // A large argument is with the worker before it begins.
    let pids = idle_workers(&pool, 1).await;
    stop(pids[0]);
    let large = pool.apply(|bytes: Vec<u8>| bytes.len(), (vec![1; 4 << 20],)).timeout(100 * MS);
    assert_eq!(within(large).await.unwrap_err().kind(), ErrorKind::Timeout);
    Ok(())
}

#[tokio::test]
async fn when_all_workers_are_stopped_deadlines_hold_and_all_are_replaced() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let pids = idle_workers(&pool, 2).await;
    pids.iter().for_each(|pid| stop(*pid));
    let results: Vec<_> = within(pool.imap(square, 0..6).chunksize(1).timeout(100 * MS).collect()).await;
    let late = results.iter().filter(|result| result.is_err()).count();
    assert!((1..=2).contains(&late), "{results:?}");
    assert_eq!(within(pool.map(square, 0..6)).await?, [0, 1, 4, 9, 16, 25]);
    eventually("all are replaced", || pids.iter().all(|pid| is_gone(*pid))).await;
    Ok(())
}

/// The pool comes too late to kill it: its thread is busy. What counts is when the item ended, by its worker's clock.
#[tokio::test]
async fn item_that_ends_after_deadline_and_grace_times_out_even_if_the_pool_looks_late() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let ended = Queue::unbounded()?;
    let slow_at_first = |ended: Queue<u64>, len: usize| {
        if mp::current_task().is_some_and(|task| task.attempt() == 0) {
            ended.blocking_put(nap(100)).expect("put");
        }
        vec![7u8; len]
    };
    // Nobody drives the pool until the item has ended; or it was killed before that, on a busy machine.
    let hold_up = || {
        let start = Instant::now();
        while ended.try_get().is_err() && start.elapsed() < 500 * MS {
            std::thread::sleep(MS);
        }
        std::thread::sleep(20 * MS);
    };
    // What an attempt that was killed in time would have said, it says no more.
    let forget = || while ended.try_get().is_ok() {};
    // One of many attempts has enough of the CPUs.
    for (retries, len) in [(0, 1), (20, 1), (0, 128 << 10), (20, 128 << 10)] {
        forget();
        let call = pool.apply(slow_at_first, (ended.clone(), len)).timeout(30 * MS).grace(10 * MS).retries(retries);
        let mut call = std::pin::pin!(call);
        falls_asleep(call.as_mut()).await;
        hold_up();
        match (within(call).await, retries) {
            (Ok(bytes), 20) => assert_eq!(bytes, vec![7; len]),
            (Err(error), 0) => assert_eq!(error.kind(), ErrorKind::Timeout, "{error}"),
            (other, _) => panic!("{:?} with {retries} retries", other.map(|bytes| bytes.len())),
        }
        assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    }
    // Among others that travel with it, and in order.
    let nap_and_tell = |n: u64, ended: Option<Queue<u64>>| {
        if let Some(ended) = ended {
            ended.blocking_put(nap(100)).expect("put");
        }
        n
    };
    for late in 0..3 {
        forget();
        let teller = ended.clone();
        let items = (0..3).map(move |n| (n, (n == late).then(|| teller.clone())));
        let results = pool.starmap(nap_and_tell, items).timeout(30 * MS).grace(10 * MS);
        let mut results = std::pin::pin!(results);
        falls_asleep(results.as_mut()).await;
        hold_up();
        assert_eq!(within(results).await.unwrap_err().kind(), ErrorKind::Timeout);
    }
    Ok(())
}

#[tokio::test]
async fn cancelled_item_that_stops_in_time_keeps_its_worker() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let before = pool.apply(pid, ()).await?;
    let patient = || {
        let task = mp::current_task().expect("in a worker");
        assert!(task.label().contains("cancelled_item_that_stops") && task.attempt() == 0);
        while !task.is_cancelled() {
            std::thread::sleep(MS);
        }
        7
    };
    assert_eq!(pool.apply(patient, ()).timeout(20 * MS).grace(Duration::from_secs(10)).await?, 7);
    let by_token = async || {
        mp::current_task().expect("in a worker").cancellation().cancelled().await;
        8
    };
    assert_eq!(pool.apply(by_token, ()).timeout(20 * MS).grace(Duration::from_secs(10)).await?, 8);
    let running = pool.apply(by_token, ()).grace(Duration::from_secs(10));
    assert!(tokio::time::timeout(50 * MS, running).await.is_err());
    assert_eq!(pool.apply(pid, ()).await?, before, "the worker was not killed");
    assert!(mp::current_task().is_none());
    Ok(())
}

/// Of the items of one order each may have a token; the thread that it takes goes with the item, and not with the order.
#[tokio::test]
async fn a_token_takes_one_thread_and_only_while_its_item_is_at_work() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let watched = |n: u32| {
        let token = mp::current_task().expect("inside a worker").cancellation();
        let threads = || std::fs::read_dir("/proc/self/task").expect("a list").count();
        let start = Instant::now();
        while n == 99 && threads() > 3 && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(MS);
        }
        (token.is_cancelled(), threads())
    };
    let last = within(pool.map(watched, 0..100).chunksize(100)).await?.pop().expect("a result each");
    assert!(!last.0 && last.1 <= 3, "{last:?}");
    // The token of one that was not the first of its order.
    let asked = |n: u32| {
        let token = mp::current_task().expect("inside a worker").cancellation();
        let start = Instant::now();
        while n == 1 && !token.is_cancelled() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(MS);
        }
        token.is_cancelled()
    };
    let both = pool.map(asked, 0..2).chunksize(2).timeout(500 * MS).grace(Duration::from_secs(10));
    assert_eq!(within(both).await?, [false, true]);
    Ok(())
}

#[tokio::test]
async fn cancelled_item_never_starts_and_frees_its_slot() -> mp::Result<()> {
    let _deadline = Deadline::start();
    rounds(cancelled_and_followed, |took| *took < 150 * MS).await
}

/// Returns after which time the slot of a cancelled item has served another.
async fn cancelled_and_followed() -> mp::Result<Duration> {
    let pool = Pool::new(1)?;
    let begun = Queue::unbounded()?;
    let count = |begun: Queue<u32>, ms: u64| {
        begun.blocking_put(0).expect("put");
        nap(ms)
    };
    let running = pool.apply_async(count, (begun.clone(), 60_000));
    begun.get().await?;
    let waiting: Vec<_> = (0..20).map(|_| pool.apply_async(count, (begun.clone(), 1))).collect();
    waiting.iter().for_each(|result| result.cancel());
    let start = Instant::now();
    running.cancel();
    assert_eq!(pool.apply(square, (3,)).await?, 9);
    let took = start.elapsed();
    for result in waiting {
        assert_eq!(result.await.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    assert_eq!(running.await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(begun.len(), 0, "something began that was cancelled");
    Ok(took)
}

/// `lane`: orders that were taken back stay with a worker until it comes to them, and then nothing comes of them. That
/// there is room again is told all the same.
#[tokio::test]
async fn item_cancelled_before_its_start_leaves_room_for_others() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let worker = pool.apply(pid, ()).await?;
    let large = |bytes: Vec<u8>| bytes.len();
    for len in [1, 8 << 20] {
        stop(worker);
        for _ in 0..10 {
            pool.apply_async(large, (vec![0; len],)).cancel();
        }
        let mut call = std::pin::pin!(pool.apply(large, (vec![0; len],)));
        falls_asleep(call.as_mut()).await;
        go_on(worker);
        assert_eq!(within(call).await?, len);
    }
    Ok(())
}

/// What a call brings goes when it is cancelled, also from a worker that had it already and is idle now.
#[tokio::test]
async fn cancelled_item_leaves_no_descriptor_in_its_worker() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let worker = pool.apply(pid, ()).await?;
    let (sender, mut receiver) = mp::simplex::<u32>()?;
    stop(worker);
    pool.apply_async(|_: mp::Sender<u32>| (), (sender,)).cancel();
    go_on(worker);
    assert_eq!(within(receiver.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
    Ok(())
}

/// As many orders one after the other as there may be do not exhaust a worker's stack, though it can read none of them.
#[tokio::test]
async fn unreadable_argument_fails_its_own_item_each_time() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let starve = || {
        use rustix::process::{Resource, Rlimit, setrlimit};
        // It keeps what it has.
        for (resource, most) in [(Resource::Stack, 256 << 10), (Resource::Nofile, 3)] {
            setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }).expect("a limit");
        }
        pid()
    };
    // What it sleeps on it has from its first sleep on.
    let worker = pool.apply(pid, ()).await?;
    eventually("it sleeps", || is_asleep(worker)).await;
    assert_eq!(pool.apply(starve, ()).await?, worker);
    let file = |_| mp::Fd::new(std::fs::File::open("/dev/null").expect("a file"));
    let mut results = pool.imap(|_: mp::Fd<std::fs::File>| (), (0..1000).map(file));
    while let Some(result) = within(results.next()).await {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Io);
    }
    // The time of the one before is not its time.
    std::thread::sleep(600 * MS);
    assert_eq!(pool.apply(pid, ()).timeout(500 * MS).grace(5 * MS).retries(100).await?, worker);
    std::thread::sleep(30 * MS);
    let error = within(pool.apply(|_: mp::Fd<std::fs::File>| (), (file(0),)).retries(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    Ok(())
}

/// As many calls as wait, each costs the same: also of a pool that grows, and once somebody has had a worker to himself.
#[tokio::test]
async fn many_calls_that_wait_cost_no_more_than_few() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let submits = async |count: i64| -> mp::Result<Duration> {
        let pool = Pool::builder().workers(0..=1).build()?;
        drop(within(pool.checkout()).await?);
        let begun = Queue::unbounded()?;
        let _running = pool.apply_async(say_and_stay, (begun.clone(),));
        begun.get().await?;
        let start = Instant::now();
        let _calls: Vec<_> = (0..count).map(|n| pool.apply_async(square, (n,))).collect();
        let took = start.elapsed();
        pool.terminate();
        Ok(took)
    };
    let round = async || Ok((submits(2000).await?, submits(20_000).await?));
    rounds(round, |(few, many)| *many < Duration::from_secs(5) || *many < 30 * *few).await
}

/// An item that is tried again has started; it is not said to have waited for too long.
#[tokio::test]
async fn a_retry_that_waits_for_a_worker_is_not_late() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).initializer(nap, (3000,)).build()?;
    pool.apply(square, (1,)).await?;
    let dies_once = || match mp::current_task().expect("inside a worker").attempt() {
        0 => std::process::abort(),
        attempt => attempt,
    };
    assert_eq!(within(pool.apply(dies_once, ()).retries(1).queue_timeout(2000 * MS)).await?, 1);
    Ok(())
}

#[tokio::test]
async fn item_cancelled_before_its_retry_does_not_delay_the_end_of_the_pool() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let worker = pool.apply(pid, ()).await?;
    let mut call = Box::pin(pool.apply(die, ()).retries(3).back_off(Duration::from_secs(3600)));
    falls_asleep(call.as_mut()).await;
    eventually("it has died", || is_gone(worker) && pool.stats().workers.iter().all(|other| other.pid != worker)).await;
    drop(call);
    assert_eq!(pool.stats().queued, 0);
    pool.close();
    within(pool.join()).await
}

/// `lane`: killed between giving such an order up and the notice of that.
#[cfg(debug_assertions)]
#[tokio::test]
async fn worker_killed_while_it_gives_up_a_cancelled_order_is_replaced_and_leaves_room() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).env("MULTIPROCESS_KILL_AT", "lane.given_up").build()?;
    let worker = pool.apply(pid, ()).await?;
    stop(worker);
    for _ in 0..10 {
        pool.apply_async(pid, ()).cancel();
    }
    let mut call = std::pin::pin!(pool.apply(pid, ()));
    falls_asleep(call.as_mut()).await;
    go_on(worker);
    assert_ne!(within(call).await?, worker);
    assert!(is_gone(worker));
    Ok(())
}

#[tokio::test]
async fn idle_worker_takes_over_items_behind_a_slow_one() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    // All in one chunk, of which the first item ends when the others have come.
    let gate = Gate::new("idle");
    let slow_first = |(n, gate): (u64, Gate)| {
        if n == 0 {
            gate.pass();
        }
        n
    };
    let held = gate.clone();
    let items = (0..10).map(move |n| (n, held.clone()));
    let mut results = pool.imap_unordered(slow_first, items).chunksize(10);
    let mut others = HashSet::new();
    for _ in 1..10 {
        others.insert(within(results.next()).await.expect("a result each")?);
    }
    assert_eq!(others, (1..10).collect(), "the others did not wait for it");
    gate.open();
    assert_eq!(within(results.next()).await.expect("a result each")?, 0);
    gate.remove();
    Ok(())
}

#[tokio::test]
async fn plife_01_rule_7_shares_of_one_task_strand_nothing_and_are_no_error() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(2).max_tasks_per_worker(1).build()?;
    let results: Vec<_> = pool.imap_unordered(|n: u32| n, 0..1000).try_collect().await?;
    assert_eq!(results.into_iter().collect::<HashSet<_>>(), (0..1000).collect());
    let pids = pool.map(|_: u32| pid(), 0..200).await?;
    assert_eq!(pids.iter().collect::<HashSet<_>>().len(), 200);
    Ok(())
}

#[tokio::test]
async fn plife_02_closed_right_after_submitting_everything_comes() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(2).max_tasks_per_worker(1).build()?;
    let results: Vec<_> = (0..6).map(|n| pool.apply_async(square, (n,))).collect();
    pool.close();
    within(pool.join()).await?;
    for (n, result) in results.into_iter().enumerate() {
        assert_eq!(result.await?, square(n as i64));
    }
    Ok(())
}

#[tokio::test]
async fn workers_go_when_they_are_old_or_large_between_two_tasks() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).max_age(30 * MS).build()?;
    let first = pool.apply(pid, ()).await?;
    assert_eq!(pool.apply(nap, (60,)).await?, 60, "nobody is killed for his age");
    assert_ne!(pool.apply(pid, ()).await?, first);

    let pool = Pool::builder().workers(1).recycle_above(256 << 20).build()?;
    let grow = |mib: usize| {
        let block = std::hint::black_box(vec![1u8; mib << 20]);
        std::thread::sleep(10 * MS);
        std::mem::forget(block);
        pid()
    };
    let small = pool.apply(grow, (1,)).await?;
    assert_eq!(pool.apply(grow, (300,)).await?, small);
    let pids = pool.clone();
    while within(pids.apply(pid, ())).await? == small {
        tokio::task::yield_now().await;
    }
    Ok(())
}

#[tokio::test]
async fn an_elastic_pool_grows_with_its_work_and_shrinks_when_idle() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(0..=4).idle_timeout(50 * MS).build()?;
    eventually("nobody is there without work", || pool.workers() == 0).await;
    // Those that have begun wait until three have.
    let begun = mp::Value::new(0_u32)?;
    let three = |begun: mp::Value<u32>| {
        begun.fetch_add(1);
        let start = Instant::now();
        while begun.get() < 3 && start.elapsed() < Duration::from_secs(15) {
            std::thread::sleep(MS);
        }
        pid()
    };
    let items = (0..8).map(move |_| (begun.clone(),));
    let pids: HashSet<_> = pool.starmap(three, items).chunksize(1).await?.into_iter().collect();
    assert!(pids.len() > 2, "{pids:?}");
    eventually("all went home", || pool.workers() == 0).await;
    assert_eq!(pool.apply(square, (3,)).await?, 9);
    Ok(())
}

#[tokio::test]
async fn resize_lets_running_items_go_on() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(3)?;
    let begun = Queue::unbounded()?;
    let say_and_nap = |begun: Queue<u32>| {
        begun.blocking_put(0).expect("put");
        nap(100)
    };
    let running: Vec<_> = (0..3).map(|_| pool.apply_async(say_and_nap, (begun.clone(),))).collect();
    for _ in 0..3 {
        begun.get().await?;
    }
    within(pool.resize(1)).await?;
    for result in running {
        assert_eq!(result.await?, 100);
    }
    let pids: HashSet<_> = pool.map(|_: u32| (nap(5), pid()).1, 0..8).chunksize(1).await?.into_iter().collect();
    assert_eq!(pids.len(), 1);
    within(pool.resize(3)).await?;
    let pids: HashSet<_> = pool.map(|_: u32| (nap(50), pid()).1, 0..12).chunksize(1).await?.into_iter().collect();
    assert!(pids.len() > 1 && pool.resize(0).await.is_err());
    Ok(())
}

/// Those that go may be on their way up at that moment: it is another thread that starts them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resize_ends_those_too_that_were_being_started() -> mp::Result<()> {
    let _deadline = Deadline::start();
    for n in 0..20 {
        let pool = Pool::new(6)?;
        tokio::time::sleep(n % 10 * MS / 4).await;
        within(pool.resize(1)).await?;
        assert_eq!(within(pool.apply(square, (3,))).await?, 9);
        assert_eq!(pool.workers(), 1);
    }
    Ok(())
}

/// Who waits for fewer workers than somebody else wants by now waits no more.
#[tokio::test]
async fn resize_is_over_when_another_wants_more() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let begun = Queue::unbounded()?;
    let _running = [0, 1].map(|_| pool.apply_async(say_and_stay, (begun.clone(),)));
    for _ in 0..2 {
        begun.get().await?;
    }
    for most in [2, 3] {
        let mut fewer = std::pin::pin!(pool.resize(1));
        assert!(futures::poll!(&mut fewer).is_pending());
        within(pool.resize(most)).await?;
        within(fewer).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_pool_that_is_revived_has_no_more_workers_than_it_needs() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let fails = || -> () { panic!("no") };
    let pool = Pool::builder().workers(0..=3).initializer(fails, ()).build()?;
    assert!(within(pool.apply(square, (1,))).await.is_err());
    eventually("nobody is left", || pool.workers() == 0).await;
    pool.revive()?;
    // On this thread the pool's own task has done by then what it is to do.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!((pool.broken(), pool.workers()), (None, 0));
    Ok(())
}

/// Its runtime may end before it has begun anything.
#[test]
fn calls_on_a_pool_whose_runtime_has_ended_fail_with_the_reason() {
    let _deadline = Deadline::start();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let made = runtime().block_on(async { Pool::new(1) }).expect("a pool");
    let error = runtime().block_on(within(made.apply(square, (3,)))).expect_err("nobody starts its workers");
    let says_so = |error: &mp::Error| error.to_string().contains("its runtime has ended");
    assert!(error.kind() == ErrorKind::Closed && says_so(&error), "{error}");
    let error = runtime().block_on(within(made.map_async(square, [3]))).expect_err("nobody starts its workers");
    assert!(says_so(&error), "{error}");
    let error = runtime().block_on(within(made.imap(square, [3]).next())).expect("an item").unwrap_err();
    assert!(error.kind() == ErrorKind::Closed && says_so(&error), "{error}");
    let error = runtime().block_on(within(made.checkout())).expect_err("nobody starts its workers");
    assert!(error.kind() == ErrorKind::Closed && says_so(&error), "{error}");
    // What was asked for before, and is waited for after.
    let first = runtime();
    let (made, result, results) = first.block_on(async {
        let pool = Pool::new(1).expect("a pool");
        let (result, results) = (pool.apply_async(stuck, ()), pool.map_async(square, [1, 2]));
        (pool, result, results)
    });
    drop(first);
    for error in runtime().block_on(async { [within(result).await.unwrap_err(), within(results).await.unwrap_err()] }) {
        assert!(error.kind() == ErrorKind::Cancelled && says_so(&error), "{error}");
    }
    drop(made);
    // One that was closed and is over had its end before its runtime had.
    let closed = runtime().block_on(async {
        let pool = Pool::new(1).expect("a pool");
        pool.close();
        within(pool.join()).await.expect("it ends");
        // The task that has seen to it is over then, too.
        tokio::task::yield_now().await;
        pool
    });
    let error = runtime().block_on(within(closed.apply(square, (3,)))).unwrap_err();
    assert_eq!((error.kind(), error.to_string().contains("closed")), (ErrorKind::Closed, true), "{error}");
}

#[tokio::test]
async fn a_checkout_taken_before_close_goes_on_until_it_is_dropped() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let first = pool.checkout().await?;
    let mut second = std::pin::pin!(pool.checkout());
    assert!(futures::poll!(&mut second).is_pending(), "the only worker is out");
    pool.close();
    assert_eq!(within(first.apply(square, (3,))).await?, 9);
    drop(first);
    let second = within(second).await?;
    assert_eq!(within(second.apply(square, (4,))).await?, 16);
    assert_eq!(pool.checkout().await.unwrap_err().kind(), ErrorKind::Closed);
    drop(second);
    within(pool.join()).await?;
    // Who ends the pool does not wait for it.
    let pool = Pool::new(1)?;
    let held = pool.checkout().await?;
    within(pool.shutdown(Duration::from_secs(10))).await;
    assert!(within(held.apply(square, (3,))).await.is_err());
    Ok(())
}

#[tokio::test]
async fn rule_8_crash_loop_breaks_the_pool_with_a_reason_and_can_be_revived() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let healthy = Queue::<u32>::unbounded()?;
    let crash = |healthy: Queue<u32>| {
        if healthy.is_empty() {
            std::process::abort();
        }
    };
    let pool = Pool::builder().workers(1).initializer(crash, (healthy.clone(),)).build()?;
    let error = within(pool.apply(square, (1,))).await.unwrap_err();
    assert!(error.to_string().contains("SIGABRT") && error.to_string().contains("initializer"), "{error}");
    assert!(pool.broken().is_some_and(|why| why.contains("SIGABRT")));
    assert!(pool.apply(square, (1,)).await.is_err(), "asked again it says so at once");
    healthy.try_put(1)?;
    pool.revive()?;
    assert_eq!(within(pool.apply(square, (5,))).await?, 25);
    assert_eq!(pool.broken(), None);
    Ok(())
}

#[tokio::test]
async fn rule_11_workers_work_under_their_conditions_and_ctrl_c_does_not_reach_them() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let done = Queue::unbounded()?;
    let last = |done: Queue<u32>| done.blocking_put(pid()).is_ok();
    let pool = Pool::builder().workers(1).nice(5).cpus([0]).env("COLOR", "blue").descriptor_limit(200);
    let pool = pool.finalizer(last, (done.clone(),)).build()?;
    let conditions = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_string();
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let nice = rustix::process::getpriority_process(None).unwrap();
        (nice, cpus, std::env::var("COLOR").unwrap(), descriptors)
    };
    assert_eq!(pool.apply(conditions, ()).await?, (5, "0".into(), "blue".into(), Some(200)));
    let worker = pool.apply(pid, ()).await?;
    kill(worker, rustix::process::Signal::INT);
    assert_eq!(pool.apply(pid, ()).await?, worker);
    pool.close();
    within(pool.join()).await?;
    assert_eq!(done.try_get()?, worker, "the finalizer ran");
    assert!(is_gone(worker));
    Ok(())
}

#[tokio::test]
async fn large_values_and_descriptors_travel_among_small_ones_in_order() -> mp::Result<()> {
    in_child(large_values_and_descriptors, ()).await
}

async fn large_values_and_descriptors() -> mp::Result<()> {
    let pool = Pool::new(2)?;
    let size = |n: usize| if n.is_multiple_of(5) { 300_000 + n } else { n };
    let same = |bytes: Vec<u8>| bytes;
    let results: Vec<_> = pool.imap(same, (0..60).map(move |n| vec![n as u8; size(n)])).try_collect().await?;
    for (n, bytes) in results.iter().enumerate() {
        assert!(bytes.len() == size(n) && bytes.iter().all(|byte| *byte == n as u8), "{n}");
    }
    let big = pool.map(|n: usize| vec![7u8; n << 20], [1, 9, 3]).chunksize(3).await?;
    assert_eq!(big.iter().map(Vec::len).collect::<Vec<_>>(), [1 << 20, 9 << 20, 3 << 20]);
    let before = holdings().descriptors;
    let open = |n: u32| (n, mp::Fd::new(std::fs::File::open("/dev/null").unwrap()));
    let back = |(n, file): (u32, mp::Fd<std::fs::File>)| (n, file);
    let files: Vec<_> = pool.imap(back, (0..30).map(open)).chunksize(4).try_collect().await?;
    assert!(files.iter().enumerate().all(|(n, (m, _))| n as u32 == *m));
    drop(files);
    eventually("no descriptor is left", || holdings().descriptors == before).await;
    Ok(())
}

/// In a process of its own, where nobody else takes memory.
#[tokio::test]
async fn rule_9_a_million_items_of_an_endless_source_take_flat_memory() -> mp::Result<()> {
    let _deadline = Deadline::after(Duration::from_secs(100));
    let growth = in_child(
        async || -> mp::Result<usize> {
            let pool = Pool::new(2)?;
            let mut results = pool.imap_unordered(square, 0..);
            let mut take = async |count: usize| -> mp::Result<()> {
                for _ in 0..count {
                    results.next().await.expect("endless")?;
                }
                Ok(())
            };
            take(1_000).await?;
            let (before, mut most) = (resident(), 0);
            let start = Instant::now();
            for n in 1..=45 {
                take(22_200).await?;
                most = most.max(resident());
                // On a busy machine, where a million take too long, some of them must do.
                if n >= 9 && start.elapsed() > Duration::from_secs(50) {
                    break;
                }
            }
            Ok(most.saturating_sub(before))
        },
        (),
    );
    let growth = growth.await?;
    assert!(growth < 16 << 20, "{} KiB", growth >> 10);
    Ok(())
}

/// Results that are too large for a ring lie in a pipe until their caller comes for them, and that is small.
#[tokio::test]
async fn large_results_of_a_caller_that_is_not_polled_delay_no_other_caller() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let large: Vec<_> = (0..5).map(|n| pool.apply_async(|n: u8| vec![n; 3 << 20], (n,))).collect();
    assert_eq!(within(pool.apply(square, (3,))).await?, 9, "it came behind all of them");
    assert!(large.iter().all(|result| result.ready()));
    large[3].cancel();
    for (n, result) in large.into_iter().enumerate() {
        assert!(within(result).await? == vec![n as u8; 3 << 20], "what was there is not cancelled, and whole");
    }
    // Nobody comes for these at all.
    drop((0..5).map(|n| pool.apply_async(|n: u8| vec![n; 3 << 20], (n,))).collect::<Vec<_>>());
    assert_eq!(within(pool.apply(square, (4,))).await?, 16);
    Ok(())
}

#[tokio::test]
async fn large_items_behind_one_that_hangs_leave_its_deadline_in_force() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let work = |(n, bytes): (usize, bytes::Bytes)| {
        if n == 100 {
            stuck();
        }
        bytes.len()
    };
    // Quick at first, so that orders are given ahead; then more that is large than their way holds.
    let items = (0..106).map(|n| (n, vec![0; if n > 100 { 1_500_000 } else { 1 }].into()));
    let results: Vec<_> = within(pool.imap(work, items).chunksize(1).timeout(1000 * MS).collect()).await;
    for (n, result) in results.into_iter().enumerate() {
        match n {
            100 => assert_eq!(result.unwrap_err().kind(), ErrorKind::Timeout),
            _ => assert_eq!(result?, if n > 100 { 1_500_000 } else { 1 }),
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_time_that_never_comes_is_no_mistake() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let never = Duration::MAX;
    let builder = Pool::builder().workers(1..=2).idle_timeout(never).exit_timeout(never).max_age(never);
    let pool = builder.initializer(|| (), ()).initializer_timeout(never).build()?;
    assert_eq!(within(pool.apply(square, (2,)).timeout(never).queue_timeout(never).grace(never)).await?, 4);
    let squares = within(pool.map(square, 0..50).timeout(never).retries(1).back_off(never)).await?;
    assert_eq!(squares, (0..50).map(square).collect::<Vec<_>>());
    drop(pool.apply_async(stuck, ()));
    drop(pool);
    Ok(())
}

#[tokio::test]
async fn no_time_at_all_and_odd_numbers_are_no_mistake_or_an_error() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let zero = Duration::ZERO;
    let pool = Pool::builder().workers(1).exit_timeout(zero).idle_timeout(zero).tasks_jitter(usize::MAX).build()?;
    let start = Instant::now();
    for grace in [zero, 5 * MS] {
        let (first, second) = futures::join!(
            pool.apply(stuck, ()).timeout(zero).grace(grace),
            pool.apply(stuck, ()).timeout(zero).grace(grace),
        );
        assert_eq!([first, second].map(|result| result.unwrap_err().kind()), [ErrorKind::Timeout; 2]);
    }
    // Also of one that was given to a worker while that started, which may take ten seconds.
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    // What waits has not run out of its time, and what has begun is no end that is late.
    let (begun, go) = (Queue::unbounded()?, Queue::unbounded()?);
    let first = pool.apply_async(say_and_wait, (begun.clone(), go.clone()));
    begun.get().await?;
    let mut second = Box::pin(pool.apply(stuck, ()).timeout(zero));
    falls_asleep(second.as_mut()).await;
    assert_eq!(within(pool.apply(square, (1,)).queue_timeout(zero)).await.unwrap_err().kind(), ErrorKind::Timeout);
    go.put(3).await?;
    assert_eq!(within(first).await?, 3);
    assert_eq!(within(second).await.unwrap_err().kind(), ErrorKind::Timeout);
    let last = pool.apply_async(nap, (30,));
    pool.close();
    assert_eq!(within(last).await?, 30);
    within(pool.join()).await?;
    for workers in [0..=usize::MAX, 5000..=5000] {
        assert!(Pool::new(workers).is_err_and(|error| error.to_string().contains("4096 workers at most")));
    }
    assert!(Pool::builder().workers(1).max_waiting(0).build().is_err());
    assert!(Pool::builder().cpus([usize::MAX]).build().is_err_and(|error| error.to_string().contains("no CPU")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_that_is_not_polled_delays_no_other_caller() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    pool.map(nap, [1, 1]).await?;
    // It sleeps until its result comes.
    let (begun, go) = (Queue::unbounded()?, Queue::unbounded()?);
    let mut asleep = Box::pin(pool.apply(say_and_wait, (begun.clone(), go.clone())));
    falls_asleep(asleep.as_mut()).await;
    let asleep = tokio::spawn(asleep);
    begun.get().await?;
    // These are polled once or twice, at whatever they are then, and for long not again.
    let mut left = Vec::new();
    for polls in 1..4 {
        let mut call = pool.apply(nap, (1,)).boxed();
        for _ in 0..polls {
            let _ = futures::poll!(&mut call);
        }
        left.push(call);
    }
    go.put(50).await?;
    assert_eq!(within(asleep).await.expect("no panic")?, 50);
    for n in 0..20 {
        assert_eq!(within(pool.apply(square, (n,))).await?, n * n);
    }
    drop(left);
    Ok(())
}

/// Kills the worker that answered last, again and again at random, until it is stopped; returns the number of kills.
async fn kill_at_random(last: Arc<AtomicU32>, kills: Arc<AtomicU32>, stop: CancellationToken) {
    let (mut random, mut killed) = (Random::new(7), None);
    while !stop.is_cancelled() {
        tokio::time::sleep(Duration::from_micros(500 + random.below(8000))).await;
        let victim = last.swap(0, Relaxed);
        if victim != 0 {
            kill(victim, rustix::process::Signal::KILL);
            kills.fetch_add(1, Relaxed);
            killed = Some(victim);
        }
    }
    eventually("the last one is gone", || killed.is_none_or(is_gone)).await;
}

/// Runs for up to 300 us, by its number, and every hundredth longer than anybody has time if it may hang.
fn erratic(n: u64, may_hang: bool) -> (u64, u32) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_micros(50 * (n % 7)) {
        std::hint::spin_loop();
    }
    if may_hang && n % 101 == 100 {
        stuck();
    }
    (n, pid())
}

/// Runs `round` again and again while workers are killed; then everything is as it was after the first quarter. In a
/// process of its own, where nobody else takes descriptors or memory.
async fn chaos_of(round: impl AsyncFn(&Pool, &mut Random, &AtomicU32)) -> mp::Result<()> {
    let pool = Pool::new(3)?;
    let (mut random, mut rounds, mut before) = (Random::new(3), 0, None);
    // On a busy machine a round, and so the time between kills, takes longer: then there are more rounds.
    let (kills, enough) = (Arc::new(AtomicU32::new(0)), chaos().as_millis() / 300);
    let has_enough = || u128::from(kills.load(Relaxed)) > enough;
    for (while_, least) in [(chaos() / 4, false), (chaos() / 4 * 3, true)] {
        let (last, stop) = (Arc::new(AtomicU32::new(0)), CancellationToken::new());
        let killer = tokio::spawn(kill_at_random(last.clone(), kills.clone(), stop.clone()));
        let start = Instant::now();
        let is_over =
            || start.elapsed() >= while_ && (!least || has_enough() || start.elapsed() > while_ + 25_000 * MS);
        while !is_over() {
            round(&pool, &mut random, &last).await;
            rounds += 1;
        }
        stop.cancel();
        killer.await.expect("no panic");
        assert_eq!(within(pool.map(square, 0..100)).await?, (0..100).map(square).collect::<Vec<_>>());
        // A worker that the pool is about to reap is gone, one that it has killed is busy until then.
        let is_well = |worker: &mp::WorkerStats| !worker.is_busy && !is_gone(worker.pid);
        let is_whole =
            || pool.workers() == 3 && pool.stats().workers.iter().filter(|worker| is_well(worker)).count() == 3;
        eventually("the pool is back to size", is_whole).await;
        let Some((held, had)) = before else {
            before = Some((holdings(), resident()));
            continue;
        };
        eventually("no descriptor is left", || holdings().descriptors == held.descriptors).await;
        assert!(resident() < had + (16 << 20), "{} KiB, then {} KiB", had >> 10, resident() >> 10);
    }
    eprintln!("{rounds} rounds, {kills:?} kills");
    assert!(has_enough(), "{kills:?} kills");
    Ok(())
}

#[tokio::test]
async fn rule_2_chaos_of_kills_each_item_is_answered_once() -> mp::Result<()> {
    let _deadline = Deadline::after(chaos() + Duration::from_secs(40));
    Process::spawn(chaos_of_kills, ())?.await?
}

async fn chaos_of_kills() -> mp::Result<()> {
    chaos_of(async |pool, random, last| {
        let chunk = random.below(9) as usize;
        let mut results = pool.imap(erratic_but_quick, 0..300).chunksize(chunk).retries(1000);
        for n in 0..300 {
            let (value, worker) = within(results.next()).await.expect("a result each").expect("in the end it succeeds");
            assert_eq!(value, n, "each item once, in its place");
            last.store(worker, Relaxed);
        }
        assert!(within(results.next()).await.is_none());
        // The same without retries, in any order: each item is a value or a death.
        let mut seen = [0u8; 300];
        let mut failed = 0;
        let mut results = pool.imap_unordered(erratic_but_quick, 0..300).chunksize(chunk);
        while let Some(result) = within(results.next()).await {
            match result {
                Ok((value, worker)) => {
                    seen[value as usize] += 1;
                    last.store(worker, Relaxed);
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ProcessDied, "{error}");
                    failed += 1;
                }
            }
        }
        assert!(seen.iter().all(|times| *times <= 1), "an item was answered twice");
        assert_eq!(seen.iter().map(|times| usize::from(*times)).sum::<usize>() + failed, 300);
    })
    .await
}

fn erratic_but_quick(n: u64) -> (u64, u32) {
    erratic(n, false)
}

#[tokio::test]
async fn chaos_of_kills_cancellations_and_timeouts_each_item_is_answered_once() -> mp::Result<()> {
    let _deadline = Deadline::after(chaos() + Duration::from_secs(40));
    Process::spawn(chaos_of_everything, ())?.await?
}

async fn chaos_of_everything() -> mp::Result<()> {
    let work = |n: u64| erratic(n, true);
    chaos_of(async |pool, random, last| {
        let chunk = random.below(9) as usize;
        let calls: Vec<_> = (0..random.below(20)).map(|n| pool.apply_async(erratic_but_quick, (n,))).collect();
        let mut results = pool.imap(work, 0..300).chunksize(chunk).timeout(30 * MS).retries(1);
        let dropped_after = if random.below(3) == 0 { random.below(300) } else { u64::MAX };
        let mut n = 0;
        while let Some(result) = within(results.next()).await {
            match result {
                Ok((value, worker)) => {
                    assert_eq!(value, n, "each item once, in its place");
                    last.store(worker, Relaxed);
                }
                Err(error) => assert!(matches!(error.kind(), ErrorKind::ProcessDied | ErrorKind::Timeout), "{error}"),
            }
            n += 1;
            if n == dropped_after {
                break;
            }
        }
        assert!(n == 300 || n == dropped_after, "{n} results");
        for (n, call) in (0..).zip(calls) {
            if random.below(2) == 0 {
                call.cancel();
            }
            match within(call).await {
                Ok((value, _)) => assert_eq!(value, n),
                Err(error) => assert!(matches!(error.kind(), ErrorKind::ProcessDied | ErrorKind::Cancelled), "{error}"),
            }
        }
    })
    .await
}

/// Rule 6: an initializer, a worker's end and a shutdown have deadlines of their own, which errors name.
#[tokio::test]
async fn rule_6_hanging_initializer_is_killed_and_reported_as_late() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let starts = Queue::unbounded()?;
    // The first two hang.
    let hangs = |starts: Queue<u32>| {
        starts.blocking_put(pid()).expect("put");
        if starts.len() < 3 {
            stuck();
        }
    };
    let builder = Pool::builder().workers(1).initializer(hangs, (starts.clone(),));
    let pool = builder.initializer_timeout(Duration::from_secs(2)).build()?;
    assert_eq!(within(pool.apply(square, (3,))).await?, 9, "it waits for one that comes up");
    assert_eq!(starts.len(), 3);
    let (first, second) = (starts.get().await?, starts.get().await?);
    assert!(is_gone(first) && is_gone(second));
    let pool = Pool::builder().workers(1).initializer(stuck, ()).initializer_timeout(20 * MS).build()?;
    let late = within(pool.apply(square, (3,)).queue_timeout(MS)).await.unwrap_err();
    assert!(late.kind() == ErrorKind::Timeout && late.to_string().contains("did not start"), "{late}");
    let error = within(pool.apply(square, (3,))).await.unwrap_err().to_string();
    for part in ["initializer of PoolWorker-1", "did not end within 20ms"] {
        assert!(error.contains(part), "{error} says {part}");
    }
    assert!(pool.broken().is_some_and(|why| why.contains("did not end within 20ms")));
    pool.close();
    within(pool.join()).await
}

#[tokio::test]
async fn rule_6_a_finalizer_that_hangs_is_killed_and_strands_nothing() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).finalizer(stuck, ()).max_tasks_per_worker(1).exit_timeout(20 * MS).build()?;
    // Each one's end is waited for, and then cut short.
    let pids = within(pool.map(|_: u32| pid(), 0..5)).await?;
    assert_eq!(pids.iter().collect::<HashSet<_>>().len(), 5);
    pool.close();
    within(pool.join()).await?;
    assert_eq!(pool.stats().late, 5);
    // A task that is still at work is no end that is late.
    let pool = Pool::builder().workers(1).exit_timeout(Duration::from_secs(1)).build()?;
    let slow = pool.apply_async(nap, (3000,));
    pool.close();
    within(pool.join()).await?;
    assert_eq!((slow.await?, pool.stats().late), (3000, 0));
    // A worker that is not yet up when all is over is given the same time.
    let pool = Pool::builder().workers(1).initializer(stuck, ()).exit_timeout(20 * MS).build()?;
    eventually("it is there", || !pool.stats().workers.is_empty()).await;
    pool.close();
    within(pool.join()).await?;
    assert_eq!(pool.stats().late, 1);
    // A shutdown waits no longer than it was told to.
    let pool = Pool::builder().workers(1).finalizer(stuck, ()).build()?;
    within(pool.apply(square, (2,))).await?;
    let report = within(pool.shutdown(20 * MS)).await;
    assert_eq!((report.not_begun(), report.killed()), (0, 0));
    Ok(())
}

/// A worker at its limit of memory says so, also where it can allocate nothing any more.
#[tokio::test]
async fn rule_11_a_worker_at_its_memory_limit_ends_with_an_error_that_names_the_limit() -> mp::Result<()> {
    let _deadline = Deadline::start();
    fn too_large() -> usize {
        std::hint::black_box(vec![1u8; 8 << 30]).len()
    }
    fn fill() {
        let (mut all, mut size) = (Vec::new(), 64 << 20);
        while size > 16 {
            let mut block = Vec::<u8>::new();
            match all.try_reserve(1).is_ok() && block.try_reserve_exact(size).is_ok() {
                true => all.push(block),
                false => size /= 2,
            }
        }
        std::mem::forget(all);
    }
    fn panics_at_the_limit() {
        fill();
        panic!("it is full")
    }
    fn fails_at_the_limit() -> usize {
        fill();
        std::hint::black_box(vec![1u8; 200 << 20]).len()
    }
    for (backtrace, lines) in [("0", 0), ("1", 0), ("1", 3)] {
        let pool = Pool::builder().workers(1).memory_limit(4 << 30).env("RUST_BACKTRACE", backtrace);
        let pool = pool.keep_stderr(lines).build()?;
        for is_one_too_large in [true, false] {
            let done = match is_one_too_large {
                true => within(pool.apply(too_large, ())).await,
                false => within(pool.apply(fails_at_the_limit, ())).await,
            };
            let error = done.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::MemoryLimit, "{error}");
            let text = error.to_string();
            assert!(
                text.contains("memory_limit") && text.contains("4096 MiB") && text.contains("PoolWorker-1"),
                "{text}"
            );
        }
        let error = within(pool.apply(panics_at_the_limit, ())).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Panicked | ErrorKind::MemoryLimit), "{error}");
        if let Some(panic) = error.panic() {
            assert_eq!(panic.message(), "it is full");
        }
        assert_eq!(within(pool.apply(|| 5, ())).await?, 5);
    }
    // An abort for another reason is one.
    let pool = Pool::builder().workers(1).memory_limit(4 << 30).build()?;
    let error = within(pool.apply(|| std::process::abort() as (), ())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ProcessDied, "{error}");
    Ok(())
}

#[tokio::test]
async fn rule_11_a_caught_panic_leaves_a_worker_its_memory_limit() -> mp::Result<()> {
    let _deadline = Deadline::start();
    const LIMIT: usize = 4 << 30;
    fn panics() {
        panic!("on purpose")
    }
    async fn panics_in_a_task() {
        tokio::spawn(async { panic!("on purpose") }).await.unwrap_err();
    }
    /// Takes 16 MiB more than it may have.
    fn goes_beyond() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = statm.split(' ').next().unwrap().parse().unwrap();
        let size = LIMIT - pages * rustix::param::page_size() + (16 << 20);
        std::hint::black_box(Vec::<u8>::with_capacity(size)).capacity()
    }
    for is_in_a_task in [false, true] {
        let pool = Pool::builder().workers(1).memory_limit(LIMIT as u64).env("RUST_BACKTRACE", "0").build()?;
        match is_in_a_task {
            true => within(pool.apply(panics_in_a_task, ())).await?,
            false => assert_eq!(within(pool.apply(panics, ())).await.unwrap_err().kind(), ErrorKind::Panicked),
        }
        let error = within(pool.apply(goes_beyond, ())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MemoryLimit, "{error}");
    }
    Ok(())
}

/// A pool of one worker, which waits at `gate`, of which `most` items may wait.
async fn bounded(most: usize, gate: &Gate) -> mp::Result<(Pool, mp::AsyncResult<()>)> {
    let pool = Pool::builder().workers(1).max_waiting(most).build()?;
    let busy = pool.apply_async(|gate: Gate| gate.pass(), (gate.clone(),));
    eventually("it is at work", || pool.stats().running == 1).await;
    Ok((pool, busy))
}

#[tokio::test]
async fn a_call_that_is_cancelled_while_it_waits_for_room_never_runs_and_leaves_its_place() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let gate = Gate::new("max_waiting_cancelled");
    let (pool, busy) = bounded(1, &gate).await?;
    let waiting = pool.try_apply(square, (1,))?;
    let ran = Queue::unbounded()?;
    let says = |ran: Queue<u32>| ran.blocking_put(1).expect("put");
    let not_in_line = pool.apply_async(says, (ran.clone(),));
    let mut in_line = pool.apply_async(says, (ran.clone(),));
    assert!(futures::poll!(&mut in_line).is_pending());
    not_in_line.cancel();
    in_line.cancel();
    gate.open();
    within(busy).await?;
    within(waiting).await?;
    assert_eq!(within(pool.apply(square, (2,))).await?, 4, "nobody is before it, though the others were not dropped");
    for cancelled in [not_in_line, in_line] {
        assert_eq!(within(cancelled).await.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    // What the one worker was given before this has run by now.
    assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    assert!(ran.try_get().is_err(), "a cancelled call ran");
    Ok(())
}

#[tokio::test]
async fn a_map_hands_in_no_more_items_than_may_wait_and_all_get_done() -> mp::Result<()> {
    let _deadline = Deadline::start();
    for workers in [1, 3] {
        let pool = Pool::builder().workers(workers).max_waiting(5).build()?;
        let both = futures::future::join(
            pool.map(square, 0..2000),
            pool.imap(square, 0..2000).chunksize(100).try_collect::<Vec<_>>(),
        );
        let (map, imap) = within(both).await;
        let expected: Vec<_> = (0..2000).map(square).collect();
        assert_eq!((map?, imap?), (expected.clone(), expected));
    }
    let gate = Gate::new("max_waiting_map");
    let (pool, busy) = bounded(5, &gate).await?;
    let map = tokio::spawn(pool.map(square, 0..2000).chunksize(3).into_future());
    eventually("as many wait as may", || pool.stats().queued == 5).await;
    // Those that wait for room hear of the end, too.
    pool.terminate();
    gate.open();
    assert_eq!(within(map).await.expect("no panic").unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(within(busy).await.is_err());
    Ok(())
}

/// Its worker cannot make what it needs to wait for them.
#[tokio::test]
async fn large_argument_that_cannot_be_received_is_not_given_to_a_later_call() -> mp::Result<()> {
    let _deadline = Deadline::start();
    fn hoard() {
        while let Ok(fd) = rustix::io::dup(rustix::stdio::stdin()) {
            std::mem::forget(fd);
        }
    }
    // A worker needs less than this, and has what it sleeps on from its first sleep on.
    let pool = Pool::builder().workers(1).descriptor_limit(256).build()?;
    let worker = pool.apply(pid, ()).await?;
    eventually("it sleeps", || is_asleep(worker)).await;
    pool.apply(hoard, ()).await?;
    let first = |bytes: Vec<u8>| (bytes[0], bytes.len());
    for n in 1..=5u8 {
        let len = (8 << 20) + usize::from(n);
        match pool.apply(first, (vec![n; len],)).await {
            Ok(result) => assert_eq!(result, (n, len), "the argument of another call"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Io, "{error}"),
        }
    }
    Ok(())
}

#[tokio::test]
async fn large_results_of_calls_that_nobody_waits_for_leave_nothing_behind() -> mp::Result<()> {
    let _deadline = Deadline::start();
    async fn calls(rounds: u64) -> mp::Result<()> {
        let pool = Pool::builder().workers(1).max_tasks_per_worker(1).build()?;
        for done in 1..=rounds {
            drop(pool.apply_async(|| vec![1u8; 1 << 20], ()));
            eventually("it is done", || pool.stats().totals.done == done).await;
        }
        pool.close();
        pool.join().await?;
        Ok(())
    }
    async fn all() -> mp::Result<()> {
        calls(1).await?;
        let before = holdings();
        calls(15).await?;
        eventually("they are closed", || holdings().descriptors <= before.descriptors).await;
        Ok(())
    }
    in_child(all, ()).await
}

/// What it decodes to panics in this process.
#[tokio::test]
async fn initializer_whose_value_panics_when_it_is_read_breaks_the_pool_with_that_panic() -> mp::Result<()> {
    #[derive(serde::Serialize)]
    struct Thorny;
    impl<'de> serde::Deserialize<'de> for Thorny {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            panic!("thorns")
        }
    }
    let pool = Pool::builder().workers(1).initializer(|| Thorny, ()).build()?;
    let error = within(pool.apply(square, (2,))).await.unwrap_err();
    assert!(error.to_string().contains("thorns"), "{error}");
    assert!(pool.broken().is_some());
    Ok(())
}

#[tokio::test]
async fn map_with_a_predicate_goes_on_behind_an_item_that_takes_long() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let event = mp::Event::new()?;
    let work = |n: u64, event: mp::Event| {
        match n {
            // Far more items later than are in flight at a time.
            0 => event.blocking_wait().unwrap(),
            60 => event.set(),
            _ => {}
        }
        n
    };
    let never = |_: &mp::Result<u64>| false;
    let items: Vec<_> = (0..70).map(|n| (n, event.clone())).collect();
    let map = pool.starmap(work, items).retries(1).retry_if(never);
    assert_eq!(within(map.into_future()).await?, (0..70).collect::<Vec<_>>());
    Ok(())
}

/// It has left the looking for results to its own polls.
#[tokio::test]
async fn call_that_is_not_polled_any_more_delays_neither_callers_without_room_nor_the_end() -> mp::Result<()> {
    let _deadline = Deadline::start();
    for _ in 0..20 {
        let pool = Pool::builder().workers(1).max_waiting(1).build()?;
        // Its worker is there, so the first is at work at once.
        within(pool.apply(square, (0,))).await?;
        let (mut working, mut waiting) =
            (pin!(pool.apply(square, (1,)).into_future()), pin!(pool.apply(square, (2,)).into_future()));
        let _ = futures::poll!(&mut working);
        let _ = futures::poll!(&mut waiting);
        assert_eq!(within(pool.apply(square, (3,))).await?, 9);
        let mut last = pin!(pool.apply(square, (4,)).into_future());
        let _ = futures::poll!(&mut last);
        pool.close();
        within(pool.join()).await?;
    }
    Ok(())
}
