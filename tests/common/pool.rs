//! What the items of pools do in tests, and what is asked of their workers.

use super::{eventually, within};
use multiprocess::{Barrier, Pool, Queue};
use rustix::process::{Pid, Signal, kill_process};
use std::path::PathBuf;
use std::time::Duration;

pub const MS: Duration = Duration::from_millis(1);

pub fn square(n: i64) -> i64 {
    n * n
}

pub fn nap(ms: u64) -> u64 {
    std::thread::sleep(Duration::from_millis(ms));
    ms
}

pub fn stuck() {
    std::thread::sleep(Duration::from_secs(600));
}

pub fn spin() {
    loop {
        std::hint::spin_loop();
    }
}

pub fn die() {
    std::process::abort();
}

pub fn pid() -> u32 {
    std::process::id()
}

/// Says that it has begun, and waits for a word.
pub fn say_and_wait(begun: Queue<u32>, go: Queue<u32>) -> u32 {
    begun.blocking_put(pid()).expect("put");
    go.blocking_get().expect("get")
}

/// Says that it has begun, and stays.
pub fn say_and_stay(begun: Queue<u32>) {
    begun.blocking_put(pid()).expect("put");
    stuck();
}

pub fn kill(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid as i32).expect("a pid"), signal);
}

/// Waits until each of `count` workers has begun a call, so that it is up, and nothing is left to do.
pub async fn all_serve(pool: &Pool, count: usize) {
    let barrier = Barrier::new(count).expect("a barrier");
    let meet = |barrier: Barrier| barrier.blocking_wait().map(drop).expect("all come");
    let calls = (0..count).map(|_| pool.apply(meet, (barrier.clone(),)));
    within(futures::future::try_join_all(calls)).await.expect("they meet");
    is_idle(pool).await;
}

/// Waits until nothing is left to do.
pub async fn is_idle(pool: &Pool) {
    let is_idle = || {
        let stats = pool.stats();
        stats.running == 0 && stats.queued == 0 && stats.workers.iter().all(|worker| !worker.is_busy)
    };
    eventually("nothing is left to do", is_idle).await;
}

pub fn is_gone(pid: u32) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}/exe")).exists()
}

/// What items wait for that must not bring descriptors, for those travel alone.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
pub struct Gate(PathBuf);

impl Gate {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("multiprocess-gate-{name}-{}", pid()));
        // In a pid namespace an earlier run may have had this pid.
        let _ = std::fs::remove_file(&path);
        Self(path)
    }

    pub fn open(&self) {
        std::fs::write(&self.0, "").expect("write");
    }

    pub fn is_open(&self) -> bool {
        self.0.exists()
    }

    pub fn pass(&self) {
        while !self.is_open() {
            std::thread::sleep(MS);
        }
    }

    pub fn remove(self) {
        std::fs::remove_file(&self.0).expect("remove");
    }
}
