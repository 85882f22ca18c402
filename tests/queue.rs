//! Queues: what the reference suite asks of them, and what only an async, crash-proof queue can promise.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use bytes::Bytes;
use common::{
    Deadline, Random, assert_no_growth, eventually, holdings, in_child, limit_descriptors, payload, read_payload,
    within,
};
use futures::{FutureExt, SinkExt, StreamExt};
use multiprocess::{self as mp, ErrorKind, Fd, JoinableQueue, Process, Queue};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

mp::test_support!();

const SHORT: Duration = Duration::from_millis(50);

// The reference suite.

#[tokio::test]
async fn queue_01_fresh_is_empty_and_not_full() {
    let queue = Queue::<u8>::bounded(6).unwrap();
    assert!(queue.is_empty() && !queue.is_full());
    assert_eq!((queue.len(), queue.capacity()), (0, Some(6)));
}

#[tokio::test]
async fn queue_02_every_form_of_put_succeeds_while_there_is_room() {
    let queue = Queue::bounded(4).unwrap();
    queue.put(1).await.unwrap();
    queue.try_put(2).unwrap();
    queue.put_timeout(3, Duration::ZERO).await.unwrap();
    let blocking = queue.clone();
    tokio::task::spawn_blocking(move || blocking.blocking_put(4)).await.unwrap().unwrap();
    assert_eq!(queue.len(), 4);
}

#[tokio::test]
async fn queue_03_filled_is_not_empty_and_full() {
    let queue = Queue::bounded(2).unwrap();
    queue.put('a').await.unwrap();
    assert!(!queue.is_empty() && !queue.is_full());
    queue.put('b').await.unwrap();
    assert!(!queue.is_empty() && queue.is_full());
}

#[tokio::test]
async fn queue_04_full_refuses_at_once_and_hands_the_value_back() {
    let queue = Queue::bounded(1).unwrap();
    queue.put("first".to_string()).await.unwrap();
    let error = queue.try_put("second".to_string()).unwrap_err();
    assert_eq!((error.kind(), error.into_inner().as_str()), (ErrorKind::Full, "second"));
}

#[tokio::test]
async fn queue_05_full_with_a_timeout_refuses_after_it() {
    let queue = Queue::bounded(1).unwrap();
    queue.put("first".to_string()).await.unwrap();
    let start = Instant::now();
    let error = within(queue.put_timeout("second".to_string(), SHORT)).await.unwrap_err();
    assert!(start.elapsed() >= SHORT);
    assert_eq!((error.kind(), error.into_inner().as_str()), (ErrorKind::Timeout, "second"));
    assert_eq!(queue.len(), 1);
}

#[tokio::test]
async fn queue_06_a_consumer_elsewhere_drains_it() {
    let queue = Queue::bounded(6).unwrap();
    for n in 0..6 {
        queue.put(n).await.unwrap();
    }
    let drain = |queue: Queue<i32>| (0..6).map(|_| queue.blocking_get().unwrap()).collect::<Vec<_>>();
    assert_eq!(in_child(drain, (queue.clone(),)).await, [0, 1, 2, 3, 4, 5]);
    assert!(queue.is_empty() && !queue.is_full());
}

#[tokio::test]
async fn queue_07_every_form_of_get_returns_in_order() {
    let queue = Queue::unbounded().unwrap();
    for n in 0..4 {
        queue.put(n).await.unwrap();
    }
    assert_eq!(queue.get().await.unwrap(), 0);
    assert_eq!(queue.get_timeout(SHORT).await.unwrap(), 1);
    assert_eq!(queue.try_get().unwrap(), 2);
    let blocking = queue.clone();
    assert_eq!(tokio::task::spawn_blocking(move || blocking.blocking_get()).await.unwrap().unwrap(), 3);
    assert!(queue.is_empty());
}

#[tokio::test]
async fn queue_08_empty_refuses_at_once() {
    let queue = Queue::<u8>::unbounded().unwrap();
    assert_eq!(queue.try_get().unwrap_err().kind(), ErrorKind::Empty);
}

#[tokio::test]
async fn queue_09_empty_with_a_timeout_refuses_after_it() {
    let queue = Queue::<u8>::unbounded().unwrap();
    let start = Instant::now();
    assert_eq!(within(queue.get_timeout(SHORT)).await.unwrap_err().kind(), ErrorKind::Timeout);
    assert!(start.elapsed() >= SHORT);
}

#[tokio::test]
async fn queue_10_items_of_a_process_that_exits_are_kept_and_order_holds_across_its_start() {
    let queue = Queue::unbounded().unwrap();
    for n in 0..10 {
        queue.put(n).await.unwrap();
    }
    in_child(
        async |queue: Queue<u32>| {
            for n in 10..20 {
                queue.put(n).await.unwrap()
            }
        },
        (queue.clone(),),
    )
    .await;
    for n in 0..20 {
        assert_eq!(within(queue.get()).await.unwrap(), n);
    }
    assert_eq!(queue.try_get().unwrap_err().kind(), ErrorKind::Empty);
}

#[tokio::test]
async fn queue_11_len_is_exact() {
    let queue = Queue::unbounded().unwrap();
    // Across segments of several sizes, which is where counting could go wrong.
    for round in 0..3 {
        for n in 0..200usize {
            assert_eq!(queue.len(), n);
            queue.put(vec![round as u8; n * 100]).await.unwrap();
        }
        let len_elsewhere = in_child(|queue: Queue<Vec<u8>>| queue.len(), (queue.clone(),)).await;
        assert_eq!(len_elsewhere, 200);
        for n in (0..200).rev() {
            queue.get().await.unwrap();
            assert_eq!(queue.len(), n);
        }
    }
}

#[tokio::test]
async fn queue_14_a_timed_out_get_takes_its_time() {
    let queue = Queue::<u8>::unbounded().unwrap();
    let start = Instant::now();
    let elsewhere = async |queue: Queue<u8>| queue.get_timeout(Duration::from_millis(200)).await.unwrap_err().kind();
    assert_eq!(in_child(elsewhere, (queue,)).await, ErrorKind::Timeout);
    assert!(start.elapsed() >= Duration::from_millis(200));
}

/// Cannot be serialised when it says so.
#[derive(Debug, PartialEq)]
struct Fussy(Option<u32>);

impl Serialize for Fussy {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.ok_or_else(|| serde::ser::Error::custom("this one does not travel"))?.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Fussy {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u32::deserialize(deserializer)? {
            13 => Err(serde::de::Error::custom("this one does not arrive")),
            n => Ok(Self(Some(n))),
        }
    }
}

#[tokio::test]
async fn queue_15_an_item_that_cannot_be_serialised_comes_back_and_later_ones_flow() {
    let queue = Queue::unbounded().unwrap();
    let error = queue.put(Fussy(None)).await.unwrap_err();
    assert_eq!((error.kind(), error.into_inner()), (ErrorKind::Encode, Fussy(None)));
    assert_eq!(queue.put_timeout(Fussy(None), SHORT).await.unwrap_err().kind(), ErrorKind::Encode);
    assert_eq!(queue.try_put(Fussy(None)).unwrap_err().kind(), ErrorKind::Encode);
    queue.put(Fussy(Some(1))).await.unwrap();
    assert_eq!(queue.get().await.unwrap(), Fussy(Some(1)));
}

#[tokio::test]
async fn queue_15_an_item_that_cannot_be_read_is_one_error_and_later_ones_flow() {
    let queue = Queue::unbounded().unwrap();
    queue.put(Fussy(Some(13))).await.unwrap();
    queue.put(Fussy(Some(14))).await.unwrap();
    assert_eq!(queue.get().await.unwrap_err().kind(), ErrorKind::Decode);
    assert_eq!(queue.get().await.unwrap(), Fussy(Some(14)));
}

#[tokio::test]
async fn queue_16_a_failed_put_takes_no_room() {
    let queue = Queue::bounded(1).unwrap();
    queue.put(Fussy(None)).await.unwrap_err();
    assert_eq!(queue.len(), 0);
    queue.try_put(Fussy(Some(2))).unwrap();
    assert!(queue.is_full());
}

#[tokio::test]
async fn queue_17_error_of_a_failed_put_has_the_reason_and_the_value() {
    let queue = Queue::unbounded().unwrap();
    let error = queue.put(Fussy(None)).await.unwrap_err();
    assert!(error.to_string().contains("this one does not travel"), "{error}");
    assert!(error.to_string().contains("Fussy"), "{error}");
    let error = mp::Error::from(error);
    assert_eq!(error.kind(), ErrorKind::Encode);
}

#[tokio::test]
async fn queue_18_closing_a_queue_never_used() {
    let queue = Queue::<u8>::unbounded().unwrap();
    queue.close();
    assert!(queue.is_empty() && queue.is_closed());
}

#[tokio::test]
async fn queue_19_closed_queue_fails_with_closed() {
    let queue = Queue::unbounded().unwrap();
    queue.put(1).await.unwrap();
    queue.close();
    assert!(queue.is_closed() && !queue.is_empty());
    assert_eq!(queue.get().await.unwrap(), 1);
    assert_eq!(queue.get().await.unwrap_err().kind(), ErrorKind::Closed);
    assert!(queue.is_empty());
}

#[tokio::test]
async fn queue_20_every_operation_on_a_closed_queue_fails_with_closed() {
    let queue = Queue::<u8>::bounded(1).unwrap();
    queue.close();
    assert_eq!(queue.put(1).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(queue.put_timeout(1, SHORT).await.unwrap_err().kind(), ErrorKind::Closed);
    let error = queue.try_put(7).unwrap_err();
    assert_eq!((error.kind(), error.into_inner()), (ErrorKind::Closed, 7));
    assert_eq!(queue.get().await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(queue.get_timeout(SHORT).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(queue.try_get().unwrap_err().kind(), ErrorKind::Closed);
    let (putter, getter) = (queue.clone(), queue.clone());
    let both = move || (putter.blocking_put(1).unwrap_err().kind(), getter.blocking_get().unwrap_err().kind());
    assert_eq!(tokio::task::spawn_blocking(both).await.unwrap(), (ErrorKind::Closed, ErrorKind::Closed));
}

#[test]
fn queue_22_capacity_beyond_the_limits_is_refused() {
    assert_eq!(Queue::<u8>::bounded(0).unwrap_err().kind(), ErrorKind::Other);
    assert_eq!(JoinableQueue::<u8>::bounded(0).unwrap_err().kind(), ErrorKind::Other);
    assert_eq!(Queue::<u8>::bounded(1 << 31).unwrap_err().kind(), ErrorKind::Other);
    assert_eq!(Queue::<u8>::bounded((1 << 31) - 1).unwrap().capacity(), Some((1 << 31) - 1));
    assert_eq!(Queue::<u8>::unbounded().unwrap().capacity(), None);
    assert!(!Queue::<u8>::unbounded().unwrap().is_full());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_23_close_wakes_every_waiter_in_every_process() {
    let (empty, full) = (Queue::<u8>::unbounded().unwrap(), Queue::bounded(1).unwrap());
    full.put(1u8).await.unwrap();
    let ready = Queue::unbounded().unwrap();
    let waiters = async |empty: Queue<u8>, full: Queue<u8>, ready: Queue<u8>| {
        let blocking = (empty.clone(), full.clone());
        let blocking = std::thread::spawn(move || {
            (blocking.0.blocking_get().unwrap_err(), blocking.1.blocking_put(2).unwrap_err().kind())
        });
        let gets = futures::future::join_all((0..3).map(|_| empty.get()));
        let puts = futures::future::join_all((0..3).map(|n| full.put(n)));
        let (mut gets, mut puts) = (gets.fuse(), puts.fuse());
        assert!(futures::poll!(&mut gets).is_pending() && futures::poll!(&mut puts).is_pending());
        ready.put(0).await.unwrap();
        let (gets, puts) = futures::join!(gets, puts);
        assert!(gets.into_iter().all(|result| result.unwrap_err().kind() == ErrorKind::Closed));
        assert!(puts.into_iter().all(|result| result.unwrap_err().kind() == ErrorKind::Closed));
        let (get, put) = blocking.join().unwrap();
        assert_eq!((get.kind(), put), (ErrorKind::Closed, ErrorKind::Closed));
    };
    let arguments = || (empty.clone(), full.clone(), ready.clone());
    let children: Vec<_> = (0..3).map(|_| Process::spawn(waiters, arguments()).unwrap()).collect();
    let (a, b, c) = arguments();
    let here = tokio::spawn(async move { waiters(a, b, c).await });
    for _ in 0..4 {
        within(ready.get()).await.unwrap();
    }
    empty.close();
    full.close();
    for child in children {
        within(child).await.unwrap();
    }
    within(here).await.unwrap();
    assert_eq!(full.get().await.unwrap(), 1);
}

#[tokio::test]
async fn queue_25_a_child_that_put_much_can_be_joined_before_any_get() {
    // There is no feeder to flush: what was put is in the queue (P8).
    let queue = Queue::unbounded().unwrap();
    in_child(|queue: Queue<Vec<u8>>| queue.blocking_put(vec![7; 100 << 20]).unwrap(), (queue.clone(),)).await;
    assert_eq!(queue.len(), 1);
    let bytes = queue.get().await.unwrap();
    assert!(bytes == vec![7; 100 << 20]);
}

#[tokio::test]
async fn queue_31_a_handle_serialised_outside_a_journey_is_refused() {
    let queue = Queue::<u8>::unbounded().unwrap();
    assert!(serde_json::to_vec(&queue).unwrap_err().to_string().contains("on its way to another process"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_32_messages_of_one_producer_keep_their_order() {
    let queue = Queue::bounded(10).unwrap();
    let produce = async |queue: Queue<(u32, u32)>, me: u32| {
        for n in 0..1000 {
            queue.put((me, n)).await.unwrap();
        }
    };
    let children: Vec<_> = (0..3).map(|me| Process::spawn(produce, (queue.clone(), me)).unwrap()).collect();
    let mut next = [0; 3];
    for _ in 0..3000 {
        let (producer, n) = within(queue.get()).await.unwrap();
        assert_eq!(n, next[producer as usize]);
        next[producer as usize] += 1;
    }
    for child in children {
        within(child).await.unwrap();
    }
    assert!(queue.is_empty());
}

#[tokio::test]
async fn simpleq_01_a_closed_queue_never_used_answers() {
    let queue = Queue::<u8>::unbounded().unwrap();
    queue.close();
    assert_eq!(queue.try_get().unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn simpleq_02_emptiness_is_seen_from_both_sides() {
    let queue = Queue::unbounded().unwrap();
    assert!(queue.is_empty());
    let put = |queue: Queue<bool>| {
        let before = queue.is_empty();
        queue.blocking_put(true).unwrap();
        (before, queue.is_empty())
    };
    assert_eq!(in_child(put, (queue.clone(),)).await, (true, false));
    assert!(!queue.is_empty());
    assert!(queue.get().await.unwrap());
    assert!(queue.is_empty());
    assert!(in_child(|queue: Queue<bool>| queue.is_empty(), (queue,)).await);
}

#[tokio::test]
async fn simpleq_03_closing_twice_is_fine() {
    let queue = Queue::<u8>::unbounded().unwrap();
    queue.close();
    queue.close();
    in_child(|queue: Queue<u8>| queue.close(), (queue.clone(),)).await;
    assert!(queue.is_closed());
}

#[tokio::test]
async fn simpleq_04_close_closes_for_everybody() {
    let queue = Queue::<u8>::unbounded().unwrap();
    in_child(|queue: Queue<u8>| queue.close(), (queue.clone(),)).await;
    assert!(queue.is_closed());
    assert_eq!(queue.try_put(1).unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(queue.try_get().unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn simpleq_05_a_large_put_without_a_reader_waits_only_for_capacity() {
    let unbounded = Queue::unbounded().unwrap();
    within(unbounded.put(vec![1u8; 1 << 20])).await.unwrap();
    let bounded = Queue::bounded(1).unwrap();
    within(bounded.put(vec![1u8; 1 << 20])).await.unwrap();
    let second = bounded.put(vec![2u8; 1 << 20]);
    futures::pin_mut!(second);
    assert!(futures::poll!(&mut second).is_pending());
    assert_eq!(bounded.get().await.unwrap()[0], 1);
    within(second).await.unwrap();
    assert_eq!(bounded.get().await.unwrap()[0], 2);
}

// Futures.

#[tokio::test]
async fn futures_are_served_in_the_order_of_their_first_poll() {
    let queue = Queue::unbounded().unwrap();
    let mut getters: Vec<_> = (0..10).map(|_| Box::pin(queue.get())).collect();
    let order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7];
    for n in order {
        assert!(futures::poll!(&mut getters[n]).is_pending());
    }
    for n in 0..10 {
        queue.put(n).await.unwrap();
    }
    let got = within(futures::future::join_all(getters)).await;
    for (place, n) in order.into_iter().enumerate() {
        assert_eq!(*got[n].as_ref().unwrap(), place);
    }
    let queue = Queue::bounded(1).unwrap();
    queue.put(100).await.unwrap();
    let mut putters: Vec<_> = (0..10).map(|n| Box::pin(queue.put(n))).collect();
    for n in order {
        assert!(futures::poll!(&mut putters[n]).is_pending());
    }
    let take = async {
        let mut got = Vec::new();
        for _ in 0..11 {
            got.push(queue.get().await.unwrap());
        }
        got
    };
    let (_, got) = within(async { futures::join!(futures::future::join_all(putters), take) }).await;
    assert_eq!(got[1..], order);
}

#[tokio::test]
async fn a_later_getter_does_not_overtake_one_that_waits() {
    let queue = Queue::unbounded().unwrap();
    let mut first = Box::pin(queue.get());
    assert!(futures::poll!(&mut first).is_pending());
    queue.put(1).await.unwrap();
    let mut second = Box::pin(queue.get());
    assert!(futures::poll!(&mut second).is_pending());
    queue.put(2).await.unwrap();
    assert!(second.now_or_never().is_none());
    assert_eq!(within(first).await.unwrap(), 1);
    assert_eq!(within(queue.get()).await.unwrap(), 2);
}

#[tokio::test]
async fn stream_ends_after_the_last_item_and_sink_flushes_on_close() {
    let queue = Queue::bounded(2).unwrap();
    let mut sink = queue.sink();
    let feed = async {
        let mut items = futures::stream::iter((0..100).map(Ok));
        sink.send_all(&mut items).await.unwrap();
        queue.close();
    };
    let mut stream = queue.stream();
    let drain = async {
        let mut sum = 0;
        while let Some(item) = stream.next().await {
            sum += item.unwrap();
        }
        sum
    };
    let ((), sum) = within(async { futures::join!(feed, drain) }).await;
    assert_eq!(sum, (0..100).sum::<i32>());
    assert!(stream.next().await.is_none());
    assert_eq!(queue.sink().send(1).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn an_item_that_a_sink_was_not_ready_for_is_refused() {
    let queue = Queue::bounded(1).unwrap();
    let mut sink = queue.sink();
    sink.start_send_unpin(1).unwrap();
    // No room: the sink keeps it.
    sink.start_send_unpin(2).unwrap();
    assert_eq!(queue.try_get().unwrap(), 1);
    assert_eq!(sink.start_send_unpin(3).unwrap_err().kind(), ErrorKind::Other);
    within(sink.flush()).await.unwrap();
    assert_eq!(queue.try_get().unwrap(), 2);
    sink.start_send_unpin(3).unwrap();
    assert_eq!((queue.try_get().unwrap(), queue.len()), (3, 0));
}

#[tokio::test]
async fn closing_a_sink_leaves_the_queue_open() {
    let queue = Queue::bounded(1).unwrap();
    let mut sink = queue.sink();
    sink.send(1).await.unwrap();
    within(sink.close()).await.unwrap();
    assert_eq!((queue.is_closed(), queue.try_get().unwrap()), (false, 1));
}

#[tokio::test]
async fn a_dropped_stream_loses_nothing() {
    let queue = Queue::unbounded().unwrap();
    let mut stream = queue.stream();
    assert!(futures::poll!(stream.next()).is_pending());
    queue.put(1).await.unwrap();
    drop(stream);
    assert_eq!(queue.try_get().unwrap(), 1);
}

fn is_send<T: Send + 'static>(_: &T) {}
fn is_send_future<T: Send>(_: &T) {}

#[tokio::test]
async fn handles_are_send_and_futures_are_send_for_items_that_are_not_sync() {
    fn all<T: Send + Sync + Unpin + 'static>() {}
    all::<Queue<std::cell::Cell<u8>>>();
    all::<JoinableQueue<std::cell::Cell<u8>>>();
    fn send<T: Send + 'static>() {}
    send::<mp::QueueStream<std::cell::Cell<u8>>>();
    send::<mp::QueueSink<std::cell::Cell<u8>>>();
    let queue = Queue::<std::cell::Cell<u8>>::unbounded().unwrap();
    is_send(&queue);
    let put = queue.put(std::cell::Cell::new(1));
    is_send_future(&put);
    put.await.unwrap();
    is_send_future(&queue.put_timeout(std::cell::Cell::new(1), SHORT));
    is_send_future(&queue.get_timeout(SHORT));
    let get = queue.get();
    is_send_future(&get);
    assert_eq!(get.await.unwrap().get(), 1);
}

#[tokio::test]
async fn debug_shows_the_state_of_the_queue() {
    let queue = Queue::bounded(3).unwrap();
    queue.put(1).await.unwrap();
    assert_eq!(format!("{queue:?}"), "Queue { len: 1, capacity: Some(3), is_closed: false }");
    let text = format!("{:?}", JoinableQueue::<u8>::unbounded().unwrap());
    assert_eq!(text, "JoinableQueue { len: 0, capacity: None, is_closed: false }");
}

// Handles that travel.

#[derive(Serialize, Deserialize)]
struct Luggage {
    one: Queue<u32>,
    many: Vec<Queue<u32>>,
    perhaps: Option<Queue<u32>>,
    none: Option<Queue<u32>>,
    named: HashMap<String, Queue<u32>>,
    tuple: (u8, Box<Queue<u32>>),
}

#[tokio::test]
async fn handles_travel_inside_other_values() {
    let queues: Vec<Queue<u32>> = (0..6).map(|_| Queue::unbounded().unwrap()).collect();
    let luggage = Luggage {
        one: queues[0].clone(),
        many: vec![queues[1].clone(), queues[2].clone()],
        perhaps: Some(queues[3].clone()),
        none: None,
        named: HashMap::from([("x".into(), queues[4].clone())]),
        tuple: (7, Box::new(queues[5].clone())),
    };
    let put_to_all = |luggage: Luggage| {
        luggage.one.blocking_put(0).unwrap();
        luggage.many[0].blocking_put(1).unwrap();
        luggage.many[1].blocking_put(2).unwrap();
        luggage.perhaps.as_ref().unwrap().blocking_put(3).unwrap();
        assert!(luggage.none.is_none());
        luggage.named["x"].blocking_put(4).unwrap();
        luggage.tuple.1.blocking_put(5).unwrap();
        luggage
    };
    let back = in_child(put_to_all, (luggage,)).await;
    for (n, queue) in queues.iter().enumerate() {
        assert_eq!(queue.try_get().unwrap(), n as u32);
    }
    back.tuple.1.put(6).await.unwrap();
    assert_eq!(queues[5].try_get().unwrap(), 6);
}

#[tokio::test]
async fn handles_travel_through_queues_and_pipes_and_on_to_grandchildren() {
    let carrier = Queue::<Queue<u32>>::unbounded().unwrap();
    let (mut here, there) = mp::pipe::<Queue<u32>, Queue<u32>>().unwrap();
    let child = async |carrier: Queue<Queue<u32>>, mut pipe: mp::Connection<Queue<u32>, Queue<u32>>| {
        let through_queue = carrier.get().await.unwrap();
        let through_pipe = pipe.recv().await.unwrap();
        let grandchild = async |a: Queue<u32>, b: Queue<u32>| {
            a.put(1).await.unwrap();
            b.put(2).await.unwrap();
            a
        };
        let back = Process::spawn(grandchild, (through_queue, through_pipe)).unwrap().await.unwrap();
        pipe.send(back).await.unwrap();
    };
    let child = Process::spawn(child, (carrier.clone(), there)).unwrap();
    let (a, b) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    carrier.put(a.clone()).await.unwrap();
    here.send(b.clone()).await.unwrap();
    let back = within(here.recv()).await.unwrap();
    within(child).await.unwrap();
    assert_eq!((back.try_get().unwrap(), b.try_get().unwrap()), (1, 2));
}

#[tokio::test]
async fn a_queue_can_travel_through_itself() {
    #[derive(Serialize, Deserialize)]
    struct Nested(Option<Box<Queue<Nested>>>);
    let queue = Queue::unbounded().unwrap();
    queue.put(Nested(Some(Box::new(queue.clone())))).await.unwrap();
    let inner = queue.get().await.unwrap().0.unwrap();
    inner.put(Nested(None)).await.unwrap();
    assert!(queue.get().await.unwrap().0.is_none());
}

#[tokio::test]
async fn a_queue_made_in_a_child_outlives_it_with_its_items() {
    let make = || {
        let queue = Queue::unbounded().unwrap();
        for n in 0..1000 {
            queue.blocking_put((n, vec![n as u8; 1000])).unwrap();
        }
        let file = std::fs::File::open("/proc/self/comm").unwrap();
        (queue, Fd::new(file))
    };
    let (queue, _file) = in_child(make, ()).await;
    assert_eq!(queue.len(), 1000);
    for n in 0..1000u32 {
        assert_eq!(queue.try_get().unwrap(), (n, vec![n as u8; 1000]));
    }
    queue.put((0, vec![])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_handle_received_100_000_times_costs_nothing() {
    let (carrier, handle) = (Queue::<Queue<u8>>::bounded(64).unwrap(), Queue::unbounded().unwrap());
    let receive = |carrier: Queue<Queue<u8>>| {
        let first = carrier.blocking_get().unwrap();
        limit_descriptors(8);
        let before = holdings();
        for _ in 1..100_000 {
            let again = carrier.blocking_get().unwrap();
            assert_eq!(again.len(), 0);
        }
        let after = holdings();
        first.blocking_put(1).unwrap();
        (before, after)
    };
    let child = Process::spawn(receive, (carrier.clone(),)).unwrap();
    within(async {
        for _ in 0..100_000 {
            carrier.put(handle.clone()).await.unwrap();
        }
    })
    .await;
    let (before, after) = within(child).await.unwrap();
    assert_no_growth(before, after);
    assert!(after.descriptors <= 128, "{after:?}");
    assert_eq!(handle.try_get().unwrap(), 1);
}

fn descriptors(count: usize) -> Vec<Fd<std::fs::File>> {
    (0..count)
        .map(|n| {
            let mut file = std::fs::File::from(rustix::fs::memfd_create("n", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
            write!(file, "{n}").unwrap();
            Fd::new(file)
        })
        .collect()
}

fn read_numbers(files: Vec<Fd<std::fs::File>>) -> Vec<usize> {
    let read = |mut file: Fd<std::fs::File>| {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text.parse().unwrap()
    };
    files.into_iter().map(read).collect()
}

#[tokio::test]
async fn a_value_with_1000_descriptors_travels_every_way() {
    let all: Vec<usize> = (0..1000).collect();
    let whole = async || {
        let before = holdings();
        // As an argument and as a result.
        let child = Process::spawn(|files: Vec<Fd<std::fs::File>>| files, (descriptors(1000),)).unwrap();
        assert_eq!(read_numbers(child.await.unwrap()), (0..1000).collect::<Vec<_>>());
        // Through a queue and a pipe.
        let queue = Queue::unbounded().unwrap();
        let (mut tx, mut rx) = mp::simplex().unwrap();
        for _ in 0..3 {
            queue.put(descriptors(1000)).await.unwrap();
            tx.send(descriptors(1000)).await.unwrap();
            assert_eq!(read_numbers(queue.get().await.unwrap()), (0..1000).collect::<Vec<_>>());
            assert_eq!(read_numbers(rx.recv().await.unwrap()), (0..1000).collect::<Vec<_>>());
        }
        drop((queue, tx, rx));
        // The bell of this process is watched from the first wait on.
        holdings().descriptors - before.descriptors
    };
    assert!(in_child(whole, ()).await <= 8);
    let queue = Queue::unbounded().unwrap();
    let through = Queue::unbounded().unwrap();
    queue.put(descriptors(1000)).await.unwrap();
    let forward = |from: Queue<Vec<Fd<std::fs::File>>>, to: Queue<Vec<Fd<std::fs::File>>>| {
        to.blocking_put(from.blocking_get().unwrap()).unwrap();
    };
    in_child(forward, (queue, through.clone())).await;
    assert_eq!(read_numbers(through.get().await.unwrap()), all);
}

#[tokio::test]
async fn a_receiver_at_its_descriptor_limit_gets_an_error_and_nothing_leaks() {
    let receive = |queue: Queue<Vec<Fd<std::fs::File>>>| {
        let before = holdings();
        limit_descriptors(5);
        for _ in 0..20 {
            let error = queue.blocking_get().unwrap_err();
            assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
        }
        assert_eq!(read_numbers(queue.blocking_get().unwrap()), [0, 1]);
        (before, holdings())
    };
    let send = async |receive: Queue<Queue<Vec<Fd<std::fs::File>>>>| {
        let queue = Queue::unbounded().unwrap();
        receive.put(queue.clone()).await.unwrap();
        let before = holdings();
        for count in [10, 300].into_iter().cycle().take(20) {
            queue.put(descriptors(count)).await.unwrap();
        }
        queue.put(descriptors(2)).await.unwrap();
        (before, holdings())
    };
    let carrier = Queue::unbounded().unwrap();
    let (before, after) = in_child(send, (carrier.clone(),)).await;
    assert_no_growth(before, after);
    let (before, after) = in_child(receive, (carrier.get().await.unwrap(),)).await;
    assert_no_growth(before, after);
}

#[tokio::test]
async fn a_list_of_descriptors_arrives_where_there_is_no_room_for_copies_of_them() {
    let receive = |queue: Queue<Vec<Fd<std::fs::File>>>| {
        limit_descriptors(150);
        read_numbers(queue.blocking_get().unwrap())
    };
    let queue = Queue::unbounded().unwrap();
    queue.put(descriptors(100)).await.unwrap();
    assert!(in_child(receive, (queue,)).await.into_iter().eq(0..100));
}

#[tokio::test]
async fn messages_with_more_descriptors_than_the_kernel_holds_wait_and_arrive() {
    // The kernel's socket takes some 270 packets; this must neither fail nor stall at its end.
    let queue = Queue::<Vec<Fd<std::fs::File>>>::unbounded().unwrap();
    let put_all = async {
        for n in 0..1000 {
            queue.put(descriptors(if n % 10 == 9 { 600 } else { 1 })).await.unwrap();
            if n % 100 == 99 {
                tokio::task::yield_now().await;
            }
        }
    };
    let get_all = async {
        for n in 0..1000 {
            let count = if n % 10 == 9 { 600 } else { 1 };
            assert_eq!(queue.get().await.unwrap().len(), count, "message {n}");
        }
    };
    within(async { futures::join!(put_all, get_all) }).await;
}

#[tokio::test]
async fn a_message_of_many_descriptors_behind_a_full_socket_arrives() {
    let queue = Queue::<Vec<Fd<std::fs::File>>>::unbounded().unwrap();
    let mut few = 0;
    let full = loop {
        match queue.try_put(descriptors(1)) {
            Ok(()) => few += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), ErrorKind::Full);
    let mut put = Box::pin(queue.put(descriptors(1000)));
    assert!(futures::poll!(&mut put).is_pending());
    let take_few = async {
        for _ in 0..few {
            assert_eq!(queue.get().await.unwrap().len(), 1);
        }
    };
    let (put, ()) = within(async { futures::join!(put, take_few) }).await;
    put.unwrap();
    assert_eq!(queue.get().await.unwrap().len(), 1000);
}

// Sizes and types.

#[tokio::test]
async fn bytes_of_every_size_and_type_arrive() {
    #[allow(clippy::manual_async_fn)] // An `async fn` would ask `make` to be `Send` across its awaits.
    fn check<T>(make: impl Fn(Vec<u8>) -> T) -> impl Future<Output = ()>
    where
        T: Serialize + serde::de::DeserializeOwned + Send + AsRef<[u8]> + 'static,
    {
        async move {
            let (to, from) = (Queue::<T>::unbounded().unwrap(), Queue::<T>::unbounded().unwrap());
            let echo = |from: Queue<T>, to: Queue<T>| {
                while let Ok(value) = from.blocking_get() {
                    to.blocking_put(value).unwrap();
                }
            };
            let child = Process::spawn(echo, (to.clone(), from.clone())).unwrap();
            for size in [0, 1, 7, 8, 9, 100, 4095, 4096, 65_516, 65_536, 65_537, 1 << 20, 9 << 20] {
                let bytes = payload(3, size as u64, size);
                to.put(make(bytes.clone())).await.unwrap();
                assert!(within(from.get()).await.unwrap().as_ref() == bytes, "{size} bytes");
            }
            to.put(make(Vec::new())).await.unwrap();
            assert!(within(from.get()).await.unwrap().as_ref().is_empty());
            to.close();
            within(child).await.unwrap();
        }
    }
    check(|bytes| bytes).await;
    check(Bytes::from).await;
    check(Vec::into_boxed_slice).await;
}

#[tokio::test]
async fn messages_without_any_bytes() {
    let queue = Queue::<()>::unbounded().unwrap();
    let empty = Queue::<Vec<u8>>::bounded(3).unwrap();
    for _ in 0..3 {
        queue.put(()).await.unwrap();
        empty.put(Vec::new()).await.unwrap();
    }
    assert_eq!((queue.len(), empty.len(), empty.is_full()), (3, 3, true));
    for _ in 0..3 {
        queue.get().await.unwrap();
        assert!(empty.get().await.unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_producers_of_large_messages_tear_nothing() {
    let queue = Queue::bounded(4).unwrap();
    let produce = async |queue: Queue<Vec<u8>>, me: u32| {
        let mut random = Random::new(me.into());
        for n in 0..100 {
            queue.put(payload(me, n, random.size(1 << 20))).await.unwrap();
        }
    };
    let children: Vec<_> = (0..3).map(|me| Process::spawn(produce, (queue.clone(), me)).unwrap()).collect();
    let mut next = [0; 3];
    for _ in 0..300 {
        let (producer, n) = read_payload(&within(queue.get()).await.unwrap());
        assert_eq!(n, next[producer as usize]);
        next[producer as usize] += 1;
    }
    for child in children {
        within(child).await.unwrap();
    }
}

// Runtimes and plain functions.

#[test]
fn blocking_calls_work_without_any_runtime() {
    let _deadline = Deadline::start();
    let queue = Queue::bounded(3).unwrap();
    let getter = std::thread::spawn({
        let queue = queue.clone();
        move || std::iter::from_fn(|| queue.blocking_get().ok()).sum::<u64>()
    });
    (0..10_000).for_each(|n| queue.blocking_put(n).unwrap());
    queue.close();
    assert_eq!(getter.join().unwrap(), (0..10_000).sum::<u64>());
}

thread_local! {
    /// The file in which this thread panicked last.
    static PANICKED_IN: std::cell::RefCell<Option<String>> = const { std::cell::RefCell::new(None) };
}

#[tokio::test]
async fn blocking_calls_inside_async_code_panic_at_the_line_of_their_caller() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICKED_IN.set(panic.location().map(|place| place.file().to_owned()));
        usual(panic);
    }));
    let queue = Queue::<u8>::bounded(1).unwrap();
    for call in [0, 1, 2] {
        let queue = queue.clone();
        let task = tokio::spawn(async move {
            match call {
                0 => drop(queue.blocking_put(1)),
                1 => drop(queue.blocking_get()),
                _ => multiprocess::run(async {}),
            }
        });
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!(PANICKED_IN.take().as_deref(), Some(file!()), "{call}");
    }
    assert!(queue.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_on_a_multi_thread_runtime() {
    let queue = Queue::bounded(3).unwrap();
    let put = |queue: Queue<u64>, t: u64| async move {
        for n in 0..5000 {
            queue.put(t * 5000 + n).await.unwrap();
        }
    };
    let get = |queue: Queue<u64>| async move {
        let mut sum = 0;
        while let Ok(n) = queue.get().await {
            sum += n;
        }
        sum
    };
    let putters: Vec<_> = (0..4).map(|t| tokio::spawn(put(queue.clone(), t))).collect();
    let getters: Vec<_> = (0..4).map(|_| tokio::spawn(get(queue.clone()))).collect();
    for putter in putters {
        within(putter).await.unwrap();
    }
    queue.close();
    let mut sum = 0;
    for getter in getters {
        sum += within(getter).await.unwrap();
    }
    assert_eq!(sum, (0..20_000).sum::<u64>());
}

fn current_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Puts what it gets back, one more: a peer in another process.
fn echo(from: Queue<u32>, to: Queue<u32>) {
    while let Ok(n) = from.blocking_get() {
        to.blocking_put(n + 1).unwrap();
    }
}

#[test]
fn several_runtimes_one_after_another() {
    let _deadline = Deadline::start();
    let (to, from) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let _child = Process::spawn(echo, (to.clone(), from.clone())).unwrap();
    for n in 0..20 {
        let runtime = if n & 1 == 0 { current_thread() } else { tokio::runtime::Runtime::new().unwrap() };
        let answer = runtime.block_on(async {
            let mut get = Box::pin(from.get());
            assert!(futures::poll!(&mut get).is_pending());
            tokio::time::sleep(Duration::from_millis(1)).await;
            to.put(n).await.unwrap();
            get.await.unwrap()
        });
        assert_eq!(answer, n + 1);
    }
    to.close();
}

#[test]
fn queue_serves_several_runtimes_at_once() {
    let _deadline = Deadline::start();
    let (to, from) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let _child = Process::spawn(echo, (to.clone(), from.clone())).unwrap();
    let thread = |n: u32| {
        let (to, from) = (to.clone(), from.clone());
        std::thread::spawn(move || {
            let runtime = if n.is_multiple_of(2) { current_thread() } else { tokio::runtime::Runtime::new().unwrap() };
            runtime.block_on(async {
                let mut sum = 0;
                for n in 0..300 {
                    to.put(n).await.unwrap();
                    sum += from.get().await.unwrap();
                }
                sum
            })
        })
    };
    let threads: Vec<_> = (0..4).map(thread).collect();
    let sum: u32 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert_eq!(sum, 4 * (1..=300).sum::<u32>());
    to.close();
}

#[test]
fn a_waiter_behind_one_whose_runtime_ended_is_woken_from_another_process() {
    let _deadline = Deadline::start();
    let (to, from) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let _child = Process::spawn(echo, (to.clone(), from.clone())).unwrap();
    let first = current_thread();
    first.spawn({
        let from = from.clone();
        async move { from.get().await.map(drop) }
    });
    first.block_on(async { tokio::time::sleep(Duration::from_millis(20)).await });
    let second = std::thread::spawn({
        let from = from.clone();
        move || {
            current_thread().block_on(async {
                let mut get = Box::pin(from.get());
                assert!(futures::poll!(&mut get).is_pending());
                tokio::task::spawn_blocking(|| drop(first)).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
                to.put(1).await.unwrap();
                within(get).await.unwrap()
            })
        }
    });
    assert_eq!(second.join().unwrap(), 2);
}

#[test]
fn a_future_that_moves_to_another_runtime_is_woken_there() {
    let _deadline = Deadline::start();
    let (to, from) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let _child = Process::spawn(echo, (to.clone(), from.clone())).unwrap();
    let (first, second) = (current_thread(), current_thread());
    let mut get = Box::pin(from.get());
    first.block_on(async {
        assert!(futures::poll!(&mut get).is_pending());
        // The first look may have been all: sleep for real.
        let _ = tokio::time::timeout(Duration::from_millis(20), &mut get).await;
    });
    let answer = second.block_on(async {
        assert!(futures::poll!(&mut get).is_pending());
        to.put(5).await.unwrap();
        within(get).await.unwrap()
    });
    assert_eq!(answer, 6);
    drop(first);
}

/// A waker that holds a future.
struct Holder(#[expect(dead_code, reason = "it is held")] std::sync::Mutex<futures::future::BoxFuture<'static, ()>>);

impl std::task::Wake for Holder {
    fn wake(self: std::sync::Arc<Self>) {}
}

#[tokio::test]
async fn a_waker_that_takes_other_waiters_with_it_hangs_nobody() {
    let _deadline = Deadline::after(Duration::from_secs(20));
    for goes in [true, false] {
        let queue = Queue::<u32>::unbounded().unwrap();
        let mut first = Box::pin(queue.get());
        let other = queue.clone();
        let mut second = async move { drop(other.get().await) }.boxed();
        let mut nobody = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(first.as_mut().poll(&mut nobody).is_pending());
        assert!(second.as_mut().poll(&mut nobody).is_pending());
        let holder = std::sync::Arc::new(Holder(second.into()));
        let waker = std::task::Waker::from(holder.clone());
        while std::sync::Arc::strong_count(&holder) < 3 {
            assert!(first.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending());
            // A task may not poll without end.
            tokio::task::yield_now().await;
        }
        // From now on only the line has it.
        drop((holder, waker));
        if !goes {
            assert!(first.as_mut().poll(&mut nobody).is_pending());
        }
        drop(first);
        queue.put(1).await.unwrap();
        assert_eq!(within(queue.get()).await.unwrap(), 1);
    }
}

#[test]
fn timeouts_without_a_timer_are_errors() {
    let (queue, full) = (Queue::<u32>::unbounded().unwrap(), Queue::bounded(1).unwrap());
    full.try_put(1).unwrap();
    let (_tx, mut rx) = mp::simplex::<u32>().unwrap();
    let mut all = async || {
        assert_eq!(queue.get_timeout(SHORT).await.unwrap_err().kind(), ErrorKind::Io);
        let refused = full.put_timeout(2, SHORT).await.unwrap_err();
        assert_eq!((refused.kind(), refused.into_inner()), (ErrorKind::Io, 2));
        assert_eq!(rx.recv_timeout(SHORT).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(rx.poll(SHORT).await.unwrap_err().kind(), ErrorKind::Io);
    };
    futures::executor::block_on(all());
    tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap().block_on(all());
}

#[test]
fn the_last_values_of_a_thread_can_still_put() {
    struct Last(Queue<String>, Queue<Fd<std::fs::File>>);
    impl Drop for Last {
        fn drop(&mut self) {
            self.0.try_put("last".into()).unwrap();
            // What rides along needs more of the thread than there is.
            let refused = self.1.try_put(file()).unwrap_err();
            self.0.try_put(format!("{:?}", refused.kind())).unwrap();
            self.0.try_put(format!("{:?}", self.1.try_get().unwrap_err().kind())).unwrap();
        }
    }
    thread_local! {
        static LAST: std::cell::RefCell<Option<Last>> = const { std::cell::RefCell::new(None) };
    }
    fn file() -> Fd<std::fs::File> {
        Fd::new(std::fs::File::open("/dev/null").unwrap())
    }
    let (texts, files) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let last = Last(texts.clone(), files.clone());
    let thread = std::thread::spawn(move || {
        // Values of a thread go in the reverse order of their first use.
        LAST.set(Some(last));
        LAST.with_borrow(|last| {
            let Last(texts, files) = last.as_ref().unwrap();
            texts.try_put("first".into()).unwrap();
            (0..2).for_each(|_| files.try_put(file()).unwrap());
            files.try_get().unwrap();
        });
    });
    thread.join().unwrap();
    let all: Vec<String> = (0..4).map(|_| texts.try_get().unwrap()).collect();
    assert_eq!(all, ["first", "last", "Encode", "Decode"]);
}

#[tokio::test]
async fn a_put_that_fails_when_it_is_woken_wakes_the_next() {
    type Files = Vec<Fd<std::fs::File>>;
    let fail = async |queue: Queue<Files>, told: Queue<String>, done: Queue<()>| {
        let mut put = std::pin::pin!(queue.put(descriptors(300)));
        common::falls_asleep(put.as_mut()).await;
        // So many travel in a socket of their own, and there will be none.
        limit_descriptors(0);
        told.try_put("asleep".into()).unwrap();
        told.try_put(format!("{:?}", within(put).await.unwrap_err().kind())).unwrap();
        // Its end would make everybody look.
        within(done.get()).await.unwrap();
    };
    let (queue, told, done) =
        (Queue::<Files>::bounded(1).unwrap(), Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    queue.put(vec![]).await.unwrap();
    let child = Process::spawn(fail, (queue.clone(), told.clone(), done.clone())).unwrap();
    assert_eq!(within(told.get()).await.unwrap(), "asleep");
    let second = queue.clone();
    let mut put = Box::pin(async move { second.put(descriptors(1)).await });
    common::falls_asleep(put.as_mut()).await;
    // A task, which is polled when it is woken and not before.
    let put = tokio::spawn(put);
    tokio::task::yield_now().await;
    // The child is the first in line, and has nothing left to do but to be woken.
    eventually("it sleeps", || common::is_asleep(child.pid())).await;
    assert!(queue.try_get().unwrap().is_empty());
    assert_eq!(within(told.get()).await.unwrap(), "Io");
    within(put).await.unwrap().unwrap();
    done.put(()).await.unwrap();
    within(child).await.unwrap();
}

#[tokio::test]
async fn an_idle_queue_gives_everything_back_when_its_last_handle_goes() {
    let whole = async || {
        let _warm = Queue::<u8>::unbounded().unwrap();
        let before = holdings();
        for n in 0..50usize {
            let queue = Queue::unbounded().unwrap();
            queue.put(vec![0u8; n * 10_000]).await.unwrap();
            queue.put(vec![0u8; n * 100_000]).await.unwrap();
            if n % 2 == 0 {
                queue.get().await.unwrap();
            }
        }
        (before, holdings())
    };
    let (before, after) = in_child(whole, ()).await;
    assert_eq!(before, after);
}

#[tokio::test]
async fn threads_that_still_put_when_their_process_returns_tear_nothing() {
    // A child's function returns while another thread of it is in the middle of a large put.
    let queue = Queue::bounded(20).unwrap();
    let child = |queue: Queue<Vec<u8>>, me: u32| {
        std::thread::spawn(move || (0..=u64::MAX).for_each(|n| queue.blocking_put(payload(me, n, 300_000)).unwrap()));
        std::thread::sleep(Duration::from_micros(u64::from(me) * 37 % 4000));
    };
    for me in 0..20 {
        let ended = Process::spawn(child, (queue.clone(), me)).unwrap();
        let puts = async {
            for n in 0..20 {
                queue.put(payload(1000 + me, n, 200_000)).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let mut next = 0;
        let gets = async {
            while next < 20 {
                let (producer, n) = read_payload(&within(queue.get()).await.unwrap());
                if producer >= 1000 {
                    assert_eq!((producer, n), (1000 + me, next));
                    next += 1;
                }
            }
        };
        let (ended, (), ()) = within(async { futures::join!(ended, puts, gets) }).await;
        ended.unwrap();
        while let Ok(bytes) = queue.try_get() {
            read_payload(&bytes);
        }
    }
}

#[tokio::test]
async fn any_descriptor_arrives_with_its_kind() {
    let queue = Queue::<(Fd<OwnedFd>, Fd<std::net::TcpListener>)>::unbounded().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let file: OwnedFd = std::fs::File::open("/proc/self/comm").unwrap().into();
    queue.put((Fd::new(file), Fd::new(listener))).await.unwrap();
    let look = |queue: Queue<(Fd<OwnedFd>, Fd<std::net::TcpListener>)>| {
        queue.blocking_get().unwrap().1.local_addr().unwrap().to_string()
    };
    assert_eq!(in_child(look, (queue.clone(),)).await, address.to_string());
    eventually("the queue is empty again", || queue.is_empty()).await;
}
