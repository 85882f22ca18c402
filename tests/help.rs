//! Errors that the guide's page on troubleshooting explains end with its short name, once, wherever they come from.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{Deadline, eventually, within};
use futures::StreamExt;
use multiprocess::connection::{Listener, connect};
use multiprocess::{
    self as mp, Array, Barrier, Condition, Error, ErrorKind, JoinableQueue, Lock, Manager, Pool, Process, Queue,
    Restart, Stdio,
};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

mp::test_support!();
common::quiet::quiet_stderr!();

const PAGE: &str = include_str!("../docs/guide/troubleshooting.md");
const SHORT: Duration = Duration::from_millis(50);

/// The short names of the page, each with the texts that it quotes.
fn entries() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    PAGE.split("\n### ").skip(1).map(|entry| {
        let (name, rest) = entry.split_once('\n').unwrap();
        (name, rest.lines().filter_map(|line| line.strip_prefix("> ")).collect())
    })
}

/// Whether `text` has all parts of `quote`, which stand between dots, one after the other.
fn has(text: &str, quote: &str) -> bool {
    let mut parts = quote.split("..").map(str::trim);
    let after = |rest: &'_ str, part: &str| rest.find(part).map(|at| at + part.len());
    parts.try_fold(0, |at, part| Some(at + after(&text[at..], part)?)).is_some()
}

/// `text` ends with this short name and has no other, and the page quotes it under the name.
#[track_caller]
fn is_explained(text: &str, name: &str) {
    assert!(text.trim_end().ends_with(&format!("[{name}]")), "{name}: {text}");
    let names: usize = entries().map(|(other, _)| text.matches(&format!("[{other}]")).count()).sum();
    assert_eq!(names, 1, "{text}");
    let (_, quotes) = entries().find(|(entry, _)| *entry == name).unwrap_or_else(|| panic!("no entry {name}"));
    assert!(quotes.iter().any(|quote| has(text, quote)), "the entry {name} does not quote {text}");
}

#[track_caller]
fn explained(error: impl Into<Error>, name: &str) {
    let error = error.into();
    assert_eq!(error.help(), Some(name), "{error}");
    is_explained(&error.to_string(), name);
    assert!(format!("{error:?}").contains(&format!("[{name}]\"")), "{error:?}");
}

#[tokio::test]
async fn what_ends_a_child_or_a_worker_is_explained_once() {
    let mut child = Process::spawn(std::thread::park, ()).unwrap();
    child.kill().unwrap();
    explained(within(child.join()).await.unwrap_err(), "died");

    let mut child = Process::spawn(|| -> u8 { panic!("no luck") }, ()).unwrap();
    explained(within(child.join()).await.unwrap_err(), "panicked");
    explained(within(child.join()).await.map(drop).unwrap_err(), "result-taken");

    let pool = Pool::new(1).unwrap();
    explained(within(pool.apply(|| -> u8 { std::process::abort() }, ())).await.unwrap_err(), "died");
    explained(within(pool.apply(|| -> u8 { panic!("no luck") }, ())).await.unwrap_err(), "panicked");
    let sleeps = || std::thread::sleep(Duration::from_secs(600));
    explained(within(pool.apply(sleeps, ()).timeout(SHORT)).await.unwrap_err(), "timeout");
}

/// Ends, with a child that was killed as the reason.
async fn has_a_child_that_dies() -> mp::Result<()> {
    let child = Process::spawn(std::thread::park, ())?;
    child.kill()?;
    child.await
}

/// Uses a queue wrongly.
fn is_done_too_often(queue: JoinableQueue<u8>) -> mp::Result<()> {
    queue.task_done()
}

#[tokio::test]
async fn an_error_that_a_function_returns_brings_its_name_along() {
    explained(within(Process::spawn(has_a_child_that_dies, ()).unwrap()).await.unwrap().unwrap_err(), "died");
    let pool = Pool::new(1).unwrap();
    let queue = JoinableQueue::unbounded().unwrap();
    let error = within(pool.apply(is_done_too_often, (queue.clone(),))).await.unwrap().unwrap_err();
    explained(error, "task-done");
    // By a queue, and as a cause of another error.
    let errors = Queue::unbounded().unwrap();
    errors.put(queue.task_done().map_err(Error::other).unwrap_err()).await.unwrap();
    let error = within(errors.get()).await.unwrap();
    assert_eq!(error.kind(), ErrorKind::Other);
    explained(error, "task-done");
}

#[tokio::test]
async fn an_error_that_quotes_another_has_one_name() {
    // A panic that this crate wants is explained by itself, and not as any panic.
    let forgets = |array: Array<u8>| {
        let mut guard = array.blocking_lock().unwrap();
        guard[0] = 1;
        array.set(0, 2);
    };
    let child = Process::spawn(forgets, (Array::from_slice(&[0]).unwrap(),)).unwrap();
    explained(within(child).await.unwrap_err(), "array-guard");

    // The initializer's error is that of a child of the worker.
    let pool = Pool::builder().workers(1).initializer(has_a_child_that_dies, ()).build().unwrap();
    explained(within(pool.apply(|| 1, ())).await.unwrap_err(), "pool-broken");
    is_explained(&pool.broken().unwrap(), "initializer");

    let fails = || -> u8 { std::process::abort() };
    let restart = Restart::on_failure().max(1, Duration::from_secs(600)).back_off(SHORT, SHORT);
    let mut supervised = Process::builder().restart(restart).spawn(fails, ()).unwrap();
    let error = within(supervised.wait()).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    is_explained(&cause, "died");
    explained(error, "restart-limit");
}

#[tokio::test]
async fn what_a_pool_refuses_or_gives_up_is_explained() {
    let pool = Pool::builder().workers(1).max_waiting(1).build().unwrap();
    explained(within(pool.join()).await.unwrap_err(), "close-first");
    let begun = mp::Event::new().unwrap();
    let waits = |begun: mp::Event| {
        begun.set();
        std::thread::sleep(Duration::from_secs(600));
    };
    let first = pool.apply_async(waits, (begun.clone(),));
    within(begun.wait()).await.unwrap();
    explained(within(pool.apply(|| (), ()).queue_timeout(SHORT)).await.unwrap_err(), "no-worker-was-free");
    let second = pool.apply_async(waits, (begun.clone(),));
    eventually("the second waits", || pool.stats().queued == 1).await;
    explained(pool.try_apply(waits, (begun.clone(),)).map(drop).unwrap_err(), "no-room");
    pool.terminate();
    explained(within(first).await.unwrap_err(), "pool-closed");
    explained(within(second).await.unwrap_err(), "pool-closed");

    let pool = Pool::new(1).unwrap();
    let source = [1, 2].into_iter().inspect(|n| assert!(*n < 2, "no more"));
    explained(within(pool.map(|n: i32| n, source)).await.unwrap_err(), "source-panicked");
}

#[derive(Serialize, Deserialize)]
struct Deep(Option<Box<Deep>>);

#[derive(Serialize, Deserialize)]
enum Sent {
    A,
}

/// A type that is written as text, and read as a number.
#[derive(Debug)]
struct Changes;

impl Serialize for Changes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("a text")
    }
}

impl<'de> Deserialize<'de> for Changes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u64::deserialize(deserializer).map(|_| Self)
    }
}

#[tokio::test]
async fn what_is_wrong_with_values_is_explained() {
    let mut deep = Deep(None);
    for _ in 0..2000 {
        deep = Deep(Some(Box::new(deep)));
    }
    let queue = Queue::unbounded().unwrap();
    explained(queue.try_put(deep).unwrap_err(), "too-deep");

    // In a worker, and back here.
    let pool = Pool::new(1).unwrap();
    explained(within(pool.apply(|_: Changes| (), (Changes,))).await.unwrap_err(), "cannot-read");
    explained(within(pool.apply(|| Changes, ())).await.unwrap_err(), "cannot-read");

    let error = serde_json::to_string(&queue).unwrap_err();
    is_explained(&error.to_string(), "handle-outside-a-message");
    explained(Error::other(error), "handle-outside-a-message");

    let (sender, _receiver) = mp::watch(None::<Queue<u8>>).unwrap();
    explained(sender.send(Some(Queue::unbounded().unwrap())).unwrap_err(), "handle-in-broadcast");
    let (sender, mut receiver) = mp::broadcast(1).unwrap();
    (0..3).for_each(|n| sender.send(n).unwrap());
    explained(within(receiver.recv()).await.unwrap_err(), "lagged");
    let (mut sender, receiver) = mp::simplex::<Sent>().unwrap();
    drop(receiver);
    explained(within(sender.send(Sent::A)).await.unwrap_err(), "other-end-gone");
}

#[tokio::test]
async fn what_is_wrong_with_locks_is_explained() {
    let lock = Lock::new().unwrap();
    let dies = |lock: Lock| -> u8 {
        let _guard = lock.blocking_acquire().unwrap();
        std::process::abort()
    };
    within(Process::spawn(dies, (lock.clone(),)).unwrap()).await.unwrap_err();
    explained(within(lock.acquire()).await.map(drop).unwrap_err(), "owner-died");

    let barrier = Barrier::new(2).unwrap();
    barrier.abort();
    explained(within(barrier.wait()).await.unwrap_err(), "barrier-broken");

    let (one, other) = (Condition::new().unwrap(), Condition::new().unwrap());
    let guard = within(one.lock()).await.unwrap();
    explained(within(other.wait(guard)).await.map(drop).unwrap_err(), "guard-of-another");
}

#[tokio::test]
async fn what_is_wrong_with_other_programs_is_explained() {
    let listener = within(async { Listener::bind("127.0.0.1:0").authkey(b"secret").max_message(1 << 10).await });
    let listener = listener.await.unwrap();
    let address = listener.local_addr();
    let (ours, theirs) =
        futures::join!(within(async { connect(&address, Some(b"another")).await }), within(listener.accept()));
    explained(ours.map(drop).unwrap_err(), "wrong-key");
    explained(theirs.map(drop).unwrap_err(), "wrong-key");
    let (ours, theirs) =
        futures::join!(within(async { connect(&address, Some(b"secret")).await }), within(listener.accept()));
    let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
    within(ours.send_bytes(&[0; 2 << 10])).await.unwrap();
    explained(within(theirs.recv_bytes()).await.unwrap_err(), "message-too-long");

    let manager = Manager::start().await.unwrap();
    let list = manager.list::<u8>().await.unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(manager.pid() as i32).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    explained(within(list.len()).await.unwrap_err(), "manager-gone");
}

#[test]
fn without_a_runtime_the_error_is_explained() {
    let _deadline = Deadline::start();
    explained(Pool::new(1).map(drop).unwrap_err(), "no-runtime");
    let supervised = Process::builder().restart(Restart::on_failure()).spawn(|| (), ());
    explained(supervised.map(drop).unwrap_err(), "no-runtime");
    // Polled, it waits by the tokio runtime that is not there.
    let queue = Queue::<u8>::unbounded().unwrap();
    explained(futures::executor::block_on(queue.get()).unwrap_err(), "no-runtime");
}

#[tokio::test]
async fn lines_on_stderr_end_with_their_name() {
    let leaves_a_child = || drop(Process::spawn(|| std::thread::sleep(Duration::from_secs(600)), ()).unwrap());
    let mut child = Process::builder().stderr(Stdio::piped()).spawn(leaves_a_child, ()).unwrap();
    let mut stderr = child.take_stderr().unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        let mut byte = [0];
        while !text.ends_with('\n') && stderr.read(&mut byte).unwrap() > 0 {
            text.push(byte[0].into());
        }
        text
    });
    is_explained(&within(read).await.unwrap(), "waits-for-children");
    child.kill().unwrap();
}

/// The field `help` of each warning.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl<S: tracing::Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        event.record(&mut self.clone());
    }
}

impl Visit for Warnings {
    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "help" {
            self.0.lock().unwrap().push(value.to_string());
        }
    }
}

#[tokio::test]
async fn warnings_have_their_name_in_a_field() {
    let warnings = Warnings::default();
    let subscriber = tracing_subscriber::registry().with(warnings.clone());
    let _guard = tracing::subscriber::set_default(subscriber);
    let stuck = || std::thread::sleep(Duration::from_secs(600));
    let builder = Pool::builder().workers(1).finalizer(stuck, ()).max_tasks_per_worker(1).exit_timeout(SHORT);
    let pool = builder.build().unwrap();
    within(pool.apply(|| (), ())).await.unwrap();
    eventually("the worker is late", || warnings.0.lock().unwrap().contains(&"worker-late".to_string())).await;
}

#[tokio::test]
async fn errors_that_say_all_have_no_name() {
    let pool = Pool::new(1).unwrap();
    let refuses = || mp::Result::<()>::Err(Error::other("the licence [of 1999] is over"));
    let error = within(pool.apply(refuses, ())).await.unwrap().unwrap_err();
    assert_eq!((error.help(), error.to_string()), (None, "the licence [of 1999] is over".into()));
    let queue = Queue::<u8>::unbounded().unwrap();
    assert_eq!(queue.try_get().unwrap_err().help(), None);
    // A word of the user's own is no name, though one is called so.
    let refuses = || mp::Result::<()>::Err(Error::other("no such key: limits[timeout]"));
    let error = within(pool.apply(refuses, ())).await.unwrap().unwrap_err();
    assert_eq!((error.help(), error.to_string()), (None, "no such key: limits[timeout]".into()));
    let panics = || -> u8 { panic!("bad row: cols[stopped]") };
    let error = within(pool.apply(panics, ())).await.unwrap_err();
    assert!(error.to_string().ends_with("bad row: cols[stopped] [panicked]"), "{error}");
    let source = [1, 2].into_iter().inspect(|n| assert!(*n < 2, "bad row: cols[stopped]"));
    let error = within(pool.map(|n: i32| n, source)).await.unwrap_err();
    assert!(error.to_string().ends_with("bad row: cols[stopped] [source-panicked]"), "{error}");
    let mut results = pool.imap(|n: u8| n, [1]);
    assert_eq!(within(results.next()).await.unwrap().unwrap(), 1);
}
