//! The pools, queues and managers whose figures are shown or reported, each with a name.

use crate::channel::{Item, JoinableQueue, Queue};
use crate::error::Result;
use crate::manager::{Counts, Manager};
use crate::pool::{Pool, StatsSource};
use futures_util::future::BoxFuture;
use std::fmt;

/// It keeps no pool alive, and holds a handle of each queue and manager.
#[derive(Default)]
pub(crate) struct Sources {
    pub(crate) pools: Vec<PoolSource>,
    pub(crate) queues: Vec<QueueSource>,
    pub(crate) managers: Vec<ManagerSource>,
}

pub(crate) struct PoolSource {
    pub(crate) name: String,
    pub(crate) stats: StatsSource,
}

pub(crate) struct QueueSource {
    pub(crate) name: String,
    pub(crate) capacity: Option<usize>,
    pub(crate) len: Box<dyn Fn() -> usize + Send + Sync>,
    /// How many items were ever put, and how many taken, each modulo 2^32.
    #[cfg_attr(not(feature = "metrics"), allow(dead_code))]
    pub(crate) passed: Box<dyn Fn() -> Option<[u32; 2]> + Send + Sync>,
}

pub(crate) struct ManagerSource {
    pub(crate) name: String,
    pub(crate) counts: Box<dyn Fn() -> BoxFuture<'static, Result<Counts>> + Send + Sync>,
}

impl Sources {
    pub(crate) fn add_pool(&mut self, name: String, pool: &Pool) {
        self.pools.push(PoolSource { name, stats: pool.stats_source() });
    }

    pub(crate) fn add_queue<T: Item>(&mut self, name: String, queue: &Queue<T>) {
        let (capacity, queue, same) = (queue.capacity(), queue.clone(), queue.clone());
        let (len, passed) = (Box::new(move || queue.len()), Box::new(move || same.passed()));
        self.queues.push(QueueSource { name, capacity, len, passed });
    }

    pub(crate) fn add_joinable_queue<T: Item>(&mut self, name: String, queue: &JoinableQueue<T>) {
        let (capacity, queue, same) = (queue.capacity(), queue.clone(), queue.clone());
        let (len, passed) = (Box::new(move || queue.len()), Box::new(move || same.passed()));
        self.queues.push(QueueSource { name, capacity, len, passed });
    }

    pub(crate) fn add_manager(&mut self, name: String, manager: &Manager) {
        self.managers.push(ManagerSource { name, counts: Box::new(manager.counter()) });
    }

    #[cfg(feature = "metrics")]
    pub(crate) fn is_empty(&self) -> bool {
        self.pools.is_empty() && self.queues.is_empty() && self.managers.is_empty()
    }

    /// Their names, as those of a type that has them.
    pub(crate) fn fmt(&self, of: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pools = self.pools.iter().map(|pool| &pool.name).collect::<Vec<_>>();
        let queues = self.queues.iter().map(|queue| &queue.name).collect::<Vec<_>>();
        let managers = self.managers.iter().map(|manager| &manager.name).collect::<Vec<_>>();
        f.debug_struct(of).field("pools", &pools).field("queues", &queues).field("managers", &managers).finish()
    }
}
