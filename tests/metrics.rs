//! Figures of pools, queues and managers as a recorder of the `metrics` crate gets them.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use multiprocess::{self as mp, ErrorKind, JoinableQueue, Manager, MetricsReporter, Pool, Queue};
use std::time::Duration;

mp::test_support!();

/// Longer than anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// What the last report has recorded, as `name label=value..`. A look takes it away.
struct Figures(Vec<(String, DebugValue)>);

impl Figures {
    fn taken(snapshotter: &Snapshotter) -> Self {
        let snapshot = snapshotter.snapshot().into_vec().into_iter();
        Self(
            snapshot
                .map(|(key, _, _, value)| {
                    let labels = key.key().labels().map(|label| format!(" {}={}", label.key(), label.value()));
                    (format!("{}{}", key.key().name(), labels.collect::<String>()), value)
                })
                .collect(),
        )
    }

    fn number(&self, figure: &str) -> Option<f64> {
        match &self.0.iter().find(|(name, _)| name == figure)?.1 {
            DebugValue::Counter(count) => Some(*count as f64),
            DebugValue::Gauge(value) => Some(value.into_inner()),
            DebugValue::Histogram(_) => None,
        }
    }

    fn samples(&self, figure: &str) -> Vec<f64> {
        match self.0.iter().find(|(name, _)| name == figure) {
            Some((_, DebugValue::Histogram(samples))) => samples.iter().map(|sample| sample.into_inner()).collect(),
            _ => Vec::new(),
        }
    }
}

fn sometimes(n: u32) -> u32 {
    assert!(!n.is_multiple_of(5), "five");
    n
}

#[tokio::test]
async fn items_of_a_pool_are_counted_by_outcome_and_their_times_once() {
    let recorder = DebuggingRecorder::new();
    let (snapshotter, _guard) = (recorder.snapshotter(), metrics::set_default_local_recorder(&recorder));
    let pool = Pool::new(2).unwrap();
    let mut reporter = MetricsReporter::new().pool("counted", &pool);
    for n in 1..=20 {
        let _ = pool.apply(sometimes, (n,)).await;
    }
    let error = pool.apply(|| std::thread::sleep(LIMIT), ()).timeout(Duration::from_millis(20)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    reporter.report().await;
    let figures = Figures::taken(&snapshotter);
    let outcomes = ["done", "panicked", "timed_out", "died"]
        .map(|outcome| figures.number(&format!("multiprocess_pool_items_total pool=counted outcome={outcome}")));
    assert_eq!(outcomes, [16, 4, 1, 0].map(|count| Some(f64::from(count))));
    assert_eq!(figures.number("multiprocess_pool_items pool=counted state=queued"), Some(0.0));
    let runs = figures.samples("multiprocess_pool_run_seconds pool=counted");
    assert_eq!(runs.len(), 20, "one for each item that came to its end: {runs:?}");
    assert!(runs.iter().all(|seconds| (0.0..1.0).contains(seconds)), "{runs:?}");
    let waits = figures.samples("multiprocess_pool_wait_seconds pool=counted");
    assert_eq!(waits.len(), 21, "{waits:?}");
    // Nothing has come since.
    reporter.report().await;
    let figures = Figures::taken(&snapshotter);
    assert_eq!(figures.samples("multiprocess_pool_run_seconds pool=counted"), [0.0; 0]);
    assert_eq!(figures.number("multiprocess_pool_items_total pool=counted outcome=done"), Some(16.0));
}

#[tokio::test]
async fn workers_of_a_pool_are_busy_or_idle_and_none_after_its_drop() {
    let recorder = DebuggingRecorder::new();
    let (snapshotter, _guard) = (recorder.snapshotter(), metrics::set_default_local_recorder(&recorder));
    let pool = Pool::new(2).unwrap();
    let go_on = mp::Event::new().unwrap();
    let mut reporter = MetricsReporter::new().pool("workers", &pool);
    let call = pool.apply_async(|go_on: mp::Event| go_on.blocking_wait().is_ok(), (go_on.clone(),));
    let workers = |figures: &Figures| {
        ["busy", "idle"].map(|state| figures.number(&format!("multiprocess_pool_workers pool=workers state={state}")))
    };
    let figures = tokio::time::timeout(LIMIT, async {
        loop {
            reporter.report().await;
            let figures = Figures::taken(&snapshotter);
            if workers(&figures) == [Some(1.0); 2] {
                return figures;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let figures = figures.await.expect("one runs the item, one is idle");
    assert!(figures.number("multiprocess_pool_resident_bytes pool=workers").unwrap() > 0.0);
    go_on.set();
    assert!(call.await.unwrap());
    drop(pool);
    // It does not keep it, and has nothing to report then.
    tokio::time::timeout(LIMIT, reporter.run(Duration::from_secs(3600))).await.expect("it ends");
    assert_eq!(workers(&Figures::taken(&snapshotter)), [Some(0.0); 2]);
}

#[tokio::test]
async fn queues_and_managers_are_reported_also_when_a_manager_is_gone() {
    let recorder = DebuggingRecorder::new();
    let (snapshotter, _guard) = (recorder.snapshotter(), metrics::set_default_local_recorder(&recorder));
    let (queue, bounded) = (Queue::unbounded().unwrap(), JoinableQueue::bounded(7).unwrap());
    let manager = Manager::start().await.unwrap();
    let _list = manager.list::<u32>().await.unwrap();
    let mut reporter =
        MetricsReporter::new().queue("jobs", &queue).joinable_queue("seven", &bounded).manager("state", &manager);
    (0..3).for_each(|n| queue.try_put(n).unwrap());
    bounded.try_put(1).unwrap();
    reporter.report().await;
    let figures = Figures::taken(&snapshotter);
    assert_eq!(figures.number("multiprocess_queue_items queue=jobs"), Some(3.0));
    assert_eq!(figures.number("multiprocess_queue_capacity queue=jobs"), None);
    assert_eq!(figures.number("multiprocess_queue_items queue=seven"), Some(1.0));
    assert_eq!(figures.number("multiprocess_queue_capacity queue=seven"), Some(7.0));
    assert_eq!(figures.number("multiprocess_manager_up manager=state"), Some(1.0));
    assert_eq!(figures.number("multiprocess_manager_objects manager=state"), Some(1.0));
    manager.shutdown().await.unwrap();
    reporter.report().await;
    let figures = Figures::taken(&snapshotter);
    assert_eq!(figures.number("multiprocess_manager_up manager=state"), Some(0.0));
}

#[tokio::test]
async fn items_of_a_queue_are_counted_whoever_puts_and_takes_them() {
    let recorder = DebuggingRecorder::new();
    let (snapshotter, _guard) = (recorder.snapshotter(), metrics::set_default_local_recorder(&recorder));
    let queue = Queue::unbounded().unwrap();
    let mut reporter = MetricsReporter::new().queue("jobs", &queue);
    let mut counts = async || {
        reporter.report().await;
        let figures = Figures::taken(&snapshotter);
        ["put", "taken"].map(|what| figures.number(&format!("multiprocess_queue_{what}_total queue=jobs")).unwrap())
    };
    assert_eq!(counts().await, [0.0, 0.0]);
    let put = |queue: Queue<u32>| (0..5).for_each(|n| queue.try_put(n).unwrap());
    mp::Process::spawn(put, (queue.clone(),)).unwrap().await.unwrap();
    assert_eq!(queue.get().await.unwrap(), 0);
    assert_eq!(counts().await, [5.0, 1.0]);
    // One that comes back is not counted again.
    drop(queue.try_lease().unwrap());
    assert_eq!(counts().await, [5.0, 2.0]);
    while queue.try_get().is_ok() {}
    assert_eq!(counts().await, [5.0, 5.0]);
}

/// An object of a manager.
struct Fragile(u32);

#[tokio::test]
async fn requests_and_failed_calls_of_a_manager_are_counted() {
    let recorder = DebuggingRecorder::new();
    let (snapshotter, _guard) = (recorder.snapshotter(), metrics::set_default_local_recorder(&recorder));
    let manager = Manager::start().await.unwrap();
    let mut reporter = MetricsReporter::new().manager("state", &manager);
    let mut counts = async || {
        reporter.report().await;
        let figures = Figures::taken(&snapshotter);
        let count = |what| figures.number(&format!("multiprocess_manager_{what}_total manager=state")).unwrap();
        [count("requests"), count("failed_calls")]
    };
    let [before, failed] = counts().await;
    assert_eq!(failed, 0.0);
    let fragile = manager.create(Fragile, (1,)).await.unwrap();
    for _ in 0..10 {
        fragile.call(|fragile: &mut Fragile| fragile.0 += 1, ()).await.unwrap();
    }
    // Another thread leads after one that takes so long; what was counted stays.
    let pause = Duration::from_millis(50);
    fragile.call(|_: &mut Fragile, pause| std::thread::sleep(pause), (pause,)).await.unwrap();
    for _ in 0..3 {
        let failing = fragile.call(|fragile: &mut Fragile| assert!(fragile.0 == 0, "it is not"), ());
        assert_eq!(failing.await.unwrap_err().kind(), ErrorKind::Panicked);
    }
    let [after, failed] = counts().await;
    assert_eq!(failed, 3.0);
    // The object was made, and this report counts, too.
    assert!((16.0..32.0).contains(&(after - before)), "{before} and {after}");
    manager.shutdown().await.unwrap();
}
