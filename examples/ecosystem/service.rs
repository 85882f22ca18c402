//! A web service of axum whose CPU work is a pool under layers of `tower`, with its figures for Prometheus and on a page of its own.
//!
//! | what | where | answer |
//! |---|---|---|
//! | more requests than may wait | `load_shed` | 503 |
//! | a request that takes too long, waiting included | `timeout`: the drop of the response ends the work | 504 |
//! | more requests at a time than the pool should run | `concurrency_limit`, with a `buffer` before it | waits |
//! | work that panics or crashes | the pool | 500 |
//!
//! `GET /primes/N` counts primes, `GET /metrics` has the figures. Known answers are in a dictionary of a manager, and each request is a line of a log that a process
//! of its own writes, so the figures of a manager and of a queue are there too. The address of the page, which only this machine can read, is on stderr.
//!
//! `cargo run --release -p multiprocess-ecosystem --example service 127.0.0.1:8080` serves until SIGTERM or Ctrl-C.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Router, routing::get};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use multiprocess::{self as mp, Dashboard, DashboardHandle, DictProxy, Manager, MetricsReporter, Pool, Process, Queue};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, ServiceBuilder, ServiceExt};

/// A request has to be answered within this time.
const DEADLINE: Duration = Duration::from_secs(2);
/// So many run at a time, on two workers.
const AT_A_TIME: usize = 2;
/// So many wait in the buffer for that; the next are shed.
const WAITING: usize = 4;

type Work = BoxCloneSyncService<u64, u64, BoxError>;

#[derive(Clone)]
struct Service {
    work: Work,
    known: DictProxy<u64, u64>,
    log: Queue<String>,
    reporter: Arc<Mutex<MetricsReporter>>,
    prometheus: PrometheusHandle,
}

/// Runs in a worker.
fn count_primes(below: u64) -> u64 {
    assert!(below > 0, "there is no number below 0");
    (2..below).filter(|n| (2..).take_while(|d| d * d <= *n).all(|d| n % d != 0)).count() as u64
}

/// Runs in a process of its own.
fn write_log(lines: Queue<String>) {
    while let Ok(line) = lines.blocking_get() {
        eprintln!("{line}");
    }
}

fn layers_around(pool: &Pool) -> Work {
    let layers = ServiceBuilder::new().load_shed().timeout(DEADLINE).buffer(WAITING).concurrency_limit(AT_A_TIME);
    BoxCloneSyncService::new(layers.service(pool.service(count_primes)))
}

fn status_of(error: &BoxError) -> StatusCode {
    if error.is::<tower::load_shed::error::Overloaded>() {
        StatusCode::SERVICE_UNAVAILABLE
    } else if error.is::<tower::timeout::error::Elapsed>() {
        StatusCode::GATEWAY_TIMEOUT
    } else {
        StatusCode::INTERNAL_SERVER_ERROR
    }
}

async fn primes(State(service): State<Service>, Path(below): Path<u64>) -> (StatusCode, String) {
    let result = match service.known.get(&below).await {
        Ok(Some(count)) => Ok(count),
        _ => service.work.oneshot(below).await,
    };
    let (status, text) = match result {
        Ok(count) => {
            _ = service.known.insert(below, count).await;
            (StatusCode::OK, format!("{count} primes below {below}"))
        }
        Err(error) => (status_of(&error), error.to_string()),
    };
    metrics::counter!("http_requests_total", "status" => status.as_str().to_owned()).increment(1);
    // A log that is behind delays no request.
    _ = service.log.try_put(format!("/primes/{below}: {status}"));
    (status, text)
}

/// The figures are those of the moment of the scrape.
async fn figures(State(service): State<Service>) -> String {
    service.reporter.lock().await.report().await;
    service.prometheus.run_upkeep();
    service.prometheus.render()
}

/// Serves a page of them, until the handle is dropped.
async fn show(pool: &Pool, log: &Queue<String>, manager: &Manager) -> mp::Result<DashboardHandle> {
    let dashboard = Dashboard::new().pool("primes", pool).queue("log", log).manager("known", manager);
    dashboard.serve("127.0.0.1:0").await
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    mp::run(async {
        // After `run` has begun, so that workers have no recorder, which they would keep to themselves.
        let limits: Vec<f64> = (0..16).map(|n| 0.001 * f64::from(1 << n)).collect();
        let prometheus = PrometheusBuilder::new().set_buckets(&limits)?.install_recorder()?;

        let pool = Pool::builder().workers(AT_A_TIME).max_waiting(AT_A_TIME + WAITING).build()?;
        let manager = Manager::start().await?;
        let known = manager.dict().await?;
        let log = Queue::bounded(1024)?;
        // Ctrl-C in a terminal is for the service alone.
        let logger = Process::builder().shield_signals(true).spawn(write_log, (log.clone(),))?;
        let dashboard = show(&pool, &log, &manager).await?;
        eprintln!("a page with all of it: {}", dashboard.url());
        let reporter = MetricsReporter::new().pool("primes", &pool).queue("log", &log).manager("known", &manager);
        let reporter = Arc::new(Mutex::new(reporter));
        let service = Service { work: layers_around(&pool), known, log: log.clone(), reporter, prometheus };
        let routes = Router::new().route("/primes/{below}", get(primes)).route("/metrics", get(figures));

        let address = std::env::args().nth(1);
        let listener = TcpListener::bind(address.as_deref().unwrap_or("127.0.0.1:0")).await?;
        println!("serving at http://{}", listener.local_addr()?);
        let stop = async { _ = mp::shutdown_signal().await };
        axum::serve(listener, routes.with_state(service)).with_graceful_shutdown(stop).await?;
        pool.shutdown(DEADLINE).await;
        log.close();
        logger.await?;
        manager.shutdown().await?;
        Ok(())
    })
}
