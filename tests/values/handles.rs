//! Handles in what serde reads from a buffer of its own, and in lists, of a value that goes through a queue, as an argument and
//! as a result: each arrives, and no descriptor stays behind.

use multiprocess::{self as mp, Fd, Manager, Process, Queue};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

#[derive(Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Tagged<T> {
    #[allow(dead_code, reason = "the other one is sent")]
    None,
    One {
        handle: T,
    },
}
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", content = "content")]
enum Adjacent<T> {
    Pair(u8, T),
}
/// The first variant takes the handle before it fails.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged<T> {
    #[allow(dead_code, reason = "the other one is sent")]
    Named {
        handle: T,
        name: String,
    },
    Numbered {
        handle: T,
        number: u8,
    },
}
#[derive(Serialize, Deserialize)]
struct Inner<T> {
    handle: T,
}
#[derive(Serialize, Deserialize)]
struct Flat<T> {
    number: u8,
    #[serde(flatten)]
    inner: Inner<T>,
}
#[derive(Serialize, Deserialize)]
struct Forms<T> {
    tagged: Tagged<T>,
    adjacent: Adjacent<T>,
    untagged: Untagged<T>,
    flat: Flat<T>,
    list: Vec<T>,
    pairs: Vec<(u8, T)>,
    option: Option<Option<T>>,
    map: BTreeMap<u8, T>,
}

impl<T> Forms<T> {
    fn of(make: &mut impl FnMut() -> T) -> Self {
        Self {
            tagged: Tagged::One { handle: make() },
            adjacent: Adjacent::Pair(1, make()),
            untagged: Untagged::Numbered { handle: make(), number: 2 },
            flat: Flat { number: 3, inner: Inner { handle: make() } },
            list: (0..9).map(|_| make()).collect(),
            pairs: (0..9).map(|n| (n, make())).collect(),
            option: Some(Some(make())),
            map: (0..9).map(|n| (n, make())).collect(),
        }
    }

    /// Whether all that is there is as it was made.
    fn is_whole(&self) -> bool {
        let is_tagged = matches!(self.tagged, Tagged::One { .. });
        let is_untagged = matches!(self.untagged, Untagged::Numbered { number: 2, .. });
        let Adjacent::Pair(number, _) = &self.adjacent;
        is_tagged
            && is_untagged
            && (*number, self.flat.number, self.list.len(), self.map.len()) == (1, 3, 9, 9)
            && self.pairs.iter().map(|pair| pair.0).eq(0..9)
            && matches!(self.option, Some(Some(_)))
    }
}

fn same<T>(value: T) -> T {
    value
}

/// By a queue, and to a process and back.
async fn send<T>(make: &mut impl FnMut() -> T) -> mp::Result<bool>
where
    T: Serialize + DeserializeOwned + Send + Unpin + 'static,
{
    let queue = Queue::unbounded()?;
    queue.put(Forms::of(make)).await.map_err(|error| mp::Error::other(error.to_string()))?;
    let by_queue = queue.get().await?;
    let by_process = Process::spawn(same::<Forms<T>>, (Forms::of(make),))?.await?;
    Ok(by_queue.is_whole() && by_process.is_whole())
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Sends handles of a type twice. The second time leaves no more descriptors than the first: what a process keeps for all
/// handles is there by then.
async fn check<T>(mut make: impl FnMut() -> T)
where
    T: Serialize + DeserializeOwned + Send + Unpin + 'static,
{
    let what = std::any::type_name::<T>();
    let mut before = usize::MAX;
    for _ in 0..2 {
        match send(&mut make).await {
            Ok(is_whole) => assert!(is_whole, "{what} is changed"),
            Err(error) => panic!("{what}: {error}"),
        }
        let start = Instant::now();
        while descriptors() > before {
            let late = start.elapsed() > Duration::from_secs(30);
            assert!(!late, "{what}: {} descriptors, {before} before", descriptors());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        before = descriptors();
    }
}

fn seven() -> u8 {
    7
}

/// In a process of its own, whose descriptors no other test counts in.
async fn check_all() -> mp::Result<()> {
    check(|| Fd::new(std::net::UdpSocket::bind("127.0.0.1:0").unwrap())).await;
    check(|| Queue::<u8>::unbounded().unwrap()).await;
    check(|| mp::JoinableQueue::<u8>::unbounded().unwrap()).await;
    check(|| mp::simplex::<u8>().unwrap().0).await;
    check(|| mp::simplex::<u8>().unwrap().1).await;
    check(|| mp::pipe::<u8, u16>().unwrap().0).await;
    check(|| mp::oneshot::<u8>().unwrap().0).await;
    check(|| mp::oneshot::<u8>().unwrap().1).await;
    check(|| mp::watch(1u8).unwrap().0).await;
    check(|| mp::watch(1u8).unwrap().1).await;
    check(|| mp::broadcast::<u8>(4).unwrap().0).await;
    check(|| mp::broadcast::<u8>(4).unwrap().1).await;
    check(|| mp::Lock::new().unwrap()).await;
    check(|| mp::RLock::new().unwrap()).await;
    check(|| mp::RwLock::new().unwrap()).await;
    check(|| mp::Semaphore::new(2).unwrap()).await;
    check(|| mp::BoundedSemaphore::new(2).unwrap()).await;
    check(|| mp::Event::new().unwrap()).await;
    check(|| mp::Barrier::new(2).unwrap()).await;
    check(|| mp::Condition::new().unwrap()).await;
    check(|| mp::CancellationToken::new().unwrap()).await;
    check(|| mp::Value::new(1u64).unwrap()).await;
    check(|| mp::Array::from_slice(&[1u64; 10]).unwrap()).await;
    check(|| mp::SharedMemory::anonymous(5000).unwrap()).await;
    check(|| mp::Task::of(seven, ())).await;
    let manager = Manager::start().await?;
    let dict: mp::DictProxy<u8, u8> = manager.dict().await?;
    check(|| dict.clone()).await;
    let list: mp::ListProxy<u8> = manager.list().await?;
    check(|| list.clone()).await;
    let lock = manager.lock().await?;
    check(|| lock.clone()).await;
    manager.shutdown().await
}

#[test]
fn handles_arrive_in_every_form_and_leave_no_descriptors() {
    let limit = Duration::from_secs(240);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let all = async { tokio::time::timeout(limit, Process::spawn(check_all, ())?.join()).await.expect("no hang") };
    runtime.block_on(all).unwrap().unwrap();
}
