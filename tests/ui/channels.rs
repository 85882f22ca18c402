//! The channels, locks and sockets of std and of tokio stay in their process; the message says what to use instead.
use multiprocess::{Pool, Process, Queue};
use std::sync::{Arc, Mutex, mpsc};
use tokio::net::TcpStream;

fn with_sender(_: mpsc::Sender<u32>) {}
fn with_receiver(_: mpsc::Receiver<u32>) {}
fn with_tokio_sender(_: tokio::sync::mpsc::Sender<u32>) {}
fn with_tokio_receiver(_: tokio::sync::mpsc::Receiver<u32>) {}
fn with_oneshot(_: tokio::sync::oneshot::Sender<u32>) {}
fn with_socket(_: TcpStream) {}
fn with_shared(_: Arc<Mutex<u32>>) {}

fn sockets() -> TcpStream {
    unimplemented!()
}

async fn all(pool: Pool, socket: TcpStream, shared: Arc<Mutex<u32>>) {
    let (sender, receiver) = mpsc::channel();
    let _ = Process::spawn(with_sender, (sender,));
    let _ = Process::spawn(with_receiver, (receiver,));
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let _ = Process::spawn(with_tokio_sender, (sender,));
    let _ = pool.apply(with_tokio_receiver, (receiver,)).await;
    let (sender, _) = tokio::sync::oneshot::channel();
    let _ = pool.map(with_oneshot, vec![sender]).await;
    let _ = Process::spawn(with_socket, (socket,));
    let _ = Process::spawn(with_shared, (shared,));
    let _ = Process::spawn(sockets, ());
    let _ = multiprocess::simplex::<TcpStream>();
    let _: multiprocess::Result<Queue<std::fs::File>> = Queue::unbounded();
}

fn main() {}
