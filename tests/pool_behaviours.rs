//! What CPython's suite demands of pools and executors, by the ids of the catalogue.

use futures::future::join_all;
use futures::{StreamExt, TryStreamExt};
use multiprocess::{self as mp, ErrorKind, Pool, Process, Queue};
use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

mod common;
use common::pool::{Gate, MS, is_gone, kill, nap, pid, say_and_stay, say_and_wait, spin, square};
use common::{Deadline, eventually, holdings, in_child, limit_descriptors, rounds, within};

multiprocess::test_support!();
common::quiet::quiet_stderr!();

static RUN: OnceLock<mp::Value<u32>> = OnceLock::new();

#[tokio::test]
async fn items_of_a_source_that_takes_its_time_run_while_it_prepares_the_next() -> mp::Result<()> {
    let _deadline = Deadline::start();
    for len in [1, 2 << 10] {
        let run = mp::Value::new(0)?;
        let keeps = |run: mp::Value<u32>| RUN.set(run).expect("once");
        let pool = Pool::builder().workers(3).initializer(keeps, (run.clone(),)).build()?;
        // A worker for each item, started before: the source takes this thread, which would help them.
        for napped in join_all((0..3).map(|_| pool.apply(nap, (100,)))).await {
            napped?;
        }
        // Each item takes longer than a tick of the kernel's clock, and ends once those before it have run.
        let source = (0..3).map(move |n| {
            let begun = Instant::now();
            while begun.elapsed() < 30 * MS || run.get() < n {
                assert!(begun.elapsed() < Duration::from_secs(20), "an item before {n} is held back");
                std::thread::sleep(MS);
            }
            vec![0_u8; len]
        });
        let count = |_: Vec<u8>| RUN.get().map(|run| run.fetch_add(1));
        let results: Vec<_> = pool.imap(count, source).chunksize(1).try_collect().await?;
        assert_eq!(results.len(), 3);
    }
    Ok(())
}

static DROPPED: AtomicU32 = AtomicU32::new(0);

#[derive(serde::Serialize, serde::Deserialize)]
struct Counted(u32);

impl Drop for Counted {
    fn drop(&mut self) {
        DROPPED.fetch_add(1, Relaxed);
    }
}

#[tokio::test]
async fn ppe_04_exec_09_an_argument_is_dropped_in_the_worker_right_after_its_task() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    assert_eq!(pool.apply(|counted: Counted| counted.0, (Counted(7),)).await?, 7);
    assert_eq!(pool.apply(|| DROPPED.load(Relaxed), ()).await?, 1);
    Ok(())
}

/// What became of a pool that was made with few descriptors left.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
enum Starved {
    /// There is none, or it has no worker, because of this.
    Fails(String),
    /// With fewer workers than it is to have.
    Serves(usize),
}

#[tokio::test]
async fn pool_28_ppe_11_workers_that_cannot_be_started_are_an_error_only_if_none_could() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let starved = async |more: usize| -> mp::Result<Starved> {
        limit_descriptors(more);
        let pool = match Pool::new(8) {
            Ok(pool) => pool,
            Err(error) => return Ok(Starved::Fails(error.to_string())),
        };
        let result = within(pool.apply(square, (3,))).await;
        if let Some(why) = pool.broken() {
            let errors = within(join_all((0..8).map(|n| pool.apply(square, (n,))))).await;
            // An error that quotes another has one short name, its own.
            let (text, _) = why.rsplit_once(" [").expect("a short name");
            for error in errors.into_iter().chain([result]).map(|result| result.expect_err("nobody serves")) {
                assert!(error.to_string().contains(text), "{error} says {why}");
            }
            eventually("nobody is left", || mp::active_children().is_empty()).await;
            return Ok(Starved::Fails(why));
        }
        assert_eq!(result?, 9);
        // The others are tried again and again meanwhile, five times within a second.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            assert_eq!(within(pool.apply(nap, (1,))).await?, 1, "{:?}", pool.stats().workers.len());
        }
        assert_eq!(pool.broken(), None);
        let workers = pool.stats().workers;
        drop(pool);
        eventually("nobody is left", || workers.iter().all(|worker| is_gone(worker.pid))).await;
        eventually("nobody is a child", || mp::active_children().is_empty()).await;
        Ok(Starved::Serves(workers.len()))
    };
    let mut ends = Vec::new();
    for more in [8, 16, 30] {
        ends.push(in_child(starved, (more,)).await?);
    }
    let names_cause = |end: &Starved| matches!(end, Starved::Fails(why) if why.contains("Too many open files"));
    assert!(names_cause(&ends[0]), "{ends:?}");
    assert!(matches!(ends[2], Starved::Serves(workers) if 0 < workers && workers < 8), "{ends:?}");
    Ok(())
}

#[tokio::test]
async fn pool_19_pool_26_shut_09_shut_10_p15_a_dropped_pool_ends_with_its_last_result() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let (begun, go) = (Queue::unbounded()?, Queue::unbounded()?);
    let result = pool.apply_async(say_and_wait, (begun.clone(), go.clone()));
    let worker = begun.get().await?;
    let stream = pool.imap(square, 0..3);
    drop(pool);
    go.put(1).await?;
    assert_eq!((within(result).await?, within(stream.try_collect::<Vec<_>>()).await?), (1, vec![0, 1, 4]));
    eventually("its workers are gone", || is_gone(worker)).await;
    // P15: a drop with workers at work takes less than 10 ms, and a second later they are gone; the best of some, as this
    // machine has other things to do.
    let drops_and_ends = async || {
        let pool = Pool::new(2)?;
        drop([0, 1].map(|_| pool.apply_async(say_and_wait, (begun.clone(), go.clone()))));
        let busy = [begun.get().await?, begun.get().await?];
        let start = Instant::now();
        drop(pool);
        let dropped = start.elapsed();
        eventually("busy ones are gone too", || busy.iter().all(|worker| is_gone(*worker))).await;
        Ok((dropped, start.elapsed()))
    };
    rounds(drops_and_ends, |(dropped, ended)| *dropped < 10 * MS && *ended < 1000 * MS).await
}

#[tokio::test]
async fn p9_a_busy_loop_is_stopped_within_its_grace_and_its_slot_is_free_soon() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).grace(10 * MS).build()?;
    let begun = Queue::unbounded()?;
    let say_and_spin = |begun: Queue<u32>| {
        begun.blocking_put(pid()).expect("put");
        spin();
    };
    // The best of some, as this machine has other things to do.
    let cancel_and_overrun = async || {
        let running = pool.apply_async(say_and_spin, (begun.clone(),));
        begun.get().await?;
        let queued = pool.apply_async(spin, ());
        let start = Instant::now();
        running.cancel();
        queued.cancel();
        assert_eq!(within(running).await.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(within(queued).await.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(within(pool.apply(square, (3,))).await?, 9);
        let cancelled = start.elapsed();
        let start = Instant::now();
        let error = within(pool.apply(spin, ()).timeout(20 * MS)).await.unwrap_err();
        let overrun = start.elapsed();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(cancelled >= 10 * MS && overrun >= 30 * MS, "{cancelled:?} {overrun:?}");
        Ok((cancelled, overrun))
    };
    rounds(cancel_and_overrun, |(cancelled, overrun)| *cancelled < 60 * MS && *overrun < 80 * MS).await
}

static KEPT: OnceLock<Pool> = OnceLock::new();

#[tokio::test]
async fn plife_04_shut_02_p32_a_pool_in_a_static_does_not_hold_up_the_exit() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let keeps = async || -> mp::Result<u32> {
        let pool = KEPT.get_or_init(|| Pool::new(2).expect("a pool"));
        let worker = pool.apply(pid, ()).await?;
        drop(pool.apply_async(nap, (600_000,)));
        Ok(worker)
    };
    let worker = within(Process::spawn(keeps, ())?).await??;
    eventually("its workers went with it", || is_gone(worker)).await;
    Ok(())
}

/// Exits where it is told to.
struct Leaver(u8);

impl serde::Serialize for Leaver {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0 == 9 {
            std::process::exit(9);
        }
        serializer.serialize_u8(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Leaver {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match <u8 as serde::Deserialize>::deserialize(deserializer)? {
            2 if mp::parent_process().is_some() => std::process::exit(2),
            n => Ok(Self(n)),
        }
    }
}

#[tokio::test]
async fn ppe_16_dead_02_dead_06_dead_09_p12_an_exit_is_the_error_of_its_item() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let code = |error: mp::Error| {
        assert_eq!(error.kind(), ErrorKind::ProcessDied, "{error}");
        error.exit_status().and_then(|status| status.code())
    };
    let leave = |code: i32| {
        if code > 0 {
            std::process::exit(code);
        }
    };
    assert_eq!(code(within(pool.apply(leave, (3,))).await.unwrap_err()), Some(3));
    assert_eq!(code(within(pool.apply(|_: Leaver| (), (Leaver(2),))).await.unwrap_err()), Some(2));
    assert_eq!(code(within(pool.apply(|| Leaver(9), ())).await.err().expect("it left")), Some(9));
    assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    Ok(())
}

#[tokio::test]
async fn ppe_05_ppe_06_ppe_07_tpe_03_tpe_07_workers_come_as_they_are_needed() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(0..=3).build()?;
    let mut one = HashSet::new();
    for _ in 0..10 {
        one.insert(pool.apply(pid, ()).await?);
    }
    assert_eq!(one.len(), 1, "calls one after the other use one worker");
    let slow = |_: u32| {
        nap(5);
        (pid(), mp::current_process().name().to_string())
    };
    let all: HashSet<_> = within(pool.map(slow, 0..75)).await?.into_iter().collect();
    assert!(all.len() <= 3 && all.iter().all(|(_, name)| name.starts_with("PoolWorker-")), "{all:?}");
    Ok(())
}

/// Whose drop comes while nobody is at anything.
#[tokio::test]
async fn workers_of_a_dropped_pool_end_in_order_if_they_are_at_nothing() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let (finished, begun) = (Queue::unbounded()?, Queue::unbounded()?);
    let finish = |finished: Queue<u32>| {
        nap(50);
        finished.blocking_put(pid()).expect("put");
    };
    let build = || Pool::builder().workers(2).finalizer(finish, (finished.clone(),)).build();
    let pool = build()?;
    assert_eq!(within(pool.map(square, 0..20)).await?.len(), 20);
    let start = Instant::now();
    drop(pool);
    assert!(start.elapsed() < Duration::from_secs(1), "the drop waits for nobody: {:?}", start.elapsed());
    let ended: HashSet<_> = [within(finished.get()).await?, within(finished.get()).await?].into();
    eventually("they are gone", || ended.iter().all(|worker| is_gone(*worker))).await;
    // One that is at something is killed, also with more of that order before it.
    let pool = build()?;
    drop(pool.apply_async(say_and_stay, (begun.clone(),)));
    let busy = within(begun.get()).await?;
    let mut idle = 0;
    eventually("both are there", || {
        let workers = pool.stats().workers;
        idle = workers.iter().map(|worker| worker.pid).find(|pid| *pid != busy).unwrap_or_default();
        workers.len() == 2
    })
    .await;
    drop(pool);
    assert_eq!(within(finished.get()).await?, idle);
    eventually("both are gone", || [busy, idle].iter().all(|worker| is_gone(*worker))).await;
    assert!(finished.is_empty(), "who was at something has not ended in order");
    // A finalizer that hangs has its time.
    let pool = Pool::builder().workers(1).finalizer(say_and_stay, (begun.clone(),)).exit_timeout(50 * MS).build()?;
    assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    drop(pool);
    let hangs = within(begun.get()).await?;
    eventually("it is killed", || is_gone(hangs)).await;
    Ok(())
}

/// A process that ends right after its pool was dropped, or was closed and not joined.
#[tokio::test]
async fn a_process_waits_at_its_end_for_workers_that_end_in_order() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let finished = Queue::unbounded()?;
    let work = async |finished: Queue<u32>, closes: bool| -> mp::Result<()> {
        let finish = |finished: Queue<u32>| {
            nap(100);
            finished.blocking_put(pid()).expect("put");
        };
        let pool = Pool::builder().workers(1).finalizer(finish, (finished,)).build()?;
        assert_eq!(pool.apply(square, (3,)).await?, 9);
        if closes {
            pool.close();
        }
        Ok(())
    };
    for closes in [false, true] {
        in_child(work, (finished.clone(), closes)).await?;
        // The result is there before the process has ended.
        eventually("its worker has run its finalizer", || finished.try_get().is_ok()).await;
    }
    // One whose finalizer hangs holds up nobody for longer than it may take.
    let hangs = async |begun: Queue<u32>| -> mp::Result<()> {
        let builder = Pool::builder().workers(1).finalizer(say_and_stay, (begun,)).exit_timeout(300 * MS);
        assert_eq!(builder.build()?.apply(square, (3,)).await?, 9);
        Ok(())
    };
    let start = Instant::now();
    in_child(hangs, (finished.clone(),)).await?;
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let worker = within(finished.get()).await?;
    eventually("it is killed", || is_gone(worker)).await;
    Ok(())
}

#[tokio::test]
async fn ppe_08_ppe_10_new_06_p19_a_share_of_three_tasks() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).max_tasks_per_worker(3).build()?;
    let mut pids = Vec::new();
    for _ in 0..7 {
        pids.push(within(pool.apply(pid, ())).await?);
    }
    assert!(pids[0] == pids[2] && pids[2] != pids[3] && pids[3] == pids[5] && pids[5] != pids[6], "{pids:?}");
    let pool = Pool::builder().workers(2).max_tasks_per_worker(1).build()?;
    let six: Vec<_> = (0..6).map(|n| pool.apply_async(square, (n,))).collect();
    drop(pool);
    assert_eq!(within(join_all(six)).await.into_iter().collect::<mp::Result<Vec<_>>>()?, [0, 1, 4, 9, 16, 25]);
    Ok(())
}

#[tokio::test]
async fn ppe_02_ppe_14_p6_one_death_of_three_fails_one_call_of_eight() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(3)?;
    let (begun, go) = (Queue::unbounded()?, Queue::unbounded()?);
    let calls: Vec<_> = (0..8).map(|_| pool.apply_async(say_and_wait, (begun.clone(), go.clone()))).collect();
    let victim = begun.get().await?;
    kill(victim, rustix::process::Signal::KILL);
    for n in 0..8 {
        go.put(n).await?;
    }
    let results = within(join_all(calls)).await;
    let failed: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    assert_eq!(failed.len(), 1);
    assert!(failed[0].to_string().contains(&victim.to_string()) && failed[0].to_string().contains("SIGKILL"));
    assert_eq!(within(pool.apply(square, (2,))).await?, 4);
    Ok(())
}

#[tokio::test]
async fn new_03_new_04_ppe_17_exec_05_p11_little_is_pulled_ahead_and_a_close_comes_through() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    const AHEAD: u32 = 2 * 4;
    let pulled = Arc::new(AtomicU32::new(0));
    let counted = || {
        let count = pulled.clone();
        count.store(0, Relaxed);
        std::iter::repeat_with(move || count.fetch_add(1, Relaxed))
    };
    let assert_pulled = |most: u32| assert!(pulled.load(Relaxed) <= most, "{pulled:?} pulled, not {most}");
    // Four items for each worker are ahead of what was taken, at all times.
    let mut results = pool.imap(|n: u32| nap(u64::from(n % 2)), counted()).chunksize(1);
    for taken in 0..40 {
        assert_pulled(taken + AHEAD);
        within(results.next()).await.expect("endless")?;
    }
    // Nobody reads: all that is ahead is done, and nothing more is pulled.
    eventually("they have nothing to do", || pool.stats().queued + pool.stats().running == 0).await;
    assert_pulled(40 + AHEAD);
    pool.close();
    drop(results);
    within(pool.join()).await?;
    // Results that wait for the first count, too.
    let pool = Pool::new(2)?;
    let gate = Gate::new("p11");
    let first_waits = |(n, gate): (u32, Gate)| {
        if n == 0 {
            gate.pass();
        }
        n
    };
    let held = gate.clone();
    let mut results = pool.imap(first_waits, counted().map(move |n| (n, held.clone()))).chunksize(1);
    assert!(futures::poll!(results.next()).is_pending());
    for _ in 0..100 {
        assert!(tokio::time::timeout(MS / 4, results.next()).await.is_err(), "the first is not done");
        assert_pulled(AHEAD);
    }
    gate.open();
    assert_eq!(within(results.next()).await.expect("endless")?, 0);
    gate.remove();
    Ok(())
}

#[tokio::test]
async fn initx_03_a_failed_initializer_leaves_no_descriptor() -> mp::Result<()> {
    // In a process of its own, where nobody else opens anything.
    in_child(initializers_fail, ()).await
}

async fn initializers_fail() -> mp::Result<()> {
    Pool::new(1)?.apply(pid, ()).await?;
    let before = holdings().descriptors;
    for _ in 0..5 {
        let pool = Pool::builder().workers(2).initializer(|| -> () { panic!("no") }, ()).build()?;
        assert!(within(pool.apply(pid, ())).await.is_err());
        pool.terminate();
        within(pool.join()).await?;
    }
    eventually("no descriptor is left", || holdings().descriptors <= before).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tpe_04_pools_come_and_go_in_a_busy_runtime() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let shared = Pool::new(2)?;
    let rounds = (0..20).map(|n| {
        let shared = shared.clone();
        tokio::spawn(async move {
            let own = Pool::new(1)?;
            let (a, b) = futures::join!(own.apply(square, (n,)), shared.apply(square, (n,)));
            own.close();
            own.join().await?;
            Ok::<_, mp::Error>(a? + b?)
        })
    });
    for (n, round) in (0..20).zip(rounds.collect::<Vec<_>>()) {
        assert_eq!(within(round).await.expect("no panic")?, 2 * n * n);
    }
    Ok(())
}
