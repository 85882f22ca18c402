//! The public types `Dashboard` and `DashboardHandle`; the tasks that sample, and those that answer requests.

use super::guard;
use super::history::{PoolHistory, QueueHistory};
use super::page::{self, ManagerState, View};
use crate::channel::{Item, JoinableQueue, Queue};
use crate::error::{Error, Result};
use crate::manager::Manager;
use crate::os::sync::lock;
use crate::os::{background, reactor, timer};
use crate::pool::{Pool, StatsSource};
use crate::sync::debug::{self, Dump};
use futures_util::future::{BoxFuture, join_all};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

/// The time between two samples, usually and at most.
const SAMPLE: Duration = Duration::from_millis(250);
const RAREST_SAMPLE: Duration = Duration::from_secs(2);
/// The time between two questions to a manager, and how long it may take to answer.
const ASK: Duration = Duration::from_secs(1);
/// Sampling, and reading the locks, take at most one in so many parts of the time.
const SHARE: u32 = 100;
/// A picture is not older than this.
const FRESH: Duration = Duration::from_millis(400);
/// The locks are not read more often.
const READ_LOCKS: Duration = Duration::from_secs(1);
/// So many connections are open at most, and so long.
const CONNECTIONS: usize = 64;
const CONNECTION: Duration = Duration::from_secs(10);
/// No descriptor is left for a connection: try again after this.
const REFUSED: Duration = Duration::from_millis(100);
/// The largest head of a request.
const HEAD: usize = 16 << 10;

/// The browser loads nothing that does not come from here, and runs no script within the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A page that shows pools, queues and managers, while the program runs.
///
/// [`Pool::dashboard`] is shorter for one pool.
///
/// ```
/// use multiprocess::{self as mp, Dashboard, Manager, Pool, Queue};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let (pool, queue, manager) = (Pool::new(2)?, Queue::<u32>::bounded(100)?, Manager::start().await?);
/// let dashboard = Dashboard::new().pool("thumbnails", &pool).queue("jobs", &queue).manager("state", &manager);
/// let dashboard = dashboard.serve("127.0.0.1:0").await?;
/// println!("open {}", dashboard.url());
/// # Ok(()) }) }
/// ```
///
/// The page shows, for each pool, a lane for each worker (what it runs, and since when), the items that wait, throughput and times
/// over the last five minutes, the memory of the workers, and the last deaths with their reasons; for each queue its length; for each
/// manager its number of objects; and all locks of the program that are held or waited for, with holders and waiters. Each picture
/// has its contents beside it as text. The page asks for new pictures each second, as long as it is visible. It loads nothing from
/// elsewhere.
///
/// # Safety of the page
/// It can only be read. It shows names of functions and processes, and error texts, to all who can reach its address. So that must be a
/// loopback address, unless [`allow_remote`](Self::allow_remote) permits others, and a request whose `Host` header is not that address is
/// refused, because it may come from a page of another site; [`host`](Self::host) adds names. It has no password and no TLS: put a proxy that
/// has them before it where others can reach it.
///
/// # Cost
/// Without a dashboard, none. With one, four samples a second, each of which takes the lock of every pool once and reads one small file of
/// /proc per worker; fewer, down to one in two seconds, if they took more than a hundredth of the time. Pictures are drawn on a thread, and only when a page asks for them: some
/// milliseconds each second, however many pages are open. Memory is bounded: some 300 KiB for each pool.
///
/// # Accuracy
/// Lanes show items that take longer than a quarter of a second one by one, and shorter ones together. Times are known to within a factor of two,
/// as in [`Histogram`](crate::Histogram). The first 64 workers of a pool have lanes.
///
/// # Drop
/// A dashboard does not keep a pool alive: of a pool that is dropped the page shows the past. It holds a handle of each queue and manager.
#[derive(Default)]
pub struct Dashboard {
    pools: Vec<(String, StatsSource)>,
    queues: Vec<QueueSource>,
    managers: Vec<(String, CountObjects)>,
    hosts: Vec<String>,
    may_be_remote: bool,
}

type CountObjects = Box<dyn Fn() -> BoxFuture<'static, Result<usize>> + Send + Sync>;

struct QueueSource {
    name: String,
    capacity: Option<usize>,
    len: Box<dyn Fn() -> usize + Send + Sync>,
}

impl Dashboard {
    /// Creates a page that shows nothing but locks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a pool, under this name.
    pub fn pool(mut self, name: impl Into<String>, pool: &Pool) -> Self {
        self.pools.push((name.into(), pool.stats_source()));
        self
    }

    /// Adds a queue, under this name.
    pub fn queue<T: Item>(self, name: impl Into<String>, queue: &Queue<T>) -> Self {
        let (capacity, queue) = (queue.capacity(), queue.clone());
        self.queue_source(name.into(), capacity, move || queue.len())
    }

    /// Adds a joinable queue, under this name.
    pub fn joinable_queue<T: Item>(self, name: impl Into<String>, queue: &JoinableQueue<T>) -> Self {
        let (capacity, queue) = (queue.capacity(), queue.clone());
        self.queue_source(name.into(), capacity, move || queue.len())
    }

    fn queue_source(
        mut self,
        name: String,
        capacity: Option<usize>,
        len: impl Fn() -> usize + Send + Sync + 'static,
    ) -> Self {
        self.queues.push(QueueSource { name, capacity, len: Box::new(len) });
        self
    }

    /// Adds a manager, under this name.
    pub fn manager(mut self, name: impl Into<String>, manager: &Manager) -> Self {
        self.managers.push((name.into(), Box::new(manager.object_counter())));
        self
    }

    /// Permits an address that other machines can reach. Whoever reaches it can read the page.
    ///
    /// ```
    /// use multiprocess::{self as mp, Dashboard};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// assert!(Dashboard::new().serve("0.0.0.0:0").await.is_err());
    /// let dashboard = Dashboard::new().allow_remote().host("status.example.com").serve("0.0.0.0:0").await?;
    /// # drop(dashboard);
    /// # Ok(()) }) }
    /// ```
    pub fn allow_remote(mut self) -> Self {
        self.may_be_remote = true;
        self
    }

    /// Adds a name or an IP address by which browsers may ask for the page, without a port: that of a proxy before it, for example.
    ///
    /// Always accepted are the address at which a request arrives, and `localhost`.
    pub fn host(mut self, name: impl Into<String>) -> Self {
        self.hosts.push(name.into());
        self
    }

    /// Serves the page at an address, `IP:PORT` or `localhost:PORT`, until the handle is dropped. Port 0 takes a free one. Its tasks run in the
    /// present runtime, and end with it.
    ///
    /// # Errors
    /// - `Other` if the address cannot be parsed, or is not a loopback address and [`allow_remote`](Self::allow_remote) was not called.
    /// - `Io` if the address is in use or not permitted, or in a runtime without its I/O or its timer.
    pub async fn serve(self, address: &str) -> Result<DashboardHandle> {
        let address = parse(address, self.may_be_remote)?;
        let failed = |error| Error::io(format!("cannot serve a dashboard at {address}"), error);
        reactor::has_io().and_then(|()| reactor::has_timer()).map_err(failed)?;
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let Self { pools, queues, managers, hosts, .. } = self;
        let state = Arc::new(State::new(&pools, &queues, &managers));
        let mut tasks = JoinSet::new();
        tasks.spawn(sample(state.clone(), pools, queues));
        tasks.spawn(ask(state.clone(), managers));
        tasks.spawn(accept(listener, state, hosts.into()));
        Ok(DashboardHandle { address, tasks })
    }
}

impl fmt::Debug for Dashboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pools = self.pools.iter().map(|(name, _)| name).collect::<Vec<_>>();
        let queues = self.queues.iter().map(|queue| &queue.name).collect::<Vec<_>>();
        let managers = self.managers.iter().map(|(name, _)| name).collect::<Vec<_>>();
        let mut dashboard = f.debug_struct("Dashboard");
        dashboard.field("pools", &pools).field("queues", &queues).field("managers", &managers).finish()
    }
}

/// A page that is served; made by [`Dashboard::serve`].
///
/// Its drop stops the page. Soon after, when the runtime has run again, the address is free and connections are closed.
#[must_use = "the page is served until this is dropped"]
pub struct DashboardHandle {
    address: SocketAddr,
    /// Ended by their drop.
    tasks: JoinSet<()>,
}

impl DashboardHandle {
    /// Returns the address at which the page is served, with the port that it got.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the address as it is written in a browser. For a page at all addresses of the machine this is that of the machine itself.
    pub fn url(&self) -> String {
        let (ip, port) = (self.address.ip(), self.address.port());
        let shown = match ip {
            IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
            IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::from(std::net::Ipv6Addr::LOCALHOST),
            ip => ip,
        };
        format!("http://{}/", SocketAddr::new(shown, port))
    }
}

impl fmt::Debug for DashboardHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tasks = self.tasks.len();
        f.debug_struct("DashboardHandle").field("address", &self.address).field("tasks", &tasks).finish()
    }
}

fn parse(text: &str, may_be_remote: bool) -> Result<SocketAddr> {
    let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    let address: SocketAddr = numeric.as_deref().unwrap_or(text).parse().map_err(|error| {
        Error::other(format!("{text:?} is no address for a dashboard, write for example 127.0.0.1:0: {error}"))
    })?;
    if !address.ip().to_canonical().is_loopback() && !may_be_remote {
        let why = format!(
            "a dashboard at {address} can be read by others than this machine: take a loopback address, such as \
             127.0.0.1:{}, or call Dashboard::allow_remote",
            address.port()
        );
        return Err(Error::other(why));
    }
    Ok(address)
}

/// What is shown, as the tasks have it in common.
struct State {
    started: Instant,
    pools: Mutex<Vec<PoolHistory>>,
    queues: Mutex<Vec<QueueHistory>>,
    managers: Mutex<Vec<ManagerState>>,
    /// Held while it is drawn: one picture at a time.
    drawn: Arc<tokio::sync::Mutex<Drawn>>,
}

#[derive(Default)]
struct Drawn {
    /// The last contents, for each width that was asked for.
    contents: Vec<(u32, Instant, Arc<str>)>,
    locks: Locks,
}

/// What [`debug::dump`] has returned, when, and how long that took.
#[derive(Default)]
struct Locks(Option<(Instant, Duration, Dump)>);

impl Locks {
    fn dump(&mut self) -> &Dump {
        let is_old = |(at, took, _): &(Instant, Duration, Dump)| at.elapsed() >= READ_LOCKS.max(*took * SHARE);
        if self.0.as_ref().is_none_or(is_old) {
            let begun = Instant::now();
            let dump = debug::dump();
            self.0 = Some((Instant::now(), begun.elapsed(), dump));
        }
        &self.0.get_or_insert_with(|| (Instant::now(), Duration::ZERO, Dump::default())).2
    }
}

impl State {
    fn new(pools: &[(String, StatsSource)], queues: &[QueueSource], managers: &[(String, CountObjects)]) -> Self {
        let pools = pools.iter().map(|(name, _)| PoolHistory::new(name.clone())).collect();
        let queues = queues.iter().map(|queue| QueueHistory::new(queue.name.clone(), queue.capacity)).collect();
        let managers = managers.iter().map(|(name, _)| ManagerState { name: name.clone(), objects: None }).collect();
        Self {
            started: Instant::now(),
            pools: Mutex::new(pools),
            queues: Mutex::new(queues),
            managers: Mutex::new(managers),
            drawn: Arc::default(),
        }
    }

    /// Draws everything as it is now. Takes some milliseconds.
    fn draw(&self, width: u32, locks: &Dump) -> String {
        let (pools, queues, managers) = (lock(&self.pools), lock(&self.queues), lock(&self.managers));
        let (now, started) = (Instant::now(), self.started);
        page::content(&View { now, started, pools: &pools, queues: &queues, managers: &managers, locks }, width)
    }
}

/// The contents of the page. They are drawn by a thread, which goes on if nobody waits any more.
async fn content(state: &Arc<State>, width: u32) -> Result<Arc<str>> {
    let mut drawn = state.drawn.clone().lock_owned().await;
    if let Some((.., text)) = drawn.contents.iter().find(|(of, at, _)| *of == width && at.elapsed() < FRESH) {
        return Ok(text.clone());
    }
    let state = state.clone();
    let draw = move || {
        let text: Arc<str> = state.draw(width, drawn.locks.dump()).into();
        drawn.contents.retain(|(of, at, _)| *of != width && at.elapsed() < FRESH);
        drawn.contents.push((width, Instant::now(), text.clone()));
        text
    };
    let failed = |error| Error::io("cannot draw", error);
    background::blocking(draw).map_err(failed)?.await.map_err(|_| Error::other("drawing has failed"))
}

/// Takes samples, for ever.
async fn sample(state: Arc<State>, pools: Vec<(String, StatsSource)>, queues: Vec<QueueSource>) {
    loop {
        let begun = Instant::now();
        for (at, (_, source)) in pools.iter().enumerate() {
            let stats = source.stats();
            lock(&state.pools).get_mut(at).into_iter().for_each(|pool| pool.record(begun, stats.clone()));
        }
        for (queue, history) in queues.iter().zip(lock(&state.queues).iter_mut()) {
            history.record(begun, (queue.len)());
        }
        timer::sleep((begun.elapsed() * SHARE).clamp(SAMPLE, RAREST_SAMPLE)).await;
    }
}

/// Asks the managers how many objects they have, for ever.
async fn ask(state: Arc<State>, managers: Vec<(String, CountObjects)>) {
    if managers.is_empty() {
        return;
    }
    loop {
        let asked = managers.iter().map(|(_, count_objects)| timer::within(ASK, count_objects()));
        let answers = join_all(asked).await;
        for (manager, answer) in lock(&state.managers).iter_mut().zip(answers) {
            manager.objects = Some(match answer {
                Ok(Ok(objects)) => Ok(objects),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("has not answered within {ASK:?}")),
            });
        }
        timer::sleep(ASK).await;
    }
}

/// Takes connections, for ever. If there are too many the oldest is closed.
async fn accept(listener: TcpListener, state: Arc<State>, hosts: Arc<[String]>) {
    let (mut connections, mut order) = (JoinSet::new(), VecDeque::<AbortHandle>::new());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, _)) = accepted else {
            timer::sleep(REFUSED).await;
            continue;
        };
        order.retain(|connection| !connection.is_finished());
        if order.len() >= CONNECTIONS {
            order.pop_front().into_iter().for_each(|oldest| oldest.abort());
        }
        let answers = answer_all(stream, state.clone(), hosts.clone());
        order.push_back(connections.spawn(async move { _ = timer::within(CONNECTION, answers).await }));
    }
}

/// Answers the one request of a connection.
async fn answer_all(stream: TcpStream, state: Arc<State>, hosts: Arc<[String]>) {
    let Ok(ours) = stream.local_addr() else { return };
    let answer = |request: Request<Incoming>| {
        let (state, hosts) = (state.clone(), hosts.clone());
        async move { Ok::<_, Infallible>(answer(&request, &state, ours.ip(), &hosts).await) }
    };
    let mut http = http1::Builder::new();
    http.keep_alive(false).header_read_timeout(None).max_buf_size(HEAD);
    // The error is that of a client.
    let _ = http.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

async fn answer(request: &Request<Incoming>, state: &Arc<State>, ours: IpAddr, hosts: &[String]) -> Response<String> {
    if let Err((status, text)) = guard::check(request, ours, hosts) {
        return response(status, "text/plain", text.to_string());
    }
    let width = page::width_in(request.uri().query());
    match request.uri().path() {
        "/style.css" => response(StatusCode::OK, "text/css", page::STYLE.to_string()),
        "/script.js" => response(StatusCode::OK, "text/javascript", page::SCRIPT.to_string()),
        path @ ("/" | "/content") => match content(state, width).await {
            Ok(content) if path == "/" => response(StatusCode::OK, "text/html", page::document(&content)),
            Ok(content) => response(StatusCode::OK, "text/html", content.to_string()),
            Err(error) => response(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{error}\n")),
        },
        _ => response(StatusCode::NOT_FOUND, "text/plain", "There is / only.\n".to_string()),
    }
}

fn response(status: StatusCode, kind: &str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    let kind = HeaderValue::from_str(&format!("{kind}; charset=utf-8"));
    headers.insert(header::CONTENT_TYPE, kind.unwrap_or(HeaderValue::from_static("text/plain")));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_loopback_unless_told_otherwise() {
        for text in ["127.0.0.1:0", "127.9.9.9:80", "[::1]:0", "localhost:0", "[::ffff:127.0.0.1]:0"] {
            assert!(parse(text, false).is_ok(), "{text}");
        }
        for text in ["0.0.0.0:0", "10.0.0.1:80", "[::]:0"] {
            let error = parse(text, false).unwrap_err().to_string();
            assert!(error.contains("call Dashboard::allow_remote"), "{error}");
            assert!(parse(text, true).is_ok(), "{text}");
        }
        for text in ["", "127.0.0.1", "example.com:80", "localhost:x"] {
            assert!(parse(text, true).unwrap_err().to_string().contains("write for example"), "{text}");
        }
    }
}
