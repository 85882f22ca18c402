//! A service under load: thumbnails of PNG pictures over HTTP.
//!
//! The decoding is done by a pool of processes. A worker that dies costs nothing, as its request is tried again (`retry_if`). A
//! picture that does not fit into memory (a decompression bomb) and one whose work does not end cost their own request only. More
//! requests than may wait are refused at once. On SIGTERM and Ctrl-C it answers the requests that have come and ends the program with exit code 0.
//!
//! ```text
//! cargo run --release -p multiprocess-heavy-examples --example thumbnails -- 127.0.0.1:8080
//! curl --data-binary @photo.png http://127.0.0.1:8080/thumbnail/200/0 -o small.png    # 200 pixels wide, blurred 0 times
//! curl http://127.0.0.1:8080/metrics
//! ```

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header::CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get, routing::post};
use multiprocess::{self as mp, ErrorKind, Pool, Retry};
use std::error::Error;
use std::io::Cursor;
use std::time::Duration;
use tokio::net::TcpListener;

/// For one picture: what takes longer is given up.
const TIME: Duration = Duration::from_secs(2);
/// For one worker: a picture that needs more is refused.
const MEMORY: u64 = 512 << 20;
/// More requests than this do not wait for a worker.
const WAITING: usize = 64;

// ---- what runs in the workers

/// The picture, scaled down to `width` and then blurred. It trusts its input: what may come of that is its process's concern.
fn thumbnail(file: Bytes, width: usize, blur: u64) -> Result<Vec<u8>, String> {
    let make = || -> Result<Vec<u8>, Box<dyn Error>> {
        let mut picture = Picture::decode(&file)?.scaled_to(width);
        (0..blur).for_each(|_| picture.blur());
        picture.encode()
    };
    make().map_err(|error| error.to_string())
}

struct Picture {
    width: usize,
    height: usize,
    colours: png::ColorType,
    bytes: Vec<u8>,
}

impl Picture {
    fn decode(file: &[u8]) -> Result<Self, Box<dyn Error>> {
        let mut decoder = png::Decoder::new(Cursor::new(file));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info()?;
        let mut bytes = vec![0; reader.output_buffer_size().ok_or("the picture is too large")?];
        let info = reader.next_frame(&mut bytes)?;
        Ok(Self { width: info.width as usize, height: info.height as usize, colours: info.color_type, bytes })
    }

    fn at(&self, x: usize, y: usize, sample: usize) -> u64 {
        self.bytes[(y * self.width + x) * self.colours.samples() + sample].into()
    }

    /// Each of its pixels is the mean of those whose place it takes.
    fn scaled_to(&self, width: usize) -> Self {
        let width = width.clamp(1, self.width);
        let height = (self.height * width / self.width).max(1);
        let mut small = Self { width, height, colours: self.colours, bytes: Vec::new() };
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        small.bytes.extend(pixels.flat_map(|(x, y)| {
            let columns = x * self.width / width..(x + 1) * self.width / width;
            let rows = y * self.height / height..((y + 1) * self.height / height).max(y * self.height / height + 1);
            let count = (columns.len() * rows.len()) as u64;
            (0..self.colours.samples()).map(move |sample| {
                let sum = |y| columns.clone().map(|x| self.at(x, y, sample)).sum::<u64>();
                (rows.clone().map(sum).sum::<u64>() / count) as u8
            })
        }));
        small
    }

    fn blur(&mut self) {
        let step = self.colours.samples();
        for at in step..self.bytes.len().saturating_sub(step) {
            let sum: u32 = [at - step, at, at + step].map(|at| u32::from(self.bytes[at])).iter().sum();
            self.bytes[at] = (sum / 3) as u8;
        }
    }

    fn encode(&self) -> Result<Vec<u8>, Box<dyn Error>> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(self.colours);
        encoder.write_header()?.write_image_data(&self.bytes)?;
        Ok(file)
    }
}

// ---- the service

async fn post_picture(State(pool): State<Pool>, Path((width, blur)): Path<(usize, u64)>, file: Bytes) -> Response {
    let call = pool.apply(thumbnail, (file, width, blur)).timeout(TIME).reject_when_full();
    // A client that goes away drops this call, and so stops its work.
    match call.retries(20).retry_if(Retry::DIED).await {
        Ok(Ok(file)) => ([(CONTENT_TYPE, "image/png")], file).into_response(),
        Ok(Err(why)) => (StatusCode::UNPROCESSABLE_ENTITY, why).into_response(),
        Err(error) => (status(error.kind()), error.to_string()).into_response(),
    }
}

fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::MemoryLimit => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorKind::Full | ErrorKind::Closed | ErrorKind::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The counters of the pool, as Prometheus reads them.
async fn metrics(State(pool): State<Pool>) -> String {
    let stats = pool.stats();
    let (totals, runs) = (stats.totals, &stats.runs);
    let counters = [
        ("done_total", totals.done),
        ("died_total", totals.died),
        ("timed_out_total", totals.timed_out),
        ("retried_total", totals.retried),
        ("rejected_total", totals.rejected),
        ("workers_restarted_total", totals.restarted),
        ("seconds_count", runs.count()),
        ("running", stats.running as u64),
        ("queued", stats.queued as u64),
    ];
    let sum = format!("thumbnails_seconds_sum {}\n", runs.sum().as_secs_f64());
    counters.map(|(name, count)| format!("thumbnails_{name} {count}\n")).concat() + &sum
}

fn main() -> Result<(), Box<dyn Error>> {
    mp::run(async {
        let pool = Pool::builder().memory_limit(MEMORY).max_waiting(WAITING).build()?;
        let routes =
            Router::new().route("/thumbnail/{width}/{blur}", post(post_picture)).route("/metrics", get(metrics));
        let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".into());
        let listener = TcpListener::bind(address).await?;
        println!("serving at http://{}", listener.local_addr()?);
        let stop = async { _ = mp::shutdown_signal().await };
        axum::serve(listener, routes.with_state(pool.clone())).with_graceful_shutdown(stop).await?;
        pool.shutdown(TIME).await;
        Ok(())
    })
}
