//! The ring alone: sizes, limits, damage, and deaths at each store.

use super::*;
use crate::channel::extents::{self, BASE};
use crate::channel::reclaim;
use crate::channel::segment::Bytes;

fn ring(items: u64, bytes: u64) -> Ring {
    Ring::create(items, bytes).unwrap()
}

fn push(ring: &Ring, payload: &[u8]) -> Push {
    ring.push(&mut Payload::Borrowed(payload), 0, |_| Ok(true)).0.unwrap()
}

fn pop(ring: &Ring) -> Option<Vec<u8>> {
    match ring.pop(|_| (Vec::<u8>::new(), false), |_, _| Ok(Vec::new()), |_| ()).0.unwrap() {
        Pop::Got(bytes, _) => Some(bytes),
        Pop::Empty => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn discardable_payloads_arrive_whole_in_new_segments_and_in_old_ones() {
    let ring = ring(0, 0);
    let sizes = [1, 100, 100_000, PIECE - 8, PIECE, PIECE + 5000, 2 * PIECE + 1, 70_000, PIECE + 1, 3 * PIECE];
    let payload = |n: usize| -> Vec<u8> { (0..sizes[n]).map(|at| (at ^ (at >> 8) ^ n) as u8).collect() };
    for rounds in [1, 2, 5] {
        for n in (0..sizes.len()).cycle().take(rounds * 3) {
            let mut bytes = payload(n);
            let pushed = ring.push(&mut Payload::Discardable(&mut bytes), 0, |_| Ok(true)).0.unwrap();
            assert_eq!((pushed, push(&ring, &[n as u8; 9])), (Push::Done, Push::Done));
        }
        for n in (0..sizes.len()).cycle().take(rounds * 3) {
            assert!(pop(&ring).unwrap() == payload(n), "{n}");
            assert_eq!(pop(&ring).unwrap(), [n as u8; 9]);
        }
    }
    assert!(pop(&ring).is_none());
}

#[test]
fn a_payload_that_finds_no_room_is_not_discarded() {
    for (items, bytes) in [(1, 0), (0, 1)] {
        let ring = ring(items, bytes);
        let full = |payload: &mut Vec<u8>| ring.push(&mut Payload::Discardable(payload), 0, |_| Ok(true)).0.unwrap();
        while push(&ring, &[0; 1000]) == Push::Done {}
        let mut payload = vec![7; 2 * PIECE];
        assert_eq!(full(&mut payload), Push::Full);
        assert!(payload.iter().all(|byte| *byte == 7));
        assert_eq!(ring.try_close().map_err(|error| error.kind()), Ok(true));
        assert_eq!(full(&mut payload), Push::Closed);
        assert!(payload.iter().all(|byte| *byte == 7));
    }
}

#[test]
fn a_ring_that_was_drained_just_before_it_grew_can_grow_again() {
    let ring = ring(0, 0);
    for n in 0..10 {
        assert_eq!(push(&ring, &[n]), Push::Done);
        assert_eq!(pop(&ring), Some(vec![n]));
        let mut side = lock(&ring.put);
        let tail = ring.settle_putter(&mut side).unwrap();
        assert!(ring.grow(&mut side, tail, RecordHead::new(64, 0)).unwrap().is_some());
    }
}

#[test]
fn records_of_all_sizes_come_out_whole_and_in_order() {
    let ring = ring(0, 0);
    let sizes = [0, 1, 7, 8, 9, 4095, 65_000, 65_536, 200_000, 3 << 20, 5, 40 << 20, 17];
    let payload = |n: usize, size: usize| -> Vec<u8> { (0..size).map(|i| (i * 31 + n) as u8).collect() };
    for round in 0..3 {
        for (n, size) in sizes.iter().enumerate() {
            assert_eq!(push(&ring, &payload(n + round, *size)), Push::Done);
        }
        assert_eq!(ring.len().unwrap(), sizes.len());
        for (n, size) in sizes.iter().enumerate() {
            assert_eq!(pop(&ring).unwrap(), payload(n + round, *size), "record {n} of {size} bytes");
        }
        assert_eq!((pop(&ring), ring.len().unwrap()), (None, 0));
    }
}

#[test]
fn segments_of_other_sizes_leave_room_for_one_that_is_needed() {
    let ring = ring(0, 0);
    // A backlog of small ones, as when there is no memory for large ones.
    let small: Vec<u64> = (1..extents::MOST).map(|_| ring.extents.allocate(BASE / 8).unwrap()).collect();
    assert!(ring.extents.allocate(BASE / 8).is_err());
    small.into_iter().for_each(|name| ring.extents.retire(name));
    // The process that made room in the list for it has died.
    assert!(ring.extents.empty_row().is_some());
    for size in [1 << 20, 3 << 20, 10] {
        assert_eq!(push(&ring, &vec![1; size]), Push::Done);
        assert_eq!((pop(&ring).unwrap().len(), ring.len().unwrap()), (size, 0));
    }
}

/// A ring that keeps the memory of a large record.
fn drained() -> Arc<Ring> {
    let ring = Arc::new(ring(0, 0));
    assert_eq!(push(&ring, &[1; 8 << 20]), Push::Done);
    assert_eq!(pop(&ring).unwrap().len(), 8 << 20);
    assert!(ring.take_idle() && ring.kept().is_some());
    ring
}

#[test]
fn memory_that_cannot_be_given_back_while_somebody_takes_is_watched_again() {
    let ring = drained();
    let wait_until = |what: &str, is_so: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(30), "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let taking = lock(&ring.get);
    reclaim::watch(&ring, std::sync::Weak::<crate::channel::channel_core::ChannelCore>::new());
    reclaim::give_back_all();
    wait_until("nobody watches it", &|| ring.watched() >= 8 << 20);
    assert!(ring.kept().is_some());
    drop(taking);
    wait_until("nobody gives it back", &|| ring.kept().is_none() && ring.watched() == 0);
}

#[test]
fn small_record_that_follows_a_large_one_takes_the_short_way() {
    let ring = drained();
    ring.set_watched(ring.kept().unwrap().bytes);
    assert_eq!(push(&ring, b"small"), Push::Done);
    let mut bytes = Vec::new();
    assert!(ring.pop_here(usize::MAX, &mut bytes).0 && bytes == b"small" && !ring.take_idle());
}

#[test]
fn record_whose_memory_was_needed_has_its_segment_give_all_back() {
    let ring = ring(0, 0);
    assert_eq!((push(&ring, &[1; 8 << 20]), push(&ring, b"small")), (Push::Done, Push::Done));
    let (taken, _) = ring.pop(|_| (Vec::<u8>::new(), true), |_, _| Ok(Vec::new()), |_| ());
    assert!(matches!(taken.unwrap(), Pop::Got(bytes, _) if bytes.len() == 8 << 20));
    assert_eq!((pop(&ring).unwrap(), ring.kept(), ring.take_idle()), (b"small".to_vec(), None, false));
}

#[test]
fn memory_of_a_large_backlog_is_given_back() {
    let ring = ring(0, 0);
    let blocks = || rustix::fs::fstat(ring.region().fd()).unwrap().st_blocks as u64 * 512;
    (0..100).for_each(|_| assert_eq!(push(&ring, &[1; 1 << 20]), Push::Done));
    assert!(blocks() > 100 << 20);
    (0..100).for_each(|_| assert_eq!(pop(&ring).unwrap().len(), 1 << 20));
    assert!(ring.take_idle() && !ring.take_idle() && ring.kept().is_some_and(|kept| kept.bytes < blocks()));
    assert_eq!(ring.give_back_kept(), WakeRequests::default());
    assert!(blocks() < KEEP && ring.kept().is_none(), "{} bytes kept", blocks());
    assert_eq!(push(&ring, b"and it goes on"), Push::Done);
    assert_eq!(pop(&ring).unwrap(), b"and it goes on");
}

#[test]
fn ring_refuses_records_beyond_its_item_or_byte_limit() {
    let items = ring(2, 0);
    assert_eq!([push(&items, b"a"), push(&items, b"b"), push(&items, b"c")], [Push::Done, Push::Done, Push::Full]);
    assert_eq!(pop(&items).unwrap(), b"a");
    assert_eq!(push(&items, &[0; 1 << 20]), Push::Done);
    let bytes = ring(0, 1 << 20);
    let fitting = (0..).take_while(|_| push(&bytes, &[0; 1000]) == Push::Done).count();
    assert!((1000..3000).contains(&fitting), "{fitting}");
    (0..fitting).for_each(|_| drop(pop(&bytes).unwrap()));
    assert_eq!(push(&bytes, &[0; 5 << 20]), Push::Done, "one message always fits an empty pipe");
}

#[test]
fn closed_lets_nothing_in_and_everything_out() {
    let ring = ring(0, 0);
    push(&ring, b"last");
    ring.close().unwrap();
    assert_eq!(push(&ring, b"late"), Push::Closed);
    assert_eq!(pop(&ring).unwrap(), b"last");
    assert!(matches!(ring.pop(|_| (Vec::<u8>::new(), false), |_, _| Ok(Vec::new()), |_| ()).0.unwrap(), Pop::Closed));
}

/// The memory that a putter leaves if it dies before the link.
fn lose_8_mib(ring: &Ring) {
    let name = ring.extents.allocate(1 << 20).unwrap();
    ring.extents.back(name, &ring.extents.open(name).unwrap(), 0, 8 << 20).unwrap();
}

#[test]
fn death_growing_before_the_link_the_lost_extent_is_given_back() {
    let ring = ring(0, 0);
    push(&ring, b"kept");
    lose_8_mib(&ring);
    let blocks = || rustix::fs::fstat(ring.region().fd()).unwrap().st_blocks as u64 * 512;
    assert!(blocks() >= 8 << 20);
    // The putter that did this has died holding the lock, and its slot is free.
    ring.word(word::PUT_LOCK).store(Member { slot: 4000, epoch: 9 }.to_bits(), Release);
    assert_eq!(push(&ring, b"next"), Push::Done);
    assert!(blocks() < 1 << 20);
    assert_eq!((pop(&ring).unwrap(), pop(&ring).unwrap()), (b"kept".to_vec(), b"next".to_vec()));
}

#[test]
fn death_growing_before_the_link_while_the_other_side_is_at_work_is_repaired_later() {
    let ring = ring(0, 0);
    lose_8_mib(&ring);
    let blocks = || rustix::fs::fstat(ring.region().fd()).unwrap().st_blocks as u64 * 512;
    ring.word(word::PUT_LOCK).store(Member { slot: 4000, epoch: 9 }.to_bits(), Release);
    let me = ring.family.me().unwrap();
    let _taker = ring.get_lock().try_take(me, ring.family).unwrap();
    assert_eq!(push(&ring, b"first"), Push::Done);
    assert!(blocks() >= 8 << 20);
    let _ = ring.get_lock().release();
    assert_eq!(pop(&ring).unwrap(), b"first");
    assert!(blocks() < 1 << 20, "{} bytes lost", blocks());
}

#[test]
fn more_memory_than_there_is_is_refused_before_it_is_taken() {
    let error = ring(0, 0).region().reserve(1 << 20, 1 << 50).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
}

#[test]
fn death_growing_after_the_link_the_next_putter_follows_it() {
    let ring = ring(0, 0);
    push(&ring, b"before");
    let name = ring.extents.allocate(1 << 14).unwrap();
    let base = ring.extents.open(HEAD_LEN as u64).unwrap();
    ring.extents.open(name).unwrap().segment().begin(base.segment().tail().count, 0);
    base.segment().link(name);
    assert_eq!(push(&ring, b"after"), Push::Done);
    assert_eq!(
        (pop(&ring).unwrap(), pop(&ring).unwrap(), ring.len().unwrap()),
        (b"before".to_vec(), b"after".to_vec(), 0)
    );
}

#[test]
fn death_growing_after_the_link_a_drained_segment_leads_the_next_putter_on() {
    let ring = ring(0, 0);
    let name = ring.extents.allocate(1 << 14).unwrap();
    let next = ring.extents.allocate(1 << 15).unwrap();
    // A putter died twice between a link and the move of `PUT_SEGMENT`, and a consumer has left both segments.
    for (name, next) in [(HEAD_LEN as u64, name), (name, next)] {
        ring.extents.open(next).unwrap().segment().begin(0, 0);
        ring.extents.open(name).unwrap().segment().link(next);
    }
    assert_eq!((pop(&ring), ring.len().unwrap()), (None, 0));
    assert_eq!(push(&ring, b"found"), Push::Done);
    assert_eq!((ring.len().unwrap(), pop(&ring).unwrap()), (1, b"found".to_vec()));
}

#[test]
fn counts_and_positions_wrap_around() {
    let ring = ring(3, 0);
    let base = ring.extents.open(HEAD_LEN as u64).unwrap();
    let start = Mark { count: u32::MAX - 5, position: u32::MAX - 4000 };
    base.segment().begin_at(start);
    ring.word(word::KNOWN_TAKEN).store(start.count.into(), Relaxed);
    for n in 0..200u8 {
        let payloads = [vec![n; 1000], vec![n; 1], vec![!n; 333]];
        payloads.iter().for_each(|payload| assert_eq!(push(&ring, payload), Push::Done));
        assert_eq!((push(&ring, b"one more"), ring.len().unwrap()), (Push::Full, 3));
        payloads.iter().for_each(|payload| assert_eq!(&pop(&ring).unwrap(), payload));
        assert_eq!((pop(&ring), ring.len().unwrap()), (None, 0));
    }
}

#[test]
fn a_chain_that_bites_its_tail_is_an_error() {
    let ring = ring(0, 0);
    ring.extents.open(HEAD_LEN as u64).unwrap().segment().link(HEAD_LEN as u64);
    assert!(ring.push(&mut Payload::Borrowed(b"x"), 0, |_| Ok(true)).0.is_err());
    assert!(ring.pop(|_| (Vec::<u8>::new(), false), |_, _| Ok(Vec::new()), |_| ()).0.is_err());
}

#[test]
fn death_holding_the_get_lock_the_record_is_still_there() {
    let ring = ring(0, 0);
    push(&ring, b"still");
    ring.word(word::GET_LOCK).store(Member { slot: 4000, epoch: 9 }.to_bits(), Release);
    assert_eq!(pop(&ring).unwrap(), b"still");
}

/// The same memory as a second process sees it.
fn another(ring: &Ring) -> Ring {
    Ring::open(ring.region().fd().try_clone().unwrap()).unwrap()
}

#[test]
fn corrupt_bytes_are_an_error() {
    let ring = ring(0, 0);
    push(&ring, b"x");
    let base = ring.extents.open(HEAD_LEN as u64).unwrap();
    base.write(0, &u64::MAX.to_ne_bytes());
    assert!(ring.pop(|_| (Vec::<u8>::new(), false), |_, _| Ok(Vec::new()), |_| ()).0.is_err());
}

#[test]
fn damaged_ring_is_closed_for_all_and_reported_once() {
    let ring = ring(0, 0);
    let other = another(&ring);
    ring.word(word::GET_SEGMENT).store(12345, Release);
    let (error, requests) = ring.pop(|_| (Vec::<u8>::new(), false), |_, _| Ok(Vec::new()), |_| ());
    assert!(Damage::is_in(&error.unwrap_err()) && requests.all);
    let (error, requests) = other.push(&mut Payload::Borrowed(b"x"), 0, |_| Ok(true));
    assert!(Damage::is_in(&error.unwrap_err()) && !requests.all, "the first has told everybody");
    other.close().unwrap();
    assert!(
        ring.push(&mut Payload::Borrowed(b"x"), 0, |_| Ok(true)).0.is_err_and(|error| Damage::is_in(&error)),
        "damaged, not just closed"
    );
}

#[test]
fn no_word_of_the_head_leads_to_a_panic_or_an_endless_loop() {
    let values = |seen: u64| [0, 1, u64::MAX, 1 << 63, seen ^ 1 << 33, seen ^ 1 << 12, seen.wrapping_add(8), !seen];
    let heads = (0..128).chain(HEAD_LEN / 8..HEAD_LEN / 8 + 40);
    for (at, n) in heads.flat_map(|at| (0..8).map(move |n| (at, n))) {
        let ring = ring([0, 3][n % 2], 0);
        let base = ring.extents.open(HEAD_LEN as u64).unwrap();
        (0..2u8).for_each(|n| assert_eq!(push(&ring, &[n; 9]), Push::Done));
        let word = match at.checked_sub(HEAD_LEN / 8) {
            None => ring.word(at),
            Some(at) => &base.segment().words[at],
        };
        word.store(values(word.load(Acquire))[n], Release);
        let other = another_or(&ring);
        for ring in [Some(&ring), other.as_ref()].into_iter().flatten() {
            for _ in 0..4 {
                let _ = ring.push_here(&[1; 9]);
                let _ = ring.push(&mut Payload::Borrowed(&[2; 70_000]), 0, |_| Ok(true));
                let _ =
                    (ring.pop_here(usize::MAX, &mut Vec::new()), ring.is_empty_here(), ring.len(), ring.drained_at());
                let _ = ring.pop(|_| (Vec::<u8>::new(), false), |_, _| Ok(Vec::new()), |_| ());
            }
        }
    }
}

/// Opens it if its first words are still those of a ring.
fn another_or(ring: &Ring) -> Option<Ring> {
    Ring::open(ring.region().fd().try_clone().unwrap()).ok()
}

/// So many bytes of a record, each page of which contains its own number.
fn stamped(len: usize, n: usize) -> Vec<u8> {
    let mut bytes = vec![n as u8; len];
    bytes
        .chunks_exact_mut(1000)
        .enumerate()
        .for_each(|(at, page)| page[at % 7..][..8].copy_from_slice(&(at ^ n).to_ne_bytes()));
    bytes
}

#[test]
fn a_segment_has_memory_for_as_many_large_records_as_are_under_way() {
    for (size, under_way) in [(5 << 20, 1), (5 << 20, 2), (8 << 20, 1), (9 << 20, 2), (33 << 20, 1), (20 << 20, 2)] {
        let ring = ring(0, 0);
        let payload = |n: usize| stamped(size, n);
        let backed = || lock(&ring.put).segment().unwrap().backed();
        let put = |n| assert_eq!(push(&ring, &payload(n)), Push::Done);
        // The first of them bring a segment that is large enough.
        (0..under_way).for_each(put);
        (0..under_way).for_each(|n| assert!(pop(&ring).unwrap() == payload(n)));
        (0..under_way).for_each(put);
        let had = backed();
        for n in 0..8 {
            assert!(pop(&ring).unwrap() == payload(n % under_way), "{n} of {size}");
            put(n % under_way);
        }
        let most = 2 * size as u64 + 2 * AHEAD;
        assert!(backed() <= most && had <= most, "{} and {had} bytes for {under_way} of {size}", backed());
    }
}

#[test]
fn records_with_and_without_rewinding_come_out_in_order() {
    let ring = ring(0, 0);
    let sizes = [6 << 20, 10, 7 << 20, 3 << 20, 100, 9 << 20, 1, 0, 2 << 20, 6 << 20];
    let payload = |n: usize| stamped(sizes[n % sizes.len()], n);
    let (mut put, mut got) = (0, 0);
    for ahead in [1, 2, 3, 1, 1, 4, 2, 1, 1, 1].into_iter().cycle().take(40) {
        (0..ahead).for_each(|_| {
            assert_eq!(push(&ring, &payload(put)), Push::Done);
            put += 1;
        });
        for _ in 0..ahead {
            assert!(pop(&ring).unwrap() == payload(got), "record {got}");
            got += 1;
        }
        assert_eq!(ring.len().unwrap(), 0);
    }
}

#[test]
fn a_limited_ring_takes_two_large_records_and_no_third() {
    let ring = ring(0, 1 << 20);
    for size in [5 << 20, 9 << 20, 40 << 20] {
        let taken = (0..10).take_while(|_| push(&ring, &vec![1; size]) == Push::Done).count();
        assert!((1..=2).contains(&taken), "{taken} of {size}");
        (0..taken).for_each(|_| assert_eq!(pop(&ring).unwrap().len(), size));
    }
}
