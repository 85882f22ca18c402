//! Spans and events of children and of a manager, at the subscriber of the process that started them.
#![allow(clippy::unwrap_used)] // Tests, though clippy does not see it in the functions that run elsewhere.

use common::{Deadline, eventually, go_on, stop, within};
use multiprocess::{self as mp, ErrorKind, Event, Manager, Pool, Process, Restart, StartMethod};
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

mod common;

mp::test_support!();
common::quiet::quiet_stderr!();

/// What a subscriber has seen.
#[derive(Clone, Default)]
struct Seen {
    events: Arc<Mutex<Vec<Told>>>,
    /// Spans that have begun and not ended.
    open: Arc<AtomicUsize>,
}

/// An event: the spans around it from the outermost on, its level and fields, and the process that it is from.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    spans: String,
    text: String,
    target: String,
    file: Option<String>,
    pid: Option<u64>,
    dropped: u64,
}

impl Visit for Told {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.text += &format!(" {}={value:?}", field.name());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "process.pid" => assert_eq!(self.pid.replace(value), None, "it is there once"),
            "dropped" => self.dropped = value,
            name => self.text += &format!(" {name}:{value}"),
        }
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Seen {
    fn on_new_span(&self, _: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        self.open.fetch_add(1, Relaxed);
    }
    fn on_record(&self, _: &Id, values: &Record<'_>, _: Context<'_, S>) {
        let mut told = Told { text: "RECORDED".into(), ..Told::default() };
        values.record(&mut told);
        self.events.lock().unwrap().push(told);
    }
    fn on_event(&self, event: &tracing::Event<'_>, context: Context<'_, S>) {
        let metadata = event.metadata();
        let mut told = Told { text: metadata.level().to_string(), ..Told::default() };
        event.record(&mut told);
        let scope = context.event_scope(event).into_iter().flat_map(|scope| scope.from_root());
        told.spans = scope.map(|span| span.name()).collect::<Vec<_>>().join("/");
        (told.target, told.file) = (metadata.target().into(), metadata.file().map(str::to_owned));
        self.events.lock().unwrap().push(told);
    }
    fn on_close(&self, _: Id, _: Context<'_, S>) {
        self.open.fetch_sub(1, Relaxed);
    }
}

impl Seen {
    /// Becomes the subscriber of this thread, at level INFO.
    fn begin() -> (Self, DefaultGuard) {
        let seen = Self::default();
        let subscriber = tracing_subscriber::registry().with(LevelFilter::INFO).with(seen.clone());
        (seen, tracing::subscriber::set_default(subscriber))
    }

    /// What was told since the last time. Those that this crate itself tells are left out.
    fn take(&self) -> Vec<Told> {
        let told = std::mem::take(&mut *self.events.lock().unwrap());
        told.into_iter().filter(|told| !told.target.starts_with("multiprocess::")).collect()
    }

    fn texts(&self) -> Vec<String> {
        self.take().into_iter().map(|told| told.text).collect()
    }

    fn count(&self) -> usize {
        self.events.lock().unwrap().len()
    }
}

fn tell(n: u64) -> u32 {
    tracing::debug!("not of interest");
    let span = tracing::info_span!("inner", n, late = tracing::field::Empty);
    let _entered = span.enter();
    span.record("late", 7_u64);
    tracing::warn!(n, who = "me", "seen");
    std::process::id()
}

async fn tell_later(n: u64) -> u32 {
    tokio::task::yield_now().await;
    tell(n)
}

#[tokio::test]
async fn records_of_a_child_appear_under_the_span_of_its_spawn() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        // The later children of a fork server are spares.
        for n in 0..4_u64 {
            let builder = || Process::builder().start_method(method);
            let mut child = tracing::info_span!("outer").in_scope(|| match n {
                0 => builder().spawn(tell_later, (n,)).unwrap(),
                n => builder().spawn(tell, (n,)).unwrap(),
            });
            let pid = within(child.join()).await.unwrap();
            assert_eq!(pid, child.pid());
            let told = seen.take();
            assert_eq!(told.len(), 2, "{told:?}");
            assert_eq!((told[0].text.as_str(), told[0].pid), ("RECORDED late:7", Some(pid.into())));
            let event = Told {
                spans: "outer/inner".into(),
                text: format!("WARN message=seen n:{n} who=\"me\""),
                target: module_path!().into(),
                file: Some(file!().into()),
                pid: Some(pid.into()),
                dropped: 0,
            };
            assert_eq!(told[1], event);
        }
    }
    eventually("all spans are closed", || seen.open.load(Relaxed) == 0).await;
}

#[tokio::test]
async fn level_that_is_of_interest_is_the_level_of_the_child() {
    let _deadline = Deadline::start();
    let (_seen, _default) = Seen::begin();
    let enabled = || [tracing::enabled!(tracing::Level::INFO), tracing::enabled!(tracing::Level::DEBUG)];
    assert_eq!(within(Process::spawn(enabled, ()).unwrap()).await.unwrap(), [true, false]);
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// What `child` is told, in a process whose tests share no subscriber.
async fn without_a_listener() -> [usize; 2] {
    assert_eq!(LevelFilter::current(), LevelFilter::OFF);
    let mut counts = [0; 2];
    for count in &mut counts {
        let before = descriptors();
        let child = Process::spawn(descriptors, ()).unwrap();
        // Its pidfd and its report socket, when all else is there.
        *count = descriptors() - before;
        let in_child = child.await.unwrap();
        assert!(in_child > 0);
    }
    counts
}

#[tokio::test]
async fn child_has_a_descriptor_more_only_if_somebody_listens() {
    let _deadline = Deadline::start();
    // The tests of this program run in one process where they are run by `cargo test`, and some have subscribers.
    let counts = within(Process::spawn(without_a_listener, ()).unwrap()).await.unwrap();
    assert_eq!(counts[1], 2, "a spawn without a listener has no descriptor for it");
    let (_seen, _default) = Seen::begin();
    let with = within(Process::spawn(descriptors, ()).unwrap()).await.unwrap();
    let quiet = || Process::builder().forward_tracing(false);
    let without = within(quiet().spawn(descriptors, ()).unwrap()).await.unwrap();
    assert_eq!(with, without + 1);
}

#[tokio::test]
async fn switched_off_nothing_arrives() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    within(Process::builder().forward_tracing(false).spawn(tell, (1,)).unwrap()).await.unwrap();
    let pool = Pool::builder().workers(1).forward_tracing(false).build().unwrap();
    within(pool.apply(tell, (2,))).await.unwrap();
    let manager = Manager::builder().forward_tracing(false).start().await.unwrap();
    within(manager.create(|| tell(3), ())).await.unwrap();
    within(manager.shutdown()).await.unwrap();
    assert_eq!(seen.take(), []);
}

/// Another subscriber as the default of this thread, with an open span of its own.
fn another() -> (Seen, tracing::Span, DefaultGuard) {
    let (other, default) = Seen::begin();
    (other, tracing::info_span!("of the other"), default)
}

#[tokio::test]
async fn spans_are_closed_at_their_own_subscriber_whatever_is_the_default_then() {
    let _deadline = Deadline::start();
    for has_another in [false, true] {
        let (seen, default) = Seen::begin();
        let child = tracing::info_span!("outer").in_scope(|| Process::spawn(tell, (1,)).unwrap());
        drop(default);
        let other = has_another.then(another);
        within(child).await.unwrap();
        eventually("all spans of the starter are closed", || seen.open.load(Relaxed) == 0).await;
        if let Some((other, _span, _default)) = &other {
            assert_eq!(other.open.load(Relaxed), 1, "the other subscriber keeps its span");
        }
    }
}

#[tokio::test]
async fn spans_of_a_task_are_closed_at_their_own_subscriber_whatever_is_the_default_then() {
    let _deadline = Deadline::start();
    let pool = Pool::new(1).unwrap();
    let (seen, default) = Seen::begin();
    let mut call = Box::pin(pool.apply(tell, (1,)));
    let mut idle = std::task::Context::from_waker(std::task::Waker::noop());
    tracing::info_span!("outer").in_scope(|| assert!(call.as_mut().poll(&mut idle).is_pending()));
    drop(default);
    let (other, _span, _default) = another();
    within(call).await.unwrap();
    eventually("all spans of the caller are closed", || seen.open.load(Relaxed) == 0).await;
    assert_eq!(other.open.load(Relaxed), 1, "the other subscriber keeps its span");
}

static OWN: AtomicU32 = AtomicU32::new(0);

/// Counts events; has spans of its own.
struct Own;

impl tracing::Subscriber for Own {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, span: &Id, _: &Record<'_>) {
        assert_eq!(span.into_u64(), 1);
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        OWN.fetch_add(1, Relaxed);
    }
    fn enter(&self, span: &Id) {
        assert_eq!(span.into_u64(), 1);
    }
    fn exit(&self, _: &Id) {}
}

/// Tells `before` that, becomes the subscriber of all threads, and tells the rest that.
fn tell_own(start: u32) -> u32 {
    let earlier = tracing::info_span!("earlier");
    let _entered = earlier.enter();
    tracing::info!("to the parent");
    (0..start).for_each(|_| tracing::subscriber::with_default(Own, || tracing::info!("to a scope of mine")));
    tracing::info!("to the parent, too");
    tracing::subscriber::set_global_default(Own).unwrap();
    tracing::trace!("to mine, which wants more");
    let later = tracing::debug_span!(parent: &earlier, "later", n = tracing::field::Empty);
    later.in_scope(|| tracing::warn!("to mine"));
    later.record("n", 1);
    std::thread::spawn(|| tracing::warn!("to mine, too")).join().unwrap();
    OWN.load(Relaxed)
}

#[tokio::test]
async fn subscriber_of_the_child_wins_from_the_moment_at_which_it_is_set() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        let child = Process::builder().start_method(method).spawn(tell_own, (2,)).unwrap();
        assert_eq!(within(child).await.unwrap(), 2 + 3);
        assert_eq!(seen.texts(), ["INFO message=to the parent", "INFO message=to the parent, too"]);
    }
    eventually("all spans are closed", || seen.open.load(Relaxed) == 0).await;
}

/// Many more than find room.
const FLOOD: u64 = 30_000;

fn flood() {
    (0..FLOOD).for_each(|n| tracing::info!(n, "one of many, which are long enough to need room"));
}

/// Blocks the only thread of the runtime until the child has ended, so that nobody reads.
fn wait_unread<R>(child: &Process<R>) {
    while child.is_alive() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test]
async fn records_that_find_no_room_are_dropped_and_counted_and_the_child_never_waits() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let mut child = Process::spawn(flood, ()).unwrap();
    wait_unread(&child);
    within(child.join()).await.unwrap();
    let told = std::mem::take(&mut *seen.events.lock().unwrap());
    let (warnings, told): (Vec<_>, Vec<_>) = told.into_iter().partition(|told| told.dropped > 0);
    let [warning] = &warnings[..] else { panic!("{warnings:?}") };
    assert!(warning.text.starts_with("WARN ") && warning.pid == Some(child.pid().into()), "{warning:?}");
    assert!(told.len() > 100 && told.len() as u64 + warning.dropped == FLOOD, "{} and {warning:?}", told.len());
    let told: Vec<_> = told.iter().map(|told| told.text.clone()).collect();
    assert!(told.is_sorted_by_key(|text| text.rsplit(':').next().unwrap().parse::<u64>().unwrap()), "in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_read_while_the_child_runs_also_without_its_handle() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let goes_on = Event::new().unwrap();
    async fn tell_on(goes_on: Event) {
        tracing::info!("first");
        goes_on.wait().await.unwrap();
        tracing::info!("second");
        std::future::pending().await
    }
    let child = Process::builder().daemon(true).spawn(tell_on, (goes_on.clone(),)).unwrap();
    let pid = child.pid();
    eventually("the first has come", || seen.count() == 1).await;
    drop(child);
    goes_on.set();
    eventually("the second has come", || seen.count() == 2).await;
    assert!(seen.take().iter().all(|told| told.pid == Some(pid.into())));
    kill(pid);
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn tell_until_killed(then: u64) {
    let _entered = tracing::info_span!("open to the end").entered();
    for n in 0..then {
        tracing::info!(n, "alive");
    }
    kill(std::process::id());
}

#[tokio::test]
async fn records_of_a_killed_child_arrive_up_to_its_death() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let mut child = Process::spawn(tell_until_killed, (50,)).unwrap();
    assert_eq!(within(child.join()).await.unwrap_err().kind(), ErrorKind::ProcessDied);
    assert_eq!(seen.texts().len(), 50);
    eventually("the span that it has left open is closed", || seen.open.load(Relaxed) == 0).await;
    if !cfg!(debug_assertions) {
        return; // Then there are no fault points.
    }
    // The span is the first record.
    for (point, told) in [("trace.taken:4", 2), ("trace.sent:4", 3)] {
        let builder = Process::builder().env("MULTIPROCESS_KILL_AT", point);
        let mut child = builder.spawn(tell_until_killed, (50,)).unwrap();
        assert_eq!(within(child.wait()).await.unwrap().signal(), Some(9), "{point}");
        assert_eq!(seen.texts().len(), told, "{point}");
    }
    eventually("no span is open", || seen.open.load(Relaxed) == 0).await;
}

#[tokio::test]
async fn ten_thousand_dropped_joins_lose_no_record() {
    let _deadline = Deadline::after(Duration::from_secs(120));
    let (seen, _default) = Seen::begin();
    let mut random = common::Random::new(16);
    let records = async |stop: Event| {
        let mut count = 0_u64;
        while !stop.is_set() {
            tracing::info!(n = count);
            count += 1;
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
        count
    };
    let stop = Event::new().unwrap();
    let mut child = Process::spawn(records, (stop.clone(),)).unwrap();
    for n in 0..10_000 {
        let time = Duration::from_micros(random.below(200));
        let joined = match random.below(2) {
            0 => tokio::time::timeout(time, child.join()).await.ok(),
            _ => futures::FutureExt::now_or_never(child.join()),
        };
        assert!(joined.is_none(), "{n}: {joined:?}");
    }
    stop.set();
    let count = within(child.join()).await.unwrap();
    let expected: Vec<_> = (0..count).map(|n| format!("INFO n:{n}")).collect();
    assert!(count > 0 && seen.texts() == expected, "each once, in order");
}

/// A subscriber that is at an event until it may go on.
#[derive(Clone, Default)]
struct Slow {
    is_at_it: Arc<std::sync::atomic::AtomicBool>,
    may_go_on: Arc<std::sync::atomic::AtomicBool>,
}

impl<S: tracing::Subscriber> Layer<S> for Slow {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target().starts_with("multiprocess::") {
            return;
        }
        self.is_at_it.store(true, Relaxed);
        while !self.may_go_on.load(Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Lets it go on, also if the test fails.
struct GoesOn(Slow);

impl Drop for GoesOn {
    fn drop(&mut self) {
        self.0.may_go_on.store(true, Relaxed);
    }
}

/// How often a task was woken.
#[derive(Default)]
struct Woken(AtomicU32);

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

/// Waits by blocking: while a task blocks, tokio's timers may stand still.
fn blocking_until(what: &str, condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn join_sleeps_while_the_subscriber_is_at_a_record() {
    let _deadline = Deadline::start();
    let slow = Slow::default();
    let subscriber = tracing_subscriber::registry().with(LevelFilter::INFO).with(slow.clone());
    let mut child = {
        let _default = tracing::subscriber::set_default(subscriber);
        Process::spawn(|| tracing::info!("told"), ()).unwrap()
    };
    let goes_on = GoesOn(slow.clone());
    // A task of the runtime is at it; this one waits for the child.
    blocking_until("the subscriber is at it", || slow.is_at_it.load(Relaxed));
    blocking_until("the child has ended", || !child.is_alive());
    let woken = Arc::new(Woken::default());
    let waker = std::task::Waker::from(woken.clone());
    let (mut join, mut polls, mut seen) = (Box::pin(child.join()), 0, u32::MAX);
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_millis(200) && polls < 1000 {
        let wakes = woken.0.load(Relaxed);
        if wakes == seen {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        (polls, seen) = (polls + 1, wakes);
        assert!(
            join.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending(),
            "its record is not replayed"
        );
    }
    assert!(polls < 50, "{polls} polls");
    drop(goes_on);
    within(join).await.unwrap();
}

/// In a process of its own: with so many descriptors a spawn that somebody listens to succeeds if one without a listener does.
async fn spawns_at_every_limit() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    // The fork server is there, and what else the first one brings.
    within(Process::spawn(tell, (1,)).unwrap()).await.unwrap();
    seen.take();
    let before = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let starts = async |more: usize, listened_to: bool| {
        common::limit_descriptors(more);
        let child = Process::builder().forward_tracing(listened_to).spawn(tell, (1,));
        rustix::process::setrlimit(rustix::process::Resource::Nofile, before).unwrap();
        match child {
            Ok(mut child) => within(child.wait()).await.is_ok(),
            Err(_) => false,
        }
    };
    let mut unforwarded = 0;
    for more in 0..14 {
        if starts(more, false).await {
            seen.take();
            // Whether there is a spare child, which takes fewer, is a matter of time.
            let mut started = false;
            for _ in 0..5 {
                started = started || starts(more, true).await;
            }
            assert!(started, "with {more} descriptors");
            unforwarded += u32::from(seen.take().is_empty());
        }
    }
    println!("{unforwarded} started without a way for records");
}

#[tokio::test]
async fn spawn_that_would_succeed_without_a_listener_succeeds_with_one_at_the_limit_of_descriptors() {
    let _deadline = Deadline::start();
    common::in_child(spawns_at_every_limit, ()).await;
}

#[tokio::test]
async fn stopped_child_delays_nobody() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let mut stopped = Process::builder().kill_on_drop(true).spawn(std::future::pending::<()>, ()).unwrap();
    stop(stopped.pid());
    within(Process::spawn(tell, (1,)).unwrap()).await.unwrap();
    assert_eq!(seen.take().len(), 2);
    go_on(stopped.pid());
    stopped.kill().unwrap();
    within(stopped.wait()).await.unwrap();
}

#[tokio::test]
async fn records_of_grandchildren_and_of_tasks_in_a_child_come_all_the_way() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    async fn below() -> [u32; 2] {
        let middle = tracing::info_span!("middle");
        let child = middle.in_scope(|| Process::spawn(tell, (1,)).unwrap());
        let first = child.await.unwrap();
        let pool = Pool::new(1).unwrap();
        let second = tracing::Instrument::instrument(pool.apply(tell, (2,)), middle).await.unwrap();
        [first, second]
    }
    let mut child = tracing::info_span!("outer").in_scope(|| Process::spawn(below, ()).unwrap());
    let [grandchild, worker] = within(child.join()).await.unwrap();
    let mut told = seen.take();
    told.retain(|told| !told.text.starts_with("RECORDED"));
    assert_eq!(told.len(), 2, "{told:?}");
    let pid = |pid: u32| Some(u64::from(pid));
    assert_eq!((told[0].spans.as_str(), told[0].pid), ("outer/middle/inner", pid(grandchild)));
    assert_eq!((told[1].spans.as_str(), told[1].pid), ("outer/middle/inner", pid(child.pid())));
    assert!(told[1].text.contains(&format!("worker.pid:{worker}")), "{told:?}");
}

#[tokio::test]
async fn records_of_methods_appear_at_the_starter_of_the_manager() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let manager = {
        let _entered = tracing::info_span!("keeper").entered();
        Manager::start()
    };
    let manager = tracing::Instrument::instrument(manager, tracing::info_span!("keeper")).await.unwrap();
    let add = |total: &mut u64, n: u64| {
        tracing::info!(n, "added");
        *total += n;
    };
    let total = manager.create(|| 0_u64, ()).await.unwrap();
    within(total.call(add, (1,))).await.unwrap();
    eventually("the first has come", || seen.count() == 1).await;
    // By another process, and so for the starter all the same.
    let elsewhere = async |total: mp::Proxy<u64>| {
        let add = |total: &mut u64, n: u64| {
            tracing::info!(n, "added elsewhere");
            *total += n;
        };
        total.call(add, (2,)).await.unwrap();
    };
    within(Process::builder().forward_tracing(false).spawn(elsewhere, (total.clone(),)).unwrap()).await.unwrap();
    // A slow one runs on another thread.
    let slow = |_: &mut u64| {
        std::thread::sleep(Duration::from_millis(50));
        tracing::info!("slow");
    };
    within(total.call(slow, ())).await.unwrap();
    within(manager.shutdown()).await.unwrap();
    let told = seen.take();
    let texts: Vec<_> = told.iter().map(|told| told.text.as_str()).collect();
    assert_eq!(texts, ["INFO message=added n:1", "INFO message=added elsewhere n:2", "INFO message=slow"]);
    let pid = Some(u64::from(manager.pid()));
    assert!(told.iter().all(|told| told.spans == "keeper" && told.pid == pid), "{told:?}");
}

#[tokio::test]
async fn every_start_of_a_supervised_child_is_under_the_span_of_the_first() {
    let _deadline = Deadline::start();
    let (seen, default) = Seen::begin();
    let twice = |starts: mp::Value<u32>| {
        tracing::info!("start");
        assert!(starts.fetch_add(1) == 1, "not this time");
    };
    let again = Restart::on_failure().max(5, Duration::from_secs(60)).back_off(Duration::ZERO, Duration::ZERO);
    let starts = mp::Value::new(0).unwrap();
    let span = tracing::info_span!("outer");
    let mut server = span.in_scope(|| Process::builder().restart(again).spawn(twice, (starts,)).unwrap());
    // The later starts are made by a task, on a thread that may have another subscriber, or none.
    drop(default);
    within(server.wait()).await.unwrap();
    eventually("both have told", || seen.count() == 2).await;
    assert!(seen.take().iter().all(|told| told.spans == "outer" && told.text == "INFO message=start"));
}

#[tokio::test]
async fn process_forked_by_a_child_sends_no_records() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let fork = || {
        // SAFETY: the process that is made has one thread, and ends by `_exit`.
        match unsafe { libc::fork() } {
            0 => {
                tracing::error!("not of the child");
                // SAFETY: it ends the process.
                unsafe { libc::_exit(0) }
            }
            forked => {
                // SAFETY: waits for the process that was just made.
                unsafe { libc::waitpid(forked, std::ptr::null_mut(), 0) };
                tracing::info!("of the child");
            }
        }
    };
    within(Process::spawn(fork, ()).unwrap()).await.unwrap();
    assert_eq!(seen.texts(), ["INFO message=of the child"]);
}

#[tokio::test]
async fn thread_that_is_given_the_subscriber_takes_part_and_no_other() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let threads = || {
        let dispatch = tracing::dispatcher::get_default(Clone::clone);
        let given = || tracing::dispatcher::with_default(&dispatch, || tracing::info!("given"));
        std::thread::scope(|scope| {
            scope.spawn(given);
            scope.spawn(|| tracing::info!("not given"));
        });
    };
    within(Process::spawn(threads, ()).unwrap()).await.unwrap();
    assert_eq!(seen.texts(), ["INFO message=given"]);
}

/// Tells when it is dropped, which a task is after the function has returned.
struct TellsAtTheEnd;

impl Drop for TellsAtTheEnd {
    fn drop(&mut self) {
        tracing::info!("after the result");
    }
}

#[tokio::test]
async fn records_after_the_result_and_before_the_exit_arrive() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let leave = async || {
        let told = TellsAtTheEnd;
        tokio::spawn(async move {
            let _told = told;
            std::future::pending::<()>().await;
        });
        tokio::task::yield_now().await;
        5
    };
    assert_eq!(within(Process::spawn(leave, ()).unwrap()).await.unwrap(), 5);
    assert_eq!(seen.texts(), ["INFO message=after the result"]);
}

#[test]
fn spawn_outside_a_runtime_forwards_nothing() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let child = Process::spawn(tell, (1,)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(within(child)).unwrap();
    assert_eq!(seen.take(), []);
}

#[test]
fn child_goes_on_when_the_runtime_that_reads_is_gone() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let reader = runtime();
    let mut child = {
        let _inside = reader.enter();
        Process::spawn(flood, ()).unwrap()
    };
    drop(reader);
    runtime().block_on(within(child.join())).unwrap();
    assert!(seen.count() > 100);
}

#[tokio::test]
async fn record_of_a_thread_that_a_task_has_left_behind_stays_with_its_own_call() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    let pool = Pool::new(1).unwrap();
    let leaves = |go_on: Event, done: Event| {
        let dispatch = tracing::dispatcher::get_default(Clone::clone);
        let span = tracing::info_span!("left behind");
        std::thread::spawn(move || {
            go_on.blocking_wait().unwrap();
            tracing::dispatcher::with_default(&dispatch, || span.in_scope(|| tracing::info!("late")));
            done.set();
        });
    };
    let meets = |go_on: Event, done: Event| {
        go_on.set();
        done.blocking_wait().unwrap();
    };
    let (go_on, done) = (Event::new().unwrap(), Event::new().unwrap());
    let call = pool.apply(leaves, (go_on.clone(), done.clone()));
    within(tracing::Instrument::instrument(call, tracing::info_span!("first"))).await.unwrap();
    let call = pool.apply(meets, (go_on, done));
    within(tracing::Instrument::instrument(call, tracing::info_span!("second"))).await.unwrap();
    let told: Vec<_> = seen.take().into_iter().map(|told| (told.spans, told.text)).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].0, "first/left behind");
}

thread_local! {
    static LAST: TellsAtTheEnd = const { TellsAtTheEnd };
}

fn tell_at_the_end_of_the_thread(code: Option<i32>) {
    LAST.with(|_| ());
    tracing::info!("first");
    if let Some(code) = code {
        std::process::exit(code);
    }
}

#[tokio::test]
async fn record_in_the_drop_of_a_thread_local_does_not_end_the_child() {
    let _deadline = Deadline::start();
    let (_seen, _default) = Seen::begin();
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        for code in [None, Some(7)] {
            let builder = Process::builder().start_method(method);
            let mut child = builder.spawn(tell_at_the_end_of_the_thread, (code,)).unwrap();
            let status = within(child.wait()).await.unwrap();
            assert_eq!(status.code(), Some(code.unwrap_or(0)), "{method:?}: {status}");
        }
    }
}

/// Forks while another thread uses spans of the same subscriber. A forked process that hangs is ended by an alarm.
fn fork_beside_spans() {
    let dispatch = tracing::dispatcher::get_default(Clone::clone);
    let span = tracing::info_span!("cloned");
    let is_done = std::sync::atomic::AtomicBool::new(false);
    let clone = || {
        tracing::dispatcher::with_default(&dispatch, || {
            while !is_done.load(Relaxed) {
                drop(span.clone());
            }
        })
    };
    let fork = || {
        // SAFETY: the process that is made uses what is safe after a fork, and ends by `_exit` or by a signal.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: they have no preconditions.
                unsafe { libc::alarm(20) };
                drop(span.clone());
                span.record("n", 1);
                // SAFETY: it ends the process.
                unsafe { libc::_exit(0) }
            }
            forked => {
                let mut status = -1;
                // SAFETY: waits for the process that was just made.
                unsafe { libc::waitpid(forked, &mut status, 0) };
                status
            }
        }
    };
    let statuses: Vec<_> = std::thread::scope(|scope| {
        scope.spawn(clone);
        let statuses = (0..200).map(|_| fork()).take_while(|status| *status == 0).collect();
        is_done.store(true, Relaxed);
        statuses
    });
    assert_eq!(statuses.len(), 200, "a forked process hangs");
}

#[tokio::test]
async fn process_forked_while_another_thread_uses_spans_goes_on() {
    let _deadline = Deadline::start();
    let (_seen, _default) = Seen::begin();
    within(Process::spawn(fork_beside_spans, ()).unwrap()).await.unwrap();
}

#[tokio::test]
async fn records_of_a_grandchild_that_outlives_the_function_of_its_starter_arrive() {
    let _deadline = Deadline::start();
    let (seen, _default) = Seen::begin();
    async fn leave_a_child(goes_on: Event) {
        let late = |goes_on: Event| {
            goes_on.blocking_wait().unwrap();
            tracing::info!("late");
        };
        drop(Process::spawn(late, (goes_on,)).unwrap());
    }
    let goes_on = Event::new().unwrap();
    let mut child = Process::spawn(leave_a_child, (goes_on.clone(),)).unwrap();
    within(child.join()).await.unwrap();
    goes_on.set();
    within(child.wait()).await.unwrap();
    assert_eq!(seen.texts(), ["INFO message=late"]);
}
