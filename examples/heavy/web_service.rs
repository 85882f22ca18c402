//! A web service that has its CPU work done by a pool: each request has a deadline, and a worker that is stuck, or is
//! killed, costs one request and not the service.
//!
//! `web_service 127.0.0.1:8080` serves until SIGTERM or Ctrl-C: then it answers what it was asked and ends. Without an
//! address it tries itself out.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Router, routing::get};
use multiprocess::{self as mp, ErrorKind, Pool};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const DEADLINE: Duration = Duration::from_millis(500);

fn count_primes(below: u64) -> u64 {
    (2..below).filter(|n| (2..).take_while(|d| d * d <= *n).all(|d| n % d != 0)).count() as u64
}

async fn primes(State(pool): State<Pool>, Path(below): Path<u64>) -> (StatusCode, String) {
    // A client that goes away drops this call, and so stops its work.
    match pool.apply(count_primes, (below,)).timeout(DEADLINE).queue_timeout(DEADLINE).await {
        Ok(count) => (StatusCode::OK, format!("{count} primes below {below}")),
        Err(error) if error.kind() == ErrorKind::Timeout => (StatusCode::GATEWAY_TIMEOUT, error.to_string()),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn crash(State(pool): State<Pool>) -> (StatusCode, String) {
    match pool.apply(|| std::process::abort() as (), ()).await {
        Ok(()) => (StatusCode::OK, "it did not crash".into()),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn health(State(pool): State<Pool>) -> String {
    let stats = pool.stats();
    format!("{} running, {} queued, {} workers", stats.running, stats.queued, stats.workers.len())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    mp::run(async {
        let routes = Router::new().route("/primes/{below}", get(primes));
        let routes = routes.route("/crash", get(crash)).route("/health", get(health));
        let pool = Pool::new(2)?;
        let service = routes.with_state(pool.clone());
        let address = std::env::args().nth(1);
        let listener = TcpListener::bind(address.as_deref().unwrap_or("127.0.0.1:0")).await?;
        let (serves, address) = (address.is_some(), listener.local_addr()?);
        if serves {
            println!("serving at http://{address}");
            let stop = async { _ = mp::shutdown_signal().await };
            axum::serve(listener, service).with_graceful_shutdown(stop).await?;
            pool.shutdown(DEADLINE).await;
            return Ok(());
        }
        tokio::spawn(async move { axum::serve(listener, service).await });
        Ok(try_out(address).await?)
    })
}

async fn try_out(address: SocketAddr) -> std::io::Result<()> {
    println!("a quick one: {}", status(address, "/primes/1000").await?);
    println!("an endless one: {}", status(address, "/primes/1000000000000").await?);
    println!("one that crashes: {}", status(address, "/crash").await?);
    // Workers crash one after the other; other requests meanwhile are answered.
    let crashes = tokio::spawn(async move {
        let mut count = 0;
        while count < 50 && status(address, "/crash").await.is_ok_and(|status| status == 500) {
            count += 1;
        }
        count
    });
    let (mut asked, mut answered) = (0, 0);
    while !crashes.is_finished() {
        asked += 1;
        answered += usize::from(status(address, "/health").await? == 200);
    }
    let crashes = crashes.await.unwrap_or(0);
    println!("{crashes} crashes, meanwhile all health checks answered: {}", asked == answered && asked > 0);
    println!("and a quick one: {}", status(address, "/primes/1000").await?);
    Ok(())
}

/// Gets `path`, and tells with which status that was answered.
async fn status(address: SocketAddr, path: &str) -> std::io::Result<u16> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0))
}
