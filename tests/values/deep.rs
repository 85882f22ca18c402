//! Deep values by every way, in threads with the usual stack: each arrives, or is refused by an error that names the limit.

use multiprocess::{self as mp, ErrorKind, Pool, Process, Queue};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Two levels for each: the struct and its `Some`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Chain {
    next: Option<Box<Chain>>,
}

/// serde buffers what is in it, level by level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Tagged {
    End,
    Node { next: Box<Tagged> },
}

type Square = [[[u64; 32]; 32]; 4];

/// The same with 32 KiB in each node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
#[allow(clippy::large_enum_variant, reason = "it is large on purpose")]
enum Wide {
    End,
    Node { data: Square, next: Box<Wide> },
}

impl Tagged {
    fn next(&self) -> Option<&Self> {
        match self {
            Self::Node { next } => Some(next),
            Self::End => None,
        }
    }
}

impl Wide {
    fn next(&self) -> Option<&Self> {
        match self {
            Self::Node { next, .. } => Some(next),
            Self::End => None,
        }
    }
}

trait Deep: Serialize + DeserializeOwned + Clone + PartialEq + Send + Sync + Unpin + 'static {
    /// Of so many nodes.
    fn of(nodes: usize) -> Self;
    /// Taken apart in a loop or on a larger stack.
    fn is_of(&self, nodes: usize) -> bool;
}

impl Deep for Chain {
    fn of(nodes: usize) -> Self {
        (1..nodes).fold(Self { next: None }, |next, _| Self { next: Some(Box::new(next)) })
    }
    fn is_of(&self, nodes: usize) -> bool {
        std::iter::successors(Some(self), |node| node.next.as_deref()).count() == nodes
    }
}

impl Deep for Tagged {
    fn of(nodes: usize) -> Self {
        (1..nodes).fold(Self::End, |next, _| Self::Node { next: Box::new(next) })
    }
    fn is_of(&self, nodes: usize) -> bool {
        std::iter::successors(Some(self), |node| node.next()).count() == nodes
    }
}

impl Deep for Vec<Tagged> {
    fn of(nodes: usize) -> Self {
        vec![Tagged::of(nodes), Tagged::End]
    }
    fn is_of(&self, nodes: usize) -> bool {
        self.len() == 2 && self[0].is_of(nodes)
    }
}

impl Deep for Box<Tagged> {
    fn of(nodes: usize) -> Self {
        Self::new(Tagged::of(nodes))
    }
    fn is_of(&self, nodes: usize) -> bool {
        (**self).is_of(nodes)
    }
}

fn wide(nodes: usize) -> Box<Wide> {
    let end = Box::new(Wide::End);
    (1..nodes).fold(end, |next, _| Box::new(Wide::Node { data: [[[7; 32]; 32]; 4], next }))
}

fn is_wide(first: &Wide, nodes: usize) -> bool {
    std::iter::successors(Some(first), |node| node.next()).count() == nodes
}

impl Deep for Vec<Wide> {
    fn of(nodes: usize) -> Self {
        vec![*wide(nodes)]
    }
    fn is_of(&self, nodes: usize) -> bool {
        self.len() == 1 && is_wide(&self[0], nodes)
    }
}

impl Deep for Box<Wide> {
    fn of(nodes: usize) -> Self {
        wide(nodes)
    }
    fn is_of(&self, nodes: usize) -> bool {
        is_wide(self, nodes)
    }
}

fn takes<T: Deep>(value: T, nodes: usize) -> bool {
    value.is_of(nodes)
}

/// What became of a value on one way: whether it was what was sent.
type Arrived = mp::Result<bool>;

/// By every way.
async fn send<T: Deep>(pool: Pool, nodes: usize) -> Vec<(&'static str, Arrived)> {
    let queue = async {
        let queue = Queue::unbounded()?;
        queue.put(T::of(nodes)).await?;
        Ok(queue.get().await?.is_of(nodes))
    };
    let argument = async { Process::spawn(takes::<T>, (T::of(nodes), nodes))?.await };
    let result = async { Ok(Process::spawn(T::of, (nodes,))?.await?.is_of(nodes)) };
    vec![
        ("queue", queue.await),
        ("argument of a process", argument.await),
        ("result of a process", result.await),
        ("argument of a pool", pool.apply(takes::<T>, (T::of(nodes), nodes)).await),
        ("result of a pool", pool.apply(T::of, (nodes,)).await.map(|value| value.is_of(nodes))),
    ]
}

/// On a worker thread of tokio. `None`: it arrives; else the error says so.
fn check<T: Deep>(nodes: usize, refusal: Option<&str>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let limit = Duration::from_secs(120);
    let all = runtime.block_on(async {
        let pool = Pool::new(1).unwrap();
        tokio::time::timeout(limit, tokio::spawn(send::<T>(pool, nodes))).await.expect("it does not hang").unwrap()
    });
    let what = std::any::type_name::<T>();
    for (way, arrived) in all {
        match (arrived, refusal) {
            (Ok(is_same), None) => assert!(is_same, "{way}: {what} of {nodes} nodes is changed"),
            (Err(error), Some(why)) if error.kind() == ErrorKind::Encode || way.starts_with("result") => {
                assert!(error.to_string().contains(why), "{way}: {what} of {nodes}: {error}");
            }
            (other, _) => panic!("{way}: {what} of {nodes} nodes: {other:?}"),
        }
    }
}

#[test]
fn deep_values_arrive_by_every_way() {
    check::<Chain>(500, None);
    check::<Tagged>(500, None);
    check::<Vec<Tagged>>(500, None);
    check::<Box<Tagged>>(500, None);
}

#[test]
fn deep_values_with_large_nodes_arrive_by_every_way() {
    for nodes in [5, 50] {
        check::<Vec<Wide>>(nodes, None);
        check::<Box<Wide>>(nodes, None);
    }
}

#[test]
fn values_deeper_than_the_limit_are_refused_by_every_way() {
    let refusal = Some("deeper than 1024 levels");
    check::<Chain>(2000, refusal);
    check::<Tagged>(2000, refusal);
    check::<Vec<Tagged>>(2000, refusal);
    check::<Box<Tagged>>(2000, refusal);
}
