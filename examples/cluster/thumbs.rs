//! Thumbnails of PNG pictures over HTTP, made by all machines that serve.
//!
//! A request has a deadline, is refused at once when too many wait, and is made again if its worker or its host dies. A client that
//! goes away stops its work, wherever that is. On SIGTERM a host finishes what it has begun, and the web service what it was asked.
//!
//! ```text
//! nats-server -js -sd /tmp/nats
//! thumbs serve                       # on each machine that is to work
//! thumbs 127.0.0.1:8080              # the web service
//! curl --data-binary @photo.png http://127.0.0.1:8080/thumbnail/200 -o small.png
//! curl http://127.0.0.1:8080/stats
//! ```
//!
//! `THUMBS_URL` is where both meet, by default `nats://127.0.0.1:4222/thumbs`.

use axum::extract::{Path, State};
use axum::http::{StatusCode, header::CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get, routing::post};
use bytes::Bytes;
use multiprocess::cluster::{Address, HostInfo, Served, Serving, Storage};
use multiprocess::{self as mp, ErrorKind, Pool, Retry};
use std::error::Error;
use std::io::Cursor;
use std::time::Duration;
use tokio::net::TcpListener;

/// For the work on one picture.
const TIME: Duration = Duration::from_secs(2);
/// Until it begins.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests that wait here; up to 64 more wait at the server.
const WAITING: usize = 16;
/// For one worker of a host: a picture that needs more is refused.
const MEMORY: u64 = 512 << 20;

fn thumbnail(file: Bytes, width: u32) -> Result<Bytes, String> {
    let make = || -> image::ImageResult<Bytes> {
        let picture = image::load_from_memory_with_format(&file, image::ImageFormat::Png)?;
        let mut small = Cursor::new(Vec::new());
        picture.thumbnail(width.max(1), u32::MAX).write_to(&mut small, image::ImageFormat::Png)?;
        Ok(small.into_inner().into())
    };
    make().map_err(|error| error.to_string())
}

async fn post_picture(State(pool): State<Pool>, Path(width): Path<u32>, file: Bytes) -> Response {
    let call = pool.apply(thumbnail, (file, width)).timeout(TIME).queue_timeout(PATIENCE).reject_when_full();
    match call.retries(3).retry_if(Retry::DIED).await {
        Ok(Ok(file)) => ([(CONTENT_TYPE, "image/png")], file).into_response(),
        Ok(Err(why)) => (StatusCode::UNPROCESSABLE_ENTITY, why).into_response(),
        Err(error) => (status(error.kind()), error.to_string()).into_response(),
    }
}

fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Full => StatusCode::TOO_MANY_REQUESTS,
        ErrorKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorKind::MemoryLimit => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Unavailable | ErrorKind::Closed | ErrorKind::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

async fn stats(State(pool): State<Pool>) -> String {
    let (stats, hosts) = (pool.stats(), pool.hosts());
    let totals = stats.totals;
    let mut text = format!(
        "{} waiting, {} running, {} done, {} refused, {} handed out again\n",
        stats.queued, stats.running, totals.done, totals.rejected, stats.redelivered
    );
    text.extend(hosts.iter().map(line_of));
    text
}

fn line_of(host: &HostInfo) -> String {
    format!("host {} (pid {}): {} of {} slots busy\n", host.name, host.pid, host.busy, host.slots)
}

async fn serve(address: Address) -> mp::Result<()> {
    let pool = Pool::builder().memory_limit(MEMORY).build()?;
    println!("{:?}", until_stopped(pool.serve(address)).await?);
    Ok(())
}

async fn until_stopped(mut serving: Serving) -> mp::Result<Served> {
    tokio::select! {
        served = &mut serving => served,
        _ = mp::shutdown_signal() => {
            serving.drain(Duration::from_secs(30));
            serving.await
        }
    }
}

async fn web(address: Address, listen: String) -> Result<(), Box<dyn Error>> {
    let pool = Pool::builder().cluster(address).max_waiting(WAITING).build()?;
    let routes = Router::new().route("/thumbnail/{width}", post(post_picture)).route("/stats", get(stats));
    let listener = TcpListener::bind(listen).await?;
    println!("serving at http://{}", listener.local_addr()?);
    let stop = async { _ = mp::shutdown_signal().await };
    axum::serve(listener, routes.with_state(pool)).with_graceful_shutdown(stop).await?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("THUMBS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222/thumbs".into());
    // A request that waits ends with its client, so it need not outlive the server. If that is restarted, it is sent again.
    let address = Address::new(url).storage(Storage::Memory).most_waiting(10_000, 64 << 20);
    mp::run(async {
        match std::env::args().nth(1) {
            Some(word) if word == "serve" => Ok(serve(address).await?),
            listen => web(address, listen.unwrap_or_else(|| "127.0.0.1:8080".into())).await,
        }
    })
}
