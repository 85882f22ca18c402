//! Processes: start, join, exit, signals, streams.

use multiprocess::{self as mp, ErrorKind, Process, StartMethod, Stdio};
use std::future::Future;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

mp::test_support!();

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("in time")
}

fn add(a: i64, b: i64) -> i64 {
    a + b
}

#[tokio::test]
async fn proc_09_after_join_it_is_over_with_code_0() {
    let mut child = Process::spawn(add, (2, 3)).unwrap();
    assert_eq!(within(child.join()).await.unwrap(), 5);
    assert!(!child.is_alive());
    assert_eq!(child.exit_status().unwrap().code(), Some(0));
    assert!(!mp::active_children().iter().any(|other| other.pid() == child.pid()));
}

#[tokio::test]
async fn proc_13_kill() {
    let mut child = Process::spawn(async || std::future::pending::<()>().await, ()).unwrap();
    child.kill().unwrap();
    let error = within(child.join()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ProcessDied);
    assert_eq!(error.exit_status().unwrap().signal(), Some(9));
}

#[tokio::test]
async fn exec() {
    let mut child = Process::builder().start_method(StartMethod::Spawn).spawn(add, (2, 3)).unwrap();
    assert_eq!(within(child.join()).await.unwrap(), 5);
}
