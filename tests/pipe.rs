//! Pipes: what the reference suite asks of connections, and what only an async, typed pipe can promise.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use bytes::Bytes;
use common::{
    Deadline, assert_no_growth, eventually, handle_signals, holdings, in_child, is_asleep, limit_descriptors, payload,
    pestered, read_payload, within,
};
use futures::{FutureExt, SinkExt, StreamExt};
use multiprocess::{self as mp, Connection, ErrorKind, Fd, Process, Queue, Receiver, Sender};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

mp::test_support!();

const SHORT: Duration = Duration::from_millis(50);

async fn echo<T: Serialize + serde::de::DeserializeOwned + Send + 'static>(mut pipe: Connection<T, T>) {
    while let Ok(value) = pipe.recv().await {
        pipe.send(value).await.unwrap();
    }
}

type Bytewise = Connection<Vec<u8>, Vec<u8>>;

// The reference suite.

#[tokio::test]
async fn conn_01_values_echoed_by_a_child_come_back_equal() {
    #[derive(Serialize, Deserialize, Debug, PartialEq, Clone)]
    struct Value {
        text: String,
        map: BTreeMap<u8, Option<f64>>,
        nested: Vec<Result<(), String>>,
    }
    let (mut here, there) = mp::pipe::<Value, Value>().unwrap();
    let child = Process::spawn(echo::<Value>, (there,)).unwrap();
    let value = Value {
        text: "héllo".into(),
        map: BTreeMap::from([(1, Some(0.5)), (2, None)]),
        nested: vec![Ok(()), Err("no".into())],
    };
    here.send(value.clone()).await.unwrap();
    assert_eq!(within(here.recv()).await.unwrap(), value);
    drop(here);
    within(child).await.unwrap();
}

#[tokio::test]
async fn conn_02_bytes_come_back_equal() {
    let (mut here, there) = mp::pipe::<Bytes, Bytes>().unwrap();
    let _child = Process::spawn(echo::<Bytes>, (there,)).unwrap();
    for bytes in [Bytes::new(), Bytes::from_static(b"x"), Bytes::from(vec![9; 100_000])] {
        here.send(bytes.clone()).await.unwrap();
        assert_eq!(within(here.recv()).await.unwrap(), bytes);
    }
}

#[tokio::test]
async fn conn_05_poll_returns_true_once_a_value_is_there() {
    let (mut here, there) = mp::pipe::<u32, u32>().unwrap();
    assert!(!here.poll(Duration::ZERO).await.unwrap());
    let start = Instant::now();
    assert!(!here.poll(SHORT).await.unwrap());
    assert!(start.elapsed() >= SHORT);
    let _child = Process::spawn(echo::<u32>, (there,)).unwrap();
    here.send(5).await.unwrap();
    assert!(within(here.poll(Duration::MAX)).await.unwrap());
    assert!(here.poll(Duration::ZERO).await.unwrap());
    assert_eq!(here.recv().await.unwrap(), 5);
    assert!(!here.poll(Duration::ZERO).await.unwrap());
}

#[tokio::test]
async fn conn_06_16_mib_echoed_whole() {
    let (mut here, there) = mp::pipe::<Vec<u8>, Vec<u8>>().unwrap();
    let _child = Process::spawn(echo::<Vec<u8>>, (there,)).unwrap();
    let bytes = payload(1, 2, 16 << 20);
    within(here.send(bytes.clone())).await.unwrap();
    assert!(within(here.recv()).await.unwrap() == bytes);
}

#[tokio::test]
async fn conn_07_values_sent_before_the_end_come_before_closed() {
    let (mut here, there) = mp::pipe::<u32, u32>().unwrap();
    let send_and_go = async |mut pipe: Connection<u32, u32>| {
        for n in 0..100 {
            pipe.send(n).await.unwrap();
        }
    };
    in_child(send_and_go, (there,)).await;
    for n in 0..100 {
        assert_eq!(within(here.recv()).await.unwrap(), n);
    }
    for _ in 0..2 {
        assert_eq!(within(here.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
    }
    assert_eq!(here.try_recv().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(here.recv_timeout(SHORT).await.unwrap_err().kind(), ErrorKind::Closed);
    let error = here.send(7).await.unwrap_err();
    assert_eq!((error.kind(), error.into_inner()), (ErrorKind::Closed, 7));
    assert_eq!(here.try_send(7).unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn conn_10_the_handed_over_end_is_gone_here_at_once() {
    let (mut here, there) = mp::pipe::<u32, u32>().unwrap();
    let child = Process::spawn(async |mut pipe: Connection<u32, u32>| pipe.recv().await.unwrap(), (there,)).unwrap();
    // The end moved: nothing here keeps it open when the child is done with it.
    here.send(3).await.unwrap();
    assert_eq!(within(child).await.unwrap(), 3);
    assert_eq!(within(here.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn conn_13_a_file_sent_to_another_process_works_there() {
    let (mut tx, rx) = mp::simplex::<Fd<std::fs::File>>().unwrap();
    let write = async |mut rx: Receiver<Fd<std::fs::File>>| {
        rx.recv().await.unwrap().write_all(b"written elsewhere").unwrap();
    };
    let child = Process::spawn(write, (rx,)).unwrap();
    let (mut read, write_end) = std::io::pipe().unwrap();
    tx.send(Fd::new(std::fs::File::from(std::os::fd::OwnedFd::from(write_end)))).await.unwrap();
    within(child).await.unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "written elsewhere");
}

#[tokio::test]
async fn conn_14_descriptors_above_256() {
    let take = async |mut rx: Receiver<Fd<std::fs::File>>| {
        let low: Vec<_> = (0..300).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let file = rx.recv().await.unwrap();
        assert!(std::os::fd::AsRawFd::as_raw_fd(&*file) > 256);
        (&*file).write_all(b"high").unwrap();
        low.len()
    };
    let (mut tx, rx) = mp::simplex().unwrap();
    let child = Process::spawn(take, (rx,)).unwrap();
    let (mut read, write_end) = std::io::pipe().unwrap();
    tx.send(Fd::new(std::fs::File::from(std::os::fd::OwnedFd::from(write_end)))).await.unwrap();
    within(child).await.unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "high");
}

#[tokio::test]
async fn conn_15_a_descriptor_that_did_not_come_is_an_error() {
    // A number where a descriptor's index should be: the same bytes, and nothing attached.
    let (tx, mut rx) = mp::simplex::<Fd<std::fs::File>>().unwrap();
    let tx: Queue<Sender<Fd<std::fs::File>>> = {
        let queue = Queue::unbounded().unwrap();
        queue.put(tx).await.unwrap();
        queue
    };
    // The family trusts itself: a handle may be read as one of another item.
    let lie = async |queue: Queue<Sender<u32>>| queue.get().await.unwrap().send(0).await.unwrap();
    #[derive(Serialize)]
    struct Luggage(Queue<Sender<Fd<std::fs::File>>>);
    #[derive(Deserialize)]
    struct Read(Queue<Sender<u32>>);
    struct Swap(Option<Luggage>, Option<Read>);
    impl Serialize for Swap {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            self.0.as_ref().unwrap().0.serialize(serializer)
        }
    }
    impl<'de> Deserialize<'de> for Swap {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            Ok(Self(None, Some(Read(Queue::deserialize(deserializer)?))))
        }
    }
    let swap = Queue::unbounded().unwrap();
    swap.put(Swap(Some(Luggage(tx)), None)).await.unwrap();
    lie(swap.get().await.unwrap().1.unwrap().0).await;
    assert_eq!(within(rx.recv()).await.unwrap_err().kind(), ErrorKind::Decode);
    assert_eq!(within(rx.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn conn_16_dropping_both_ends_closes_them() {
    let whole = async || {
        drop(mp::pipe::<u8, u8>().unwrap());
        let before = holdings();
        for _ in 0..20 {
            let (mut a, mut b) = mp::pipe::<u8, u8>().unwrap();
            a.send(1).await.unwrap();
            b.recv().await.unwrap();
            drop(mp::simplex::<u8>().unwrap());
        }
        (before, holdings())
    };
    let (before, after) = in_child(whole, ()).await;
    assert_eq!(before, after);
}

#[tokio::test]
async fn conn_17_dropped_end_wakes_waiters_on_either_side() {
    // Here, by a drop.
    let (mut a, b) = mp::pipe::<u8, u8>().unwrap();
    let mut recv = Box::pin(a.recv());
    assert!(futures::poll!(&mut recv).is_pending());
    drop(b);
    assert_eq!(within(recv).await.unwrap_err().kind(), ErrorKind::Closed);
    // A half of the same end goes: the other half's peer hears of it, it itself goes on.
    let (a, mut b) = mp::pipe::<u8, u8>().unwrap();
    let (tx, mut rx) = a.split();
    let mut recv = Box::pin(async { (b.recv().await, b) });
    assert!(futures::poll!(&mut recv).is_pending());
    drop(tx);
    let (error, mut b) = within(recv).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Closed);
    b.send(1).await.unwrap();
    assert_eq!(rx.recv().await.unwrap(), 1);
    // A blocked thread, by the end of another process.
    let (here, there) = mp::pipe::<u8, u8>().unwrap();
    let child = Process::spawn(async |_pipe: Connection<u8, u8>| std::future::pending::<()>().await, (there,)).unwrap();
    let (mut tx, mut rx) = here.split();
    let blocked = tokio::task::spawn_blocking(move || rx.blocking_recv().unwrap_err().kind());
    let full = tokio::task::spawn_blocking(move || {
        std::iter::from_fn(|| Some(tx.blocking_send(1).err().map(|error| error.kind()))).flatten().next()
    });
    child.terminate().unwrap();
    assert_eq!(within(blocked).await.unwrap(), ErrorKind::Closed);
    assert_eq!(within(full).await.unwrap(), Some(ErrorKind::Closed));
}

#[tokio::test]
async fn conn_18_a_pipe_that_nobody_reads_waits_at_about_a_mebibyte_and_its_end_is_an_error() {
    let (mut tx, rx) = mp::simplex::<Vec<u8>>().unwrap();
    let mut sent = 0;
    let error = loop {
        match tx.try_send(vec![0; 10_000]) {
            Ok(()) => sent += 10_000,
            Err(error) => break error,
        }
    };
    assert_eq!((error.kind(), error.into_inner().len()), (ErrorKind::Full, 10_000));
    assert!((500_000..5_000_000).contains(&sent), "{sent}");
    let mut send = Box::pin(tx.send(vec![0; 10_000]));
    assert!(futures::poll!(&mut send).is_pending());
    drop(rx);
    assert_eq!(within(send).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn conn_25_the_end_is_seen_whatever_else_was_started() {
    common::rounds(end_of_a_pipe_among_others, |took| *took < Duration::from_secs(2)).await.unwrap();
}

/// Returns after which time the other side has seen that this one was dropped.
async fn end_of_a_pipe_among_others() -> mp::Result<Duration> {
    let (here, there) = mp::pipe::<u8, u8>()?;
    let wait = async |mut pipe: Connection<u8, u8>| {
        let kind = pipe.recv().await.unwrap_err().kind();
        (kind, pipe)
    };
    let waiter = Process::spawn(wait, (there,))?;
    // These are started while the ends are open; none of them may keep one.
    let idle = || Process::spawn(async || std::future::pending::<()>().await, ()).unwrap();
    let _others: Vec<_> = (0..3).map(|_| idle()).collect();
    let start = Instant::now();
    drop(here);
    let (kind, _pipe) = within(waiter).await?;
    assert_eq!(kind, ErrorKind::Closed);
    Ok(start.elapsed())
}

#[tokio::test]
async fn poll_01_an_empty_message_is_seen_again_and_again_without_being_taken() {
    let (mut tx, mut rx) = mp::simplex::<Vec<u8>>().unwrap();
    assert!(!rx.poll(Duration::ZERO).await.unwrap());
    tx.send(Vec::new()).await.unwrap();
    for _ in 0..3 {
        assert!(rx.poll(Duration::ZERO).await.unwrap());
    }
    assert!(rx.recv().await.unwrap().is_empty());
    assert!(!rx.poll(Duration::ZERO).await.unwrap());
}

#[tokio::test]
async fn poll_02_empty_and_other_messages_keep_their_borders() {
    let strings = ["hello", "", "a", "b", "", "bye", "", "lop"];
    let (tx, mut rx) = mp::simplex::<Vec<u8>>().unwrap();
    let send = async |mut tx: Sender<Vec<u8>>, strings: Vec<String>| {
        for string in strings {
            tx.send(string.into_bytes()).await.unwrap();
        }
    };
    let strings_there: Vec<String> = strings.map(str::to_string).into();
    let _child = Process::spawn(send, (tx, strings_there)).unwrap();
    for string in strings {
        assert!(within(rx.poll(Duration::MAX)).await.unwrap());
        assert_eq!(rx.recv().await.unwrap(), string.as_bytes());
    }
}

#[tokio::test]
async fn poll_03_a_poll_swallows_nothing_that_another_process_reads_later() {
    let (mut tx, mut rx) = mp::simplex::<Vec<u8>>().unwrap();
    for n in 0..10 {
        tx.send(payload(0, n, 1000)).await.unwrap();
    }
    assert!(rx.poll(Duration::ZERO).await.unwrap());
    assert_eq!(read_payload(&rx.recv().await.unwrap()), (0, 0));
    assert!(rx.poll(Duration::ZERO).await.unwrap());
    let read_on = async |mut rx: Receiver<Vec<u8>>| {
        assert!(rx.poll(Duration::ZERO).await.unwrap());
        for n in 1..5 {
            assert_eq!(read_payload(&rx.recv().await.unwrap()), (0, n));
        }
        assert!(rx.poll(Duration::ZERO).await.unwrap());
        rx
    };
    let mut rx = in_child(read_on, (rx,)).await;
    for n in 5..10 {
        assert_eq!(read_payload(&rx.recv().await.unwrap()), (0, n));
    }
}

#[tokio::test]
async fn poll_04_quick_messages_are_not_merged() {
    let (mut tx, mut rx) = mp::simplex::<String>().unwrap();
    for text in ["a", "b", "c"] {
        tx.send(text.into()).await.unwrap();
    }
    for text in ["a", "b", "c"] {
        assert!(rx.poll(Duration::ZERO).await.unwrap());
        assert_eq!(rx.recv().await.unwrap(), text);
    }
    assert!(!rx.poll(Duration::ZERO).await.unwrap());
}

#[tokio::test]
async fn poll_05_it_is_true_at_the_end_and_waits_for_it() {
    let (tx, mut rx) = mp::simplex::<u8>().unwrap();
    let mut poll = Box::pin(rx.poll(Duration::MAX));
    assert!(futures::poll!(&mut poll).is_pending());
    drop(tx);
    assert!(within(poll).await.unwrap());
    assert!(rx.poll(Duration::ZERO).await.unwrap());
    assert_eq!(rx.recv().await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn pickc_01_an_accepted_stream_is_used_in_another_process() {
    let serve = async |mut rx: Receiver<Fd<std::net::TcpStream>>| {
        let mut stream = rx.recv().await.unwrap().into_inner();
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        stream.write_all(&text.map(|byte| byte.to_ascii_uppercase())).unwrap();
    };
    let (mut tx, rx) = mp::simplex().unwrap();
    let child = Process::spawn(serve, (rx,)).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    tx.send(Fd::new(listener.accept().unwrap().0)).await.unwrap();
    client.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HELLO");
    within(child).await.unwrap();
}

#[tokio::test]
async fn pickc_02_ends_sent_through_a_connection_keep_their_direction() {
    #[derive(Serialize, Deserialize)]
    enum End {
        Sender(Sender<u32>),
        Receiver(Receiver<u32>),
    }
    let use_ends = async |mut pipe: Connection<(), End>| {
        let mut sum = 0;
        while let Ok(end) = pipe.recv().await {
            match end {
                End::Sender(mut tx) => tx.send(25).await.unwrap(),
                End::Receiver(mut rx) => sum += rx.recv().await.unwrap(),
            }
        }
        sum
    };
    let (mut here, there) = mp::pipe::<End, ()>().unwrap();
    let child = Process::spawn(use_ends, (there,)).unwrap();
    let (tx, mut rx) = mp::simplex().unwrap();
    here.send(End::Sender(tx)).await.unwrap();
    assert_eq!(within(rx.recv()).await.unwrap(), 25);
    let (mut tx, rx) = mp::simplex().unwrap();
    here.send(End::Receiver(rx)).await.unwrap();
    tx.send(32).await.unwrap();
    drop(here);
    assert_eq!(within(child).await.unwrap(), 32);
    // Read as an end of the other kind it is refused.
    let carrier = Queue::unbounded().unwrap();
    struct Mixed(Option<Sender<u32>>);
    impl Serialize for Mixed {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            self.0.as_ref().unwrap().serialize(serializer)
        }
    }
    impl<'de> Deserialize<'de> for Mixed {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            Receiver::<u32>::deserialize(deserializer).map(|_| Self(None))
        }
    }
    carrier.put(Mixed(Some(mp::simplex().unwrap().0))).await.unwrap();
    assert_eq!(carrier.get().await.err().unwrap().kind(), ErrorKind::Decode);
}

#[tokio::test]
async fn eintr_02_send_and_recv_of_large_messages_survive_signals() {
    let (mut here, there) = mp::pipe::<Vec<u8>, Vec<u8>>().unwrap();
    let child = async |pipe: Bytewise, mut ready: Sender<()>| {
        handle_signals();
        ready.send(()).await.unwrap();
        echo(pipe).await;
    };
    let (tx, mut ready) = mp::simplex().unwrap();
    let child = Process::spawn(child, (there, tx)).unwrap();
    within(ready.recv()).await.unwrap();
    let talk = async {
        for n in 0..100 {
            let bytes = payload(0, n, if n % 10 == 0 { 3 << 20 } else { 100 });
            here.send(bytes).await.unwrap();
            assert_eq!(read_payload(&here.recv().await.unwrap()), (0, n));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(here);
    };
    within(async { futures::join!(talk, pestered(child)) }).await;
}

#[tokio::test]
async fn eintr_02_blocking_calls_survive_signals() {
    let (mut here, there) = mp::pipe::<u64, u64>().unwrap();
    let child = |mut pipe: Connection<u64, u64>| {
        handle_signals();
        pipe.blocking_send(0).unwrap();
        while let Ok(n) = pipe.blocking_recv() {
            pipe.blocking_send(n).unwrap();
        }
    };
    let child = Process::spawn(child, (there,)).unwrap();
    within(here.recv()).await.unwrap();
    let talk = async {
        for n in 0..100 {
            here.send(n).await.unwrap();
            assert_eq!(here.recv().await.unwrap(), n);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(here);
    };
    within(async { futures::join!(talk, pestered(child)) }).await;
}

// What the reference has not.

#[tokio::test]
async fn a_stream_that_was_left_waiting_keeps_nothing_from_the_other_ways_to_receive() {
    let (mut tx, mut rx) = mp::simplex::<u32>().unwrap();
    assert!(rx.next().now_or_never().is_none());
    tx.send(1).await.unwrap();
    let thread = std::thread::spawn(move || (rx.blocking_recv().unwrap(), rx));
    let joined = tokio::task::spawn_blocking(move || thread.join().unwrap());
    let (got, mut rx) = within(joined).await.unwrap();
    assert_eq!(got, 1);
    assert!(rx.next().now_or_never().is_none());
    tx.send(2).await.unwrap();
    assert_eq!(rx.try_recv().unwrap(), 2);
}

#[tokio::test]
async fn nothing_overtakes_an_item_that_a_sink_still_holds() {
    let (mut tx, mut rx) = mp::simplex::<Vec<u8>>().unwrap();
    let mut fed = 0;
    loop {
        fed += 1;
        tx.feed(vec![fed; 600_000]).await.unwrap();
        if tx.flush().now_or_never().is_none() {
            break;
        }
    }
    let refused = tx.try_send(vec![0]).unwrap_err();
    assert_eq!((refused.kind(), refused.into_inner()), (ErrorKind::Full, vec![0]));
    let thread = std::thread::spawn(move || (tx.blocking_send(vec![0]).map_err(|error| error.kind()), tx));
    let (refused, mut tx) = thread.join().unwrap();
    assert_eq!(refused, Err(ErrorKind::Full));
    for n in 1..fed {
        assert_eq!(within(rx.recv()).await.unwrap()[0], n);
    }
    tx.try_send(vec![0]).unwrap();
    assert_eq!([within(rx.recv()).await.unwrap()[0], within(rx.recv()).await.unwrap()[0]], [fed, 0]);
}

#[tokio::test]
async fn an_end_that_still_holds_an_item_does_not_travel() {
    let (mut tx, mut rx) = mp::simplex::<Vec<u8>>().unwrap();
    while tx.try_send(vec![0; 100_000]).is_ok() {}
    // No room: the sink keeps it.
    tx.start_send_unpin(vec![1; 100_000]).unwrap();
    assert_eq!(tx.start_send_unpin(vec![2]).unwrap_err().kind(), ErrorKind::Other);
    let carrier = Queue::unbounded().unwrap();
    let refused = carrier.try_put(tx).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Encode, "{refused}");
    let mut tx = refused.into_inner();
    while rx.try_recv().is_ok() {}
    within(tx.flush()).await.unwrap();
    assert_eq!(within(rx.recv()).await.unwrap()[0], 1);
    carrier.try_put(tx).unwrap();
    carrier.try_get().unwrap().try_send(vec![2]).unwrap();
    assert_eq!(within(rx.recv()).await.unwrap(), [2]);
}

#[tokio::test]
async fn one_gibibyte_goes_through() {
    let (mut tx, rx) = mp::simplex::<Vec<u8>>().unwrap();
    let take = |mut rx: Receiver<Vec<u8>>| {
        let bytes = rx.blocking_recv().unwrap();
        let ends = (bytes[0], bytes[bytes.len() / 2], bytes[bytes.len() - 1]);
        (bytes.len(), ends)
    };
    let child = Process::spawn(take, (rx,)).unwrap();
    let mut bytes = vec![0; 1 << 30];
    let last = bytes.len() - 1;
    (bytes[0], bytes[1 << 29], bytes[last]) = (1, 2, 3);
    // So much takes a while on a busy machine.
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, tx.send(bytes)).await.expect("sent in time").unwrap();
    let seen = tokio::time::timeout(limit, child).await.expect("received in time");
    assert_eq!(seen.unwrap(), (1 << 30, (1, 2, 3)));
}

#[tokio::test]
async fn pipe_halves_work_as_stream_and_sink() {
    let (here, there) = mp::pipe::<u32, u32>().unwrap();
    let _child = Process::spawn(echo::<u32>, (there,)).unwrap();
    let (mut tx, rx) = here.split();
    let send = async {
        tx.send_all(&mut futures::stream::iter((0..1000).map(Ok))).await.unwrap();
        drop(tx);
    };
    let sum = rx.fold(0, |sum, n| async move { sum + n.unwrap() });
    let ((), sum) = within(async { futures::join!(send, sum) }).await;
    assert_eq!(sum, (0..1000).sum::<u32>());
    let (mut here, there) = mp::pipe::<u32, u32>().unwrap();
    let _child = Process::spawn(echo::<u32>, (there,)).unwrap();
    SinkExt::send(&mut here, 4).await.unwrap();
    assert_eq!(within(here.next()).await.unwrap().unwrap(), 4);
}

#[tokio::test]
async fn value_given_to_a_sink_is_sent_before_later_ones() {
    let (mut tx, mut rx) = mp::simplex::<(u32, Vec<u8>)>().unwrap();
    let mut n = 0;
    while tx.try_send((n, vec![0; 1000])).is_ok() {
        n += 1;
    }
    // No room: the sink keeps it.
    tx.feed((n, vec![])).await.unwrap();
    let later = async { tx.send((n + 1, vec![])).await.unwrap() };
    let all = async {
        for expected in 0..n + 2 {
            assert_eq!(rx.recv().await.unwrap().0, expected);
        }
    };
    within(async { futures::join!(later, all) }).await;
}

#[tokio::test]
async fn ends_and_halves_travel_and_are_sent_on() {
    let (mut here, there) = mp::pipe::<u32, u32>().unwrap();
    let pass_on = async |pipe: Connection<u32, u32>| {
        let (tx, rx) = pipe.split();
        let answer = async |mut tx: Sender<u32>, mut rx: Receiver<u32>| {
            while let Ok(n) = rx.recv().await {
                tx.send(n + 1).await.unwrap();
            }
            (tx, rx)
        };
        Process::spawn(answer, (tx, rx)).unwrap().await.unwrap();
    };
    let child = Process::spawn(pass_on, (there,)).unwrap();
    for n in 0..100 {
        here.send(n).await.unwrap();
        assert_eq!(within(here.recv()).await.unwrap(), n + 1);
    }
    let (tx, mut rx) = here.split();
    drop(tx);
    within(child).await.unwrap();
    assert_eq!(within(rx.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn a_half_that_could_not_be_sent_still_ends_its_direction() {
    let (a, mut b) = mp::pipe::<u32, u32>().unwrap();
    let (tx, _rx) = a.split();
    let full = Queue::bounded(1).unwrap();
    full.put(mp::simplex::<u32>().unwrap().0).await.unwrap();
    let back = full.try_put(tx).unwrap_err().into_inner();
    drop(back);
    assert_eq!(within(b.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn an_end_unread_in_a_queue_goes_with_the_queue() {
    let (tx, mut rx) = mp::simplex::<u32>().unwrap();
    let queue = Queue::unbounded().unwrap();
    queue.put(tx).await.unwrap();
    assert!(!rx.poll(Duration::ZERO).await.unwrap());
    drop(queue);
    assert_eq!(within(rx.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn many_pipes_through_a_pipe_leave_nothing() {
    let whole = async || {
        let (mut tx, mut rx) = mp::simplex::<Receiver<u32>>().unwrap();
        let mut before = None;
        for n in 0..300 {
            let (mut inner_tx, inner_rx) = mp::simplex().unwrap();
            inner_tx.send(n).await.unwrap();
            tx.send(inner_rx).await.unwrap();
            let mut inner_rx = rx.recv().await.unwrap();
            assert_eq!(inner_rx.recv().await.unwrap(), n);
            drop(inner_rx);
            assert_eq!(inner_tx.send(1).await.unwrap_err().kind(), ErrorKind::Closed);
            drop(inner_tx);
            if n == 10 {
                before = Some(holdings());
            }
        }
        (before.unwrap(), holdings())
    };
    let (before, after) = in_child(whole, ()).await;
    assert_no_growth(before, after);
}

#[tokio::test]
async fn a_receiver_at_its_descriptor_limit_gets_an_error_and_goes_on() {
    let receive = |mut rx: Receiver<Vec<Fd<std::fs::File>>>| {
        let before = holdings();
        limit_descriptors(5);
        for _ in 0..10 {
            let error = rx.blocking_recv().unwrap_err();
            assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
        }
        let got = rx.blocking_recv().unwrap().len();
        (got, before, holdings())
    };
    let files = |count| -> Vec<_> { (0..count).map(|_| Fd::new(std::fs::File::open("/dev/null").unwrap())).collect() };
    let (mut tx, rx) = mp::simplex().unwrap();
    let child = Process::spawn(receive, (rx,)).unwrap();
    for count in [6, 300].into_iter().cycle().take(10) {
        within(tx.send(files(count))).await.unwrap();
    }
    within(tx.send(files(2))).await.unwrap();
    let (got, before, after) = within(child).await.unwrap();
    assert_eq!(got, 2);
    assert_no_growth(before, after);
}

#[tokio::test]
async fn ends_are_send_and_debug() {
    fn all<T: Send + Sync + Unpin + std::fmt::Debug + 'static>(_: &T) {}
    let (mut a, b) = mp::pipe::<std::cell::Cell<u8>, std::cell::Cell<u8>>().unwrap();
    fn is_send<T: Send>(_: &T) {}
    is_send(&a.send(std::cell::Cell::new(1)));
    is_send(&a.recv());
    is_send(&a.poll(SHORT));
    fn send<T: Send + Unpin + 'static>(_: &T) {}
    send(&a);
    send(&b);
    assert!(format!("{a:?}").starts_with("Connection { sender: Sender { under_way: 0 }"), "{a:?}");
    let _ = all::<Queue<u8>>;
}

#[tokio::test]
async fn blocking_calls_inside_async_code_panic() {
    let (mut tx, mut rx) = mp::simplex::<u8>().unwrap();
    assert!(tokio::spawn(async move { drop(tx.blocking_send(1)) }).await.unwrap_err().is_panic());
    assert!(tokio::spawn(async move { drop(rx.blocking_recv()) }).await.unwrap_err().is_panic());
}

#[test]
fn blocking_ends_in_plain_functions() {
    let _deadline = Deadline::start();
    let (mut here, there) = mp::pipe::<u64, u64>().unwrap();
    let double = |mut pipe: Connection<u64, u64>| {
        while let Ok(n) = pipe.blocking_recv() {
            pipe.blocking_send(2 * n).unwrap();
        }
    };
    let child = Process::spawn(double, (there,)).unwrap();
    for n in 0..1000 {
        here.blocking_send(n).unwrap();
        assert_eq!(here.blocking_recv().unwrap(), 2 * n);
    }
    assert_eq!(here.try_recv().unwrap_err().kind(), ErrorKind::Empty);
    drop(here);
    tokio::runtime::Runtime::new().unwrap().block_on(async { child.await.unwrap() });
}

#[tokio::test]
async fn a_reader_asleep_costs_no_cpu_and_is_woken_by_the_end() {
    let (tx, rx) = mp::simplex::<u8>().unwrap();
    let child = Process::spawn(|mut rx: Receiver<u8>| rx.blocking_recv().unwrap_err().kind(), (rx,)).unwrap();
    eventually("it sleeps", || is_asleep(child.pid())).await;
    drop(tx);
    assert_eq!(within(child).await.unwrap(), ErrorKind::Closed);
}

#[tokio::test]
async fn recv_future_dropped_at_any_poll_takes_nothing() {
    let (mut tx, mut rx) = mp::simplex::<u32>().unwrap();
    assert!(rx.recv().now_or_never().is_none());
    tx.send(1).await.unwrap();
    assert_eq!(rx.recv().await.unwrap(), 1);
    let mut stream_item = Box::pin(rx.next());
    assert!(futures::poll!(&mut stream_item).is_pending());
    drop(stream_item);
    tx.send(2).await.unwrap();
    assert_eq!(rx.recv().await.unwrap(), 2);
}

/// Whoever has heard of the death of the receiver sends nothing more.
async fn hears_of_the_death() {
    for round in 0..20 {
        let (mut tx, rx) = mp::simplex().unwrap();
        let keep = async |mut rx: Receiver<u64>, mut taken: Sender<()>| {
            for _ in 0..10 {
                rx.recv().await.unwrap();
            }
            taken.send(()).await.unwrap();
            std::future::pending::<()>().await;
        };
        let (mut all_taken, taken) = mp::pipe::<(), ()>().unwrap();
        let (taken, _) = taken.split();
        let mut child = Process::spawn(keep, (rx, taken)).unwrap();
        for n in 0..10 {
            tx.send(n).await.unwrap();
        }
        within(all_taken.recv()).await.unwrap();
        child.kill().unwrap();
        assert_eq!(within(child.join()).await.unwrap_err().kind(), ErrorKind::ProcessDied);
        let error = tx.send(round).await.unwrap_err();
        assert_eq!((error.kind(), error.into_inner()), (ErrorKind::Closed, round));
    }
}

#[tokio::test]
async fn sender_fails_with_closed_after_the_receiver_died() {
    hears_of_the_death().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sender_on_many_threads_fails_with_closed_after_the_receiver_died() {
    hears_of_the_death().await;
}

#[test]
fn sender_whose_runtime_has_ended_fails_with_closed() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut tx, rx) = mp::simplex::<u64>().unwrap();
    runtime().block_on(async {
        for n in 0..10 {
            tx.send(n).await.unwrap();
        }
    });
    drop(rx);
    let closed = |error: mp::SendError<u64>| assert_eq!(error.kind(), ErrorKind::Closed);
    closed(runtime().block_on(tx.send(0)).unwrap_err());
    closed(tx.blocking_send(0).unwrap_err());
}
