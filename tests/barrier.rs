//! Barriers: generations, indices, actions, and all the ways in which they break.

mod common;

use common::{Deadline, Random, eventually, go_on, in_child, stop, within};
use futures::{FutureExt, poll};
use multiprocess::{self as mp, Barrier, ErrorKind, Process, Queue};
use std::pin::pin;
use std::time::{Duration, Instant};

mp::test_support!();

const SHORT: Duration = Duration::from_millis(50);

fn is_broken<T: std::fmt::Debug>(got: mp::Result<T>) -> bool {
    got.expect_err("it is broken").kind() == ErrorKind::BrokenBarrier
}

async fn wait(barrier: Barrier) -> mp::Result<usize> {
    Ok(barrier.wait().await?.index())
}

async fn all_but(barrier: &Barrier, missing: usize) -> Vec<Process<mp::Result<usize>>> {
    let count = barrier.parties() - missing;
    let children = (0..count).map(|_| Process::spawn(wait, (barrier.clone(),)).unwrap()).collect();
    eventually("they wait", || barrier.waiting() == count).await;
    children
}

#[tokio::test]
async fn barr_01_parties_pass_in_step_and_none_is_left() {
    let (barrier, log) = (Barrier::new(4).unwrap(), Queue::<u32>::unbounded().unwrap());
    let party = async |barrier: Barrier, log: Queue<u32>| {
        log.put(1).await.unwrap();
        barrier.wait().await.unwrap();
        log.put(2).await.unwrap();
        barrier.wait().await.unwrap();
    };
    let children: Vec<_> = (0..4).map(|_| Process::spawn(party, (barrier.clone(), log.clone())).unwrap()).collect();
    for child in children {
        within(child).await.unwrap();
    }
    let mut seen = Vec::new();
    while let Ok(step) = log.try_get() {
        seen.push(step);
    }
    assert_eq!(seen, [1, 1, 1, 1, 2, 2, 2, 2]);
    assert_eq!((barrier.waiting(), barrier.is_broken(), barrier.parties()), (0, false, 4));
}

#[tokio::test]
async fn barr_02_ten_passes_of_the_same_barrier() {
    let barrier = Barrier::new(3).unwrap();
    let party = async |barrier: Barrier| {
        for _ in 0..10 {
            barrier.wait().await.unwrap();
        }
    };
    let children: Vec<_> = (0..3).map(|_| Process::spawn(party, (barrier.clone(),)).unwrap()).collect();
    for child in children {
        within(child).await.unwrap();
    }
    assert_eq!((barrier.waiting(), barrier.is_broken()), (0, false));
}

#[tokio::test]
async fn barr_03_each_index_once_and_one_leader() {
    let barrier = Barrier::new(5).unwrap();
    let children = all_but(&barrier, 1).await;
    let mine = within(barrier.wait()).await.unwrap();
    assert!(!mine.is_leader());
    let mut indices = vec![mine.index()];
    for child in children {
        indices.push(within(child).await.unwrap().unwrap());
    }
    indices.sort();
    assert_eq!(indices, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn barr_04_the_action_runs_once_before_anyone_leaves() {
    let (barrier, log) = (Barrier::new(3).unwrap(), Queue::<u32>::unbounded().unwrap());
    let party = async |barrier: Barrier, log: Queue<u32>| {
        for _ in 0..20 {
            let act = async || {
                tokio::time::sleep(Duration::from_millis(1)).await;
                log.put(0).await?;
                Ok(())
            };
            barrier.wait_then(act).await.unwrap();
            log.put(1).await.unwrap();
            barrier.wait().await.unwrap();
        }
    };
    let children: Vec<_> = (0..3).map(|_| Process::spawn(party, (barrier.clone(), log.clone())).unwrap()).collect();
    for child in children {
        within(child).await.unwrap();
    }
    for _ in 0..20 {
        let pass: Vec<u32> = (0..4).map(|_| log.try_get().unwrap()).collect();
        assert_eq!(pass, [0, 1, 1, 1]);
    }
}

#[tokio::test]
async fn barr_05_abort_breaks_it_for_all_and_it_stays_broken() {
    let barrier = Barrier::new(4).unwrap();
    let children = all_but(&barrier, 1).await;
    barrier.abort();
    for child in children {
        assert!(is_broken(within(child).await.unwrap()));
    }
    assert!(barrier.is_broken());
    assert!(is_broken(barrier.wait().await));
    assert_eq!(barrier.waiting(), 0);
}

#[tokio::test]
async fn barr_06_reset_breaks_waits_and_then_the_barrier_works() {
    let barrier = Barrier::new(4).unwrap();
    let children = all_but(&barrier, 1).await;
    barrier.reset();
    for child in children {
        assert!(is_broken(within(child).await.unwrap()));
    }
    assert!(!barrier.is_broken());
    let children = all_but(&barrier, 1).await;
    within(barrier.wait()).await.unwrap();
    for child in children {
        within(child).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn barr_07_abort_reset_and_then_it_works() {
    let barrier = Barrier::new(2).unwrap();
    let children = all_but(&barrier, 1).await;
    barrier.abort();
    barrier.reset();
    for child in children {
        assert!(is_broken(within(child).await.unwrap()), "its generation was broken, whatever came after");
    }
    let children = all_but(&barrier, 1).await;
    within(barrier.wait()).await.unwrap();
    for child in children {
        within(child).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn barr_08_timeout_breaks_the_barrier_for_all() {
    let barrier = Barrier::new(3).unwrap();
    let early = async |barrier: Barrier| barrier.wait_timeout(SHORT).await.map(|result| result.index());
    let children: Vec<_> = (0..2).map(|_| Process::spawn(early, (barrier.clone(),)).unwrap()).collect();
    for child in children {
        assert!(is_broken(within(child).await.unwrap()));
    }
    assert!(is_broken(barrier.wait().await));
}

#[tokio::test]
async fn barr_09_the_default_timeout_applies_unless_another_is_given() {
    let barrier = Barrier::with_timeout(2, SHORT).unwrap();
    let start = Instant::now();
    assert!(is_broken(barrier.wait().await));
    assert!(start.elapsed() >= SHORT);
    barrier.reset();
    let start = Instant::now();
    assert!(is_broken(barrier.wait_timeout(2 * SHORT).await));
    assert!(start.elapsed() >= 2 * SHORT);
    barrier.reset();
    let same = in_child(async |barrier: Barrier| is_broken(barrier.wait().await), (barrier,)).await;
    assert!(same, "the timeout travels");
}

#[test]
fn barr_10_one_party_never_waits() {
    let barrier = Barrier::new(1).unwrap();
    for _ in 0..2 {
        let result = barrier.wait().now_or_never().expect("at once").unwrap();
        assert!(result.is_leader() && result.index() == 0);
        assert!(barrier.try_wait().unwrap().is_leader());
        assert!(barrier.blocking_wait().unwrap().is_leader());
    }
}

#[tokio::test]
async fn barr_11_five_processes_stay_in_step_for_a_thousand_passes() {
    let (barrier, passes) = (Barrier::new(5).unwrap(), Queue::<(u32, u32)>::unbounded().unwrap());
    let party = async |barrier: Barrier, passes: Queue<(u32, u32)>, name: u32| {
        for pass in 0..1000 {
            barrier.wait().await.unwrap();
            if pass % 50 == 0 {
                passes.put((name, pass)).await.unwrap();
            }
            barrier.wait().await.unwrap();
        }
    };
    let start = Instant::now();
    let child = |name| Process::spawn(party, (barrier.clone(), passes.clone(), name)).unwrap();
    for child in (0..5).map(child).collect::<Vec<_>>() {
        tokio::time::timeout(Duration::from_secs(60), child).await.expect("all in time").unwrap();
    }
    println!("2000 passes of 5 processes in {:?}", start.elapsed());
    for pass in (0..1000).step_by(50) {
        let mut names: Vec<u32> = (0..5)
            .map(|_| passes.try_get().unwrap())
            .map(|(name, at)| {
                assert_eq!(at, pass, "in step");
                name
            })
            .collect();
        names.sort();
        assert_eq!(names, [0, 1, 2, 3, 4]);
    }
}

#[tokio::test]
async fn barr_12_zero_timeout_breaks_it_at_once_and_reset_empties_it() {
    let barrier = Barrier::new(2).unwrap();
    assert!(is_broken(barrier.wait_timeout(Duration::ZERO).await));
    assert!(barrier.is_broken());
    assert!(is_broken(barrier.wait().await));
    barrier.reset();
    assert_eq!((barrier.is_broken(), barrier.waiting()), (false, 0));
    let barrier = Barrier::new(1).unwrap();
    barrier.wait_timeout(Duration::ZERO).await.unwrap();
}

#[test]
fn barr_13_abort_without_waiters_breaks_it() {
    let barrier = Barrier::new(3).unwrap();
    barrier.abort();
    assert!(barrier.is_broken());
    assert!(is_broken(barrier.try_wait()));
}

#[tokio::test]
async fn barr_14_failed_action_returns_its_error_and_breaks_the_barrier_for_others() {
    let barrier = Barrier::new(3).unwrap();
    let children = all_but(&barrier, 1).await;
    let error = barrier.wait_then(async || Err(mp::Error::other("no luck"))).await.unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Other, "no luck".to_string()));
    for child in children {
        assert!(is_broken(within(child).await.unwrap()));
    }
}

#[test]
fn barr_15_barrier_for_zero_parties_is_refused() {
    assert_eq!(Barrier::new(0).unwrap_err().kind(), ErrorKind::Other);
    assert_eq!(Barrier::new(usize::MAX).unwrap_err().kind(), ErrorKind::Other);
    assert!(Barrier::new(100_000).unwrap().try_wait().is_err());
}

#[test]
fn every_form_of_wait_waits_for_its_timeout() {
    let _deadline = Deadline::start();
    let barrier = Barrier::new(2).unwrap();
    assert_eq!(barrier.try_wait().unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!((barrier.waiting(), barrier.is_broken()), (0, false), "a try that fails has not come");
    let other = std::thread::spawn({
        let barrier = barrier.clone();
        move || barrier.blocking_wait().unwrap().index()
    });
    while barrier.waiting() == 0 {}
    assert_eq!(barrier.try_wait().unwrap().index(), 1);
    assert_eq!(other.join().unwrap(), 0);
    let start = Instant::now();
    assert!(is_broken(barrier.blocking_wait_timeout(SHORT)));
    assert!(start.elapsed() >= SHORT);
    let barrier = Barrier::with_timeout(2, SHORT).unwrap();
    assert!(is_broken(barrier.blocking_wait()));
    assert!(format!("{barrier:?}").contains("is_broken: true"));
    fn future_is_send<T: Send>(_: T) {}
    future_is_send(barrier.wait());
    future_is_send(barrier.wait_then(async || Ok(())));
}

#[tokio::test]
async fn cancelled_wait_breaks_its_generation() {
    let barrier = Barrier::new(3).unwrap();
    let child = Process::spawn(wait, (barrier.clone(),)).unwrap();
    eventually("it waits", || barrier.waiting() == 1).await;
    {
        let mut dropped = pin!(barrier.wait());
        assert!(poll!(&mut dropped).is_pending());
        assert_eq!(barrier.waiting(), 2);
    }
    assert!(barrier.is_broken());
    assert!(is_broken(within(child).await.unwrap()));
}

/// One that is dropped when its generation has ended already breaks nothing.
#[tokio::test]
async fn wait_cancelled_too_late_breaks_nothing() {
    let barrier = Barrier::new(2).unwrap();
    {
        let mut dropped = pin!(barrier.wait());
        assert!(poll!(&mut dropped).is_pending());
        assert_eq!(barrier.wait().await.unwrap().index(), 1);
    }
    assert!(!barrier.is_broken());
}

/// P4: in CPython the others hang, and not even their timeouts fire.
#[tokio::test]
async fn barr_p4_party_killed_while_it_waits_breaks_the_barrier() {
    let barrier = Barrier::new(5).unwrap();
    let mut children = all_but(&barrier, 1).await;
    let start = Instant::now();
    let victim = children.remove(1);
    victim.kill().unwrap();
    for child in children {
        assert!(is_broken(within(child).await.unwrap()));
    }
    println!("all know after {:?}", start.elapsed());
    assert!(barrier.is_broken());
    assert!(is_broken(barrier.wait().await));
    barrier.reset();
    let children = all_but(&barrier, 1).await;
    within(barrier.wait()).await.unwrap();
    for child in children {
        within(child).await.unwrap().unwrap();
    }
}

/// Who comes while the action of the generation before still runs waits for it, and does not count in that one.
#[tokio::test]
async fn party_that_arrives_during_the_action_waits_for_the_next_generation() {
    let barrier = Barrier::new(2).unwrap();
    let (go, gone) = tokio::sync::oneshot::channel();
    let first = tokio::spawn({
        let barrier = barrier.clone();
        async move { barrier.wait().await.unwrap().index() }
    });
    eventually("it waits", || barrier.waiting() == 1).await;
    let acting = tokio::spawn({
        let barrier = barrier.clone();
        async move { barrier.wait_then(async || gone.await.map_err(mp::Error::other)).await.unwrap().index() }
    });
    eventually("it acts", || barrier.waiting() == 2).await;
    let mut late = pin!(barrier.wait());
    assert!(tokio::time::timeout(SHORT, &mut late).await.is_err());
    assert_eq!(barrier.try_wait().unwrap_err().kind(), ErrorKind::WouldBlock);
    go.send(()).unwrap();
    assert_eq!((within(first).await.unwrap(), within(acting).await.unwrap()), (0, 1));
    let other = tokio::spawn({
        let barrier = barrier.clone();
        async move { barrier.wait().await.unwrap().index() }
    });
    let mine = within(late).await.unwrap().index();
    assert_eq!(mine + within(other).await.unwrap(), 1);
}

#[tokio::test]
async fn random_kills_and_resets_leave_the_barrier_usable() {
    let barrier = Barrier::new(3).unwrap();
    let party = async |barrier: Barrier| {
        loop {
            match barrier.wait().await {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::BrokenBarrier => barrier.reset(),
                Err(error) => panic!("{error}"),
            }
        }
    };
    let mut random = Random::new(3);
    for _ in 0..15 {
        let children: Vec<Process<()>> = (0..3).map(|_| Process::spawn(party, (barrier.clone(),)).unwrap()).collect();
        tokio::time::sleep(Duration::from_micros(2000 + random.below(20_000))).await;
        for mut child in children {
            child.kill().unwrap();
            within(child.wait()).await.unwrap();
        }
        barrier.reset();
        let mut waits: Vec<_> = (0..3).map(|_| Box::pin(barrier.wait())).collect();
        let (two, one) = waits.split_at_mut(2);
        for wait in two.iter_mut() {
            assert!(poll!(wait).is_pending());
        }
        assert_eq!(within(&mut one[0]).await.unwrap().index(), 2);
        for wait in two {
            within(wait).await.unwrap();
        }
    }
}

/// Stopped is not dead: its arrival counts, and others' timeouts fire.
#[tokio::test]
async fn stopped_party_counts_and_delays_others_up_to_their_timeouts() {
    let barrier = Barrier::new(2).unwrap();
    let party = all_but(&barrier, 1).await.pop().unwrap();
    stop(party.pid());
    within(barrier.wait()).await.unwrap();
    let start = Instant::now();
    assert!(is_broken(within(barrier.wait_timeout(SHORT)).await), "nobody has come for the next generation");
    assert!(start.elapsed() >= SHORT);
    go_on(party.pid());
    assert_eq!(within(party).await.unwrap().unwrap(), 0, "its own generation has passed");
}

#[tokio::test]
async fn party_that_is_not_polled_delays_no_other_of_its_process() {
    let barrier = Barrier::new(3).unwrap();
    let mut idle = pin!(barrier.wait());
    assert!(poll!(&mut idle).is_pending());
    let mut behind = pin!(barrier.wait());
    assert!(poll!(&mut behind).is_pending());
    let third = Process::spawn(wait, (barrier.clone(),)).unwrap();
    within(behind).await.unwrap();
    within(third).await.unwrap().unwrap();
    within(idle).await.unwrap();
}
