//! Values: the reference suite's cases, nothing torn, nothing lost, and what a killed holder leaves.

mod common;

use bytemuck::{Pod, Zeroable};
use common::{Deadline, eventually, falls_asleep, holdings, in_child, thread_falls_asleep, within};
use futures::{FutureExt, poll};
use multiprocess::{self as mp, ErrorKind, Lock, Process, Queue, Value};
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::time::Duration;

mp::test_support!();

#[derive(Clone, Copy, PartialEq, Debug, Zeroable, Pod)]
#[repr(C)]
struct Mixed {
    real: f64,
    number: i32,
    letters: [u8; 12],
}

const MIXED: Mixed = Mixed { real: 1.5, number: -3, letters: *b"hello, world" };

#[derive(Clone, Copy, PartialEq, Debug, Zeroable, Pod)]
#[repr(transparent)]
struct Huge([u64; 1000]);

#[tokio::test]
async fn value_01_value_02_change_in_a_child_is_seen_here() {
    fn change(i: Value<i32>, d: Value<f64>, h: Value<i16>, q: Value<i64>, c: Value<u8>, m: Value<Mixed>) {
        assert_eq!((i.get(), d.get(), h.get(), q.get(), c.get(), m.get()), (4343, 3.625, -232, 1 << 33, b'c', MIXED));
        i.set(2424);
        d.set(-3.625);
        h.set(232);
        q.set(-1 << 40);
        c.set(b'x');
        m.set(Mixed { number: 7, ..MIXED });
    }
    let (i, d, h) = (Value::new(4343).unwrap(), Value::new(3.625).unwrap(), Value::new(-232_i16).unwrap());
    let (q, c, m) = (Value::new(1_i64 << 33).unwrap(), Value::new(b'c').unwrap(), Value::new(MIXED).unwrap());
    in_child(change, (i.clone(), d.clone(), h.clone(), q.clone(), c.clone(), m.clone())).await;
    assert_eq!((i.get(), d.get(), h.get(), q.get(), c.get()), (2424, -3.625, 232, -1 << 40, b'x'));
    assert_eq!(m.get(), Mixed { number: 7, ..MIXED });
}

#[test]
fn value_02_values_of_any_size() {
    fn check<T: Pod + PartialEq + std::fmt::Debug>(a: T, b: T) {
        let value = Value::new(a).unwrap();
        assert_eq!(value.get(), a);
        value.set(b);
        assert_eq!((value.get(), value.clone().get()), (b, b));
        *value.try_lock().unwrap() = a;
        assert_eq!(value.get(), a);
    }
    check((), ());
    check([1_u8; 3], [2; 3]);
    check(1.5_f32, f32::MIN);
    check([1_u32, 2], [3, 4]);
    check([1_u8; 9], [255; 9]);
    check(u128::MAX, 1);
    check([7_u8; 1024], [8; 1024]);
    check([7_u16; 512], [8; 512]);
    check(Huge([1; 1000]), Huge([u64::MAX; 1000]));
    check([[1_u64; 64]; 64], [[2; 64]; 64]);
}

#[tokio::test]
async fn value_05_p27_increments_under_the_guard_lose_nothing() {
    async fn add(value: Value<u32>, pair: Value<[u64; 3]>, times: u32) -> mp::Result<()> {
        for _ in 0..times {
            *value.lock().await? += 1;
            pair.lock().await?[2] += 1;
        }
        Ok(())
    }
    let (value, pair) = (Value::new(0_u32).unwrap(), Value::new([0_u64; 3]).unwrap());
    let start = |_| Process::spawn(add, (value.clone(), pair.clone(), 5_000)).unwrap();
    let children: Vec<_> = (0..4).map(start).collect();
    for child in children {
        within(child).await.unwrap().unwrap();
    }
    assert_eq!((value.get(), pair.get()), (20_000, [0, 0, 20_000]));
}

#[tokio::test]
async fn value_05_p27_fetch_add_loses_nothing() {
    fn add(value: Value<u16>, wide: Value<i64>, times: u32) {
        for _ in 0..times {
            value.fetch_add(1);
            wide.fetch_sub(3);
        }
    }
    let (value, wide) = (Value::new(0_u16).unwrap(), Value::new(0_i64).unwrap());
    let children: Vec<_> =
        (0..4).map(|_| Process::spawn(add, (value.clone(), wide.clone(), 100_000)).unwrap()).collect();
    for child in children {
        within(child).await.unwrap();
    }
    assert_eq!((value.get(), wide.get()), (400_000_u32 as u16, -1_200_000));
}

#[tokio::test]
async fn integer_operations_are_atomic_across_processes() {
    macro_rules! check {
        ($($integer:ty)*) => {$({
            let value = Value::<$integer>::new(<$integer>::MAX).unwrap();
            assert_eq!(value.fetch_add(1), <$integer>::MAX);
            assert_eq!(value.fetch_sub(1), <$integer>::MIN);
            assert_eq!(value.swap(7), <$integer>::MAX);
            assert_eq!((value.fetch_max(9), value.fetch_max(8)), (7, 9));
            assert_eq!((value.fetch_min(3), value.fetch_min(4)), (9, 3));
            assert_eq!((value.compare_exchange(4, 5), value.compare_exchange(3, 5), value.get()), (Err(3), Ok(3), 5));
        })*};
    }
    check!(u8 u16 u32 u64 usize i8 i16 i32 i64 isize);
    fn largest(value: Value<i32>, of: i32) -> i32 {
        (0..of).map(|n| value.fetch_max(n)).max().unwrap()
    }
    let value = Value::new(i32::MIN).unwrap();
    let children = [1000, 3000, 2000].map(|of| Process::spawn(largest, (value.clone(), of)).unwrap());
    for child in children {
        assert!(within(child).await.unwrap() < 3000);
    }
    assert_eq!(value.get(), 2999);
}

/// Two processes replace it, this one reads: always one whole write.
#[tokio::test]
async fn no_read_is_torn() {
    fn write(value: Value<Huge>, small: Value<[u8; 24]>, mine: u64, stop: Value<u8>) -> u64 {
        let mut writes = 0;
        while stop.get() == 0 {
            writes += 2;
            value.set(Huge([mine + writes; 1000]));
            small.set([(mine + writes) as u8; 24]);
        }
        writes
    }
    let (value, small) = (Value::new(Huge([0; 1000])).unwrap(), Value::new([0_u8; 24]).unwrap());
    let stop = Value::new(0_u8).unwrap();
    let children =
        [0, 1].map(|mine| Process::spawn(write, (value.clone(), small.clone(), mine, stop.clone())).unwrap());
    let (mut seen, mut last) = (0, 0);
    eventually("it has changed often", || {
        for _ in 0..100 {
            let (huge, small) = (value.get().0, small.get());
            assert!(huge.iter().all(|word| *word == huge[0]), "torn: {:?}", &huge[..4]);
            assert!(small.iter().all(|byte| *byte == small[0]), "torn: {small:?}");
            seen += u32::from(huge[0] != last);
            last = huge[0];
        }
        seen > 200
    })
    .await;
    stop.set(1);
    for child in children {
        assert!(within(child).await.unwrap() > 0);
    }
}

#[tokio::test]
async fn ctypes_01_struct_is_changed_as_a_whole_by_a_child() {
    async fn double(value: Value<Mixed>, number: Value<i64>) -> mp::Result<()> {
        let mut guard = value.lock().await?;
        guard.real *= 2.0;
        guard.number *= 2;
        guard.letters.rotate_left(6);
        number.set(number.get() * 2);
        Ok(())
    }
    let (value, number) = (Value::new(MIXED).unwrap(), Value::new(1_i64 << 33).unwrap());
    in_child(double, (value.clone(), number.clone())).await.unwrap();
    assert_eq!(value.get(), Mixed { real: 3.0, number: -6, letters: *b" worldhello," });
    assert_eq!(number.get(), 1 << 34);
}

#[test]
fn ctypes_02_copy_is_independent() {
    let value = Value::new(MIXED).unwrap();
    let (copy, same) = (Value::new(value.get()).unwrap(), value.clone());
    value.set(Mixed { number: 100, ..MIXED });
    assert_eq!((copy.get().number, same.get().number), (-3, 100));
}

#[tokio::test]
async fn guard_excludes_others_and_is_stored_only_if_written_to() {
    let value = Value::new(1).unwrap();
    let guard = value.lock().await.unwrap();
    assert_eq!(value.try_lock().unwrap_err().kind(), ErrorKind::WouldBlock);
    let timeout = Duration::from_millis(20);
    assert_eq!(value.lock_timeout(timeout).await.unwrap_err().kind(), ErrorKind::Timeout);
    let plain = {
        let value = value.clone();
        tokio::task::spawn_blocking(move || {
            value.blocking_lock_timeout(timeout).map(|guard| *guard).map_err(|e| e.kind())
        })
    };
    assert_eq!(plain.await.unwrap(), Err(ErrorKind::Timeout));
    value.set(5);
    assert_eq!((*guard, value.get()), (1, 5), "a guard has a copy");
    drop(guard);
    assert_eq!(value.get(), 5, "it was not written to");
    let mut guard = value.lock().await.unwrap();
    *guard += 1;
    value.set(50);
    drop(guard);
    assert_eq!(value.get(), 6);
    let waiting = tokio::task::spawn_blocking({
        let value = value.clone();
        move || *value.blocking_lock().unwrap()
    });
    assert_eq!(within(waiting).await.unwrap(), 6);
}

#[test]
fn plain_functions_and_threads_can_lock() {
    let _deadline = Deadline::start();
    let value = Value::new([0_u64; 2]).unwrap();
    let guard = value.blocking_lock().unwrap();
    let (sender, thread) = std::sync::mpsc::channel();
    let other = std::thread::spawn({
        let value = value.clone();
        move || {
            sender.send(rustix::thread::gettid()).unwrap();
            value.blocking_lock().unwrap()[1] += 1;
        }
    });
    thread_falls_asleep(thread.recv().unwrap());
    let mut guard = guard;
    guard[0] = 9;
    drop(guard);
    other.join().unwrap();
    assert_eq!(value.get(), [9, 1]);
}

/// `value`, Cancel: a dropped `lock` has not locked, at whatever point.
#[tokio::test]
async fn cancelled_lock_takes_nothing() {
    let value = Value::new(0).unwrap();
    drop(value.lock());
    let guard = value.lock().await.unwrap();
    let mut waiting = pin!(value.lock());
    assert!(poll!(&mut waiting).is_pending());
    let mut dropped = Box::pin(value.lock());
    assert!(poll!(&mut dropped).is_pending());
    drop(dropped);
    drop(guard);
    drop(within(waiting).await.unwrap());
    let mut dropped = Box::pin(value.lock());
    let guard = value.lock().now_or_never().map(|locked| locked.unwrap());
    assert!(guard.is_some());
    let _ = poll!(&mut dropped);
    drop(guard);
    drop(dropped);
    assert!(value.try_lock().is_ok(), "nobody has it");
}

async fn change(value: Value<[u64; 4]>) -> mp::Result<()> {
    let mut guard = value.lock().await?;
    guard[0] = 7;
    guard[3] = 7;
    Ok(())
}

async fn lock_and_hang(value: Value<[u64; 4]>, locked: Queue<()>) -> mp::Result<()> {
    let mut guard = value.lock().await?;
    guard[0] = 7;
    locked.put(()).await?;
    std::future::pending().await
}

/// `value`, Death: killed with a guard that was written to, the old value is there and the next lock succeeds.
#[tokio::test]
async fn death_with_a_guard_leaves_the_old_value() {
    let (value, locked) = (Value::new([5_u64; 4]).unwrap(), Queue::unbounded().unwrap());
    let mut holder = Process::spawn(lock_and_hang, (value.clone(), locked.clone())).unwrap();
    within(locked.get()).await.unwrap();
    let mut waiting = Box::pin(value.lock());
    falls_asleep(waiting.as_mut()).await;
    holder.kill().unwrap();
    let guard = within(waiting).await.expect("no error: nothing is half done");
    assert_eq!(*guard, [5; 4]);
    drop(guard);
    assert_eq!(value.get(), [5; 4]);
    assert!(within(holder.join()).await.is_err());
    *value.try_lock().unwrap() = [6; 4];
    assert_eq!(value.get(), [6; 4]);
}

/// `value` and `register`, Death: killed exactly there, the value is the old one or the new one, and all goes on.
#[cfg(debug_assertions)] // The points are there in debug builds only.
#[tokio::test]
async fn killed_while_changing_a_value() {
    for (point, is_new) in [
        ("lock.taken", false),
        ("value.changed", false),
        ("set.taken", false),
        ("set.written", false),
        ("set.published", true),
        ("value.stored", true),
        ("lock.released", true),
    ] {
        let value = Value::new([5_u64; 4]).unwrap();
        let victim = Process::builder().env("MULTIPROCESS_KILL_AT", point);
        let error = within(victim.spawn(change, (value.clone(),)).unwrap()).await.unwrap_err();
        assert_eq!(error.exit_status().and_then(|status| status.signal()), Some(9), "{point}");
        assert_eq!(value.get(), if is_new { [7, 5, 5, 7] } else { [5; 4] }, "{point}");
        let mut guard = within(value.lock()).await.unwrap();
        guard[1] = 8;
        drop(guard);
        assert_eq!(value.get()[1], 8, "{point}");
        value.set([9; 4]);
        assert_eq!(value.get(), [9; 4], "{point}");
    }
}

/// A process that is stopped in the middle of a `set` holds no reader up.
#[cfg(debug_assertions)]
#[tokio::test]
async fn writer_stopped_in_set_delays_no_reader() {
    let value = Value::new([5_u64; 4]).unwrap();
    let set = |value: Value<[u64; 4]>| value.set([7; 4]);
    let victim = Process::builder().env("MULTIPROCESS_STOP_AT", "set.written").spawn(set, (value.clone(),)).unwrap();
    let stat = format!("/proc/{}/stat", victim.pid());
    eventually("it is stopped", || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T "))).await;
    for _ in 0..1000 {
        assert_eq!(value.get(), [5; 4]);
    }
    victim.kill().unwrap();
    let set = tokio::task::spawn_blocking({
        let value = value.clone();
        move || value.set([8; 4])
    });
    within(set).await.unwrap();
    assert_eq!(value.get(), [8; 4]);
}

#[tokio::test]
async fn handle_that_returns_is_the_one_that_is_there() {
    let value = Value::new([1_u64; 500]).unwrap();
    let back = in_child(|value: Value<[u64; 300]>| value, (Value::new([1_u64; 300]).unwrap(),)).await;
    assert_eq!(back.get(), [1; 300]);
    // There nobody else opens anything.
    let returns = async |value: Value<[u64; 500]>| {
        let before = holdings();
        let queue = Queue::unbounded().unwrap();
        queue.put((value.clone(), Lock::new().unwrap())).await.unwrap();
        let (again, _lock): (Value<[u64; 500]>, Lock) = queue.get().await.unwrap();
        again.set([2; 500]);
        assert_eq!(value.get(), [2; 500]);
        drop((queue, again, _lock));
        assert!(holdings().descriptors <= before.descriptors);
    };
    in_child(returns, (value.clone(),)).await;
    assert_eq!(value.get(), [2; 500]);
}

#[tokio::test]
async fn heap_01_heap_03_values_come_and_go_on_many_threads() {
    let rounds = || {
        let round = || {
            let threads: Vec<_> = (0..4)
                .map(|seed| {
                    std::thread::spawn(move || {
                        let mut random = common::Random::new(seed + 1);
                        let mut kept = Vec::new();
                        for n in 0..400 {
                            let (small, large) = (Value::new(n).unwrap(), Value::new([n; 600]).unwrap());
                            if random.below(2) == 0 {
                                kept.push((n, small, large));
                            }
                            if !kept.is_empty() && random.below(3) == 0 {
                                kept.swap_remove(random.below(kept.len() as u64) as usize);
                            }
                        }
                        assert!(kept.iter().all(|(n, small, large)| small.get() == *n && large.get() == [*n; 600]));
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            holdings()
        };
        (round(), round())
    };
    let (first, second) = in_child(rounds, ()).await;
    assert_eq!(first, second);
}

#[test]
fn handles_and_guards_are_send_and_sync_and_their_futures_send() {
    fn check<T: Send + Sync>(_: &T) {}
    fn check_future<T: Send>(_: T) {}
    let value = Value::new(1).unwrap();
    check(&value);
    check(&value.try_lock().unwrap());
    check_future(value.lock());
    check_future(value.lock_timeout(Duration::ZERO));
}
