//! The seam between a pool and what executes its items, driven by a taker that the test plays, and encoded items run by
//! worker processes.

use super::taker::{EncodedResults, External, Limits, Order, Orders, Taker};
use super::{ChunkLimits, EncodedItems, Pool, PoolBuilder, Retry, current_task};
use crate::channel::spsc;
use crate::error::{Error, ErrorKind, Result};
use crate::process::entry::{self, IS_VALUE};
use crate::wire;
use futures_util::{FutureExt, StreamExt};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::Notify;

const LIMIT: Duration = Duration::from_secs(20);
const MS: Duration = Duration::from_millis(1);

/// A taker that does nothing by itself.
#[derive(Default)]
struct Fake {
    notified: Notify,
    orders: OnceLock<Orders>,
}

impl Taker for Fake {
    fn notify(&self) {
        self.notified.notify_one();
    }
    fn refuse(&self, what: &str) -> Error {
        Error::other(format!("a fake has no workers that can be {what}"))
    }
}

fn pool(chunks: ChunkLimits) -> (Pool, Arc<Fake>) {
    pool_with(chunks, |builder| builder)
}

fn pool_with(chunks: ChunkLimits, options: impl FnOnce(PoolBuilder) -> PoolBuilder) -> (Pool, Arc<Fake>) {
    let (sender, receiver) = mpsc::channel();
    let start = move |orders: Orders| -> Result<Arc<dyn Taker>> {
        let fake = Arc::<Fake>::default();
        let _ = fake.orders.set(orders);
        sender.send(fake.clone()).map_err(Error::other)?;
        Ok(fake)
    };
    let pool = options(Pool::builder()).external(External { chunks, start: Box::new(start) }).build().unwrap();
    (pool, receiver.recv().unwrap())
}

impl Fake {
    fn orders(&self) -> &Orders {
        self.orders.get().unwrap()
    }

    /// Waits for the next order.
    async fn next(&self) -> Order {
        let next = async {
            loop {
                if let Some(order) = self.orders().take() {
                    return order;
                }
                self.notified.notified().await;
            }
        };
        tokio::time::timeout(LIMIT, next).await.expect("an order")
    }

    async fn until(&self, holds: impl Fn() -> bool) {
        let changes = async {
            while !holds() {
                self.notified.notified().await;
            }
        };
        tokio::time::timeout(LIMIT, changes).await.expect("a change that the taker is notified of");
    }
}

fn argument(bytes: &[u8]) -> u64 {
    wire::decode_bytes::<(u64,)>(bytes, Vec::new()).unwrap().0
}

fn encoded(index: u64, value: u64) -> EncodedResults {
    EncodedResults::one(index, IS_VALUE, wire::encode(&value).unwrap().payload(&value)).unwrap()
}

/// All results of an order, each one the argument and one.
fn results(order: &Order) -> EncodedResults {
    let mut all = EncodedResults { first: order.first(), count: order.count(), records: Vec::new() };
    for (index, bytes) in order.items() {
        all.records.extend(encoded(index, argument(bytes) + 1).records);
    }
    all
}

fn plus_one(x: u64) -> u64 {
    x + 1
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.expect("within its time")
}

/// A taker that uses the runtime wherever it is called.
#[cfg(any(feature = "dashboard", feature = "metrics"))]
struct NeedsRuntime;

#[cfg(any(feature = "dashboard", feature = "metrics"))]
impl Taker for NeedsRuntime {
    fn notify(&self) {}
    fn refuse(&self, what: &str) -> Error {
        Fake::default().refuse(what)
    }
    fn add_stats(&self, _: &mut super::PoolStats) {
        tokio::runtime::Handle::current();
    }
}

#[cfg(any(feature = "dashboard", feature = "metrics"))]
#[tokio::test]
async fn stats_that_a_thread_of_no_runtime_reads_are_read_within_that_of_the_pool() {
    let start = |_| Ok(Arc::new(NeedsRuntime) as Arc<dyn Taker>);
    let external = External { chunks: ChunkLimits::LOCAL, start: Box::new(start) };
    let pool = Pool::builder().external(external).build().unwrap();
    let source = pool.stats_source();
    let read = std::thread::spawn(move || source.stats().is_some()).join();
    assert!(read.expect("no panic"));
}

#[tokio::test]
async fn order_that_is_given_back_after_its_time_to_start_fails_for_that() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    fake.orders().set_capacity(1);
    let call = pool.apply(plus_one, (1,)).queue_timeout(500 * MS);
    let give_back = async {
        let order = fake.next().await;
        // The timer of the call finds nothing that waits meanwhile.
        tokio::time::sleep(1000 * MS).await;
        order.give_back();
    };
    let (result, ()) = within(async { tokio::join!(call, give_back) }).await;
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Timeout);
}

#[tokio::test]
async fn order_that_is_given_back_to_a_pool_that_was_shut_down_is_given_up() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    fake.orders().set_capacity(1);
    let call = pool.apply_async(plus_one, (1,));
    let order = fake.next().await;
    let shutdown = async {
        pool.shutdown(LIMIT).await;
    };
    // Polled after the shutdown has begun.
    let give_back = async { order.give_back() };
    let (result, (), ()) = within(async { tokio::join!(call, shutdown, give_back) }).await;
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[tokio::test]
async fn order_names_its_function_and_its_results_reach_the_call() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    let call = pool.apply_async(plus_one, (41,));
    let mut order = fake.next().await;
    assert!(order.label().ends_with("plus_one"), "{}", order.label());
    assert_eq!(order.call(), entry::Call::of(plus_one));
    assert_eq!((order.first(), order.count(), order.attempt(), order.is_cancelled()), (0, 1, 0, false));
    assert_eq!(order.items().map(|(index, bytes)| (index, argument(bytes))).collect::<Vec<_>>(), [(0, 41)]);
    assert_eq!((pool.stats().running, pool.stats().queued), (0, 1), "nothing can run without a slot");
    fake.orders().set_capacity(2);
    assert_eq!((pool.stats().running, pool.workers()), (1, 2));
    order.settle(results(&order)).unwrap();
    assert_eq!(within(call).await.unwrap(), 42);

    let call = pool
        .apply(plus_one, (1,))
        .timeout(5 * MS)
        .retries(3)
        .retry_if(Retry::DIED)
        .back_off(2 * MS)
        .queue_timeout(LIMIT);
    let answer = async {
        let order = fake.next().await;
        let limits = Limits {
            timeout: Some(5 * MS),
            grace: 10 * MS,
            retries: 3,
            retry_on: Retry::DIED,
            back_off: 2 * MS,
            chunk: 0,
        };
        assert_eq!(order.limits(), limits);
        assert!(order.start_by().is_some());
        order.fail_rest(&Error::new(ErrorKind::ProcessDied, "host h1 was lost"));
    };
    let (outcome, ()) = within(async { tokio::join!(call, answer) }).await;
    let error = outcome.unwrap_err();
    assert_eq!((error.kind(), error.to_string().contains("h1")), (ErrorKind::ProcessDied, true), "{error}");
    assert!(pool.resize(2).await.unwrap_err().to_string().contains("resized"));
    assert!(pool.checkout().await.unwrap_err().to_string().contains("checked out"));
}

#[tokio::test]
async fn orders_grow_to_the_limits_of_the_taker_by_the_time_it_measures() {
    let limits = ChunkLimits { time: 20 * MS, items: 300, bytes: 256 << 10 };
    let (pool, fake) = pool(limits);
    fake.orders().set_capacity(1);
    let map = tokio::spawn(pool.map(plus_one, 0..10_000));
    let (mut done, mut largest) = (0, 0);
    while done < 10_000 {
        let mut order = fake.next().await;
        (done, largest) = (done + order.count(), largest.max(order.count()));
        order.ran(Duration::from_micros(1) * order.count(), order.count());
        order.settle(results(&order)).unwrap();
    }
    assert_eq!(within(map).await.unwrap().unwrap(), (1..=10_000).collect::<Vec<_>>());
    assert_eq!(largest, 300);
    assert_eq!(pool.stats().runs.count(), 10_000);
}

#[tokio::test]
async fn more_slots_have_a_waiting_map_pull_more_items() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    let map = tokio::spawn(pool.map(plus_one, 0..1000).chunksize(1));
    let mut held = Vec::new();
    for (slots, ahead) in [(1, 4), (3, 12)] {
        fake.orders().set_capacity(slots);
        while held.len() < ahead {
            held.push(fake.next().await);
        }
        tokio::task::yield_now().await;
        assert!(fake.orders().take().is_none(), "no more than that");
    }
    drop((held, map));
}

#[tokio::test]
async fn cancelled_order_is_reported_to_the_taker_and_its_later_results_are_dropped() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    let (lost, kept) = (pool.apply_async(plus_one, (1,)), pool.apply_async(plus_one, (2,)));
    let (mut first, mut second) = (fake.next().await, fake.next().await);
    lost.cancel();
    fake.until(|| first.is_cancelled()).await;
    assert_eq!((fake.orders().cancelled(), fake.orders().cancelled()), (vec![first.id()], vec![]));
    assert_eq!(within(lost).await.unwrap_err().kind(), ErrorKind::Cancelled);
    first.settle(results(&first)).unwrap();
    assert!(!second.is_cancelled());
    second.settle(results(&second)).unwrap();
    assert_eq!(within(kept).await.unwrap(), 3);
    // It ends when the taker has given up its orders.
    pool.close();
    drop(second);
    let join = pool.join();
    tokio::pin!(join);
    for _ in 0..20 {
        tokio::task::yield_now().await;
        assert!(join.as_mut().now_or_never().is_none(), "an order is still held");
    }
    drop(first);
    within(join).await.unwrap();
    fake.until(|| fake.orders().is_over()).await;
}

#[tokio::test]
async fn order_given_back_is_taken_again_without_its_settled_items() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    let map = tokio::spawn(pool.map(plus_one, 0..5).chunksize(5));
    let mut order = fake.next().await;
    assert_eq!(order.count(), 5);
    order.settle(encoded(0, 1)).unwrap();
    order.settle(encoded(2, 3)).unwrap();
    order.give_back();
    let mut again = [fake.next().await, fake.next().await];
    assert_eq!(again.each_ref().map(|order| (order.first(), order.count(), order.attempt())), [(1, 1, 0), (3, 2, 0)]);
    for order in &mut again {
        order.settle(results(order)).unwrap();
    }
    assert_eq!(within(map).await.unwrap().unwrap(), [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn the_first_result_of_an_item_counts_and_records_that_are_not_whole_settle_nothing() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    let map = tokio::spawn(pool.map(plus_one, 0..3).chunksize(3));
    let mut order = fake.next().await;
    order.settle(encoded(1, 20)).unwrap();
    let good = results(&order);
    let cut = EncodedResults { records: good.records[..good.records.len() - 4].to_vec(), ..good.clone() };
    let more = EncodedResults { count: 2, ..good.clone() };
    let endless = EncodedResults { first: u64::MAX, ..good.clone() };
    let strange = EncodedResults::one(0, 9, &[]).unwrap();
    for bad in [cut, more, endless, strange, encoded(3, 0), encoded(u64::MAX, 0)] {
        assert_eq!(order.settle(bad).unwrap_err().kind(), ErrorKind::Decode);
    }
    order.settle(EncodedResults { first: 2, count: 0, records: Vec::new() }).unwrap();
    order.settle(good).unwrap();
    order.settle(encoded(0, 7)).unwrap();
    assert_eq!(within(map).await.unwrap().unwrap(), [1, 20, 3]);
}

#[tokio::test]
async fn a_dropped_order_fails_its_items_and_the_end_of_the_pool_fails_those_that_are_held() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    let (a, b, c) =
        (pool.apply_async(plus_one, (1,)), pool.apply_async(plus_one, (2,)), pool.apply_async(plus_one, (3,)));
    drop(fake.next().await);
    assert!(within(a).await.unwrap_err().to_string().contains("given up"));
    let held = fake.next().await;
    pool.terminate();
    assert_eq!(within(b).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(within(c).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(held.is_cancelled());
    drop(held);
    fake.until(|| fake.orders().is_over()).await;
    within(pool.join()).await.unwrap();
}

#[tokio::test]
async fn the_last_holder_of_a_pool_ends_its_taker() {
    let (pool, fake) = pool(ChunkLimits::LOCAL);
    drop(pool.apply_async(plus_one, (1,)));
    let held = fake.next().await;
    drop(pool);
    fake.until(|| held.is_cancelled()).await;
    drop(held);
    fake.until(|| fake.orders().is_over()).await;
}

#[tokio::test]
async fn an_item_that_is_not_taken_in_time_fails() {
    let (pool, _fake) = pool(ChunkLimits::LOCAL);
    let error = within(pool.apply(plus_one, (1,)).queue_timeout(5 * MS)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
}

#[tokio::test]
async fn a_place_in_line_that_is_not_used_any_more_goes_to_the_next_caller() {
    let (pool, fake) = pool_with(ChunkLimits::LOCAL, |builder| builder.max_waiting(5));
    fake.orders().set_capacity(2);
    let mut stream = pool.imap(plus_one, 0..).chunksize(1);
    assert!(stream.next().now_or_never().is_none());
    // Five wait, and the stream waits for room. Now it may have fewer in flight than it has.
    fake.orders().set_capacity(1);
    let _order = fake.next().await;
    assert!(stream.next().now_or_never().is_none());
    let mut apply = pool.apply(plus_one, (1,));
    assert!((&mut apply).now_or_never().is_none());
    assert!((&mut apply).now_or_never().is_none());
    let stats = pool.stats();
    assert_eq!(stats.queued + stats.running, 6, "the call was submitted");
}

/// A waker whose drop and whose clone use the pool.
struct Nosy(Pool);

impl std::task::Wake for Nosy {
    fn wake(self: Arc<Self>) {}
}

impl Drop for Nosy {
    fn drop(&mut self) {
        self.0.stats();
    }
}

#[test]
fn a_waker_is_dropped_without_a_lock_of_the_pool_held() {
    let (sender, done) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (pool, _fake) = pool_with(ChunkLimits::LOCAL, |builder| builder.max_waiting(1));
            let nosy = || std::task::Waker::from(Arc::new(Nosy(pool.clone())));
            let mut calls = [pool.apply(plus_one, (1,)), pool.apply(plus_one, (2,))];
            for _ in 0..2 {
                for call in &mut calls {
                    // Each time another waker takes the place of the last.
                    let waker = nosy();
                    assert!(call.poll_unpin(&mut std::task::Context::from_waker(&waker)).is_pending());
                }
            }
            let [first, second] = calls;
            drop((second, first));
        });
        sender.send(()).unwrap();
    });
    done.recv_timeout(LIMIT).expect("no deadlock");
}

// The other end: encoded items, run by worker processes.

fn items<A: serde::Serialize + 'static>(call: entry::Call, first: u64, arguments: &[A]) -> EncodedItems {
    let mut records = Vec::new();
    for argument in arguments {
        let message = wire::encode(argument).unwrap();
        spsc::append_record(&mut records, message.payload(argument)).unwrap();
    }
    let limits =
        Limits { timeout: None, grace: 10 * MS, retries: 0, retry_on: Retry::ALL, back_off: Duration::ZERO, chunk: 0 };
    let count = arguments.len() as u32;
    EncodedItems {
        call,
        first,
        count,
        attempt: 0,
        records: records.into(),
        limits,
        item_time: Some(MS),
        start_in: None,
        origin: Default::default(),
    }
}

/// The outcome of each item, by its index.
async fn outcomes(pool: &Pool, items: EncodedItems) -> Vec<(u64, Result<u64>)> {
    let mut run = pool.run_encoded(items).unwrap();
    let mut all = Vec::new();
    while let Some(results) = within(run.next()).await {
        results.check().unwrap();
        let mut rest = &results.records[..];
        for index in results.first..results.first + u64::from(results.count) {
            let (tag, payload, len) = spsc::first(rest).unwrap();
            all.push((index, entry::Outcome::read_reported(tag, payload, Vec::new())));
            rest = &rest[len..];
        }
    }
    all.sort_by_key(|(index, _)| *index);
    all
}

fn attempt_or_die(x: u64) -> u64 {
    match (x, current_task().map_or(0, |task| task.attempt())) {
        (1, 5) => std::process::abort(),
        (2, _) => std::process::abort(),
        (3, _) => panic!("three"),
        (4, _) => loop {
            std::thread::sleep(MS);
        },
        (x, attempt) => 100 * x + u64::from(attempt),
    }
}

#[tokio::test]
async fn encoded_items_run_with_deadlines_and_retries_each_and_keep_their_indexes() {
    let pool = Pool::new(2).unwrap();
    let call = entry::Call::of(attempt_or_die);
    let mut these = items(call, 1000, &[(0u64,), (1,), (2,), (3,)]);
    (these.attempt, these.limits.retries) = (5, 2);
    let mut outcomes_of_all = outcomes(&pool, these).await;
    let mut slow = items(call, 1004, &[(4u64,)]);
    slow.limits.timeout = Some(200 * MS);
    outcomes_of_all.extend(outcomes(&pool, slow).await);
    let texts = outcomes_of_all.iter().map(|(index, outcome)| match outcome {
        Ok(value) => format!("{index} {value}"),
        Err(error) => format!("{index} {:?} {error}", error.kind()),
    });
    let texts = texts.collect::<Vec<_>>();
    assert_eq!(texts[..2], ["1000 5", "1001 106"], "the second died once, in attempt 5");
    assert!(texts[2].starts_with("1002 ProcessDied") && texts[2].contains("item 1002 of "), "{}", texts[2]);
    assert!(texts[2].contains("(attempt 8)"), "{}", texts[2]);
    assert!(texts[3].starts_with("1003 Panicked") && texts[4].starts_with("1004 Timeout"), "{texts:?}");
}

#[tokio::test]
async fn encoded_items_spread_over_the_workers_and_large_results_come_back() {
    let pool = Pool::new(2).unwrap();
    // Both are up, once each has had an item.
    let tasks = || pool.stats().workers.iter().map(|worker| worker.tasks).collect::<Vec<_>>();
    let both = async {
        while !tasks().iter().all(|tasks| *tasks > 0) {
            futures_util::future::join_all((0..2).map(|_| pool.apply(std::thread::sleep, (5 * MS,)))).await;
        }
    };
    within(both).await;
    let before = tasks();
    let arguments: Vec<_> = (0..2000u64).map(|x| (x,)).collect();
    let outcomes = outcomes(&pool, items(entry::Call::of(plus_one), 7, &arguments)).await;
    assert!(
        outcomes
            .iter()
            .map(|(index, outcome)| (*index, *outcome.as_ref().unwrap()))
            .eq((0..2000).map(|x| (x + 7, x + 1)))
    );
    let after = tasks();
    assert!(after.iter().zip(&before).all(|(after, before)| after > before), "{before:?}, then {after:?}");
    let mut run = pool.run_encoded(items(entry::Call::of(|len: usize| vec![7u8; len]), 0, &[(3usize << 20,)])).unwrap();
    let results = within(run.next()).await.unwrap();
    assert_eq!((results.count, results.check().unwrap(), results.records.len() > 3 << 20), (1, 0, true));
    assert!(within(run.next()).await.is_none() && run.item_time().is_some());
}

#[tokio::test]
async fn encoded_items_of_strangers_are_refused_before_anything_runs() {
    let pool = Pool::new(1).unwrap();
    let good = items(entry::Call::of(plus_one), 0, &[(1u64,), (2,)]);
    let [offset, fingerprint] = good.call.to_words();
    let cases = [
        EncodedItems { call: entry::Call::from_words([offset + 1, fingerprint]), ..good.clone() },
        EncodedItems { call: entry::Call::from_words([offset, fingerprint + 1]), ..good.clone() },
        EncodedItems { count: 3, ..good.clone() },
        EncodedItems { count: 1, ..good.clone() },
        EncodedItems { count: u32::MAX, ..good.clone() },
        EncodedItems { first: u64::MAX, ..good.clone() },
        EncodedItems { records: good.records.slice(1..), ..good.clone() },
        EncodedItems { records: vec![0xff; 1 << 20].into(), ..good.clone() },
    ];
    for case in cases {
        let text = format!("{:?}", case.call);
        assert_eq!(pool.run_encoded(case).err().expect(&text).kind(), ErrorKind::Decode);
    }
    assert_eq!(outcomes(&pool, good).await.len(), 2);
}

#[tokio::test]
async fn dropping_an_encoded_run_stops_its_items() {
    let pool = Pool::new(1).unwrap();
    let mut run = pool.run_encoded(items(entry::Call::of(attempt_or_die), 0, &[(4u64,)])).unwrap();
    assert!(run.next().now_or_never().is_none());
    drop(run);
    assert_eq!(within(pool.apply(plus_one, (1,))).await.unwrap(), 2);
}
