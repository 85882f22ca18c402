//! Queues inside one process: what needs no child.

use futures::{SinkExt, StreamExt};
use multiprocess::{self as mp, ErrorKind, JoinableQueue, Queue};
use std::time::Duration;

#[tokio::test]
async fn smoke_get_waits_for_put() -> mp::Result<()> {
    let queue = Queue::<u64>::unbounded()?;
    let getter = tokio::spawn({
        let queue = queue.clone();
        async move { queue.get().await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    queue.put(7).await?;
    assert_eq!(getter.await.unwrap()?, 7);
    Ok(())
}
#[tokio::test(flavor = "multi_thread")]
async fn smoke_many() -> mp::Result<()> {
    let queue = Queue::<u64>::bounded(3)?;
    let mut tasks = vec![];
    for t in 0..4 {
        let queue = queue.clone();
        tasks.push(tokio::spawn(async move {
            for i in 0..10000 {
                queue.put(t * 10000 + i).await.unwrap();
            }
        }));
    }
    let mut gets = vec![];
    for _ in 0..4 {
        let queue = queue.clone();
        gets.push(tokio::spawn(async move {
            let mut s = 0;
            while let Ok(v) = queue.get().await {
                s += v;
            }
            s
        }));
    }
    for t in tasks {
        t.await.unwrap();
    }
    queue.close();
    let mut sum = 0;
    for g in gets {
        sum += g.await.unwrap();
    }
    assert_eq!(sum, (0..40000).sum::<u64>());
    Ok(())
}
#[test]
fn smoke_blocking() -> mp::Result<()> {
    let queue = Queue::<u64>::bounded(3)?;
    let q = queue.clone();
    let t = std::thread::spawn(move || {
        let mut s = 0;
        while let Ok(v) = q.blocking_get() {
            s += v;
        }
        s
    });
    for i in 0..10000 {
        queue.blocking_put(i)?;
    }
    queue.close();
    assert_eq!(t.join().unwrap(), (0..10000).sum::<u64>());
    Ok(())
}
#[tokio::test]
async fn smoke_pipe() -> mp::Result<()> {
    let (mut a, mut b) = mp::pipe::<u64, u64>()?;
    let t = tokio::spawn(async move {
        while let Ok(v) = b.recv().await {
            b.send(v + 1).await.unwrap();
        }
    });
    for i in 0..1000 {
        a.send(i).await?;
        assert_eq!(a.recv().await?, i + 1);
    }
    drop(a);
    t.await.unwrap();
    let (mut a, b) = mp::pipe::<u64, u64>()?;
    let t = tokio::spawn(async move { a.recv().await.unwrap_err().kind() });
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(b);
    assert_eq!(t.await.unwrap(), ErrorKind::Closed);
    let mut s = Queue::<u32>::unbounded()?;
    s.sink().send(3).await?;
    s.close();
    assert_eq!(s.stream().map(|x| x.unwrap()).collect::<Vec<_>>().await, [3]);
    let _ = &mut s;
    let _ = JoinableQueue::<u8>::unbounded()?;
    Ok(())
}
