//! What stands between a pool and its server.
#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it, and a test fails by it")]

use super::{LEASE, Server};
use multiprocess::cluster::Address;
use multiprocess::{AsyncResult, Pool};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// Stands between a pool and the server. It may keep back what the server says, hold it up, take nothing of the pool, and cut the
/// connections.
#[derive(Clone)]
pub struct Proxy {
    port: u16,
    pub takes_nothing: Arc<AtomicBool>,
    pub keeps_back: Arc<AtomicBool>,
    pub holds: Arc<AtomicBool>,
    cut: Arc<Notify>,
    /// When it was connected to last.
    tried: Arc<Mutex<Instant>>,
    /// Bytes that it has passed to the server.
    passed: Arc<AtomicUsize>,
}

impl Proxy {
    pub async fn before(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, to) = (listener.local_addr().unwrap().port(), server.port);
        let (takes_nothing, keeps_back, holds, cut, passed) = Default::default();
        let tried = Arc::new(Mutex::new(Instant::now()));
        let proxy = Self { port, takes_nothing, keeps_back, holds, cut, tried, passed };
        let all = proxy.clone();
        tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                *all.tried.lock().unwrap() = Instant::now();
                let proxy = all.clone();
                tokio::spawn(async move {
                    if let Ok(there) = TcpStream::connect(("127.0.0.1", to)).await {
                        proxy.pass(here, there).await;
                    }
                });
            }
        });
        proxy
    }

    async fn pass(&self, here: TcpStream, there: TcpStream) {
        let ((mut from, mut back), (mut said, mut on)) = (here.into_split(), there.into_split());
        let down = async {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = said.read(&mut bytes).await {
                if self.keeps_back.load(SeqCst) {
                    continue;
                }
                let mut piece = len;
                while self.holds.load(SeqCst) {
                    // Then it comes bit by bit, as by a slow link.
                    piece = 16;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                for piece in bytes[..len].chunks(piece) {
                    if back.write_all(piece).await.is_err() {
                        return;
                    }
                    if piece.len() < len {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            }
        };
        let up = async {
            let mut bytes = vec![0; 64 << 10];
            while let Ok(len @ 1..) = from.read(&mut bytes).await {
                while self.takes_nothing.load(SeqCst) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                if on.write_all(&bytes[..len]).await.is_err() {
                    break;
                }
                self.passed.fetch_add(len, SeqCst);
            }
        };
        tokio::select! {
            () = up => {}
            () = down => {}
            () = self.cut.notified() => {}
        }
    }

    pub fn address(&self) -> Address {
        Address::new(format!("nats://127.0.0.1:{}/pool", self.port)).lease(LEASE)
    }

    /// A pool through it that is connected and has one message in the stream.
    pub async fn pool(&self, server: &Server) -> (Pool, AsyncResult<u64>) {
        super::log();
        let pool = Pool::builder().cluster(self.address()).build().unwrap();
        let waits = pool.apply_async(|n: u64| n * n, (1,));
        super::until("it is in the stream", async || server.messages().await == 1).await;
        (pool, waits)
    }

    /// What the server said meanwhile has not arrived, and never does.
    pub fn cut(&self) {
        self.keeps_back.store(false, SeqCst);
        self.cut.notify_waiters();
    }

    /// When somebody connected last.
    pub fn tried(&self) -> Instant {
        *self.tried.lock().unwrap()
    }

    /// Bytes that the server was sent through it.
    pub fn passed(&self) -> usize {
        self.passed.load(SeqCst)
    }
}
