//! Joinable queues: when everything taken is done.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{Deadline, eventually, in_child, within};
use multiprocess::{ErrorKind, Fd, JoinableQueue, Process, Queue};
use serde::{Deserialize, Serialize};
use std::time::Duration;

multiprocess::test_support!();

const SHORT: Duration = Duration::from_millis(30);

#[tokio::test]
async fn queue_12_join_returns_after_all_and_sentinels_stop_the_workers() {
    let queue = JoinableQueue::<Option<u32>>::unbounded().unwrap();
    let work = async |queue: JoinableQueue<Option<u32>>| {
        let mut done = 0;
        while queue.get().await.unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(2)).await;
            done += 1;
            queue.task_done().unwrap();
        }
        queue.task_done().unwrap();
        done
    };
    let workers: Vec<_> = (0..4).map(|_| Process::spawn(work, (queue.clone(),)).unwrap()).collect();
    for n in 0..10 {
        queue.put(Some(n)).await.unwrap();
    }
    within(queue.join()).await.unwrap();
    assert!(queue.is_empty());
    for _ in 0..4 {
        queue.put(None).await.unwrap();
    }
    let mut done = 0;
    for worker in workers {
        done += within(worker).await.unwrap();
    }
    assert_eq!(done, 10);
    within(queue.join()).await.unwrap();
}

#[tokio::test]
async fn queue_20_closed_joinable_queue_fails_with_closed() {
    let queue = JoinableQueue::<u8>::unbounded().unwrap();
    queue.close();
    assert_eq!(queue.put(1).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(queue.try_put(1).unwrap_err().into_inner(), 1);
    assert_eq!(queue.get().await.unwrap_err().kind(), ErrorKind::Closed);
    within(queue.join()).await.unwrap();
}

#[tokio::test]
async fn queue_26_more_done_than_taken_is_an_error() {
    let queue = JoinableQueue::unbounded().unwrap();
    assert_eq!(queue.task_done().unwrap_err().kind(), ErrorKind::Other);
    queue.put(1).await.unwrap();
    queue.put(2).await.unwrap();
    queue.get().await.unwrap();
    queue.task_done().unwrap();
    // The other one is not taken yet.
    assert_eq!(queue.task_done().unwrap_err().kind(), ErrorKind::Other);
    queue.get().await.unwrap();
    // Done by another process than took it.
    in_child(|queue: JoinableQueue<u8>| queue.task_done().unwrap(), (queue.clone(),)).await;
    assert_eq!(queue.task_done().unwrap_err().kind(), ErrorKind::Other);
    within(queue.join()).await.unwrap();
}

#[tokio::test]
async fn queue_27_join_waits_for_unfinished_items() {
    let queue = JoinableQueue::unbounded().unwrap();
    within(queue.join()).await.unwrap();
    queue.put(1).await.unwrap();
    let mut join = Box::pin(queue.join());
    assert!(futures::poll!(&mut join).is_pending());
    queue.get().await.unwrap();
    assert!(tokio::time::timeout(SHORT, &mut join).await.is_err());
    queue.task_done().unwrap();
    within(join).await.unwrap();
}

#[tokio::test]
async fn several_join_at_once_in_several_processes() {
    let queue = JoinableQueue::unbounded().unwrap();
    let ready = Queue::unbounded().unwrap();
    queue.put(1).await.unwrap();
    queue.put(2).await.unwrap();
    let join = |queue: JoinableQueue<u8>, ready: Queue<()>| {
        ready.blocking_put(()).unwrap();
        queue.blocking_join().unwrap();
    };
    let joiners: Vec<_> = (0..3).map(|_| Process::spawn(join, (queue.clone(), ready.clone())).unwrap()).collect();
    for _ in 0..3 {
        within(ready.get()).await.unwrap();
    }
    let take = async |queue: JoinableQueue<u8>| {
        queue.get().await.unwrap();
        queue.task_done().unwrap();
    };
    in_child(take, (queue.clone(),)).await;
    take(queue.clone()).await;
    for joiner in joiners {
        within(joiner).await.unwrap();
    }
}

#[tokio::test]
async fn items_of_a_killed_worker_count_as_done() {
    let queue = JoinableQueue::unbounded().unwrap();
    let taken = Queue::unbounded().unwrap();
    for round in 0..20 {
        for n in 0..3 {
            queue.put(n).await.unwrap();
        }
        let take = |queue: JoinableQueue<u32>, taken: Queue<()>| {
            for _ in 0..2 {
                queue.blocking_get().unwrap();
            }
            taken.blocking_put(()).unwrap();
            std::thread::park();
        };
        let worker = Process::spawn(take, (queue.clone(), taken.clone())).unwrap();
        within(taken.get()).await.unwrap();
        queue.get().await.unwrap();
        let mut join = Box::pin(queue.join());
        assert!(futures::poll!(&mut join).is_pending());
        if round % 2 == 0 {
            worker.kill().unwrap();
            queue.task_done().unwrap();
        } else {
            queue.task_done().unwrap();
            assert!(futures::poll!(&mut join).is_pending());
            worker.kill().unwrap();
        }
        within(join).await.unwrap();
    }
}

#[tokio::test]
async fn items_of_a_worker_that_returned_count_as_done() {
    let queue = JoinableQueue::unbounded().unwrap();
    queue.put(1).await.unwrap();
    in_child(|queue: JoinableQueue<u32>| queue.blocking_get().unwrap(), (queue.clone(),)).await;
    within(queue.join()).await.unwrap();
    // One with threads of its own.
    queue.put(1).await.unwrap();
    let with_threads = |queue: JoinableQueue<u32>| {
        std::thread::spawn(std::thread::park);
        queue.blocking_get().unwrap();
    };
    in_child(with_threads, (queue.clone(),)).await;
    within(queue.join()).await.unwrap();
}

#[derive(Serialize)]
struct Unreadable;

impl<'de> Deserialize<'de> for Unreadable {
    fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom("nobody can read this"))
    }
}

#[tokio::test]
async fn an_item_that_cannot_be_read_is_gone_and_keeps_nobody_waiting() {
    let queue = JoinableQueue::unbounded().unwrap();
    queue.put(Unreadable).await.unwrap();
    queue.put(Unreadable).await.unwrap();
    let mut join = Box::pin(queue.join());
    assert!(futures::poll!(&mut join).is_pending());
    assert_eq!(queue.get().await.err().unwrap().kind(), ErrorKind::Decode);
    assert_eq!(queue.try_get().err().unwrap().kind(), ErrorKind::Decode);
    within(join).await.unwrap();
    assert_eq!(queue.task_done().unwrap_err().kind(), ErrorKind::Other);
}

#[tokio::test]
async fn an_item_whose_descriptors_do_not_fit_is_gone_and_keeps_nobody_waiting() {
    let queue = JoinableQueue::<Vec<Fd<std::fs::File>>>::unbounded().unwrap();
    let files = (0..20).map(|_| Fd::new(std::fs::File::open("/dev/null").unwrap())).collect();
    queue.put(files).await.unwrap();
    let take = |queue: JoinableQueue<Vec<Fd<std::fs::File>>>| {
        common::limit_descriptors(5);
        queue.blocking_get().unwrap_err();
        queue.blocking_join().unwrap();
    };
    in_child(take, (queue,)).await;
}

#[tokio::test]
async fn joinable_and_plain_queues_are_not_taken_for_each_other() {
    struct Mixed(Option<Queue<u8>>);
    impl Serialize for Mixed {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            self.0.as_ref().unwrap().serialize(serializer)
        }
    }
    impl<'de> Deserialize<'de> for Mixed {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            JoinableQueue::<u8>::deserialize(deserializer).map(|_| Self(None))
        }
    }
    let carrier = Queue::unbounded().unwrap();
    carrier.put(Mixed(Some(Queue::unbounded().unwrap()))).await.unwrap();
    assert_eq!(carrier.get().await.err().unwrap().kind(), ErrorKind::Decode);
}

#[tokio::test]
async fn more_consumers_than_rows() {
    let queue = JoinableQueue::unbounded().unwrap();
    let taken = Queue::unbounded().unwrap();
    let go_on = Queue::<()>::unbounded().unwrap();
    let work = |queue: JoinableQueue<u32>, taken: Queue<()>, go_on: Queue<()>| {
        queue.blocking_get().unwrap();
        taken.blocking_put(()).unwrap();
        go_on.blocking_get().unwrap_err();
        queue.task_done().unwrap();
    };
    let arguments = || (queue.clone(), taken.clone(), go_on.clone());
    let workers: Vec<_> = (0..70).map(|_| Process::spawn(work, arguments()).unwrap()).collect();
    for n in 0..70 {
        queue.put(n).await.unwrap();
    }
    for _ in 0..70 {
        within(taken.get()).await.unwrap();
    }
    let mut join = Box::pin(queue.join());
    assert!(futures::poll!(&mut join).is_pending());
    go_on.close();
    within(join).await.unwrap();
    for worker in workers {
        within(worker).await.unwrap();
    }
}

#[tokio::test]
async fn a_killed_consumer_holds_up_no_join_however_many_there_have_been() {
    let queue = JoinableQueue::unbounded().unwrap();
    let (taken, go_on) = (Queue::<u32>::unbounded().unwrap(), Queue::<()>::unbounded().unwrap());
    let work = |queue: JoinableQueue<u32>, taken: Queue<u32>, go_on: Queue<()>| {
        let item = queue.blocking_get().unwrap();
        if item < 110 {
            queue.task_done().unwrap();
        }
        taken.blocking_put(item).unwrap();
        go_on.blocking_get().unwrap_err();
    };
    let mut workers = Vec::new();
    // All of them live on, and only the last one has something unfinished.
    for n in 0..=110 {
        workers.push(Process::spawn(work, (queue.clone(), taken.clone(), go_on.clone())).unwrap());
        queue.put(n).await.unwrap();
        assert_eq!(within(taken.get()).await.unwrap(), n);
    }
    let mut join = Box::pin(queue.join());
    assert!(futures::poll!(&mut join).is_pending());
    workers.last().unwrap().kill().unwrap();
    within(join).await.unwrap();
    go_on.close();
}

#[test]
fn blocking_join_in_a_plain_function() {
    let _deadline = Deadline::start();
    let queue = JoinableQueue::unbounded().unwrap();
    let worker = std::thread::spawn({
        let queue = queue.clone();
        move || {
            while queue.blocking_get().is_ok() {
                queue.task_done().unwrap();
            }
        }
    });
    (0..1000).for_each(|n| queue.blocking_put(n).unwrap());
    queue.blocking_join().unwrap();
    assert!(queue.is_empty());
    queue.close();
    worker.join().unwrap();
}

#[tokio::test]
async fn blocking_join_inside_async_code_panics() {
    let queue = JoinableQueue::<u8>::unbounded().unwrap();
    assert!(tokio::spawn(async move { drop(queue.blocking_join()) }).await.unwrap_err().is_panic());
    eventually("nothing", || true).await;
}
