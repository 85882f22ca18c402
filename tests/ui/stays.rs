//! What has no serde form stays in its process; the message says what to use instead.
use multiprocess::{Pool, Process};
use std::fs::File;
use std::net::TcpStream;
use std::sync::MutexGuard;
use std::sync::mpsc::Sender;

fn with_file(_: File) {}
fn with_socket(_: TcpStream) {}
fn with_channel(_: Sender<u32>) {}
fn with_pool(_: Pool) {}
fn with_process(_: Process<u32>) {}
fn with_guard(_: MutexGuard<'static, u32>) {}
fn with_lock(_: multiprocess::LockGuard) {}

fn all(
    file: File,
    socket: TcpStream,
    channel: Sender<u32>,
    pool: Pool,
    process: Process<u32>,
    guard: MutexGuard<'static, u32>,
    lock: multiprocess::LockGuard,
) {
    let _ = Process::spawn(with_file, (file,));
    let _ = Process::spawn(with_socket, (socket,));
    let _ = Process::spawn(with_channel, (channel,));
    let _ = Process::spawn(with_pool, (pool,));
    let _ = Process::spawn(with_process, (process,));
    let _ = Process::spawn(with_guard, (guard,));
    let _ = Process::spawn(with_lock, (lock,));
}

fn main() {}
