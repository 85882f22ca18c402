//! The pool, first cut.

use futures::{StreamExt, TryStreamExt};
use multiprocess::{self as mp, ErrorKind, Pool};
use std::time::Duration;

multiprocess::test_support!();

fn square(n: i64) -> i64 {
    n * n
}

async fn later(n: i64) -> i64 {
    tokio::time::sleep(Duration::from_millis(1)).await;
    n + 1
}

#[tokio::test]
async fn whole_program() -> mp::Result<()> {
    let pool = Pool::new(4)?;
    let squares: Vec<i64> = pool.map(square, 1..=5).await?;
    let total: i64 = pool.imap_unordered(square, 0..1_000).try_fold(0, async |sum, x| Ok(sum + x)).await?;
    let some: Vec<i64> =
        futures::stream::iter(0..10).map(|i| pool.apply_async(square, (i,))).buffer_unordered(4).try_collect().await?;
    assert_eq!((squares, total, some.len()), (vec![1, 4, 9, 16, 25], 332_833_500, 10));
    assert_eq!(pool.map(later, 0..20).await?, (1..=20).collect::<Vec<_>>());
    pool.close();
    assert_eq!(pool.apply(square, (1,)).await.unwrap_err().kind(), ErrorKind::Closed);
    pool.join().await
}

#[tokio::test]
async fn failures_are_per_task() -> mp::Result<()> {
    let pool = Pool::new(2)?;
    let die = |n: i64| -> i64 {
        match n {
            3 => std::process::abort(),
            5 => panic!("five"),
            n => n,
        }
    };
    let results: Vec<_> = pool.imap(die, 0..10).collect().await;
    let kinds: Vec<_> = results.iter().map(|result| result.as_ref().map_err(|error| error.kind()).copied()).collect();
    let expected = (0..10).map(|n| match n {
        3 => Err(ErrorKind::ProcessDied),
        5 => Err(ErrorKind::Panicked),
        n => Ok(n),
    });
    assert_eq!(kinds, expected.collect::<Vec<_>>());
    let error = pool.apply(|| std::thread::sleep(Duration::from_secs(60)), ()).timeout(Duration::from_millis(50)).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(pool.apply(square, (7,)).await?, 49);
    let stuck = pool.apply_async(|| std::thread::sleep(Duration::from_secs(60)), ());
    pool.terminate();
    assert_eq!(stuck.await.unwrap_err().kind(), ErrorKind::Cancelled);
    pool.join().await
}
