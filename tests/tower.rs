//! A pool as a `tower::Service`: under the layers that services use, its readiness, and what is dropped on the way.

use multiprocess::{self as mp, ErrorKind, Event, Pool, PoolService, Value};
use std::future::Future;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tower::buffer::Buffer;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};

mp::test_support!();

/// Longer than anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("in time")
}

async fn until(mut condition: impl FnMut() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

fn twice(n: u32) -> u32 {
    2 * n
}

async fn waits(go_on: Event) -> u32 {
    match go_on.wait().await {
        Ok(()) => 1,
        Err(_) => 0,
    }
}

/// Without a waker that counts.
fn is_ready<
    T: serde::Serialize + serde::de::DeserializeOwned + Send + 'static,
    R: serde::de::DeserializeOwned + 'static,
>(
    service: &mut PoolService<T, R>,
) -> bool {
    service.poll_ready(&mut Context::from_waker(Waker::noop())).map(|ready| ready.expect("open")).is_ready()
}

#[tokio::test]
async fn request_is_answered_by_a_worker() {
    let pool = Pool::new(1).unwrap();
    let mut service = pool.service(|n: u32| (n, std::process::id()));
    let (n, pid) = within(service.ready().await.unwrap().call(3)).await.unwrap();
    assert!(n == 3 && pid != std::process::id());
    assert_eq!(within(pool.service(twice).oneshot(4)).await.unwrap(), 8);
}

#[tokio::test]
async fn layers_of_tower_work_around_a_pool() {
    let pool = Pool::builder().workers(2).max_waiting(16).build().unwrap();
    let service = ServiceBuilder::new().load_shed().concurrency_limit(8).timeout(LIMIT).service(pool.service(twice));
    let service = Buffer::new(service, 64);
    let calls = (0..64).map(|n| service.clone().oneshot(n));
    let results: Vec<Result<u32, BoxError>> = within(futures::future::join_all(calls)).await;
    // Some may have been shed; the others are right.
    let right = (0..64).zip(&results).filter(|(n, result)| result.as_ref().is_ok_and(|twice| *twice == 2 * n)).count();
    let shed = results
        .iter()
        .filter(|result| result.as_ref().is_err_and(|error| error.is::<tower::load_shed::error::Overloaded>()));
    assert_eq!(right + shed.count(), 64, "{results:?}");
    assert!(right >= 8);
}

#[tokio::test]
async fn timeout_of_a_layer_stops_the_item_and_the_worker_goes_on() {
    let pool = Pool::builder().workers(1).grace(Duration::from_millis(10)).build().unwrap();
    let go_on = Event::new().unwrap();
    let service = ServiceBuilder::new().timeout(Duration::from_millis(50)).service(pool.service(waits));
    let error = within(service.oneshot(go_on)).await.unwrap_err();
    assert!(error.is::<tower::timeout::error::Elapsed>(), "{error}");
    assert_eq!(within(pool.apply(twice, (2,))).await.unwrap(), 4);
}

#[tokio::test]
async fn service_is_ready_as_long_as_the_pool_has_room() {
    let pool = Pool::builder().workers(1).max_waiting(1).build().unwrap();
    let go_on = Event::new().unwrap();
    let mut service = pool.service(waits);
    // One runs, one waits, and there is no room for a third.
    let mut calls = Vec::new();
    for waiting in [0, 1] {
        let call = within(service.ready()).await.unwrap().call(go_on.clone());
        calls.push(tokio::spawn(call));
        until(|| pool.stats().running == 1 && pool.stats().queued == waiting).await;
    }
    assert!(!is_ready(&mut service));
    let mut waits_for_room = tokio::spawn(async move {
        service.ready().await.unwrap();
        service
    });
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut waits_for_room).await.is_err());
    go_on.set();
    let mut service = within(waits_for_room).await.unwrap();
    assert_eq!(within(service.call(go_on)).await.unwrap(), 1);
    for call in calls {
        assert_eq!(within(call).await.unwrap().unwrap(), 1);
    }
}

#[tokio::test]
async fn room_that_a_service_keeps_is_for_its_next_call_and_returns_with_its_drop() {
    let pool = Pool::builder().workers(1).max_waiting(1).build().unwrap();
    let (mut service, mut other) = (pool.service(twice), pool.service(twice));
    assert!(is_ready(&mut service) && is_ready(&mut service));
    assert!(!is_ready(&mut other) && !is_ready(&mut service.clone()));
    let full = pool.try_apply(twice, (1,)).map(drop).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::Full);
    // It is called, and its room is free as soon as its item has begun.
    assert_eq!(within(service.call(1)).await.unwrap(), 2);
    assert!(within(other.ready()).await.is_ok());
    drop(other);
    assert!(is_ready(&mut service));
    // A response that is never polled keeps it until it is dropped.
    let response = service.call(2);
    assert!(!is_ready(&mut service));
    drop(response);
    within(service.ready()).await.unwrap();
    drop(service);
    assert_eq!(within(pool.try_apply(twice, (3,)).unwrap()).await.unwrap(), 6);
}

#[tokio::test]
async fn ten_thousand_dropped_services_and_responses_leave_the_room_as_it_was() {
    let pool = Pool::builder().workers(2).max_waiting(3).build().unwrap();
    for n in 0..10_000_u32 {
        let (mut first, mut second) = (pool.service(twice), pool.service(twice));
        let cx = &mut Context::from_waker(Waker::noop());
        let _ = (first.poll_ready(cx), second.poll_ready(cx));
        let mut response = first.call(n);
        match n % 7 {
            0 => assert_eq!(within(response).await.unwrap(), 2 * n),
            // It is handed in, and dropped before its result or after it.
            1..3 => drop(std::pin::Pin::new(&mut response).poll(cx)),
            _ => drop(response),
        }
    }
    let mut all = [(); 3].map(|()| pool.service(twice));
    for service in &mut all {
        within(service.ready()).await.unwrap();
    }
    assert!(!is_ready(&mut pool.service(twice)), "there is room for three");
}

#[tokio::test]
async fn closed_pool_is_an_error_of_readiness_also_for_a_service_in_line() {
    let pool = Pool::builder().workers(1).max_waiting(1).build().unwrap();
    let mut service = pool.service(twice);
    let holder = {
        let mut holder = pool.service(twice);
        assert!(is_ready(&mut holder));
        holder
    };
    let waiting = tokio::spawn(async move { service.ready().await.map(drop) });
    tokio::task::yield_now().await;
    pool.close();
    drop(holder);
    assert_eq!(within(waiting).await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(within(pool.service(twice).oneshot(1)).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn options_of_calls_are_those_that_the_service_was_configured_with() {
    let pool = Pool::builder().workers(1).build().unwrap();
    let dies_once = |calls: Value<u32>| {
        if calls.fetch_add(1) == 0 {
            std::process::abort();
        }
        7
    };
    let service = pool.service(dies_once).configure(|call| call.retries(1));
    assert_eq!(within(service.oneshot(Value::new(0).unwrap())).await.unwrap(), 7);
}

#[tokio::test]
async fn service_in_line_learns_the_end_of_the_pool_though_another_keeps_all_room() {
    let pool = Pool::builder().workers(1).max_waiting(1).build().unwrap();
    let mut keeper = pool.service(twice);
    assert!(is_ready(&mut keeper));
    let mut service = pool.service(twice);
    let waiting = tokio::spawn(async move { service.ready().await.map(drop) });
    let call = tokio::spawn(pool.apply(twice, (1,)));
    tokio::task::yield_now().await;
    pool.terminate();
    assert_eq!(within(waiting).await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    assert!(within(call).await.unwrap().is_err());
}

#[tokio::test]
async fn response_whose_task_has_no_turn_left_keeps_its_room() {
    let pool = Pool::builder().workers(1).max_waiting(1).build().unwrap();
    let mut service = pool.service(twice);
    let mut response = within(service.ready()).await.unwrap().call(4);
    let used_up = std::future::poll_fn(|cx| {
        while let Poll::Ready(turn) = tokio::task::coop::poll_proceed(cx) {
            turn.made_progress();
        }
        let pending = std::pin::Pin::new(&mut response).poll(cx).is_pending();
        Poll::Ready(pending && pool.try_apply(twice, (1,)).is_err())
    });
    assert!(used_up.await);
    assert_eq!(within(response).await.unwrap(), 8);
}
