//! What a pool lets one see and choose: figures, traces, last words, progress, checkouts, pools in pools and in place.

use futures::{StreamExt, TryStreamExt};
use multiprocess::{self as mp, ErrorKind, Pool, Queue};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

mod common;
use common::pool::{Gate, MS, all_serve, die, is_gone, pid, say_and_stay, say_and_wait, square, stuck};
use common::{Deadline, eventually, go_on, stop, within};

multiprocess::test_support!();
common::quiet::quiet_stderr!();

#[tokio::test]
async fn death_of_a_worker_quotes_its_last_stderr_lines_if_enabled() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let chatty = |fails: bool| {
        (0..100).for_each(|n| eprintln!("line {n}"));
        if fails {
            std::process::abort();
        }
    };
    let pool = Pool::builder().workers(1).keep_stderr(2).build()?;
    pool.apply(chatty, (false,)).await?;
    let error = pool.apply(chatty, (true,)).await.unwrap_err().to_string();
    assert!(error.ends_with("it last wrote:\nline 98\nline 99\n[died]") && error.contains("SIGABRT"), "{error}");
    // The next worker has words of its own.
    let error = pool.apply(die, ()).await;
    assert!(!error.unwrap_err().to_string().contains("line"));
    let error = Pool::new(1)?.apply(chatty, (true,)).await.unwrap_err().to_string();
    assert!(!error.contains("last wrote"), "{error}");
    Ok(())
}

#[tokio::test]
async fn more_than_a_pipe_holds_goes_through() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).keep_stderr(1).build()?;
    let flood = || {
        let mut stderr = std::io::stderr().lock();
        (0..3000).for_each(|_| std::io::Write::write_all(&mut stderr, &[b'\n'; 100]).unwrap());
        std::io::Write::write_all(&mut stderr, b"the end").unwrap();
        die();
    };
    let error = within(pool.apply(flood, ())).await.unwrap_err().to_string();
    assert!(error.ends_with("it last wrote:\nthe end\n[died]"), "{error}");
    Ok(())
}

#[tokio::test]
async fn stats_show_busy_workers_and_their_tasks() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    pool.map(square, 0..100).await?;
    let before = pool.stats();
    assert_eq!(before.workers.iter().map(|worker| worker.tasks).sum::<u64>(), 100);
    assert_eq!((before.queued, before.running, before.waits.count(), before.runs.count()), (0, 0, 100, 100));
    assert!(before.workers.iter().all(|worker| worker.resident > 0 && worker.peak >= worker.resident));
    let begun = Queue::unbounded()?;
    let running = pool.apply_async(say_and_stay, (begun.clone(),));
    let busy = begun.get().await?;
    let waiting: Vec<_> = (0..5).map(|_| pool.apply_async(stuck, ())).collect();
    eventually("the other worker is busy too", || pool.stats().running == 2).await;
    let stats = pool.stats();
    assert_eq!(stats.queued, 4);
    let worker = stats.workers.iter().find(|worker| worker.pid == busy).expect("it is listed");
    assert!(worker.is_busy && worker.task.is_some_and(|label| label.contains("say_and_stay")));
    assert!(worker.age > Duration::ZERO);
    assert!(format!("{:?}", stats.clone()).contains("queued: 4"));
    running.cancel();
    waiting.iter().for_each(|result| result.cancel());
    eventually("nobody is busy", || pool.stats().running == 0).await;
    assert_eq!(pool.stats().queued, 0);
    Ok(())
}

#[tokio::test]
async fn an_item_that_was_taken_back_for_an_idle_worker_has_waited_once() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    all_serve(&pool, 2).await;
    // All in one chunk, of which the first item ends when another one has run.
    let gate = Gate::new("taken-back");
    let slow = |(n, gate): (u64, Gate)| {
        if n == 0 {
            gate.pass();
        } else {
            gate.open();
        }
        pid()
    };
    let held = gate.clone();
    let pids = within(pool.map(slow, (0..100).map(move |n| (n, held.clone()))).chunksize(100)).await?;
    assert!(pids.iter().any(|pid| *pid != pids[0]), "the other worker took what had not begun");
    assert_eq!((pool.stats().waits.count(), pool.stats().runs.count()), (102, 102));
    gate.remove();
    Ok(())
}

/// What a subscriber has seen: the spans above it from the outermost on, and its fields.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<(String, String, u64)>>>);

#[derive(Default)]
struct Text(String, u64);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!("{}={value:?} ", field.name());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "worker.pid" => self.1 = value,
            name => self.0 += &format!("{name}:{value} "),
        }
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Seen {
    fn on_event(&self, event: &tracing::Event<'_>, context: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let scope = context.event_scope(event).into_iter().flat_map(|scope| scope.from_root());
        let names: Vec<_> = scope.map(|span| span.name()).collect();
        assert_eq!(event.metadata().file(), Some(file!()), "LOG-03: the place in the program travels along");
        let what = format!("{} {}{}", event.metadata().level(), text.0, event.metadata().target());
        self.0.lock().unwrap().push((names.join("/"), what, text.1));
    }
}

fn tells(n: u64) -> u64 {
    tracing::debug!("not of interest");
    let span = tracing::info_span!("inner", n);
    let _entered = span.enter();
    tracing::warn!(n, who = "me", "seen");
    n
}

#[tokio::test]
async fn log_02_events_and_spans_of_a_task_appear_under_its_callers_span() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let seen = Seen::default();
    let level = tracing::level_filters::LevelFilter::INFO;
    let subscriber = tracing_subscriber::registry().with(level).with(seen.clone());
    let pool = Pool::new(1)?;
    let worker = {
        let _default = tracing::subscriber::set_default(subscriber);
        let worker = u64::from(pool.apply(pid, ()).await?);
        let outer = tracing::info_span!("outer");
        let values = tracing::Instrument::instrument(pool.map(tells, [1, 2]), outer).await?;
        assert_eq!(values, [1, 2]);
        // Also of one that dies afterwards.
        let dies = || {
            tracing::error!("my last word");
            die();
        };
        assert_eq!(pool.apply(dies, ()).await.unwrap_err().kind(), ErrorKind::ProcessDied);
        worker
    };
    let told = std::mem::take(&mut *seen.0.lock().unwrap());
    let target = module_path!();
    let event = |n| ("outer/inner".to_string(), format!("WARN message=seen n:{n} who=\"me\" {target}"), worker);
    let last = (String::new(), format!("ERROR message=my last word {target}"), worker);
    assert_eq!(told, [event(1), event(2), last]);
    // Without a subscriber nothing is told.
    pool.apply(tells, (3,)).await?;
    assert!(seen.0.lock().unwrap().is_empty());
    Ok(())
}

static STATE: AtomicU32 = AtomicU32::new(0);

#[tokio::test]
async fn a_checkout_has_its_worker_to_itself() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(2).max_tasks_per_worker(3).build()?;
    let bump = || (STATE.fetch_add(1, Relaxed), pid());
    let mine = within(pool.checkout()).await?;
    let (_, worker) = mine.apply(bump, ()).await?;
    let others = tokio::spawn(pool.map(|_: u32| (STATE.fetch_add(100, Relaxed), pid()).1, 0..50).chunksize(1));
    for n in 1..20 {
        assert_eq!(within(mine.apply(bump, ())).await?, (n, worker), "its share is not counted while it is out");
    }
    assert!(within(others).await.expect("no panic")?.iter().all(|pid| *pid != worker));
    // A second checkout takes the other one; a third waits, and everybody else with it, but not the checkouts.
    let second = within(pool.checkout()).await?;
    let mut third = Box::pin(pool.checkout());
    assert!(futures::poll!(&mut third).is_pending());
    let waits = pool.apply_async(pid, ());
    assert_eq!(within(mine.apply(pid, ())).await?, worker);
    assert_ne!(within(second.apply(pid, ())).await?, worker);
    drop(mine);
    let third = within(third).await?;
    let renewed = within(third.apply(pid, ())).await?;
    assert_ne!(renewed, worker, "given back, its share was used up");
    drop((second, third));
    within(waits).await?;
    Ok(())
}

/// A worker that has been taken and has not come to it yet stays the one, whatever others share meanwhile.
#[tokio::test]
async fn a_checkout_that_passes_over_a_stopped_worker_has_one_worker() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(4)?;
    let (begun, go) = (Queue::<u32>::unbounded()?, Queue::<u32>::unbounded()?);
    eventually("all are there", || pool.stats().workers.len() == 4).await;
    let slow = pool.stats().workers[0].pid;
    stop(slow);
    let worker = within(pool.checkout()).await?;
    let mine = within(worker.apply(pid, ())).await?;
    assert_ne!(mine, slow);
    // The second item goes from one of the others to the last.
    let wait = |begun: Gate, go: Gate| {
        begun.open();
        go.pass();
    };
    let gates = [0, 1, 2].map(|n| Gate::new(&format!("checkout-{n}")));
    let [first, second, end] = &gates;
    let items = [(first.clone(), end.clone()), (second.clone(), end.clone())];
    let both = tokio::spawn(pool.starmap(wait, items).chunksize(2));
    for gate in [first, second] {
        eventually("it has begun", || gate.is_open()).await;
    }
    go_on(slow);
    assert_eq!(within(worker.apply(pid, ())).await?, mine);
    end.open();
    within(both).await.expect("no panic")?;
    drop(worker);
    let calls = [0, 1, 2, 3].map(|_| pool.apply_async(say_and_wait, (begun.clone(), go.clone())));
    for n in 0..4 {
        within(begun.get()).await?;
        go.put(n).await?;
    }
    for call in calls {
        within(call).await?;
    }
    gates.into_iter().for_each(Gate::remove);
    Ok(())
}

#[tokio::test]
async fn checkout_whose_worker_dies_fails_its_calls_and_no_others() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let mine = within(pool.checkout()).await?;
    assert_eq!(mine.apply(die, ()).await.unwrap_err().kind(), ErrorKind::ProcessDied);
    let error = within(mine.apply(square, (2,))).await.unwrap_err();
    assert!(error.kind() == ErrorKind::ProcessDied && error.to_string().contains("checked out"), "{error}");
    assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    drop(mine);
    drop(pool.checkout());
    let mut given_up = Box::pin(pool.checkout());
    let _ = futures::poll!(&mut given_up);
    drop(given_up);
    assert_eq!(within(pool.apply(square, (4,))).await?, 16);
    Ok(())
}

#[tokio::test]
async fn a_pool_in_this_process_has_the_same_calls() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::in_process()?;
    assert_eq!(pool.apply(pid, ()).await?, pid());
    assert_eq!(pool.map(square, 0..1000).await?, (0..1000).map(square).collect::<Vec<_>>());
    let later = async |n: i64| {
        tokio::time::sleep(MS).await;
        n
    };
    assert_eq!(pool.imap(later, 0..5).try_collect::<Vec<_>>().await?, [0, 1, 2, 3, 4]);
    let fails = |n: i64| {
        assert_ne!(n, 3, "three");
        vec![n as u8; 300_000]
    };
    let results: Vec<_> = pool.imap(fails, 0..6).collect().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 5);
    assert_eq!(results[3].as_ref().unwrap_err().kind(), ErrorKind::Panicked);
    assert!(pool.resize(3).await.is_err() && pool.checkout().await.is_err());
    // What has not begun is given up; what has is not.
    let nap = || std::thread::sleep(50 * MS);
    let (first, second) = (pool.apply_async(nap, ()), pool.apply_async(nap, ()));
    second.cancel();
    assert_eq!(second.await.unwrap_err().kind(), ErrorKind::Cancelled);
    first.await?;
    let left = pool.apply_async(square, (5,));
    pool.close();
    within(pool.join()).await?;
    assert_eq!(left.await?, 25);
    assert_eq!(pool.apply(square, (1,)).await.unwrap_err().kind(), ErrorKind::Closed);
    let pool = Pool::in_process()?;
    let lost: Vec<_> = (0..9).map(|_| pool.apply_async(nap, ())).collect();
    pool.terminate();
    within(pool.join()).await?;
    let kinds = lost.into_iter().map(|result| async { result.await.map_err(|error| error.kind()) });
    let kinds = futures::future::join_all(kinds).await;
    assert!(kinds.iter().filter(|kind| **kind == Err(ErrorKind::Cancelled)).count() >= 8, "{kinds:?}");
    Ok(())
}

/// P31: workers may have pools, and those end with them.
#[tokio::test]
async fn a_worker_has_a_pool_of_its_own_which_ends_with_it() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let nested = async |n: i64| -> mp::Result<i64> {
        let pool = Pool::new(2)?;
        Ok(pool.map(square, 0..n).await?.iter().sum())
    };
    let sums: Vec<_> = pool.map(nested, [3, 5, 10]).await?.into_iter().collect::<mp::Result<_>>()?;
    assert_eq!(sums, [5, 30, 285]);
    let pids = Queue::unbounded()?;
    let leaves = async |pids: Queue<u32>| -> mp::Result<()> {
        let pool = Pool::new(2)?;
        let _running = [pool.apply_async(say_and_stay, (pids.clone(),)), pool.apply_async(say_and_stay, (pids,))];
        std::future::pending().await
    };
    let running = pool.apply_async(leaves, (pids.clone(),));
    let grandchildren = [pids.get().await?, pids.get().await?];
    running.cancel();
    eventually("the grandchildren are gone", || grandchildren.iter().all(|pid| is_gone(*pid))).await;
    Ok(())
}
