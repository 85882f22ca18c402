//! Arrays: the reference suite's cases, in place across processes, and what a killed holder leaves.

mod common;

use bytemuck::{Pod, Zeroable};
use common::{Deadline, eventually, falls_asleep, holdings, in_child, within};
use futures::poll;
use multiprocess::{self as mp, Array, ErrorKind, Process, Value};
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::time::Duration;

mp::test_support!();

#[tokio::test]
async fn array_01_array_03_length_index_slices_and_a_child_changes_it_in_place() {
    async fn sum_up(array: Array<i32>) -> mp::Result<()> {
        let mut elements = array.lock().await?;
        for n in 1..elements.len() {
            elements[n] += elements[n - 1];
        }
        Ok(())
    }
    let start = [680, 626, 934, 821, 150, 233, 548, 982, 714, 831];
    let array = Array::from_slice(&start).unwrap();
    assert_eq!((array.len(), array.get(2), array.get(10), array.is_empty()), (10, Some(934), None, false));
    assert_eq!(array.lock().await.unwrap()[2..7], start[2..7]);
    array.lock().await.unwrap()[4..8].copy_from_slice(&[1, 2, 3, 4]);
    array.set(0, -5);
    let mut expected = start;
    expected[4..8].copy_from_slice(&[1, 2, 3, 4]);
    expected[0] = -5;
    assert_eq!(array.to_vec(), expected);
    in_child(sum_up, (array.clone(),)).await.unwrap();
    (1..10).for_each(|n| expected[n] += expected[n - 1]);
    assert_eq!(array.to_vec(), expected);
    assert_eq!(array.try_lock().unwrap()[..], expected);
}

#[test]
fn array_05_empty_array_is_valid_and_out_of_bounds_is_none() {
    let array = Array::<u64>::from_slice(&[]).unwrap();
    assert_eq!((array.len(), array.is_empty(), array.get(0), array.to_vec()), (0, true, None, vec![]));
    assert!(array.try_lock().unwrap().is_empty());
    let array = Array::<()>::zeroed(5).unwrap();
    assert_eq!((array.get(4), array.get(5), array.to_vec().len()), (Some(()), None, 5));
    let array = Array::<u8>::zeroed(3).unwrap();
    assert_eq!((array.get(2), array.get(3), array.get(usize::MAX)), (Some(0), None, None));
}

#[test]
#[should_panic(expected = "index out of bounds: the len is 3 but the index is 3")]
fn array_05_writing_out_of_bounds_panics_as_a_slice_does() {
    Array::<u8>::zeroed(3).unwrap().set(3, 1);
}

#[test]
fn heap_04_impossible_sizes_are_errors() {
    let kinds = [
        Array::<u64>::zeroed(usize::MAX).map(drop),
        Array::<u8>::zeroed(usize::MAX).map(drop),
        Array::<u64>::zeroed(usize::MAX / 8).map(drop),
        Array::<u8>::zeroed(1 << 62).map(drop),
        Array::<u8>::zeroed(1 << 45).map(drop),
    ];
    for result in kinds {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("out of memory") || error.to_string().contains("allocate"), "{error}");
    }
}

#[derive(Clone, Copy, PartialEq, Debug, Zeroable, Pod)]
#[repr(C)]
struct Point {
    x: f64,
    y: f64,
}

#[tokio::test]
async fn ctypes_01_structs_are_doubled_in_place() {
    async fn double(points: Array<Point>, letters: Array<u8>) -> mp::Result<()> {
        for point in points.lock().await?.iter_mut() {
            *point = Point { x: point.x * 2.0, y: point.y * 2.0 };
        }
        for n in 0..letters.len() {
            letters.set(n, letters.get(n).unwrap().to_ascii_uppercase());
        }
        Ok(())
    }
    let points: Vec<_> = (0..10).map(|n| Point { x: n.into(), y: -0.5 }).collect();
    let (array, letters) = (Array::from_slice(&points).unwrap(), Array::from_slice(b"hello").unwrap());
    in_child(double, (array.clone(), letters.clone())).await.unwrap();
    let doubled: Vec<_> = (0..10).map(|n| Point { x: f64::from(n) * 2.0, y: -1.0 }).collect();
    assert_eq!((array.to_vec(), letters.to_vec()), (doubled, b"HELLO".to_vec()));
}

#[test]
fn ctypes_02_copy_is_independent() {
    let array = Array::from_slice(&[1, 2, 3]).unwrap();
    let copy = Array::from_slice(&array.try_lock().unwrap()).unwrap();
    array.set(0, 100);
    assert_eq!((copy.get(0), array.get(0), array.clone().get(0)), (Some(1), Some(100), Some(100)));
}

/// 64 MiB are summed where they are: the child maps them and nothing is sent or copied.
#[tokio::test]
async fn large_array_is_used_in_place() {
    const LEN: usize = 8 << 20;
    async fn sum(array: Array<f64>) -> mp::Result<(f64, u64)> {
        let before = own_memory();
        let sum = array.lock().await?.iter().sum();
        Ok((sum, own_memory().saturating_sub(before)))
    }
    /// Bytes of memory that belong to this process alone.
    fn own_memory() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
    }
    let array = Array::<f64>::zeroed(LEN).unwrap();
    array.lock().await.unwrap().fill(0.5);
    let (total, grown) = in_child(sum, (array.clone(),)).await.unwrap();
    assert_eq!(total, 0.5 * LEN as f64);
    assert!(grown < 1 << 20, "{grown} bytes of its own");
}

#[tokio::test]
async fn concurrent_additions_lose_nothing() {
    async fn add(array: Array<u32>, times: usize) -> mp::Result<()> {
        for n in 0..times {
            let len = array.len();
            array.lock().await?[n % len] += 1;
        }
        Ok(())
    }
    let array = Array::<u32>::zeroed(7).unwrap();
    let children: Vec<_> = (0..4).map(|_| Process::spawn(add, (array.clone(), 3_500)).unwrap()).collect();
    for child in children {
        within(child).await.unwrap().unwrap();
    }
    assert_eq!(array.to_vec(), [2_000; 7]);
}

/// While somebody has the guard, `set` of others waits: what the guard's slice shows does not change.
#[tokio::test]
async fn set_waits_for_a_guard_in_another_process_and_get_does_not() {
    async fn watch(array: Array<u64>, begun: Value<u8>) -> mp::Result<bool> {
        let mut guard = array.lock().await?;
        guard[1] = 7;
        begun.set(1);
        let seen = guard[0];
        std::thread::sleep(Duration::from_millis(100));
        Ok(seen == guard[0])
    }
    let (array, begun) = (Array::from_slice(&[5_u64, 0]).unwrap(), Value::new(0_u8).unwrap());
    let child = Process::spawn(watch, (array.clone(), begun.clone())).unwrap();
    eventually("it has the guard", || begun.get() == 1).await;
    assert_eq!((array.get(0), array.get(1)), (Some(5), Some(7)));
    let set = tokio::task::spawn_blocking({
        let array = array.clone();
        move || array.set(0, 6)
    });
    assert!(within(child).await.unwrap().unwrap(), "it changed under a guard");
    within(set).await.unwrap();
    assert_eq!(array.to_vec(), [6, 7]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn set_waits_for_a_guard_of_another_task() {
    let array = Array::from_slice(&[1, 2]).unwrap();
    let mut guard = array.lock().await.unwrap();
    guard[0] = 10;
    let setting = tokio::spawn({
        let array = array.clone();
        async move { array.set(0, 20) }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(!setting.is_finished() && guard[0] == 10);
    drop(guard);
    within(setting).await.unwrap();
    assert_eq!(array.to_vec(), [20, 2]);
}

#[tokio::test]
async fn holder_of_the_guard_may_set_until_it_uses_the_guard() {
    let array = Array::from_slice(&[1, 2]).unwrap();
    let guard = array.lock().await.unwrap();
    array.set(0, array.get(0).unwrap() + 10);
    assert_eq!(guard[..], [11, 2]);
    assert_eq!(array.get(0), Some(11));
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| array.set(0, 1))).unwrap_err();
    assert!(panic.downcast_ref::<String>().is_some_and(|text| text.contains("write by the guard")));
    drop(guard);
    array.set(0, 1);
    let guard = array.lock().await.unwrap();
    let other = tokio::spawn({
        let array = array.clone();
        async move { array.set(1, 1) }
    });
    assert!(within(other).await.unwrap_err().is_panic(), "on this runtime it could never return");
    drop(guard);
    assert_eq!(array.to_vec(), [1, 2]);
}

#[tokio::test]
async fn all_forms_of_lock() {
    let array = Array::from_slice(&[1]).unwrap();
    let guard = array.lock().await.unwrap();
    assert_eq!(array.try_lock().unwrap_err().kind(), ErrorKind::WouldBlock);
    let timeout = Duration::from_millis(20);
    assert_eq!(array.lock_timeout(timeout).await.unwrap_err().kind(), ErrorKind::Timeout);
    let (told, late) = tokio::sync::oneshot::channel();
    let plain = tokio::task::spawn_blocking({
        let array = array.clone();
        move || {
            told.send(array.blocking_lock_timeout(timeout).unwrap_err().kind()).unwrap();
            array.blocking_lock().unwrap()[0] += 1;
        }
    });
    assert_eq!(within(late).await.unwrap(), ErrorKind::Timeout);
    drop(guard);
    within(plain).await.unwrap();
    assert_eq!(array.lock_timeout(timeout).await.unwrap()[..], [2]);
}

/// `array`, Cancel.
#[tokio::test]
async fn cancelled_lock_takes_nothing() {
    let array = Array::from_slice(&[1]).unwrap();
    let guard = array.lock().await.unwrap();
    let mut dropped = Box::pin(array.lock());
    assert!(poll!(&mut dropped).is_pending());
    let mut waiting = pin!(array.lock());
    assert!(poll!(&mut waiting).is_pending());
    drop(dropped);
    drop(guard);
    drop(within(waiting).await.unwrap());
    assert!(array.try_lock().is_ok());
}

async fn write_half_and_hang(array: Array<u64>) -> mp::Result<()> {
    let mut guard = array.lock().await?;
    let half = guard.len() / 2;
    guard[..half].fill(7);
    std::future::pending().await
}

/// `array`, Death: the next holder gets `OwnerDied` with the guard; after that all is as before.
#[tokio::test]
async fn death_with_a_guard_is_reported_to_the_next_holder() {
    let array = Array::<u64>::zeroed(10).unwrap();
    let mut holder = Process::spawn(write_half_and_hang, (array.clone(),)).unwrap();
    eventually("it is half way", || array.get(4) == Some(7)).await;
    let mut waiting = Box::pin(array.lock());
    falls_asleep(waiting.as_mut()).await;
    holder.kill().unwrap();
    let error = within(waiting).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OwnerDied);
    assert_eq!(error.into_guard()[..], [7, 7, 7, 7, 7, 0, 0, 0, 0, 0]);
    assert!(within(holder.join()).await.is_err());
    array.try_lock().unwrap().fill(1);
    assert_eq!(array.to_vec(), [1; 10]);
}

/// `array`, Death: a `set` in between does not hide that somebody died.
#[tokio::test]
async fn death_with_a_guard_is_reported_to_the_next_lock_also_after_a_set() {
    let array = Array::<u64>::zeroed(10).unwrap();
    let mut holder = Process::spawn(write_half_and_hang, (array.clone(),)).unwrap();
    eventually("it is half way", || array.get(4) == Some(7)).await;
    holder.kill().unwrap();
    assert!(within(holder.join()).await.is_err());
    array.set(0, 1);
    let error = array.try_lock().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OwnerDied);
    assert_eq!(error.into_guard()[..2], [1, 7]);
    assert!(array.try_lock().is_ok());
}

/// `array`, Death: killed exactly there.
#[cfg(debug_assertions)] // The points are there in debug builds only.
#[tokio::test]
async fn killed_at_each_move() {
    async fn change(array: Array<u64>) -> mp::Result<()> {
        array.lock().await?[1] = 7;
        Ok(())
    }
    fn set(array: Array<u64>) {
        array.set(1, 7);
    }
    for (point, by_guard, changed, told) in [
        ("lock.taken", true, false, true),
        ("array.taken", true, false, true),
        ("array.releasing", true, true, true),
        ("lock.released", true, true, false),
        ("lock.taken", false, false, true),
        ("element.written", false, true, true),
        ("lock.released", false, true, false),
    ] {
        let array = Array::<u64>::zeroed(2).unwrap();
        let victim = Process::builder().env("MULTIPROCESS_KILL_AT", point);
        let error = match by_guard {
            true => within(victim.spawn(change, (array.clone(),)).unwrap()).await.unwrap_err(),
            false => within(victim.spawn(set, (array.clone(),)).unwrap()).await.unwrap_err(),
        };
        assert_eq!(error.exit_status().and_then(|status| status.signal()), Some(9), "{point}");
        assert_eq!(array.get(1), Some(if changed { 7 } else { 0 }), "{point}");
        let locked = within(array.lock()).await.map(drop).map_err(|error| error.kind());
        assert_eq!(locked, if told { Err(ErrorKind::OwnerDied) } else { Ok(()) }, "{point}");
        array.try_lock().unwrap()[0] = 1;
    }
}

/// `array`, Death: a `set` that had the mutex from the dead dies as well, and so does the first to be told: the next is.
#[cfg(debug_assertions)]
#[tokio::test]
async fn death_after_taking_over_is_reported_once() {
    fn set(array: Array<u64>) {
        array.set(1, 7);
    }
    async fn lock(array: Array<u64>) {
        drop(array.lock().await);
    }
    let die = async |point: &str, sets: bool, array: &Array<u64>| {
        let victim = Process::builder().env("MULTIPROCESS_KILL_AT", point);
        let error = match sets {
            true => within(victim.spawn(set, (array.clone(),)).unwrap()).await.unwrap_err(),
            false => within(victim.spawn(lock, (array.clone(),)).unwrap()).await.unwrap_err(),
        };
        assert_eq!(error.exit_status().and_then(|status| status.signal()), Some(9), "{point}");
    };
    for last in ["lock.taken", "element.written", "lock.released"] {
        let array = Array::<u64>::zeroed(2).unwrap();
        die("array.taken", false, &array).await;
        die(last, true, &array).await;
        die("array.taken", false, &array).await;
        assert_eq!(array.get(1), Some(if last == "lock.taken" { 0 } else { 7 }), "{last}");
        assert_eq!(within(array.lock()).await.unwrap_err().kind(), ErrorKind::OwnerDied, "{last}");
        drop(array.try_lock().unwrap());
    }
}

#[tokio::test]
async fn heap_02_dropped_arrays_leave_nothing() {
    let rounds = || {
        let round = || {
            for n in 1..300 {
                let array = Array::from_slice(&vec![n as u8; n * 100]).unwrap();
                array.set(n, 0);
                assert_eq!(array.try_lock().unwrap()[n - 1], n as u8);
            }
            holdings()
        };
        (round(), round())
    };
    let (first, second) = in_child(rounds, ()).await;
    assert_eq!(first, second);
}

/// Fixed records instead of a list of mixed slots: `Array` of a struct. What its reference suite asks of one.
#[derive(Clone, Copy, PartialEq, Debug, Zeroable, Pod)]
#[repr(C)]
struct Record {
    number: i64,
    real: f64,
    len: u64,
    text: [u8; 8],
}

impl Record {
    fn new(number: i64, real: f64, text: &[u8]) -> Option<Self> {
        let mut room = [0; 8];
        room.get_mut(..text.len())?.copy_from_slice(text);
        Some(Self { number, real, len: text.len() as u64, text: room })
    }

    fn text(&self) -> &[u8] {
        &self.text[..(self.len as usize).min(8)]
    }
}

fn records() -> Vec<Record> {
    let texts: [&[u8]; 4] = [b"", b"howdy", b"ab\0", "\u{1f680}\u{1f680}".as_bytes()];
    (0..).zip(texts).map(|(n, text)| Record::new(n, 0.5, text).unwrap()).collect()
}

#[test]
fn sl_01_sl_04_records_are_indexed_counted_and_walked_over() {
    let list = Array::from_slice(&records()).unwrap();
    assert_eq!((list.len(), list.get(1), list.get(4)), (4, Some(records()[1]), None));
    let guard = list.try_lock().unwrap();
    assert_eq!(guard.iter().position(|record| record.number == 2), Some(2));
    assert_eq!(guard.iter().filter(|record| record.text() == b"howdy").count(), 1);
    let empty = Array::<Record>::from_slice(&[]).unwrap();
    assert_eq!((empty.len(), empty.get(0), empty.try_lock().unwrap().iter().count()), (0, None, 0));
}

#[test]
fn sl_02_sl_07_p28_bytes_round_trip_and_excess_is_refused() {
    let list = Array::from_slice(&records()).unwrap();
    for text in ["12345678".as_bytes(), b"\0\0", b"ab\0", "\u{1f680}\u{1f680}".as_bytes(), b""] {
        list.set(1, Record::new(1, 0.5, text).unwrap());
        assert_eq!(list.get(1).unwrap().text(), text);
    }
    assert!(Record::new(1, 0.5, b"123456789").is_none());
    let untouched: Vec<_> = list.to_vec().into_iter().filter(|record| record.number != 1).collect();
    assert_eq!(untouched, records().into_iter().filter(|record| record.number != 1).collect::<Vec<_>>());
    assert_eq!((list.get(usize::MAX - 7), list.get(5)), (None, None));
}

#[tokio::test]
async fn sl_03_sl_05_copy_is_independent_and_handle_is_the_same() {
    let list = Array::from_slice(&records()).unwrap();
    let copy = Array::from_slice(&list.to_vec()).unwrap();
    let change = |list: Array<Record>| {
        list.set(0, Record::new(-1, 0.0, b"there").unwrap());
        list
    };
    let same = in_child(change, (list.clone(),)).await;
    assert_eq!((list.get(0).unwrap().number, copy.get(0).unwrap().number), (-1, 0));
    same.set(3, Record::zeroed());
    assert_eq!(list.get(3), Some(Record::zeroed()));
}

#[test]
fn threads_exclude_each_other_as_processes_do() {
    let _deadline = Deadline::start();
    let array = Array::<u64>::zeroed(4).unwrap();
    let threads: Vec<_> = (0..4)
        .map(|n| {
            let array = array.clone();
            std::thread::spawn(move || {
                for round in 0..2_000 {
                    array.blocking_lock().unwrap()[0] += 1;
                    array.set(n.max(1), round);
                    array.get(0).unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(array.get(0), Some(8_000));
}

#[test]
fn handles_and_guards_are_send_and_sync_and_their_futures_send() {
    fn check<T: Send + Sync>(_: &T) {}
    fn check_future<T: Send>(_: T) {}
    let array = Array::from_slice(&[1]).unwrap();
    check(&array);
    check(&array.try_lock().unwrap());
    check_future(array.lock());
    check_future(array.lock_timeout(Duration::ZERO));
}
