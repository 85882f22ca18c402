//! What programs are put together from: tokens, oneshots, watches, broadcasts, sets of queues, tasks as values, groups and
//! supervised children.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{
    Deadline, Random, assert_no_growth, cancelled, eventually, falls_asleep, falls_asleep_in_line, holdings, in_child,
    is_asleep, within,
};
use futures::{FutureExt, StreamExt, poll};
use multiprocess::{
    self as mp, BroadcastReceiver, BroadcastSender, CancellationToken, ErrorKind, Fd, Group, JoinableQueue, Lock,
    OneshotReceiver, OneshotSender, Process, Queue, QueueSet, Restart, SupervisedState, Task, Value, WatchReceiver,
    WatchSender,
};
use std::pin::pin;
use std::time::{Duration, Instant};

mp::test_support!();

const SHORT: Duration = Duration::from_millis(50);

/// Starts `f` in a process that will be killed at `point`.
#[cfg(debug_assertions)]
macro_rules! doomed {
    ($point:expr, $f:expr, $args:expr) => {
        Process::builder().env("MULTIPROCESS_KILL_AT", $point).spawn($f, $args).unwrap()
    };
}

/// Waits until `victim` has been killed, by its own hand.
#[cfg(debug_assertions)]
async fn death<R: serde::de::DeserializeOwned + 'static>(mut victim: Process<R>, point: &str) {
    use std::os::unix::process::ExitStatusExt;
    let Err(error) = within(victim.join()).await else { panic!("it never got to {point}") };
    assert_eq!(error.exit_status().and_then(|status| status.signal()), Some(9), "{point}: {error}");
}

/// Waits until a child has begun what it was told, and is asleep over it.
async fn asleep<R>(process: &Process<R>) {
    // It also sleeps for a moment while it begins.
    tokio::time::sleep(SHORT).await;
    let of = |what| std::fs::read_to_string(format!("/proc/{}/{what}", process.pid())).unwrap_or_default();
    // A process that waits for its order has another name, and waits in another call. Where the kernel does not tell
    // the call, it says 0.
    let has_begun = || !of("comm").trim_end().is_empty() && process.name().starts_with(of("comm").trim_end());
    let is_in_epoll = || matches!(of("wchan"), call if call.contains("epoll") || call.is_empty() || call == "0");
    eventually("it sleeps", || has_begun() && is_asleep(process.pid()) && is_in_epoll()).await;
}

mod tokens {
    use super::*;

    async fn waits(token: CancellationToken) -> bool {
        token.cancelled().await;
        token.is_cancelled()
    }

    #[tokio::test]
    async fn cancel_in_one_process_is_seen_in_every_other() {
        let token = CancellationToken::new().unwrap();
        let children: Vec<_> = (0..3).map(|_| Process::spawn(waits, (token.clone(),)).unwrap()).collect();
        let canceller = Process::spawn(|token: CancellationToken| token.cancel(), (token.clone(),)).unwrap();
        within(token.cancelled()).await;
        assert!(token.is_cancelled() && token.clone().is_cancelled());
        for child in children {
            assert!(within(child).await.unwrap());
        }
        within(canceller).await.unwrap();
        within(token.cancelled()).await;
    }

    #[tokio::test]
    async fn child_tokens_are_cancelled_with_their_ancestors_wherever_they_are_and_not_the_other_way() {
        let root = CancellationToken::new().unwrap();
        let make = |root: CancellationToken| {
            let child = root.child_token().unwrap();
            (child.child_token().unwrap(), child)
        };
        // Made in a process that is gone by now.
        let (grandchild, child) = within(Process::spawn(make, (root.clone(),)).unwrap()).await.unwrap();
        let other = root.child_token().unwrap();
        let waiting = Process::spawn(waits, (grandchild.clone(),)).unwrap();
        falls_asleep_in_line(waiting.pid()).await;
        child.cancel();
        assert!(within(waiting).await.unwrap());
        assert!(grandchild.is_cancelled() && !other.is_cancelled() && !root.is_cancelled());
        let waiting = Process::spawn(waits, (other.child_token().unwrap(),)).unwrap();
        falls_asleep_in_line(waiting.pid()).await;
        root.cancel();
        assert!(within(waiting).await.unwrap());
        assert!(other.is_cancelled());
    }

    #[tokio::test]
    async fn a_process_that_is_killed_cancels_nothing() {
        let token = CancellationToken::new().unwrap();
        let holds = async |token: CancellationToken| {
            let _guard = token.clone().drop_guard();
            token.cancelled().await;
        };
        let mut child = Process::spawn(holds, (token.clone(),)).unwrap();
        falls_asleep_in_line(child.pid()).await;
        child.kill().unwrap();
        within(child.wait()).await.unwrap();
        assert_eq!(within(token.cancelled_timeout(SHORT)).await.unwrap_err().kind(), ErrorKind::Timeout);
        assert!(!token.is_cancelled());
        token.cancel();
        within(token.cancelled()).await;
    }

    /// `event.set` is where a process that cancels has set the flag and has woken nobody.
    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_it_cancels_the_token_is_cancelled_and_waiters_are_woken() {
        let token = CancellationToken::new().unwrap();
        let child_token = token.child_token().unwrap();
        let waiting = Process::spawn(waits, (child_token,)).unwrap();
        falls_asleep_in_line(waiting.pid()).await;
        death(doomed!("event.set", |token: CancellationToken| token.cancel(), (token.clone(),)), "event.set").await;
        assert!(within(waiting).await.unwrap() && token.is_cancelled());
    }

    #[tokio::test]
    async fn guards_cancel_unless_they_are_disarmed() {
        let token = CancellationToken::new().unwrap();
        assert!(!token.clone().drop_guard().disarm().is_cancelled());
        drop(token.clone().drop_guard());
        assert!(token.is_cancelled());
        assert_eq!(token.run_until_cancelled(std::future::pending::<()>()).await, None);
    }

    #[tokio::test]
    async fn tokens_of_tokio_follow_and_are_followed() {
        let token = CancellationToken::new().unwrap();
        let local = token.to_tokio().unwrap();
        let other = token.to_tokio().unwrap();
        other.cancel();
        assert!(!local.is_cancelled() && !token.is_cancelled());
        let canceller = Process::spawn(|token: CancellationToken| token.cancel(), (token.clone(),)).unwrap();
        within(local.cancelled()).await;
        within(canceller).await.unwrap();
        assert!(token.to_tokio().unwrap().is_cancelled());

        let local = tokio_util::sync::CancellationToken::new();
        let token = CancellationToken::from_tokio(&local).unwrap();
        let waiting = Process::spawn(waits, (token.clone(),)).unwrap();
        falls_asleep_in_line(waiting.pid()).await;
        local.cancel();
        assert!(within(waiting).await.unwrap());
        assert!(CancellationToken::from_tokio(&local).unwrap().is_cancelled());
    }

    #[test]
    fn plain_threads_wait_for_tokens_and_children_of_tokens() {
        let _deadline = Deadline::start();
        let token = CancellationToken::new().unwrap();
        let child = token.child_token().unwrap();
        assert!(token.to_tokio().is_err(), "there is no runtime");
        std::thread::scope(|scope| {
            let threads = [scope.spawn(|| token.blocking_cancelled()), scope.spawn(|| child.blocking_cancelled())];
            std::thread::sleep(Duration::from_millis(5));
            token.cancel();
            threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
        });
    }

    #[tokio::test]
    async fn ten_thousand_dropped_waits_leave_nothing_behind() {
        let nothing_is_left = async || {
            let mut random = Random::new(1);
            let token = CancellationToken::new().unwrap();
            let child = token.child_token().unwrap();
            let _ = cancelled(&mut random, child.cancelled()).await;
            let before = holdings();
            for _ in 0..10_000 {
                assert_eq!(cancelled(&mut random, child.cancelled()).await, None);
            }
            assert_no_growth(before, holdings());
            assert!(mp::debug::dump().objects().iter().all(|object| object.waiting().is_empty()));
            let mut waits = pin!(child.cancelled());
            assert!(poll!(&mut waits).is_pending());
            token.cancel();
            within(waits).await;
        };
        in_child(nothing_is_left, ()).await;
    }

    #[tokio::test]
    async fn a_waiter_that_is_not_polled_delays_no_other() {
        let token = CancellationToken::new().unwrap();
        let (child, event) = (token.child_token().unwrap(), mp::Event::new().unwrap());
        let (mut first, mut of_child, mut of_event) =
            (pin!(token.cancelled()), pin!(child.cancelled()), pin!(event.wait()));
        assert!(
            poll!(&mut first).is_pending() && poll!(&mut of_child).is_pending() && poll!(&mut of_event).is_pending()
        );
        let mut later = pin!(token.cancelled());
        falls_asleep(later.as_mut()).await;
        let thread = std::thread::spawn({
            let (token, event) = (token.clone(), event.clone());
            move || (token.blocking_cancelled().is_ok(), event.blocking_wait().is_ok())
        });
        token.cancel();
        event.set();
        within(later).await;
        within(token.cancelled()).await;
        within(child.cancelled()).await;
        within(event.wait()).await.unwrap();
        assert_eq!(within(tokio::task::spawn_blocking(|| thread.join().unwrap())).await.unwrap(), (true, true));
        within(async { (first.await, of_child.await, of_event.await.unwrap()) }).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn waiters_of_several_runtimes_and_threads_are_woken_by_another_process() {
        for round in 0..20 {
            let event = mp::Event::new().unwrap();
            let tasks: Vec<_> = (0..20)
                .map(|_| {
                    tokio::spawn({
                        let event = event.clone();
                        async move { event.wait().await.unwrap() }
                    })
                })
                .collect();
            let threads: Vec<_> = (0..3)
                .map(|n| {
                    std::thread::spawn({
                        let event = event.clone();
                        move || match n {
                            0 => tokio::runtime::Builder::new_current_thread()
                                .enable_all()
                                .build()
                                .unwrap()
                                .block_on(event.wait()),
                            _ => event.blocking_wait_timeout(Duration::from_secs(60)),
                        }
                    })
                })
                .collect();
            if round % 2 == 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let setter = Process::spawn(|event: mp::Event| event.set(), (event,)).unwrap();
            for task in tasks {
                within(task).await.unwrap();
            }
            for thread in threads {
                within(tokio::task::spawn_blocking(|| thread.join().unwrap())).await.unwrap().unwrap();
            }
            within(setter).await.unwrap();
        }
    }
}

mod oneshots {
    use super::*;

    #[tokio::test]
    async fn a_value_goes_to_another_process_and_an_answer_comes_back() {
        let (sender, receiver) = mp::oneshot::<String>().unwrap();
        let (answer, answered) = mp::oneshot().unwrap();
        let child = async |receiver: OneshotReceiver<String>, answer: OneshotSender<usize>| {
            answer.send(receiver.await.unwrap().len()).unwrap();
        };
        let child = Process::spawn(child, (receiver, answer)).unwrap();
        sender.send("x".repeat(100_000)).unwrap();
        assert_eq!(within(answered).await.unwrap(), 100_000);
        within(child).await.unwrap();
    }

    #[tokio::test]
    async fn a_sender_that_goes_or_is_killed_without_a_value_is_closed() {
        let (sender, receiver) = mp::oneshot::<u8>().unwrap();
        drop(sender);
        assert_eq!(within(receiver).await.unwrap_err().kind(), ErrorKind::Closed);

        let (sender, mut receiver) = mp::oneshot::<u8>().unwrap();
        let holds = async |sender: OneshotSender<u8>| {
            std::future::pending::<()>().await;
            drop(sender);
        };
        let child = Process::spawn(holds, (sender,)).unwrap();
        assert_eq!(receiver.try_recv().unwrap_err().kind(), ErrorKind::Empty);
        let mut waits = pin!(&mut receiver);
        falls_asleep(waits.as_mut()).await;
        child.kill().unwrap();
        assert_eq!(within(waits).await.unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(receiver.try_recv().unwrap_err().kind(), ErrorKind::Closed);
    }

    #[tokio::test]
    async fn value_sent_is_received_though_its_process_has_ended() {
        let (sender, receiver) = mp::oneshot::<u32>().unwrap();
        let sends = |sender: OneshotSender<u32>| {
            sender.send(7).unwrap();
            if true {
                std::process::abort();
            }
        };
        let mut child = Process::spawn(sends, (sender,)).unwrap();
        within(child.wait()).await.unwrap();
        assert_eq!(within(receiver).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn dropped_receiver_closes_the_sender() {
        let (mut sender, receiver) = mp::oneshot::<u32>().unwrap();
        let holds = async |receiver: OneshotReceiver<u32>| drop((std::future::pending::<()>().await, receiver));
        let child = Process::spawn(holds, (receiver,)).unwrap();
        assert!(!sender.is_closed());
        {
            let mut waits = pin!(sender.closed());
            falls_asleep(waits.as_mut()).await;
            child.kill().unwrap();
            within(waits).await.unwrap();
        }
        let error = sender.send(5).unwrap_err();
        assert_eq!((error.kind(), error.into_inner()), (ErrorKind::Closed, 5));
    }

    #[tokio::test]
    async fn ten_thousand_dropped_polls_take_nothing() {
        let (sender, mut receiver) = mp::oneshot::<u32>().unwrap();
        let mut random = Random::new(2);
        for _ in 0..10_000 {
            assert!(cancelled(&mut random, &mut receiver).await.is_none());
        }
        sender.send(9).unwrap();
        assert_eq!(within(receiver).await.unwrap(), 9);
    }

    #[tokio::test]
    async fn ten_thousand_dropped_waits_for_the_receivers_end_change_nothing() {
        let (mut sender, receiver) = mp::oneshot::<u32>().unwrap();
        let mut random = Random::new(22);
        for _ in 0..10_000 {
            assert!(cancelled(&mut random, sender.closed()).await.is_none());
        }
        sender.send(3).unwrap();
        assert_eq!(within(receiver).await.unwrap(), 3);
        let (mut sender, receiver) = mp::oneshot::<u32>().unwrap();
        assert!(cancelled(&mut random, sender.closed()).await.is_none());
        drop(receiver);
        within(sender.closed()).await.unwrap();
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_it_sends_the_value_is_whole_or_the_oneshot_closed() {
        for (point, is_sent) in
            [("put.taken", false), ("put.written", false), ("put.published", true), ("put.released", true)]
        {
            let (sender, receiver) = mp::oneshot::<String>().unwrap();
            let mut waits = pin!(receiver);
            falls_asleep(waits.as_mut()).await;
            let sends = |sender: OneshotSender<String>| sender.send("whole".repeat(100)).unwrap();
            death(doomed!(point, sends, (sender,)), point).await;
            let received = within(waits).await.map_err(|error| error.kind());
            let expected = if is_sent { Ok("whole".repeat(100)) } else { Err(ErrorKind::Closed) };
            assert_eq!(received, expected, "{point}");
        }
    }

    /// `get.taken` comes also where there is no value yet.
    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_it_receives_the_sender_is_closed() {
        let receives = async |receiver: OneshotReceiver<u32>| receiver.await.unwrap();
        for (point, has_value) in [
            ("get.taken", false),
            ("sleep.entered", false),
            ("get.read", true),
            ("get.consumed", true),
            ("get.released", true),
        ] {
            let (mut sender, receiver) = mp::oneshot::<u32>().unwrap();
            if !has_value {
                death(doomed!(point, receives, (receiver,)), point).await;
                within(sender.closed()).await.unwrap();
                assert_eq!(sender.send(1).unwrap_err().kind(), ErrorKind::Closed, "{point}");
                continue;
            }
            let stays = async |receiver: OneshotReceiver<u32>, is_there: mp::Event| {
                is_there.wait().await.unwrap();
                receiver.await.unwrap()
            };
            let is_there = mp::Event::new().unwrap();
            let child = doomed!(point, stays, (receiver, is_there.clone()));
            sender.send(1).unwrap();
            is_there.set();
            death(child, point).await;
        }
    }

    #[test]
    fn a_plain_thread_waits_for_the_value() {
        let _deadline = Deadline::start();
        let (sender, receiver) = mp::oneshot::<u32>().unwrap();
        let thread = std::thread::spawn(|| receiver.blocking_recv().unwrap());
        sender.send(3).unwrap();
        assert_eq!(thread.join().unwrap(), 3);
    }
}

mod watches {
    use super::*;

    #[tokio::test]
    async fn receivers_in_other_processes_see_the_last_value() {
        let (sender, receiver) = mp::watch(0_u64).unwrap();
        let until = async |mut receiver: WatchReceiver<u64>, last: u64| {
            let mut seen = receiver.get_and_update().unwrap();
            while seen < last {
                receiver.changed().await.unwrap();
                let next = receiver.get_and_update().unwrap();
                assert!(next > seen, "{next} after {seen}");
                seen = next;
            }
        };
        let children: Vec<_> = (0..3).map(|_| Process::spawn(until, (receiver.clone(), 2_000)).unwrap()).collect();
        for n in 1..=2_000 {
            sender.send(n).unwrap();
            if n % 100 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        for child in children {
            within(child).await.unwrap();
        }
        assert_eq!(receiver.get().unwrap(), 2_000);
    }

    #[tokio::test]
    async fn values_of_a_remote_sender_arrive_and_its_death_is_closed() {
        let (sender, mut receiver) = mp::watch(vec![0_u8]).unwrap();
        let sends = async |sender: WatchSender<Vec<u8>>| {
            sender.send(vec![1; 300_000]).unwrap();
            std::future::pending::<()>().await;
        };
        let child = Process::spawn(sends, (sender,)).unwrap();
        within(receiver.changed()).await.unwrap();
        assert_eq!(receiver.get().unwrap(), vec![1; 300_000]);
        assert!(!receiver.has_changed().unwrap());
        {
            let mut waits = pin!(receiver.changed());
            falls_asleep(waits.as_mut()).await;
            child.kill().unwrap();
            assert_eq!(within(waits).await.unwrap_err().kind(), ErrorKind::Closed);
        }
        assert_eq!(receiver.has_changed().unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(receiver.get().unwrap(), vec![1; 300_000], "it is still there");
    }

    #[tokio::test]
    async fn a_sender_that_is_on_its_way_counts_as_there() {
        let (sender, mut receiver) = mp::watch(1).unwrap();
        let queue = Queue::unbounded().unwrap();
        queue.put(sender).await.unwrap();
        assert_eq!(within(receiver.changed_timeout(SHORT)).await.unwrap_err().kind(), ErrorKind::Timeout);
        let sender: WatchSender<i32> = within(queue.get()).await.unwrap();
        sender.send(2).unwrap();
        drop(sender);
        within(receiver.changed()).await.unwrap();
        assert_eq!(receiver.get().unwrap(), 2);
        assert_eq!(within(receiver.changed()).await.unwrap_err().kind(), ErrorKind::Closed);
    }

    #[tokio::test]
    async fn a_change_before_the_last_sender_went_is_seen_before_closed() {
        let (sender, mut receiver) = mp::watch(1).unwrap();
        sender.send(2).unwrap();
        drop(sender);
        assert_eq!(within(receiver.wait_for(|n| *n == 2)).await.unwrap(), 2);
        assert_eq!(within(receiver.wait_for(|n| *n == 3)).await.unwrap_err().kind(), ErrorKind::Closed);
        receiver.mark_changed();
        assert!(receiver.has_changed().unwrap());
        assert_eq!(receiver.into_stream().map(Result::unwrap).collect::<Vec<_>>().await, [2]);
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_sending_the_value_is_the_old_one_or_the_new_one_and_others_go_on() {
        let send = |sender: WatchSender<String>| sender.send("new".repeat(2000)).unwrap();
        for (point, is_new) in [
            ("send.taken", false),
            ("send.begun", false),
            ("send.written", false),
            ("send.published", true),
            ("send.released", true),
        ] {
            let (sender, mut receiver) = mp::watch("old".to_string()).unwrap();
            let wait = async |mut receiver: WatchReceiver<String>| receiver.changed().await;
            let waiting = Process::spawn(wait, (receiver.clone(),)).unwrap();
            asleep(&waiting).await;
            death(doomed!(point, send, (sender.clone(),)), point).await;
            let expected = if is_new { "new".repeat(2000) } else { "old".to_string() };
            assert_eq!(receiver.get_and_update().unwrap(), expected, "{point}");
            if is_new {
                within(waiting).await.unwrap().unwrap();
            }
            sender.send("next".to_string()).unwrap();
            within(receiver.changed()).await.unwrap();
            assert_eq!(receiver.get().unwrap(), "next", "{point}");
        }
    }

    #[tokio::test]
    async fn values_are_never_torn_while_senders_are_killed() {
        let (sender, receiver) = mp::watch(vec![0_u8; 1]).unwrap();
        let sends = |sender: WatchSender<Vec<u8>>, seed: u64| {
            let mut random = Random::new(seed);
            for _ in 0..u64::MAX {
                let size = random.size(20_000) + 1;
                sender.send(vec![random.next() as u8; size]).unwrap();
            }
        };
        let start = Instant::now();
        for seed in 0.. {
            let child = Process::spawn(sends, (sender.clone(), seed)).unwrap();
            for _ in 0..300 {
                let value = receiver.get().unwrap();
                assert!(value.iter().all(|byte| *byte == value[0]), "torn");
            }
            child.kill().unwrap();
            if start.elapsed() > Duration::from_secs(2) {
                break;
            }
        }
    }

    #[tokio::test]
    async fn ten_thousand_dropped_waits_change_nothing() {
        let (sender, mut receiver) = mp::watch(0_u32).unwrap();
        let mut random = Random::new(3);
        let (mut dropped, mut sent) = (0, 0);
        while dropped < 10_000 {
            if random.below(10) == 0 {
                sent += 1;
                sender.send(sent).unwrap();
            }
            let has_changed = receiver.has_changed().unwrap();
            match cancelled(&mut random, receiver.changed()).await {
                Some(changed) => {
                    changed.unwrap();
                    assert!(has_changed);
                }
                None => {
                    dropped += 1;
                    assert_eq!(receiver.has_changed().unwrap(), has_changed);
                }
            }
            assert_eq!(receiver.get().unwrap(), sent);
        }
    }

    #[test]
    fn a_value_with_a_handle_is_refused() {
        let (sender, receiver) = mp::watch::<Option<Lock>>(None).unwrap();
        let error = sender.send(Some(Lock::new().unwrap())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Encode);
        assert!(error.to_string().contains("queue or a pipe"), "{error}");
        assert!(receiver.get().unwrap().is_none());
    }

    #[test]
    fn a_plain_thread_waits_for_a_change() {
        let _deadline = Deadline::start();
        let (sender, mut receiver) = mp::watch(1).unwrap();
        let thread = std::thread::spawn(move || {
            receiver.blocking_changed().unwrap();
            (receiver.get().unwrap(), receiver.blocking_changed().unwrap_err().kind())
        });
        sender.send(2).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        drop(sender);
        assert_eq!(thread.join().unwrap(), (2, ErrorKind::Closed));
    }

    #[tokio::test]
    async fn a_receiver_that_waits_delays_no_other_of_its_process() {
        let (sender, mut seen) = mp::watch(1).unwrap();
        let mut new = seen.clone();
        new.mark_changed();
        let values = seen.clone();
        let mut waits = pin!(seen.changed());
        assert!(poll!(&mut waits).is_pending());
        within(new.changed()).await.unwrap();
        let mut values = values.into_stream();
        assert_eq!(within(values.next()).await.unwrap().unwrap(), 1);
        let mut next = pin!(values.next());
        falls_asleep(next.as_mut()).await;
        sender.send(2).unwrap();
        assert_eq!(within(next).await.unwrap().unwrap(), 2);
        within(waits).await.unwrap();
    }

    #[test]
    fn a_plain_thread_sees_that_the_senders_are_gone_also_after_a_runtime() {
        let _deadline = Deadline::start();
        let (sender, mut receiver) = mp::watch(1).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { falls_asleep(pin!(receiver.changed())).await });
        drop(runtime);
        let thread = std::thread::spawn(move || receiver.blocking_changed().unwrap_err().kind());
        std::thread::sleep(Duration::from_millis(5));
        drop(sender);
        assert_eq!(thread.join().unwrap(), ErrorKind::Closed);
    }
}

mod broadcasts {
    use super::*;

    async fn collect(mut receiver: BroadcastReceiver<u64>) -> (Vec<u64>, u64) {
        let (mut got, mut missed) = (Vec::new(), 0);
        loop {
            match receiver.recv().await {
                Ok(value) => got.push(value),
                Err(error) if error.kind() == ErrorKind::Lagged => missed += error.lagged().unwrap(),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Closed);
                    return (got, missed);
                }
            }
        }
    }

    #[tokio::test]
    async fn every_receiver_gets_every_value_in_order() {
        let (sender, receiver) = mp::broadcast(10_000).unwrap();
        let children: Vec<_> = (0..3).map(|_| Process::spawn(collect, (receiver.resubscribe(),)).unwrap()).collect();
        let here = tokio::spawn(collect(receiver));
        for n in 0..10_000 {
            sender.send(n).unwrap();
        }
        drop(sender);
        let all: Vec<u64> = (0..10_000).collect();
        for child in children {
            assert_eq!(within(child).await.unwrap(), (all.clone(), 0));
        }
        assert_eq!(within(here).await.unwrap(), (all, 0));
    }

    #[tokio::test]
    async fn slow_receiver_gets_the_number_of_missed_values() {
        let (sender, mut receiver) = mp::broadcast(3).unwrap();
        assert_eq!(receiver.try_recv().unwrap_err().kind(), ErrorKind::Empty);
        (0..10).for_each(|n| sender.send(n).unwrap());
        assert_eq!(receiver.len(), 10);
        let error = within(receiver.recv()).await.unwrap_err();
        assert_eq!((error.kind(), error.lagged()), (ErrorKind::Lagged, Some(7)));
        for n in 7..10 {
            assert_eq!(within(receiver.recv()).await.unwrap(), n);
        }
        assert!(receiver.is_empty());
        assert_eq!(within(receiver.recv_timeout(SHORT)).await.unwrap_err().kind(), ErrorKind::Timeout);
    }

    #[tokio::test]
    async fn values_and_misses_add_up_while_senders_race_and_receivers_are_slow() {
        let (sender, receiver) = mp::broadcast(16).unwrap();
        let child = Process::spawn(collect, (receiver.resubscribe(),)).unwrap();
        let here = tokio::spawn(collect(receiver));
        let sends = |sender: BroadcastSender<u64>| (0..5_000).for_each(|n| sender.send(n).unwrap());
        let senders: Vec<_> = (0..2).map(|_| Process::spawn(sends, (sender.clone(),)).unwrap()).collect();
        drop(sender);
        for sender in senders {
            within(sender).await.unwrap();
        }
        for (got, missed) in [within(child).await.unwrap(), within(here).await.unwrap()] {
            assert_eq!(got.len() as u64 + missed, 10_000);
        }
    }

    #[tokio::test]
    async fn a_receiver_travels_with_its_place() {
        let (sender, mut receiver) = mp::broadcast(8).unwrap();
        (0..4).for_each(|n| sender.send(n).unwrap());
        assert_eq!(receiver.try_recv().unwrap(), 0);
        let child = Process::spawn(collect, (receiver,)).unwrap();
        drop(sender);
        assert_eq!(within(child).await.unwrap(), (vec![1, 2, 3], 0));
    }

    #[tokio::test]
    async fn death_of_the_last_sender_is_closed_after_its_values() {
        let (sender, mut receiver) = mp::broadcast(8).unwrap();
        let sends = async |sender: BroadcastSender<u64>| {
            sender.send(1).unwrap();
            std::future::pending::<()>().await;
        };
        let child = Process::spawn(sends, (sender.clone(),)).unwrap();
        drop(sender);
        assert_eq!(within(receiver.recv()).await.unwrap(), 1);
        let mut waits = pin!(receiver.recv());
        falls_asleep(waits.as_mut()).await;
        child.kill().unwrap();
        assert_eq!(within(waits).await.unwrap_err().kind(), ErrorKind::Closed);
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_sending_the_value_is_sent_whole_or_not_at_all() {
        let send = |sender: BroadcastSender<String>| sender.send("second".into()).unwrap();
        for (point, is_sent) in
            [("send.taken", false), ("send.begun", false), ("send.written", false), ("send.published", true)]
        {
            let (sender, mut receiver) = mp::broadcast(4).unwrap();
            sender.send("first".to_string()).unwrap();
            death(doomed!(point, send, (sender.clone(),)), point).await;
            sender.send("third".to_string()).unwrap();
            drop(sender);
            let got: Vec<String> = within(async {
                let mut got = Vec::new();
                while let Ok(text) = receiver.recv().await {
                    got.push(text);
                }
                got
            })
            .await;
            let all: &[&str] = if is_sent { &["first", "second", "third"] } else { &["first", "third"] };
            assert_eq!(got, all, "{point}");
        }
    }

    #[tokio::test]
    async fn ten_thousand_dropped_receives_lose_nothing() {
        let (sender, mut receiver) = mp::broadcast(4).unwrap();
        let mut random = Random::new(4);
        let (mut dropped, mut sent, mut received) = (0, 0_u64, 0_u64);
        while dropped < 10_000 {
            if random.below(10) == 0 && sent - received < 4 {
                sender.send(sent).unwrap();
                sent += 1;
            }
            match cancelled(&mut random, receiver.recv()).await {
                Some(value) => {
                    assert_eq!(value.unwrap(), received);
                    received += 1;
                }
                None => dropped += 1,
            }
        }
        assert_eq!(receiver.len(), sent - received);
    }

    #[test]
    fn a_capacity_that_cannot_be_is_an_error() {
        for capacity in [0, usize::MAX] {
            assert_eq!(mp::broadcast::<u8>(capacity).unwrap_err().kind(), ErrorKind::Other);
        }
    }

    #[test]
    fn a_plain_thread_receives() {
        let _deadline = Deadline::start();
        let (sender, mut receiver) = mp::broadcast(4).unwrap();
        let thread = std::thread::spawn(move || (receiver.blocking_recv().unwrap(), receiver.blocking_recv().is_err()));
        std::thread::sleep(Duration::from_millis(5));
        sender.send(5).unwrap();
        drop(sender);
        assert_eq!(thread.join().unwrap(), (5, true));
    }

    #[test]
    fn a_lag_keeps_its_number_on_a_journey() {
        let (sender, mut receiver) = mp::broadcast(1).unwrap();
        (0..3).for_each(|n| sender.send(n).unwrap());
        let error = receiver.try_recv().unwrap_err();
        let queue = Queue::unbounded().unwrap();
        queue.try_put(error).unwrap();
        assert_eq!(queue.try_get().unwrap().lagged(), Some(2));
    }

    #[tokio::test]
    async fn a_receiver_that_waits_delays_no_other_of_its_process() {
        let (sender, mut first) = mp::broadcast(4).unwrap();
        let mut second = sender.subscribe();
        sender.send(1).unwrap();
        assert_eq!(within(first.recv()).await.unwrap(), 1);
        let mut waits = pin!(first.recv());
        assert!(poll!(&mut waits).is_pending());
        assert_eq!(within(second.recv()).await.unwrap(), 1);
        let mut next = pin!(second.recv());
        falls_asleep(next.as_mut()).await;
        sender.send(2).unwrap();
        assert_eq!(within(next).await.unwrap(), 2);
        assert_eq!(within(waits).await.unwrap(), 2);
    }

    #[test]
    fn a_plain_thread_sees_that_the_senders_are_gone_also_after_a_runtime() {
        let _deadline = Deadline::start();
        let (sender, mut receiver) = mp::broadcast::<u8>(2).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { falls_asleep(pin!(receiver.recv())).await });
        drop(runtime);
        let thread = std::thread::spawn(move || receiver.blocking_recv().unwrap_err().kind());
        std::thread::sleep(Duration::from_millis(5));
        drop(sender);
        assert_eq!(thread.join().unwrap(), ErrorKind::Closed);
    }
}

mod queue_sets {
    use super::*;

    #[tokio::test]
    async fn items_come_with_the_key_of_their_queue_and_queues_take_turns() {
        let queues: Vec<_> = (0..3).map(|_| Queue::unbounded().unwrap()).collect();
        let mut set = QueueSet::new();
        for (key, queue) in queues.iter().enumerate() {
            set.insert(key, queue).unwrap();
            for item in 0..3 {
                queue.put(10 * key + item).await.unwrap();
            }
        }
        let mut got = Vec::new();
        for _ in 0..9 {
            got.push(within(set.get()).await.unwrap());
        }
        assert_eq!(got, [(0, 0), (1, 10), (2, 20), (0, 1), (1, 11), (2, 21), (0, 2), (1, 12), (2, 22)]);
        assert_eq!(set.try_get().unwrap_err().kind(), ErrorKind::Empty);
        assert_eq!(within(set.get_timeout(SHORT)).await.unwrap_err().kind(), ErrorKind::Timeout);
    }

    #[tokio::test]
    async fn a_set_that_sleeps_is_woken_by_a_put_in_another_process() {
        let queues: Vec<Queue<String>> = (0..3).map(|_| Queue::unbounded().unwrap()).collect();
        let mut set = QueueSet::new();
        queues.iter().enumerate().for_each(|(key, queue)| set.insert(key, queue).unwrap());
        for key in [1, 0, 2, 2, 1] {
            let mut waits = Box::pin(set.get());
            falls_asleep(waits.as_mut()).await;
            let put = async |queue: Queue<String>| queue.put("hello".into()).await.unwrap();
            let child = Process::spawn(put, (queues[key].clone(),)).unwrap();
            assert_eq!(within(&mut waits).await.unwrap(), (key, "hello".to_string()));
            within(child).await.unwrap();
        }
    }

    #[tokio::test]
    async fn thousands_of_queues_are_waited_for_at_once() {
        let many = async || {
            let count =
                4_000.min(rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap() as usize / 4);
            let queues: Vec<Queue<usize>> = (0..count).map(|_| Queue::unbounded().unwrap()).collect();
            let mut set = QueueSet::new();
            queues.iter().enumerate().for_each(|(key, queue)| set.insert(key, queue).unwrap());
            let mut random = Random::new(5);
            for _ in 0..200 {
                let key = random.below(count as u64) as usize;
                let mut waits = Box::pin(set.get());
                falls_asleep(waits.as_mut()).await;
                queues[key].put(key).await.unwrap();
                assert_eq!(within(&mut waits).await.unwrap(), (key, key));
            }
            count
        };
        let count = in_child(many, ()).await;
        println!("{count} queues");
    }

    #[tokio::test]
    async fn a_queue_that_is_closed_and_drained_leaves_the_set() {
        let (one, other) = (Queue::unbounded().unwrap(), JoinableQueue::unbounded().unwrap());
        let mut set = QueueSet::new();
        set.insert("one", &one).unwrap();
        set.insert("other", &other).unwrap();
        one.put(1).await.unwrap();
        one.close();
        assert_eq!(within(set.get()).await.unwrap(), ("one", 1));
        let mut waits = Box::pin(set.get());
        falls_asleep(waits.as_mut()).await;
        other.put(2).await.unwrap();
        assert_eq!(within(&mut waits).await.unwrap(), ("other", 2));
        drop(waits);
        other.task_done().unwrap();
        assert_eq!(set.keys().collect::<Vec<_>>(), [&"other"]);
        let mut waits = Box::pin(set.get());
        falls_asleep(waits.as_mut()).await;
        other.close();
        assert_eq!(within(&mut waits).await.unwrap_err().kind(), ErrorKind::Closed);
        drop(waits);
        assert!(set.is_empty() && set.try_get().unwrap_err().kind() == ErrorKind::Closed);
        assert!(set.stream().next().await.is_none());
    }

    #[tokio::test]
    async fn a_set_that_nobody_polls_keeps_no_item_from_others() {
        let queue = Queue::unbounded().unwrap();
        let mut set = QueueSet::new();
        set.insert((), &queue).unwrap();
        {
            let mut waits = Box::pin(set.get());
            falls_asleep(waits.as_mut()).await;
        }
        let get = async |queue: Queue<u32>| queue.get().await.unwrap();
        let other = Process::spawn(get, (queue.clone(),)).unwrap();
        asleep(&other).await;
        // The set has waited longer, so its alarm goes off.
        queue.put(7).await.unwrap();
        assert_eq!(within(other).await.unwrap(), 7);

        // And one that was woken, and is dropped before it could look.
        let mut waits = Box::pin(set.get());
        falls_asleep(waits.as_mut()).await;
        let other = Process::spawn(get, (queue.clone(),)).unwrap();
        asleep(&other).await;
        queue.put(8).await.unwrap();
        drop(waits);
        assert_eq!(within(other).await.unwrap(), 8);

        // Removed, and dropped as a whole.
        let other = Process::spawn(get, (queue.clone(),)).unwrap();
        asleep(&other).await;
        assert!(set.remove(&()) && !set.remove(&()));
        queue.put(9).await.unwrap();
        assert_eq!(within(other).await.unwrap(), 9);
    }

    #[tokio::test]
    async fn the_death_of_a_process_with_a_set_keeps_no_item_from_others() {
        let queue = Queue::unbounded().unwrap();
        let get = async |queue: Queue<u32>| {
            let mut set = QueueSet::new();
            set.insert(1, &queue).unwrap();
            set.get().await.unwrap().1
        };
        let (first, second) =
            (Process::spawn(get, (queue.clone(),)).unwrap(), Process::spawn(get, (queue.clone(),)).unwrap());
        asleep(&first).await;
        asleep(&second).await;
        first.kill().unwrap();
        queue.put(1).await.unwrap();
        assert_eq!(within(second).await.unwrap(), 1);
    }

    /// `wait::sleepers` and `ring`: a process that waits at a set dies at each step; at most the item that it has taken goes with it.
    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_at_any_step_of_a_get_no_other_item_is_lost_and_others_get_on() {
        let gets = async |queues: [Queue<u32>; 2]| {
            let mut set = QueueSet::new();
            queues.iter().enumerate().for_each(|(key, queue)| set.insert(key, queue).unwrap());
            set.get().await.unwrap().1
        };
        for (point, waits, is_there) in [
            ("sleep.entered", false, true),
            ("sleep.entered:2", false, true),
            ("get.taken", true, true),
            ("get.read", true, true),
            ("get.noted", true, true),
            ("get.consumed", true, false),
            ("get.released:2", true, false),
        ] {
            let queues = [(); 2].map(|()| Queue::unbounded().unwrap());
            if waits {
                // It is there already: the process takes it before it sleeps.
                queues[1].put(7).await.unwrap();
            }
            death(doomed!(point, gets, (queues.clone(),)), point).await;
            let other = Process::spawn(gets, (queues.clone(),)).unwrap();
            if !is_there || !waits {
                asleep(&other).await;
                queues[1].put(7).await.unwrap();
            }
            assert_eq!(within(other).await.unwrap(), 7, "{point}");
            assert!(queues.iter().all(Queue::is_empty), "{point}");
        }
        // Notified, and killed before it could take: the next one of the queue is notified.
        let queues = [(); 2].map(|()| Queue::unbounded().unwrap());
        let (first, second) = (
            Process::spawn(gets, (queues.clone(),)).unwrap(),
            Process::spawn(async |queue: Queue<u32>| queue.get().await.unwrap(), (queues[0].clone(),)),
        );
        asleep(&first).await;
        let second = second.unwrap();
        asleep(&second).await;
        common::stop(first.pid());
        queues[0].put(1).await.unwrap();
        first.kill().unwrap();
        assert_eq!(within(second).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn ten_thousand_dropped_gets_lose_nothing_and_keep_the_order() {
        let queues: Vec<Queue<u64>> = (0..5).map(|_| Queue::unbounded().unwrap()).collect();
        let put = async |queues: Vec<Queue<u64>>, stop: CancellationToken| {
            let mut random = Random::new(6);
            let mut numbers = vec![0; queues.len()];
            while !stop.is_cancelled() {
                let at = random.below(queues.len() as u64) as usize;
                queues[at].put(numbers[at]).await.unwrap();
                numbers[at] += 1;
                tokio::time::sleep(Duration::from_micros(random.below(1000))).await;
            }
            queues.iter().for_each(Queue::close);
            numbers
        };
        let stop = CancellationToken::new().unwrap();
        let child = Process::spawn(put, (queues.clone(), stop.clone())).unwrap();
        let mut set = QueueSet::new();
        queues.iter().enumerate().for_each(|(key, queue)| set.insert(key, queue).unwrap());
        let mut random = Random::new(7);
        let (mut next, mut dropped) = (vec![0; queues.len()], 0);
        while dropped < 10_000 {
            match cancelled(&mut random, set.get()).await {
                Some(item) => {
                    let (key, number) = item.unwrap();
                    assert_eq!(number, next[key]);
                    next[key] += 1;
                }
                None => dropped += 1,
            }
        }
        stop.cancel();
        while let Ok((key, number)) = within(set.get()).await {
            assert_eq!(number, next[key]);
            next[key] += 1;
        }
        assert_eq!(within(child).await.unwrap(), next);
    }

    #[test]
    fn a_plain_thread_gets_from_a_set() {
        let _deadline = Deadline::start();
        let queue = Queue::unbounded().unwrap();
        let mut set = QueueSet::new();
        set.insert("k", &queue).unwrap();
        let thread = std::thread::spawn(move || set.blocking_get().unwrap());
        queue.try_put(1).unwrap();
        assert_eq!(thread.join().unwrap(), ("k", 1));
    }
}

mod leases {
    use super::*;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn an_item_leaves_the_queue_with_the_commit() {
        let queue = Queue::bounded(2).unwrap();
        queue.put("a".to_string()).await.unwrap();
        queue.put("b".to_string()).await.unwrap();
        let lease = within(queue.lease()).await.unwrap();
        assert_eq!((&**lease, lease.deliveries(), queue.len()), ("a", 1, 2));
        assert!(!queue.is_full(), "it takes no room");
        queue.try_put("c".to_string()).unwrap();
        assert_eq!(lease.commit().unwrap(), "a");
        assert_eq!(queue.len(), 2);
        assert_eq!(queue.get().await.unwrap(), "b");
        assert_eq!(queue.try_lease().unwrap().commit().unwrap(), "c");
        assert_eq!(queue.try_lease().unwrap_err().kind(), ErrorKind::Empty);
        assert_eq!(within(queue.lease_timeout(SHORT)).await.unwrap_err().kind(), ErrorKind::Timeout);
        assert_eq!(queue.len(), 0);
    }

    #[tokio::test]
    async fn dropped_the_items_are_at_the_front_again_the_oldest_first() {
        let queue = Queue::unbounded().unwrap();
        for n in 0..4 {
            queue.put(n).await.unwrap();
        }
        let leases: Vec<_> = (0..3).map(|_| queue.try_lease().unwrap()).collect();
        let [first, second, third] = leases.try_into().unwrap();
        drop(third);
        drop(first);
        let again = within(queue.lease()).await.unwrap();
        assert_eq!((*again, again.deliveries()), (0, 2));
        drop(second);
        drop(again);
        assert_eq!(queue.len(), 4);
        for n in 0..4 {
            assert_eq!(within(queue.get()).await.unwrap(), n);
        }
        assert!(queue.is_empty() && queue.try_get().is_err());
    }

    #[tokio::test]
    async fn items_of_a_killed_process_are_leased_again() {
        let queue = Queue::unbounded().unwrap();
        let (leased, wait) = (mp::Event::new().unwrap(), Duration::from_secs(10));
        let holds = async |queue: Queue<String>, leased: mp::Event| {
            let _one = queue.lease().await.unwrap();
            let _other = queue.lease().await.unwrap();
            leased.set();
            std::future::pending::<()>().await;
        };
        queue.put("x".into()).await.unwrap();
        queue.put("y".repeat(300_000)).await.unwrap();
        let holder = Process::spawn(holds, (queue.clone(), leased.clone())).unwrap();
        within(leased.wait()).await.unwrap();
        queue.put("z".into()).await.unwrap();
        assert_eq!(within(queue.get()).await.unwrap(), "z");
        let mut waits = pin!(queue.lease_timeout(wait));
        falls_asleep(waits.as_mut()).await;
        holder.kill().unwrap();
        let lease = within(waits).await.unwrap();
        assert_eq!((&**lease, lease.deliveries()), ("x", 2));
        assert_eq!(within(queue.get()).await.unwrap(), "y".repeat(300_000));
        lease.commit().unwrap();
        assert_eq!(queue.len(), 0);
    }

    /// `leases`: each row of its Death page.
    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_at_any_move_no_item_is_lost_or_doubled() {
        let commits = async |queue: Queue<String>| {
            let lease = queue.lease().await.unwrap();
            lease.commit().unwrap();
        };
        let drops = async |queue: Queue<String>| drop(queue.lease().await.unwrap());
        let again = async |queue: Queue<String>| {
            drop(queue.lease().await.unwrap());
            let _lease = queue.lease().await.unwrap();
        };
        let gets_again = async |queue: Queue<String>| {
            drop(queue.lease().await.unwrap());
            queue.get().await.unwrap();
        };
        for (point, job, is_there, deliveries) in [
            ("lease.filled", 0, true, 1),
            ("lease.held", 0, true, 2),
            ("lease.kept", 0, true, 2),
            ("lease.consumed", 0, true, 2),
            ("commit.begun", 0, true, 2),
            ("commit.done", 0, false, 0),
            ("return.begun", 1, true, 2),
            ("return.done", 1, true, 2),
            ("lease.again", 2, true, 2),
            ("again.noted", 3, true, 2),
        ] {
            let queue = Queue::unbounded().unwrap();
            queue.put("first".repeat(100)).await.unwrap();
            queue.put("second".into()).await.unwrap();
            let args = (queue.clone(),);
            match job {
                0 => death(doomed!(point, commits, args), point).await,
                1 => death(doomed!(point, drops, args), point).await,
                2 => death(doomed!(point, again, args), point).await,
                _ => death(doomed!(point, gets_again, args), point).await,
            }
            if is_there {
                let lease = within(queue.lease()).await.unwrap();
                assert_eq!((&**lease, lease.deliveries()), (&*"first".repeat(100), deliveries), "{point}");
                lease.commit().unwrap();
            }
            assert_eq!(within(queue.get()).await.unwrap(), "second", "{point}");
            assert_eq!((queue.len(), queue.try_get().is_err()), (0, true), "{point}");
            queue.put("third".into()).await.unwrap();
            assert_eq!(within(queue.get()).await.unwrap(), "third", "{point}");
        }
    }

    #[tokio::test]
    async fn a_closed_queue_is_at_its_end_when_nothing_is_leased_any_more() {
        let queue = Queue::unbounded().unwrap();
        queue.put(1).await.unwrap();
        let lease = queue.lease().await.unwrap();
        queue.close();
        {
            let mut gets = pin!(queue.get());
            falls_asleep(gets.as_mut()).await;
            drop(lease);
            assert_eq!(within(gets).await.unwrap(), 1);
        }
        assert_eq!(within(queue.get()).await.unwrap_err().kind(), ErrorKind::Closed);

        let queue = Queue::unbounded().unwrap();
        queue.put(1).await.unwrap();
        queue.close();
        let lease = queue.lease().await.unwrap();
        let get = async |queue: Queue<i32>| queue.get().await.unwrap_err().kind() == ErrorKind::Closed;
        let other = Process::spawn(get, (queue.clone(),)).unwrap();
        asleep(&other).await;
        let mut stream = queue.leases();
        let mut next = pin!(stream.next());
        falls_asleep(next.as_mut()).await;
        lease.commit().unwrap();
        assert!(within(next).await.is_none());
        assert!(within(other).await.unwrap());
    }

    #[tokio::test]
    async fn a_join_that_is_not_polled_delays_no_other() {
        let queue = JoinableQueue::unbounded().unwrap();
        queue.put(1).await.unwrap();
        let (mut first, mut second) = (pin!(queue.join()), pin!(queue.join()));
        falls_asleep(first.as_mut()).await;
        falls_asleep(second.as_mut()).await;
        queue.get().await.unwrap();
        queue.task_done().unwrap();
        within(second).await.unwrap();
        within(queue.join()).await.unwrap();
        within(first).await.unwrap();
    }

    #[tokio::test]
    async fn join_waits_for_commits_and_not_for_dead_letters() {
        let queue = JoinableQueue::unbounded().unwrap();
        queue.put(1).await.unwrap();
        queue.put(2).await.unwrap();
        let lease = queue.lease().await.unwrap();
        {
            let mut joins = pin!(queue.join());
            falls_asleep(joins.as_mut()).await;
            assert_eq!(queue.get().await.unwrap(), 2);
            queue.task_done().unwrap();
            assert!(poll!(&mut joins).is_pending());
            lease.commit().unwrap();
            within(joins).await.unwrap();
        }
        assert!(queue.task_done().is_err(), "a commit is the task_done of its item");
        // One that comes back and is got is done with its task_done.
        queue.put(3).await.unwrap();
        drop(queue.lease().await.unwrap());
        assert_eq!(queue.get().await.unwrap(), 3);
        assert!(within(async { tokio::time::timeout(SHORT, queue.join()).await }).await.is_err());
        queue.task_done().unwrap();
        within(queue.join()).await.unwrap();
        let queue = queue.max_deliveries(1);
        queue.put(4).await.unwrap();
        let lease = queue.lease().await.unwrap();
        let mut joins = pin!(queue.join());
        falls_asleep(joins.as_mut()).await;
        drop(lease);
        within(joins).await.unwrap();
        assert_eq!((queue.dead_letters().try_get().unwrap(), queue.len()), (4, 0));
    }

    #[tokio::test]
    async fn an_item_that_nobody_survives_goes_to_the_dead_letters() {
        let queue = Queue::unbounded().unwrap().max_deliveries(3);
        let letters = queue.dead_letters();
        queue.put("poison".to_string()).await.unwrap();
        queue.put("food".to_string()).await.unwrap();
        let eats = async |queue: Queue<String>| {
            let mut eaten = Vec::new();
            while let Ok(lease) = queue.lease().await {
                if *lease == "poison" {
                    std::process::abort();
                }
                eaten.push(lease.commit().unwrap());
            }
            eaten
        };
        let mut letter = pin!(letters.get());
        assert!(poll!(&mut letter).is_pending());
        for _ in 0..3 {
            assert!(letters.is_empty());
            within(Process::spawn(eats, (queue.clone(),)).unwrap()).await.unwrap_err();
        }
        eventually("all are counted out", || queue.len() == 1).await;
        assert_eq!(within(letter).await.unwrap(), "poison");
        queue.close();
        assert_eq!(within(Process::spawn(eats, (queue.clone(),)).unwrap()).await.unwrap(), ["food"]);
        assert_eq!(letters.try_get().unwrap_err().kind(), ErrorKind::Empty);
        assert_eq!(within(letters.get_timeout(SHORT)).await.unwrap_err().kind(), ErrorKind::Timeout);
    }

    type WithPipe = (u32, Fd<std::io::PipeWriter>);

    #[tokio::test]
    async fn descriptors_of_an_item_come_back_with_it_and_are_closed_by_the_commit() {
        let queue = Queue::<WithPipe>::unbounded().unwrap();
        let mut readers = Vec::new();
        for n in 0..3 {
            let (reader, writer) = std::io::pipe().unwrap();
            queue.put((n, Fd::new(writer))).await.unwrap();
            readers.push(reader);
        }
        let leased = mp::Event::new().unwrap();
        let holds = async |queue: Queue<WithPipe>, leased: mp::Event| {
            let _leases = [queue.lease().await.unwrap(), queue.lease().await.unwrap(), queue.lease().await.unwrap()];
            leased.set();
            std::future::pending::<()>().await;
        };
        for _ in 0..3 {
            leased.clear();
            let mut holder = Process::spawn(holds, (queue.clone(), leased.clone())).unwrap();
            within(leased.wait()).await.unwrap();
            holder.kill().unwrap();
            within(holder.wait()).await.unwrap();
        }
        for (n, reader) in readers.iter_mut().enumerate() {
            let lease = within(queue.lease()).await.unwrap();
            assert_eq!((lease.0, lease.deliveries()), (n as u32, 4));
            let (_, mut writer) = lease.commit().unwrap();
            writer.write_all(b"mine").unwrap();
            drop(writer);
            let mut text = String::new();
            // The end comes only if nobody else has the other end any more.
            reader.read_to_string(&mut text).unwrap();
            assert_eq!(text, "mine");
        }
    }

    /// `leases`: the rows of its Death page about descriptors.
    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_at_any_move_no_descriptor_is_lost_or_kept_open() {
        let leases = async |queue: Queue<WithPipe>| drop(queue.lease().await.unwrap());
        let again = async |queue: Queue<WithPipe>| {
            drop(queue.lease().await.unwrap());
            let _lease = queue.lease().await.unwrap();
        };
        for (point, twice) in [
            ("lease.filled", false),
            ("lease.held", false),
            ("lease.kept", false),
            ("lease.consumed", false),
            ("return.done", false),
            ("lease.again", true),
        ] {
            for gets in [false, true] {
                let queue = Queue::<WithPipe>::unbounded().unwrap();
                let mut readers = Vec::new();
                for n in 0..3 {
                    let (reader, writer) = std::io::pipe().unwrap();
                    queue.put((n, Fd::new(writer))).await.unwrap();
                    readers.push(reader);
                }
                // Another item's descriptors are kept meanwhile.
                let other = queue.lease().await.unwrap();
                match twice {
                    false => death(doomed!(point, leases, (queue.clone(),)), point).await,
                    true => death(doomed!(point, again, (queue.clone(),)), point).await,
                }
                assert_eq!(queue.len(), 3, "{point}");
                let mut items = Vec::new();
                for _ in 0..2 {
                    items.push(match gets {
                        true => within(queue.get()).await.unwrap(),
                        false => within(queue.lease()).await.unwrap().commit().unwrap(),
                    });
                }
                items.push(other.commit().unwrap());
                items.rotate_right(1);
                for (n, (mut reader, item)) in readers.into_iter().zip(items).enumerate() {
                    let (number, mut writer) = item;
                    assert_eq!(number, n as u32, "{point}");
                    writer.write_all(b"mine").unwrap();
                    drop(writer);
                    let mut text = String::new();
                    let read = tokio::task::spawn_blocking(move || reader.read_to_string(&mut text).map(|_| text));
                    // The end comes only if nobody else has the other end any more.
                    assert_eq!(within(read).await.unwrap().unwrap(), "mine", "{point} {n}");
                }
            }
        }
    }

    #[tokio::test]
    async fn an_item_whose_descriptors_do_not_fit_stays_in_the_queue() {
        let alone = async || {
            use rustix::process::{Resource, getrlimit, setrlimit};
            let queue = Queue::<WithPipe>::unbounded().unwrap();
            let mut readers = Vec::new();
            for n in 0..3 {
                let (reader, writer) = std::io::pipe().unwrap();
                queue.put((n, Fd::new(writer))).await.unwrap();
                readers.push(reader);
            }
            for (n, mut reader) in readers.into_iter().enumerate() {
                drop(queue.lease().await.unwrap());
                // That of an item that was leased before has to come past the others.
                let kept = (n == 0).then(|| queue.try_lease().unwrap());
                drop(queue.lease().await.unwrap());
                drop(kept);
                let before = getrlimit(Resource::Nofile);
                common::limit_descriptors(0);
                for _ in 0..10 {
                    assert_eq!(queue.try_lease().map(drop).unwrap_err().kind(), ErrorKind::Io);
                }
                setrlimit(Resource::Nofile, before).unwrap();
                assert_eq!(queue.len(), 3 - n);
                let (number, mut writer) = queue.try_lease().unwrap().commit().unwrap();
                assert_eq!(number, n as u32);
                writer.write_all(b"mine").unwrap();
                drop(writer);
                let mut text = String::new();
                reader.read_to_string(&mut text).unwrap();
                assert_eq!(text, "mine");
            }
        };
        in_child(alone, ()).await;
    }

    #[tokio::test]
    async fn more_leases_than_there_are_places_for_are_an_error() {
        let queue = Queue::unbounded().unwrap();
        for n in 0..1030 {
            queue.put(n).await.unwrap();
        }
        let leases: Vec<_> = (0..1024).map(|_| queue.try_lease().unwrap()).collect();
        assert_eq!(queue.try_lease().unwrap_err().kind(), ErrorKind::Full);
        assert_eq!(within(queue.lease()).await.unwrap_err().kind(), ErrorKind::Full);
        assert_eq!((queue.get().await.unwrap(), queue.len()), (1024, 1029));
        drop(leases);
        for n in (0..1024).chain(1025..1030) {
            assert_eq!(queue.try_lease().unwrap().commit().unwrap(), n);
        }
        assert!(queue.is_empty());
    }

    #[tokio::test]
    async fn the_memory_of_large_items_is_given_back() {
        let alone = async || {
            let queue = Queue::unbounded().unwrap();
            let memory = || {
                let links = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
                let is_ring = |path: &std::path::PathBuf| {
                    std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("multiprocess-ring"))
                };
                use std::os::unix::fs::MetadataExt;
                links.filter(is_ring).map(|path| std::fs::metadata(path).unwrap().blocks() * 512).sum::<u64>()
            };
            for round in 0..20 {
                queue.put(vec![round; 3 << 20]).await.unwrap();
                let lease = queue.lease().await.unwrap();
                assert_eq!(lease.len(), 3 << 20);
                assert!(memory() > 3 << 20);
                if round % 2 == 0 {
                    lease.commit().unwrap();
                } else {
                    drop(lease);
                    queue.get().await.unwrap();
                }
            }
            // A drained segment keeps its memory for a time.
            eventually("the memory is given back", || memory() < 2 << 20).await;
        };
        in_child(alone, ()).await;
    }

    #[tokio::test]
    async fn ten_thousand_dropped_leases_lose_nothing() {
        let queue = Queue::unbounded().unwrap();
        let put = async |queue: Queue<u64>, stop: CancellationToken| {
            let (mut random, mut number) = (Random::new(10), 0);
            while !stop.is_cancelled() {
                queue.put(number).await.unwrap();
                number += 1;
                tokio::time::sleep(Duration::from_micros(random.below(500))).await;
            }
            queue.close();
            number
        };
        let stop = CancellationToken::new().unwrap();
        let child = Process::spawn(put, (queue.clone(), stop.clone())).unwrap();
        let mut random = Random::new(11);
        let (mut next, mut dropped) = (0, 0);
        while dropped < 10_000 {
            match cancelled(&mut random, queue.lease()).await {
                Some(lease) => {
                    let lease = lease.unwrap();
                    assert_eq!(*lease, next, "dropped leases come back to the front");
                    if random.below(2) == 0 {
                        lease.commit().unwrap();
                        next += 1;
                    } else {
                        dropped += 1;
                    }
                }
                None => dropped += 1,
            }
        }
        stop.cancel();
        while let Ok(lease) = within(queue.lease()).await {
            assert_eq!(lease.commit().unwrap(), next);
            next += 1;
        }
        assert_eq!(within(child).await.unwrap(), next);
    }

    /// `leases`: the rows of its Death page about dead letters.
    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_an_item_becomes_a_dead_letter_its_waiters_are_woken() {
        let drops = async |queue: JoinableQueue<String>| drop(queue.lease().await.unwrap());
        // What the process before had on lease becomes one when the next looks.
        let looks = async |queue: JoinableQueue<String>| drop(queue.try_lease());
        let gets = async |queue: JoinableQueue<String>| queue.dead_letters().get().await.unwrap();
        let joins = async |queue: JoinableQueue<String>| queue.join().await.unwrap();
        for (point, by_the_next) in [("return.dead", false), ("scan.dead", true)] {
            let queue = JoinableQueue::unbounded().unwrap().max_deliveries(1);
            queue.put("poison".to_string()).await.unwrap();
            let waiting = Process::spawn(gets, (queue.clone(),)).unwrap();
            let joining = Process::spawn(joins, (queue.clone(),)).unwrap();
            asleep(&waiting).await;
            asleep(&joining).await;
            match by_the_next {
                false => death(doomed!(point, drops, (queue.clone(),)), point).await,
                true => {
                    // Stopped, the sleepers do not look when the holder has died.
                    common::stop(waiting.pid());
                    common::stop(joining.pid());
                    death(doomed!("lease.kept", drops, (queue.clone(),)), "lease.kept").await;
                    death(doomed!(point, looks, (queue.clone(),)), point).await;
                    common::go_on(waiting.pid());
                    common::go_on(joining.pid());
                }
            }
            assert_eq!(within(waiting).await.unwrap(), "poison", "{point}");
            within(joining).await.unwrap();
            assert_eq!((queue.len(), queue.dead_letters().len()), (0, 0), "{point}");
        }
    }

    #[tokio::test]
    async fn the_death_of_the_last_holder_ends_a_join_that_nobody_but_the_join_looks_after() {
        let queue = JoinableQueue::unbounded().unwrap().max_deliveries(1);
        let leased = mp::Event::new().unwrap();
        let holds = async |queue: JoinableQueue<u32>, leased: mp::Event| {
            let _lease = queue.lease().await.unwrap();
            leased.set();
            std::future::pending::<()>().await;
        };
        queue.put(1).await.unwrap();
        let holder = Process::spawn(holds, (queue.clone(), leased.clone())).unwrap();
        within(leased.wait()).await.unwrap();
        let mut joins = pin!(queue.join());
        falls_asleep(joins.as_mut()).await;
        holder.kill().unwrap();
        within(joins).await.unwrap();
        assert_eq!((queue.len(), queue.dead_letters().len()), (0, 1));
    }

    /// Returns a queue whose dead letter has a descriptor, and the other end of that.
    async fn with_dead_letter() -> (Queue<WithPipe>, std::io::PipeReader) {
        let (reader, writer) = std::io::pipe().unwrap();
        let queue = Queue::<WithPipe>::unbounded().unwrap().max_deliveries(1);
        queue.put((1, Fd::new(writer))).await.unwrap();
        drop(queue.lease().await.unwrap());
        assert_eq!(queue.dead_letters().len(), 1);
        (queue, reader)
    }

    /// The descriptor is that of the item, and nobody else has it.
    async fn assert_is_mine((number, mut writer): WithPipe, mut reader: std::io::PipeReader, what: &str) {
        assert_eq!(number, 1, "{what}");
        writer.write_all(b"mine").unwrap();
        drop(writer);
        let mut text = String::new();
        let read = tokio::task::spawn_blocking(move || reader.read_to_string(&mut text).map(|_| text));
        assert_eq!(within(read).await.unwrap().unwrap(), "mine", "{what}");
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_it_takes_a_dead_letter_it_is_there_or_taken() {
        let takes = async |queue: Queue<WithPipe>| drop(queue.dead_letters().get().await.unwrap());
        for (point, is_there) in [("letter.copied", true), ("letter.freed", false)] {
            let (queue, reader) = with_dead_letter().await;
            death(doomed!(point, takes, (queue.clone(),)), point).await;
            let letters = queue.dead_letters();
            assert_eq!(letters.len(), usize::from(is_there), "{point}");
            if is_there {
                assert_is_mine(within(letters.get()).await.unwrap(), reader, point).await;
            } else {
                assert_eq!(letters.try_get().unwrap_err().kind(), ErrorKind::Empty, "{point}");
            }
            // What is left of its descriptors is not those of the next.
            let (next, writer) = std::io::pipe().unwrap();
            queue.put((1, Fd::new(writer))).await.unwrap();
            drop(queue.lease().await.unwrap());
            assert_is_mine(within(letters.get()).await.unwrap(), next, point).await;
        }
    }

    #[tokio::test]
    async fn a_dead_letter_whose_descriptors_do_not_fit_stays() {
        let alone = async || {
            use rustix::process::{Resource, getrlimit, setrlimit};
            let (queue, reader) = with_dead_letter().await;
            let letters = queue.dead_letters();
            let before = getrlimit(Resource::Nofile);
            common::limit_descriptors(0);
            for _ in 0..10 {
                assert_eq!(letters.try_get().map(drop).unwrap_err().kind(), ErrorKind::Io);
            }
            setrlimit(Resource::Nofile, before).unwrap();
            assert_is_mine(letters.try_get().unwrap(), reader, "at the limit").await;
        };
        in_child(alone, ()).await;
    }

    #[tokio::test]
    async fn ten_thousand_dropped_waits_for_dead_letters_lose_none() {
        let queue = Queue::unbounded().unwrap().max_deliveries(1);
        let letters = queue.dead_letters();
        let mut random = Random::new(23);
        let (mut put, mut got, mut dropped) = (0_u32, 0, 0);
        while dropped < 10_000 {
            if random.below(20) == 0 {
                queue.put(put).await.unwrap();
                drop(queue.lease().await.unwrap());
                put += 1;
            }
            match cancelled(&mut random, letters.get()).await {
                Some(letter) => {
                    assert_eq!(letter.unwrap(), got);
                    got += 1;
                }
                None => dropped += 1,
            }
        }
        assert_eq!(letters.len() as u32, put - got);
    }

    #[tokio::test]
    async fn workers_killed_again_and_again_lose_no_item_and_no_commit_is_doubled() {
        const ITEMS: u64 = 300;
        let queue = Queue::unbounded().unwrap();
        let commits = mp::Array::<u32>::zeroed(ITEMS as usize).unwrap();
        for n in 0..ITEMS {
            queue.put(common::payload(0, n, (n as usize * 37) % 3000)).await.unwrap();
        }
        queue.close();
        let work = async |queue: Queue<Vec<u8>>, commits: mp::Array<u32>| {
            while let Ok(lease) = queue.lease().await {
                let (_, number) = common::read_payload(&lease);
                tokio::time::sleep(Duration::from_micros(300)).await;
                // A death between the two commits without a count.
                lease.commit().unwrap();
                commits.set(number as usize, commits.get(number as usize).unwrap() + 1);
            }
        };
        let mut random = Random::new(12);
        let mut deaths = 0;
        while !queue.is_empty() {
            let mut workers: Vec<_> =
                (0..3).map(|_| Process::spawn(work, (queue.clone(), commits.clone())).unwrap()).collect();
            tokio::time::sleep(Duration::from_micros(2_000 + random.below(20_000))).await;
            for worker in &mut workers {
                worker.kill().unwrap();
                within(worker.wait()).await.unwrap();
                deaths += 1;
            }
        }
        assert_eq!(within(queue.get()).await.unwrap_err().kind(), ErrorKind::Closed);
        let counts = commits.to_vec();
        let missing = counts.iter().filter(|count| **count == 0).count();
        println!("{deaths} deaths, {missing} of them between commit and count");
        assert!(counts.iter().all(|count| *count <= 1) && missing <= deaths, "{counts:?}");
    }

    #[test]
    fn a_plain_thread_leases() {
        let _deadline = Deadline::start();
        let queue = Queue::<u32>::unbounded().unwrap();
        let other = queue.clone();
        let thread = std::thread::spawn(move || other.blocking_lease().unwrap().commit().unwrap());
        std::thread::sleep(Duration::from_millis(5));
        queue.try_put(5).unwrap();
        assert_eq!(thread.join().unwrap(), 5);
    }

    #[tokio::test]
    async fn others_learn_that_the_last_leased_item_of_a_closed_queue_was_taken_by_a_get() {
        let queue = Queue::unbounded().unwrap();
        queue.put(1).await.unwrap();
        let lease = queue.lease().await.unwrap();
        queue.close();
        // They stay: the end of a process makes all others look.
        let get = async |queue: Queue<i32>, results: Queue<Result<i32, ErrorKind>>| {
            results.put(queue.get().await.map_err(|error| error.kind())).await.unwrap();
            std::future::pending::<()>().await;
        };
        let waits = async |queue: Queue<i32>, results: Queue<Result<i32, ErrorKind>>| {
            let mut set = QueueSet::new();
            set.insert((), &queue).unwrap();
            results.put(set.get().await.map(|((), item)| item).map_err(|error| error.kind())).await.unwrap();
            std::future::pending::<()>().await;
        };
        let ended = Queue::unbounded().unwrap();
        let start = || Process::builder().kill_on_drop(true);
        let mut processes = Vec::new();
        for _ in 0..3 {
            processes.push(start().spawn(get, (queue.clone(), ended.clone())).unwrap());
            asleep(&processes[processes.len() - 1]).await;
        }
        processes.push(start().spawn(waits, (queue.clone(), ended.clone())).unwrap());
        asleep(&processes[3]).await;
        drop(lease);
        let mut results = Vec::new();
        for _ in 0..4 {
            results.push(within(ended.get()).await.unwrap());
        }
        results.sort_by_key(Result::is_ok);
        assert_eq!(results, [Err(ErrorKind::Closed), Err(ErrorKind::Closed), Err(ErrorKind::Closed), Ok(1)]);
    }

    #[tokio::test]
    async fn leases_of_growing_items_take_bounded_memory_and_addresses() {
        let alone = async || {
            let queue = Queue::unbounded().unwrap();
            let file = || {
                let links = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
                let is_ring = |path: &std::path::PathBuf| {
                    std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("multiprocess-ring"))
                };
                use std::os::unix::fs::MetadataExt;
                let metadata = links.filter(is_ring).map(|path| std::fs::metadata(path).unwrap());
                metadata.fold((0, 0), |(len, memory), file| (len + file.len(), memory + file.blocks() * 512))
            };
            for round in 0..3000 {
                let size = 1000 + round % 1000 * 600;
                queue.put(vec![7_u8; size]).await.unwrap();
                // Another item that is leased meanwhile has another place.
                let lease = queue.lease().await.unwrap();
                assert_eq!(lease.len(), size);
                match round % 3 {
                    0 => drop(lease.commit().unwrap()),
                    1 => {
                        drop(lease);
                        queue.get().await.unwrap();
                    }
                    _ => {
                        drop(lease);
                        queue.lease().await.unwrap().commit().unwrap();
                    }
                }
            }
            file()
        };
        let (len, memory) = in_child(alone, ()).await;
        assert!(len < 64 << 20 && memory < 32 << 20, "{len} bytes of addresses, {memory} bytes of memory");
    }

    #[test]
    fn leases_and_a_queue_that_grows_at_the_same_time_damage_nothing() {
        let _deadline = Deadline::start();
        for _ in 0..2000 {
            let queue = Queue::unbounded().unwrap();
            queue.try_put(vec![0_u8; 10]).unwrap();
            let start = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..3 {
                        queue.try_put(vec![1; 80_000]).unwrap();
                    }
                });
                start.wait();
                let leases: Vec<_> = (0..4).map(|_| queue.blocking_lease().unwrap()).collect();
                leases.into_iter().for_each(|lease| drop(lease.commit().unwrap()));
            });
        }
    }

    #[derive(serde::Serialize)]
    struct Fragile(u8);

    impl<'de> serde::Deserialize<'de> for Fragile {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let fragile = u8::deserialize(deserializer).map(Self)?;
            assert!(fragile.0 != 1, "it cannot be read");
            Ok(fragile)
        }
    }

    #[tokio::test]
    async fn an_item_that_panics_when_it_is_read_is_given_back_and_ends_among_the_dead_letters() {
        let queue = Queue::unbounded().unwrap().max_deliveries(2);
        queue.put(Fragile(1)).await.unwrap();
        queue.put(Fragile(2)).await.unwrap();
        for _ in 0..2 {
            let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| queue.try_lease().map(drop)));
            assert!(panics.is_err());
        }
        assert_eq!(within(queue.lease()).await.unwrap().commit().unwrap().0, 2);
        assert_eq!((queue.len(), queue.dead_letters().len()), (0, 1));
    }
}

mod tasks {
    use super::*;

    fn double(n: i64) -> i64 {
        2 * n
    }

    async fn later(n: i64, text: String) -> i64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        n + text.len() as i64
    }

    #[tokio::test]
    async fn tasks_of_any_function_run_here_and_in_other_processes() {
        let tasks = || vec![Task::of(double, (4,)), Task::of(later, (1, "xyz".into())), Task::of(|| 7, ())];
        let mut here = Vec::new();
        for task in tasks() {
            here.push(within(task.run()).await.unwrap());
        }
        assert_eq!(here, [8, 4, 7]);
        let run = async |tasks: Vec<Task<i64>>, more: Queue<Task<i64>>| {
            let mut results = Vec::new();
            for task in tasks {
                results.push(task.run().await.unwrap());
            }
            while let Ok(task) = more.get().await {
                results.push(task.run().await.unwrap());
            }
            results
        };
        let queue = Queue::unbounded().unwrap();
        let child = Process::spawn(run, (tasks(), queue.clone())).unwrap();
        queue.put(Task::of(double, (5,))).await.unwrap();
        queue.close();
        assert_eq!(within(child).await.unwrap(), [8, 4, 7, 10]);
    }

    #[tokio::test]
    async fn arguments_and_results_may_be_handles() {
        let queue = Queue::unbounded().unwrap();
        let put = async |queue: Queue<u32>| {
            queue.put(1).await.unwrap();
            queue
        };
        let tasks = Queue::unbounded().unwrap();
        tasks.put(Task::of(put, (queue.clone(),))).await.unwrap();
        let task: Task<Queue<u32>> = tasks.get().await.unwrap();
        let same = within(task.run()).await.unwrap();
        same.put(2).await.unwrap();
        assert_eq!((queue.get().await.unwrap(), queue.get().await.unwrap()), (1, 2));
    }

    #[tokio::test]
    async fn tasks_lie_in_a_managers_list_until_a_process_takes_and_runs_them() {
        let manager = mp::Manager::start().await.unwrap();
        let (tasks, results) = (manager.list::<Task<i64>>().await.unwrap(), manager.list::<i64>().await.unwrap());
        tasks.push(Task::of(double, (4,))).await.unwrap();
        tasks.extend(vec![Task::of(later, (1, "xyz".into())), Task::of(|| 7, ())]).await.unwrap();
        // A copy can be run as well.
        assert_eq!(within(tasks.get(0).await.unwrap().unwrap().run()).await.unwrap(), 8);
        let run = async |tasks: mp::ListProxy<Task<i64>>, results: mp::ListProxy<i64>| {
            while let Some(task) = tasks.pop().await? {
                results.push(task.run().await?).await?;
            }
            Ok::<_, mp::Error>(())
        };
        let run = Process::spawn(run, (tasks.clone(), results.clone())).unwrap();
        within(run).await.unwrap().unwrap();
        assert_eq!(results.to_vec().await.unwrap(), [7, 4, 8]);
        assert!(tasks.is_empty().await.unwrap());
        manager.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn a_leased_task_is_run_as_a_clone_and_stays_for_another_consumer() {
        let (tasks, calls) = (Queue::unbounded().unwrap(), Value::new(0_u32).unwrap());
        tasks.put(Task::of(|calls: Value<u32>| calls.fetch_add(1), (calls.clone(),))).await.unwrap();
        let lease: mp::Lease<Task<u32>> = within(tasks.lease()).await.unwrap();
        assert_eq!((within(lease.clone().run()).await.unwrap(), within(lease.clone().run()).await.unwrap()), (0, 1));
        drop(lease);
        assert_eq!(within(within(tasks.lease()).await.unwrap().commit().unwrap().run()).await.unwrap(), 2);
        assert_eq!(calls.get(), 3);
        let broken = Task::of(|_: Refuses| (), (Refuses,));
        let [error, same] = [broken.clone().run().await, broken.run().await].map(|result| result.unwrap_err());
        assert_eq!((error.kind(), error.to_string()), (same.kind(), same.to_string()));
    }

    #[tokio::test]
    async fn a_panic_is_an_error() {
        let fails = |n: u32| -> u32 { panic!("no {n}") };
        let error = within(Task::of(fails, (3,)).run()).await.unwrap_err();
        assert_eq!((error.kind(), error.panic().unwrap().message()), (ErrorKind::Panicked, "no 3"));
    }

    #[derive(serde::Deserialize)]
    struct Refuses;

    impl serde::Serialize for Refuses {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("not me"))
        }
    }

    #[tokio::test]
    async fn arguments_that_cannot_be_encoded_are_an_error_of_the_run_and_of_a_put() {
        let task = || Task::of(|_: Refuses| 1, (Refuses,));
        let queue = Queue::unbounded().unwrap();
        let error = queue.put(task()).await.unwrap_err().into_error();
        assert!(error.kind() == ErrorKind::Encode && error.to_string().contains("not me"), "{error}");
        assert_eq!(within(task().run()).await.unwrap_err().kind(), ErrorKind::Encode);
    }

    #[tokio::test]
    async fn a_dropped_run_cancels_an_async_function() {
        let waits = async |begun: mp::Event, dropped: mp::Event| {
            struct Sets(mp::Event);
            impl Drop for Sets {
                fn drop(&mut self) {
                    self.0.set();
                }
            }
            let _sets = Sets(dropped);
            begun.set();
            std::future::pending::<()>().await;
        };
        let (begun, dropped) = (mp::Event::new().unwrap(), mp::Event::new().unwrap());
        let run = tokio::spawn(Task::of(waits, (begun.clone(), dropped.clone())).run());
        within(begun.wait()).await.unwrap();
        run.abort();
        within(dropped.wait()).await.unwrap();
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_at_any_step_of_a_leased_task_it_is_run_again_until_its_commit() {
        let work = async |tasks: Queue<Task<u32>>| {
            let lease = tasks.lease().await.unwrap();
            lease.clone().run().await.unwrap();
            drop(lease.commit().unwrap());
        };
        for (point, runs_before, is_there) in
            [("lease.held", 0, true), ("lease.kept", 0, true), ("commit.begun", 1, true), ("commit.done", 1, false)]
        {
            let (tasks, runs) = (Queue::unbounded().unwrap(), Value::new(0_u32).unwrap());
            tasks.put(Task::of(|runs: Value<u32>| runs.fetch_add(1), (runs.clone(),))).await.unwrap();
            death(doomed!(point, work, (tasks.clone(),)), point).await;
            assert_eq!((runs.get(), tasks.len()), (runs_before, usize::from(is_there)), "{point}");
            if is_there {
                within(Process::spawn(work, (tasks.clone(),)).unwrap()).await.unwrap();
                assert_eq!((runs.get(), tasks.len()), (runs_before + 1, 0), "{point}");
            }
        }
    }

    #[tokio::test]
    async fn ten_thousand_dropped_runs_leave_nothing_behind() {
        /// Counts what has begun, and what has ended in whichever way.
        struct Run(Value<u64>);
        impl Run {
            fn begin(begun: Value<u64>, ended: Value<u64>) -> Self {
                begun.fetch_add(1);
                Self(ended)
            }
        }
        impl Drop for Run {
            fn drop(&mut self) {
                self.0.fetch_add(1);
            }
        }
        let drops = async || {
            let (begun, ended) = (Value::new(0_u64).unwrap(), Value::new(0_u64).unwrap());
            let later = async |begun: Value<u64>, ended: Value<u64>| {
                let _run = Run::begin(begun, ended);
                tokio::time::sleep(Duration::from_micros(50)).await;
                7
            };
            let at_once = |begun: Value<u64>, ended: Value<u64>| {
                let _run = Run::begin(begun, ended);
                7
            };
            let mut random = Random::new(24);
            let mut run = async || {
                let args = (begun.clone(), ended.clone());
                let task = if random.below(2) == 0 { Task::of(later, args) } else { Task::of(at_once, args) };
                let result = cancelled(&mut random, task.run()).await;
                assert!(result.as_ref().is_none_or(|result| matches!(result, Ok(7))), "{result:?}");
                result.is_some()
            };
            for _ in 0..200 {
                run().await;
            }
            eventually("all have ended", || begun.get() == ended.get()).await;
            let before = holdings();
            let mut dropped = 0;
            while dropped < 10_000 {
                dropped += u32::from(!run().await);
            }
            eventually("all have ended", || begun.get() == ended.get()).await;
            // A handle in arguments may be dropped by a thread that is a moment late.
            eventually("nothing is held", || holdings().descriptors <= before.descriptors).await;
            assert!(begun.get() > 0);
            assert_eq!(within(Task::of(at_once, (begun.clone(), ended.clone())).run()).await.unwrap(), 7);
        };
        in_child(drops, ()).await;
    }

    #[test]
    fn a_dropped_run_that_has_not_begun_runs_nothing() {
        let _deadline = Deadline::start();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let (release, released) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || released.recv());
            let runs = Value::new(0_u32).unwrap();
            let count = |runs: Value<u32>| runs.fetch_add(1);
            let dropped = Task::of(count, (runs.clone(),)).run();
            assert!(dropped.now_or_never().is_none());
            release.send(()).unwrap();
            busy.await.unwrap().unwrap();
            // The one thread has come past it when it has run another.
            Task::of(|runs: Value<u32>| runs.fetch_add(10), (runs.clone(),)).run().await.unwrap();
            assert_eq!(runs.get(), 10);
        });
    }

    #[test]
    fn a_plain_thread_runs_a_task() {
        assert_eq!(Task::of(double, (2,)).blocking_run().unwrap(), 4);
        assert_eq!(Task::of(later, (2, "x".into())).blocking_run().unwrap(), 3);
        let error = futures::executor::block_on(Task::of(double, (2,)).run()).unwrap_err();
        assert!(error.to_string().contains("runtime"), "{error}");
    }
}

mod groups {
    use super::*;

    #[tokio::test]
    async fn results_come_in_the_order_in_which_children_end() {
        let mut group = Group::new();
        let gates: Vec<_> = (0..3).map(|_| mp::Event::new().unwrap()).collect();
        let waits = async |gate: mp::Event, n: u32| {
            gate.wait().await.unwrap();
            n
        };
        for (gate, n) in gates.iter().zip(0..) {
            group.spawn(waits, (gate.clone(), n)).unwrap();
        }
        assert_eq!(group.len(), 3);
        for n in [2, 0, 1] {
            gates[n].set();
            assert_eq!(within(group.join_next()).await.unwrap().unwrap(), n as u32);
        }
        assert!(within(group.join_next()).await.is_none() && group.is_empty());
    }

    #[tokio::test]
    async fn a_child_that_fails_is_an_error_of_its_own() {
        let mut group = Group::new();
        let bad = group.spawn(|| -> u32 { std::process::abort() }, ()).unwrap();
        group.spawn(|| -> u32 { panic!("no") }, ()).unwrap();
        group.spawn(|| 3, ()).unwrap();
        let mut kinds = Vec::new();
        while let Some((who, result)) = within(group.join_next_with_info()).await {
            if who == bad {
                assert_eq!(result.as_ref().unwrap_err().kind(), ErrorKind::ProcessDied);
            }
            kinds.push(result.map_err(|error| format!("{:?}", error.kind())));
        }
        kinds.sort();
        assert_eq!(kinds, [Ok(3), Err("Panicked".into()), Err("ProcessDied".into())]);
    }

    #[tokio::test]
    async fn dropped_all_children_end() {
        let mut group = Group::new();
        let pids: Vec<_> = (0..3).map(|_| group.spawn(std::future::pending::<()>, ()).unwrap().pid()).collect();
        drop(group);
        eventually("all have ended", || {
            pids.iter().all(|pid| !mp::active_children().iter().any(|child| child.pid() == *pid))
        })
        .await;
    }

    #[tokio::test]
    async fn shutdown_asks_first_and_kills_after_the_grace() {
        let mut group = Group::new();
        let ready = Value::new(0_u32).unwrap();
        let polite = async |ready: Value<u32>| {
            let signal = mp::shutdown_signal();
            let mut signal = pin!(signal);
            assert!(poll!(&mut signal).is_pending());
            ready.fetch_add(1);
            signal.await.unwrap();
            1
        };
        group.spawn(polite, (ready.clone(),)).unwrap();
        let deaf = Process::builder().shield_signals(true);
        group.spawn_with(deaf, std::future::pending::<i32>, ()).unwrap();
        eventually("it listens", || ready.get() == 1).await;
        let results = within(group.shutdown(Duration::from_secs(3))).await;
        assert_eq!(*results[0].as_ref().unwrap(), 1);
        assert_eq!(results[1].as_ref().unwrap_err().kind(), ErrorKind::ProcessDied);
        assert!(group.is_empty());
    }

    #[tokio::test]
    async fn a_dropped_shutdown_loses_no_result() {
        let mut group = Group::new();
        group.spawn(|| 5, ()).unwrap();
        group
            .spawn_with(Process::builder().shield_signals(true), async || std::future::pending::<u32>().await, ())
            .unwrap();
        let first = tokio::time::timeout(Duration::from_millis(300), group.shutdown(Duration::from_secs(60))).await;
        assert!(first.is_err() && group.len() == 2);
        group.kill_all();
        let results = within(group.join_all()).await;
        assert!(matches!(&results[..], [Ok(5), Err(_)]) || matches!(&results[..], [Err(_), Err(_)]), "{results:?}");
    }

    #[tokio::test]
    async fn detached_children_run_on() {
        let mut group = Group::<()>::new();
        let (started, may_end) = (mp::Event::new().unwrap(), mp::Event::new().unwrap());
        let work = async |started: mp::Event, may_end: mp::Event, ended: mp::Event| {
            started.set();
            may_end.wait().await.unwrap();
            ended.set();
        };
        let ended = mp::Event::new().unwrap();
        group.spawn(work, (started.clone(), may_end.clone(), ended.clone())).unwrap();
        within(started.wait()).await.unwrap();
        group.detach_all();
        drop(group);
        may_end.set();
        within(ended.wait()).await.unwrap();
    }

    #[tokio::test]
    async fn ten_thousand_dropped_joins_and_shutdowns_lose_no_result() {
        const CHILDREN: u32 = 12;
        let drops = async || {
            let mut group = Group::new();
            let go_on = Queue::unbounded().unwrap();
            let waits = async |go_on: Queue<()>, n: u32| {
                go_on.get().await.unwrap();
                n
            };
            for n in 0..CHILDREN {
                group.spawn_with(Process::builder().shield_signals(true), waits, (go_on.clone(), n)).unwrap();
            }
            let mut random = Random::new(8);
            let (mut got, mut dropped, mut before, mut released) = (Vec::new(), 0, None, 0);
            while dropped < 10_000 {
                let long = Duration::from_secs(600);
                let results = match random.below(3) {
                    0 => cancelled(&mut random, group.join_next()).await.map(|next| next.into_iter().collect()),
                    1 => cancelled(&mut random, group.join_all()).await,
                    _ => cancelled(&mut random, group.shutdown(long)).await,
                };
                match results {
                    Some(results) => got.extend(results.into_iter().map(Result::unwrap)),
                    None => dropped += 1,
                }
                match dropped {
                    100 => before = Some(holdings()),
                    5_000 => assert_no_growth(before.unwrap(), holdings()),
                    // From here on they end, but for the last one.
                    6_000.. if released < (dropped - 6_000) / 300 && released < CHILDREN - 1 => {
                        go_on.try_put(()).unwrap();
                        released += 1;
                    }
                    _ => {}
                }
            }
            (released..CHILDREN).for_each(|_| go_on.try_put(()).unwrap());
            got.extend(within(group.join_all()).await.into_iter().map(Result::unwrap));
            got.sort();
            assert_eq!(got, (0..CHILDREN).collect::<Vec<_>>(), "each once");
        };
        in_child(drops, ()).await;
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn children_killed_at_any_step_cost_their_own_results_only() {
        let put = async |queue: Queue<u32>, n: u32| {
            queue.put(n).await.unwrap();
            n
        };
        for (point, arrives) in [("put.taken", false), ("put.written", false), ("put.published", true)] {
            let (mut group, queue) = (Group::new(), Queue::unbounded().unwrap());
            let doomed = Process::builder().env("MULTIPROCESS_KILL_AT", point);
            let victim = group.spawn_with(doomed, put, (queue.clone(), 0)).unwrap();
            for n in 1..4 {
                group.spawn(put, (queue.clone(), n)).unwrap();
            }
            let mut results = Vec::new();
            while let Some((who, result)) = within(group.join_next_with_info()).await {
                match who == victim {
                    true => assert_eq!(result.unwrap_err().kind(), ErrorKind::ProcessDied, "{point}"),
                    false => results.push(result.unwrap()),
                }
            }
            results.sort();
            assert_eq!((results, queue.len()), (vec![1, 2, 3], 3 + usize::from(arrives)), "{point}");
        }
    }

    #[tokio::test]
    async fn the_end_of_its_process_ends_all_children_of_a_group() {
        let holds = async |pids: Queue<u32>| {
            let mut group = Group::new();
            for _ in 0..3 {
                pids.put(group.spawn(std::future::pending::<()>, ()).unwrap().pid()).await.unwrap();
            }
            group.join_next().await;
        };
        let pids = Queue::unbounded().unwrap();
        let mut holder = Process::spawn(holds, (pids.clone(),)).unwrap();
        let mut children = Vec::new();
        for _ in 0..3 {
            children.push(within(pids.get()).await.unwrap());
        }
        holder.kill().unwrap();
        within(holder.wait()).await.unwrap();
        let is_gone = |pid: &u32| !std::path::Path::new(&format!("/proc/{pid}/exe")).exists();
        eventually("all have ended", || children.iter().all(is_gone)).await;
    }

    #[test]
    fn a_group_outlives_the_runtime_that_it_was_polled_in() {
        let _deadline = Deadline::start();
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (mut group, go_on) = (Group::new(), mp::Event::new().unwrap());
        let first = runtime();
        first.block_on(async {
            let waits = async |go_on: mp::Event| go_on.wait().await.is_ok();
            group.spawn(waits, (go_on.clone(),)).unwrap();
            falls_asleep(pin!(group.join_next())).await;
        });
        drop(first);
        go_on.set();
        assert!(runtime().block_on(within(group.join_next())).unwrap().unwrap());
    }

    #[test]
    fn shutdown_without_a_timer_kills_at_once_and_outside_a_runtime_is_an_error_of_each() {
        let _deadline = Deadline::start();
        let mut group = Group::new();
        group.spawn(std::future::pending::<()>, ()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let results = runtime.block_on(group.shutdown(Duration::from_secs(600)));
        assert_eq!(results[0].as_ref().unwrap_err().kind(), ErrorKind::ProcessDied);
        group.spawn(std::future::pending::<()>, ()).unwrap();
        let results = futures::executor::block_on(group.shutdown(Duration::from_secs(600)));
        assert!(results.len() == 1 && results[0].is_err(), "{results:?}");
    }
}

mod supervision {
    use super::*;

    const AT_ONCE: Duration = Duration::ZERO;

    fn often() -> Restart {
        Restart::on_failure().max(1000, Duration::from_secs(60)).back_off(AT_ONCE, AT_ONCE)
    }

    #[tokio::test]
    async fn a_child_that_fails_is_started_again_until_it_returns() {
        let starts = Value::new(0_u32).unwrap();
        let serve = |starts: Value<u32>| match starts.fetch_add(1) {
            0 => panic!("first"),
            1 => std::process::abort(),
            2 => std::process::exit(3),
            n => n,
        };
        let mut child = Process::builder().name("server").restart(often()).spawn(serve, (starts.clone(),)).unwrap();
        assert_eq!(child.name(), "server");
        assert_eq!(within(child.wait()).await.unwrap(), 3);
        assert_eq!((child.restarts(), starts.get(), child.pid()), (3, 4, None));
        assert!(within(child.wait()).await.unwrap_err().to_string().contains("already taken"));
    }

    #[tokio::test]
    async fn too_many_failures_are_given_up_with_the_last_causes() {
        let again = Restart::on_failure().max(2, Duration::from_secs(60)).back_off(AT_ONCE, AT_ONCE);
        let starts = Value::new(0_u32).unwrap();
        let fail = |starts: Value<u32>| assert!(starts.get() == 99, "failure {}", starts.fetch_add(1));
        let mut child = Process::builder().name("flaky").restart(again).spawn(fail, (starts,)).unwrap();
        let states = child.states();
        let error = within(child.wait()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::RestartLimit);
        let text = error.to_string();
        assert!(["flaky", "failure 0", "failure 1", "failure 2"].iter().all(|part| text.contains(part)), "{text}");
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("failure 2"));
        let SupervisedState::GaveUp { restarts: 2, cause } = states.get().unwrap() else { panic!() };
        assert!(cause.contains("failure 2"));
    }

    #[tokio::test]
    async fn a_killed_child_is_started_again_and_others_can_watch() {
        let mut child =
            Process::builder().restart(often()).spawn(async || std::future::pending::<()>().await, ()).unwrap();
        let watches = async |mut states: mp::WatchReceiver<SupervisedState>| {
            // It may come late to all of this.
            let is_second = |state: &SupervisedState| {
                matches!(state, SupervisedState::Running { restarts: 1.., .. } | SupervisedState::Ended { .. })
            };
            states.wait_for(is_second).await.unwrap();
            let is_over = |state: &SupervisedState| matches!(state, SupervisedState::Ended { .. });
            states.wait_for(is_over).await.unwrap()
        };
        let watcher = Process::spawn(watches, (child.states(),)).unwrap();
        for restarts in 1..=3 {
            let pid = child.pid().unwrap();
            rustix::process::kill_process(
                rustix::process::Pid::from_raw(pid as i32).unwrap(),
                rustix::process::Signal::KILL,
            )
            .unwrap();
            let mut states = child.states();
            let is_next = |state: &SupervisedState| matches!(state, SupervisedState::Running { restarts: n, .. } if *n == restarts);
            within(states.wait_for(is_next)).await.unwrap();
            assert_ne!(child.pid(), Some(pid));
        }
        assert_eq!(within(child.stop(Duration::from_secs(10))).await.unwrap(), None);
        assert_eq!(within(watcher).await.unwrap(), SupervisedState::Ended { restarts: 3 });
    }

    #[tokio::test]
    async fn stop_asks_first_and_returns_the_result() {
        let ready = mp::Event::new().unwrap();
        let polite = async |ready: mp::Event| {
            let mut signal = pin!(mp::shutdown_signal());
            assert!(poll!(&mut signal).is_pending());
            ready.set();
            signal.await.unwrap();
            2
        };
        let mut child = Process::builder().restart(Restart::always()).spawn(polite, (ready.clone(),)).unwrap();
        within(ready.wait()).await.unwrap();
        assert_eq!(within(child.stop(Duration::from_secs(10))).await.unwrap(), Some(2));

        let deaf = Process::builder().shield_signals(true).restart(Restart::always());
        let mut child = deaf.spawn(std::future::pending::<()>, ()).unwrap();
        let start = Instant::now();
        assert_eq!(within(child.stop(SHORT)).await.unwrap(), None);
        assert!(start.elapsed() >= SHORT);
    }

    #[tokio::test]
    async fn stop_ends_a_wait_for_the_next_start() {
        let again = Restart::on_failure().back_off(Duration::from_secs(600), Duration::from_secs(600));
        let mut child = Process::builder().restart(again).spawn(|| -> u8 { panic!("no") }, ()).unwrap();
        let mut states = child.states();
        within(states.wait_for(|state| matches!(state, SupervisedState::BackingOff { .. }))).await.unwrap();
        assert_eq!(child.pid(), None);
        assert_eq!(within(child.stop(AT_ONCE)).await.unwrap(), None);
    }

    #[tokio::test]
    async fn dropped_the_child_ends_and_is_not_started_again() {
        let starts = Value::new(0_u32).unwrap();
        let serve = async |starts: Value<u32>| {
            starts.fetch_add(1);
            std::future::pending::<()>().await;
        };
        let child = Process::builder().restart(often()).spawn(serve, (starts.clone(),)).unwrap();
        eventually("it runs", || starts.get() == 1).await;
        let pid = child.pid().unwrap();
        drop(child);
        eventually("it has ended", || !mp::active_children().iter().any(|child| child.pid() == pid)).await;
        tokio::time::sleep(SHORT).await;
        assert_eq!(starts.get(), 1);
    }

    #[tokio::test]
    async fn always_restarts_a_child_that_has_returned() {
        let starts = Value::new(0_u32).unwrap();
        let again = Restart::always().max(3, Duration::from_secs(60)).back_off(AT_ONCE, AT_ONCE);
        let serve = |starts: Value<u32>| starts.fetch_add(1);
        let mut child = Process::builder().restart(again).spawn(serve, (starts.clone(),)).unwrap();
        assert_eq!(within(child.wait()).await.unwrap_err().kind(), ErrorKind::RestartLimit);
        assert_eq!(starts.get(), 4);
    }

    #[tokio::test]
    async fn ten_thousand_dropped_waits_and_stops_lose_no_result() {
        let drops = async || {
            let go_on = mp::Event::new().unwrap();
            let serve = async |go_on: mp::Event| {
                go_on.wait().await.unwrap();
                5
            };
            let builder = Process::builder().shield_signals(true).restart(often());
            let mut child = builder.spawn(serve, (go_on.clone(),)).unwrap();
            let mut random = Random::new(9);
            let mut before = None;
            for n in 1..=10_000 {
                assert!(cancelled(&mut random, child.wait()).await.is_none());
                if n % 1_000 == 0 {
                    let restarts = child.restarts();
                    kill(child.pid().unwrap());
                    eventually("it is started again", || child.restarts() > restarts && child.pid().is_some()).await;
                    let holds = *before.get_or_insert_with(holdings);
                    eventually("nothing is held", || holdings().descriptors <= holds.descriptors).await;
                }
            }
            assert_eq!(child.restarts(), 10);
            for _ in 0..10_000 {
                assert!(cancelled(&mut random, child.stop(Duration::from_secs(600))).await.is_none());
            }
            go_on.set();
            assert_eq!(within(child.stop(Duration::from_secs(600))).await.unwrap(), Some(5));
            assert_eq!(child.restarts(), 10);
            assert!(within(child.stop(AT_ONCE)).await.unwrap_err().to_string().contains("already taken"));
        };
        in_child(drops, ()).await;
    }

    fn kill(pid: u32) {
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    fn is_gone(pid: u32) -> bool {
        !std::path::Path::new(&format!("/proc/{pid}/exe")).exists()
    }

    /// A child that dies at a step of its work: the next start has what is left of that.
    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_at_any_step_of_its_start_the_child_is_started_again() {
        let serve = async |jobs: Queue<u32>| {
            let lease = jobs.lease().await.unwrap();
            let (job, deliveries) = (*lease, lease.deliveries());
            lease.commit().unwrap();
            (job, deliveries)
        };
        for (point, left) in [("lease.held", 0), ("commit.begun", 1), ("commit.done", 0)] {
            let jobs = Queue::unbounded().unwrap();
            jobs.put(1).await.unwrap();
            let again = Restart::on_failure().max(3, Duration::from_secs(600)).back_off(AT_ONCE, AT_ONCE);
            let builder = Process::builder().env("MULTIPROCESS_KILL_AT", point).restart(again);
            let mut child = builder.spawn(serve, (jobs.clone(),)).unwrap();
            match point {
                // The second start gets the item in another way.
                "lease.held" => assert_eq!((within(child.wait()).await.unwrap(), child.restarts()), ((1, 2), 1)),
                "commit.begun" => {
                    assert_eq!(within(child.wait()).await.unwrap_err().kind(), ErrorKind::RestartLimit);
                    assert_eq!(child.restarts(), 3);
                }
                // The commit was complete, so the next start waits for another.
                _ => {
                    eventually("it is started again", || child.restarts() == 1 && child.pid().is_some()).await;
                    assert_eq!(within(child.stop(AT_ONCE)).await.unwrap(), None);
                }
            }
            assert_eq!(jobs.len(), left, "{point}");
        }
    }

    #[tokio::test]
    async fn the_end_of_the_supervising_process_ends_the_child_and_closes_its_states() {
        let supervises = async |told: Queue<(u32, mp::WatchReceiver<SupervisedState>)>| {
            let mut child = Process::builder().restart(often()).spawn(std::future::pending::<()>, ()).unwrap();
            told.put((child.pid().unwrap(), child.states())).await.unwrap();
            let _ = child.wait().await;
        };
        let told = Queue::unbounded().unwrap();
        let mut supervisor = Process::spawn(supervises, (told.clone(),)).unwrap();
        let (pid, mut states) = within(told.get()).await.unwrap();
        assert_eq!(states.get_and_update().unwrap(), SupervisedState::Running { pid, restarts: 0 });
        supervisor.kill().unwrap();
        assert_eq!(within(states.changed()).await.unwrap_err().kind(), ErrorKind::Closed);
        within(supervisor.wait()).await.unwrap();
        eventually("it has ended", || is_gone(pid)).await;
    }

    #[tokio::test]
    async fn a_child_that_ends_when_it_is_to_be_stopped_is_not_started_again() {
        let starts = Value::new(0_u32).unwrap();
        let fails = |starts: Value<u32>| assert!(starts.fetch_add(1) == u32::MAX, "it fails");
        for round in 0..20 {
            let mut child = Process::builder().restart(often()).spawn(fails, (starts.clone(),)).unwrap();
            eventually("it fails and is started again", || child.restarts() > round % 3).await;
            // The task has both before it: a child that has ended, and the wish to stop.
            let _ = child.stop(AT_ONCE).now_or_never();
            within(child.stop(AT_ONCE)).await.unwrap();
            let seen = starts.get();
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert_eq!((starts.get(), child.pid()), (seen, None));
        }
    }

    #[test]
    fn dropped_while_its_runtime_stands_still_the_child_ends() {
        let _deadline = Deadline::start();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let start = async || Process::builder().restart(often()).spawn(std::future::pending::<()>, ()).unwrap();
        let child = runtime.block_on(start());
        let pid = child.pid().unwrap();
        drop(child);
        while !is_gone(pid) {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(runtime);
    }

    #[tokio::test]
    async fn a_forked_process_that_drops_its_copies_leaves_the_children_alone() {
        let alone = async || {
            let child = Process::builder().restart(often()).spawn(std::future::pending::<()>, ()).unwrap();
            let mut group = Group::new();
            let member = group.spawn(std::future::pending::<()>, ()).unwrap().pid();
            let pid = child.pid().unwrap();
            // SAFETY: the process that is made drops what leaves locks and runtimes alone, and ends by `_exit` or a signal.
            match unsafe { libc::fork() } {
                0 => {
                    // SAFETY: it has no precondition.
                    unsafe { libc::alarm(20) };
                    drop((child, group));
                    // SAFETY: it ends the process.
                    unsafe { libc::_exit(0) }
                }
                forked => {
                    let mut status = -1;
                    // SAFETY: waits for the process that was just made.
                    unsafe { libc::waitpid(forked, &mut status, 0) };
                    assert_eq!(status, 0);
                }
            }
            tokio::time::sleep(SHORT).await;
            assert!(!is_gone(pid) && !is_gone(member) && child.restarts() == 0 && group.len() == 1);
        };
        in_child(alone, ()).await;
    }

    #[test]
    fn the_end_of_its_runtime_ends_the_child() {
        let _deadline = Deadline::start();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let start = async || Process::builder().restart(often()).spawn(std::future::pending::<()>, ()).unwrap();
        let mut child = runtime.block_on(start());
        let pid = child.pid().unwrap();
        drop(runtime);
        while !is_gone(pid) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(child.pid(), None);
        let other = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        assert_eq!(other.block_on(child.wait()).unwrap_err().kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn a_runtime_without_a_timer_or_io_is_an_error_of_the_start() {
        let start = |runtime: tokio::runtime::Runtime| {
            let _inside = runtime.enter();
            let child = Process::builder().restart(often()).spawn(|| 1, ());
            child.map(drop).unwrap_err().kind()
        };
        let builder = tokio::runtime::Builder::new_current_thread;
        assert_eq!(start(builder().enable_io().build().unwrap()), ErrorKind::Io);
        assert_eq!(start(builder().enable_time().build().unwrap()), ErrorKind::Io);
    }

    #[tokio::test]
    async fn arguments_with_descriptors_go_to_each_start() {
        use std::io::Write;
        let (mut reader, writer) = std::io::pipe().unwrap();
        let starts = Value::new(0_u32).unwrap();
        let write = |mut pipe: Fd<std::io::PipeWriter>, starts: Value<u32>| {
            pipe.write_all(b"x").unwrap();
            assert!(starts.fetch_add(1) == 2, "again");
        };
        let mut child = Process::builder().restart(often()).spawn(write, (Fd::new(writer), starts)).unwrap();
        within(child.wait()).await.unwrap();
        let mut bytes = [0; 3];
        std::io::Read::read_exact(&mut reader, &mut bytes).unwrap();
        assert_eq!(&bytes, b"xxx");
    }

    #[tokio::test]
    async fn blocking_tasks_that_the_function_leaves_behind_run_to_their_end() {
        let done = Value::new(0_u32).unwrap();
        let leaves = async |done: Value<u32>| {
            tokio::task::spawn_blocking(move || {
                std::thread::sleep(4 * SHORT);
                done.set(1);
            });
            7
        };
        let mut child = Process::builder().restart(Restart::on_failure()).spawn(leaves, (done.clone(),)).unwrap();
        assert_eq!((within(child.wait()).await.unwrap(), done.get()), (7, 1));
    }

    #[tokio::test]
    async fn stop_kills_a_child_whose_blocking_tasks_do_not_end() {
        let ready = mp::Event::new().unwrap();
        let leaves = async |ready: mp::Event| {
            tokio::task::spawn_blocking(move || {
                ready.set();
                loop {
                    std::thread::park();
                }
            });
            7
        };
        let builder = Process::builder().shield_signals(true).restart(Restart::on_failure());
        let mut child = builder.spawn(leaves, (ready.clone(),)).unwrap();
        within(ready.wait()).await.unwrap();
        let pid = child.pid().unwrap();
        // It may be stopped before its result has come.
        assert!(matches!(within(child.stop(4 * SHORT)).await.unwrap(), Some(7) | None));
        eventually("it is reaped", || !std::path::Path::new(&format!("/proc/{pid}")).exists()).await;
    }

    #[test]
    fn a_piped_stream_and_a_missing_runtime_are_errors() {
        let piped = || Process::builder().stdout(mp::Stdio::piped()).restart(Restart::always());
        assert!(piped().spawn(|| 1, ()).unwrap_err().to_string().contains("runtime"));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _inside = runtime.enter();
        assert_eq!(piped().spawn(|| 1, ()).unwrap_err().kind(), ErrorKind::Spawn);
    }
}
