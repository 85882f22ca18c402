//! The public types `Dashboard` and `DashboardHandle`; the tasks that ask managers, and those that answer requests.

use super::body::Pieces;
use super::guard::{self, Host};
use super::page::{self, ManagerState};
use super::recorder::{Managers, NoDrawing, Orders, Recorder};
use crate::channel::{Item, JoinableQueue, Queue};
use crate::error::{Error, Result, Topic};
use crate::manager::Manager;
use crate::observe::{ManagerSource, Sources};
use crate::os::sync::lock;
use crate::os::{reactor, timer};
use crate::pool::Pool;
use futures_util::future::join_all;
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

/// The time between two questions to a manager, and how long it may take to answer.
const ASK: Duration = Duration::from_secs(1);
/// So many connections are open at most, and so long.
pub(super) const CONNECTIONS: usize = 64;
const CONNECTION: Duration = Duration::from_secs(10);
/// No descriptor is left for a connection: try again after this.
const REFUSED: Duration = Duration::from_millis(100);
/// The largest head of a request.
pub(super) const HEAD: usize = 16 << 10;
/// The sizes of the kernel's buffers of a connection, as they are asked for.
pub(super) const SEND: u32 = 32 << 10;
pub(super) const RECEIVE: u32 = 16 << 10;

/// The browser loads nothing that does not come from here, and runs no script within the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A page that shows pools, queues and managers, while the program runs.
///
/// [`Pool::dashboard`] is shorter for one pool. Use a `MetricsReporter` (feature `metrics`) instead for figures that a server collects
/// from many programs.
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
/// /proc per worker; fewer, down to one in two seconds, if they took more than a hundredth of the time. A thread of its own takes them, and
/// draws pictures when a page asks for them: some milliseconds each second, however many pages are open. All pages of nearly the same
/// width share them.
///
/// Memory is bounded: at most 1 MiB for each pool and 16 KiB for each queue, and at most 32 MiB for pictures that are kept or being sent,
/// unless a single page is larger, and 9 MiB for connections and the thread. While a page is drawn it takes a few times its size. Clients
/// that have not read all within ten seconds are dropped; so is the oldest one if there are more than 64, or if slow ones hold all of that room.
///
/// # Accuracy
/// Lanes show items that take longer than a quarter of a second one by one, and shorter ones together. Times are known to within a factor of two,
/// as in [`Histogram`](crate::Histogram). The first 64 workers of a pool have lanes.
///
/// # Drop
/// A dashboard does not keep a pool alive: of a pool that is dropped the page shows the past. It holds a handle of each queue and manager.
#[derive(Default)]
pub struct Dashboard {
    sources: Sources,
    hosts: Vec<String>,
    may_be_remote: bool,
}

impl Dashboard {
    /// Creates a page that shows nothing but locks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a pool, under this name.
    pub fn pool(mut self, name: impl Into<String>, pool: &Pool) -> Self {
        self.sources.add_pool(name.into(), pool);
        self
    }

    /// Adds a queue, under this name.
    pub fn queue<T: Item>(mut self, name: impl Into<String>, queue: &Queue<T>) -> Self {
        self.sources.add_queue(name.into(), queue);
        self
    }

    /// Adds a joinable queue, under this name.
    pub fn joinable_queue<T: Item>(mut self, name: impl Into<String>, queue: &JoinableQueue<T>) -> Self {
        self.sources.add_joinable_queue(name.into(), queue);
        self
    }

    /// Adds a manager, under this name.
    pub fn manager(mut self, name: impl Into<String>, manager: &Manager) -> Self {
        self.sources.add_manager(name.into(), manager);
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
    /// Always accepted are the address at which a request arrives, and `localhost`. Each form of a name counts: capital letters, a dot
    /// at the end, an address of IPv6 with or without brackets.
    pub fn host(mut self, name: impl Into<String>) -> Self {
        self.hosts.push(name.into());
        self
    }

    /// Serves the page at an address, `IP:PORT` or `localhost:PORT`, until the handle is dropped. Port 0 takes a free one. Its tasks run in the
    /// present runtime, and end with it.
    ///
    /// # Errors
    /// - `Other` if the address cannot be parsed, or is not a loopback address and [`allow_remote`](Self::allow_remote) was not called; or if
    ///   a [`host`](Self::host) is no name of a host: it has a port, for example.
    /// - `Io` if the address is in use or not permitted, if no thread can be had, or in a runtime without its I/O or its timer.
    pub async fn serve(self, address: &str) -> Result<DashboardHandle> {
        let address = parse(address, self.may_be_remote)?;
        let failed = |error| Error::io(format!("cannot serve a dashboard at {address}"), error);
        reactor::has_io().and_then(|()| reactor::has_timer()).map_err(failed)?;
        let hosts = self.hosts.iter().map(|name| parse_host(name)).collect::<Result<_>>()?;
        let listener = listen(address).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let Sources { pools, queues, managers } = self.sources;
        let shown = managers.iter().map(|manager| ManagerState { name: manager.name.clone(), objects: None });
        let shown: Managers = Arc::new(Mutex::new(shown.collect()));
        let owner = Arc::new(());
        let orders = Recorder::new(pools, queues, shown.clone()).start(&owner).map_err(failed)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(ask(shown, managers));
        tasks.spawn(accept(listener, Shared::new(orders, hosts), CONNECTION));
        Ok(DashboardHandle { address, tasks, _owner: owner })
    }
}

impl fmt::Debug for Dashboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sources.fmt("Dashboard", f)
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
    /// The thread ends with it.
    _owner: Arc<()>,
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
        return Err(Error::other(why).explained_by(Topic::DashboardForOthers));
    }
    Ok(address)
}

fn parse_host(name: &str) -> Result<Host> {
    let wrong = || {
        Error::other(format!("{name:?} is no host of a dashboard: write it without a port, as in status.example.com"))
    };
    Host::parse(name).ok_or_else(wrong)
}

/// What all connections have in common.
struct Shared {
    orders: Orders,
    hosts: Vec<Host>,
    /// The oldest first.
    connections: Mutex<VecDeque<AbortHandle>>,
}

impl Shared {
    fn new(orders: Orders, hosts: Vec<Host>) -> Arc<Self> {
        Arc::new(Self { orders, hosts, connections: Mutex::default() })
    }

    /// Closes the oldest connections, until there are no more than so many.
    fn keep_newest(&self, most: usize) {
        let mut connections = lock(&self.connections);
        connections.retain(|connection| !connection.is_finished());
        let surplus = connections.len().saturating_sub(most);
        connections.drain(..surplus).for_each(|oldest| oldest.abort());
    }

    /// Closes the oldest connection, unless it is the only one: its reader may be so slow that others get nothing.
    fn close_oldest(&self) {
        let mut connections = lock(&self.connections);
        connections.retain(|connection| !connection.is_finished());
        if connections.len() > 1 {
            connections.pop_front().into_iter().for_each(|oldest| oldest.abort());
        }
    }
}

/// Listens with small buffers, because the kernel fills them for clients that read nothing. Connections inherit their sizes.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.set_send_buffer_size(SEND)?;
    socket.set_recv_buffer_size(RECEIVE)?;
    socket.bind(address)?;
    socket.listen(CONNECTIONS as u32)
}

/// Asks the managers how many objects they have, for ever.
async fn ask(shown: Managers, managers: Vec<ManagerSource>) {
    if managers.is_empty() {
        return;
    }
    loop {
        let asked = managers.iter().map(|manager| timer::within(ASK, (manager.counts)()));
        let answers = join_all(asked).await;
        for (manager, answer) in lock(&shown).iter_mut().zip(answers) {
            manager.objects = Some(match answer {
                Ok(Ok([objects, ..])) => Ok(objects as usize),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("has not answered within {ASK:?}")),
            });
        }
        timer::sleep(ASK).await;
    }
}

/// Takes connections, for ever. If there are too many the oldest is closed; and so is each that is open for longer than `limit`, even if its
/// client reads nothing.
async fn accept(listener: TcpListener, shared: Arc<Shared>, limit: Duration) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, _)) = accepted else {
            timer::sleep(REFUSED).await;
            continue;
        };
        shared.keep_newest(CONNECTIONS - 1);
        let answers = answer_all(stream, shared.clone());
        let connection = connections.spawn(async move { _ = timer::within(limit, answers).await });
        lock(&shared.connections).push_back(connection);
    }
}

/// Answers the one request of a connection.
async fn answer_all(stream: TcpStream, shared: Arc<Shared>) {
    let Ok(ours) = stream.local_addr() else { return };
    let answer = |request: Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(&request, &shared, ours.ip()).await) }
    };
    let mut http = http1::Builder::new();
    http.keep_alive(false).header_read_timeout(None).max_buf_size(HEAD);
    // The error is that of a client.
    let _ = http.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

async fn answer(request: &Request<Incoming>, shared: &Shared, ours: IpAddr) -> Response<Pieces> {
    if let Err((status, text)) = guard::check(request, ours, &shared.hosts) {
        return response(status, "text/plain", text.into());
    }
    let width = page::width_in(request.uri().query());
    match request.uri().path() {
        "/style.css" => response(StatusCode::OK, "text/css", page::STYLE.into()),
        "/script.js" => response(StatusCode::OK, "text/javascript", page::SCRIPT.into()),
        path @ ("/" | "/content") => match shared.orders.content(width).await {
            Ok(content) if path == "/" => {
                let foot = Bytes::from_static(page::FOOT.as_bytes());
                response(StatusCode::OK, "text/html", Pieces::new([page::head().into(), content, foot]))
            }
            Ok(content) => response(StatusCode::OK, "text/html", Pieces::new([content])),
            Err(why) => no_drawing(shared, why),
        },
        _ => response(StatusCode::NOT_FOUND, "text/plain", "There is / only.\n".into()),
    }
}

fn no_drawing(shared: &Shared, why: NoDrawing) -> Response<Pieces> {
    let text = match why {
        NoDrawing::Failed => "Drawing has failed.\n",
        NoDrawing::Busy => {
            shared.close_oldest();
            "Too many readers are slow: try again.\n"
        }
    };
    response(StatusCode::SERVICE_UNAVAILABLE, "text/plain", text.into())
}

fn response(status: StatusCode, kind: &str, body: Pieces) -> Response<Pieces> {
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
    use crate::dashboard::drawings;
    use crate::observe::QueueSource;
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::Relaxed;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Longer than anything takes on a busy machine.
    const LIMIT: Duration = Duration::from_secs(60);

    /// A page has a little more.
    const PAGE: usize = 4 << 20;

    /// A page of more bytes than the kernel has room for, served to connections that are open for so long.
    async fn serve_large(limit: Duration) -> (DashboardHandle, Arc<AtomicUsize>) {
        let queue =
            QueueSource { name: "q".repeat(PAGE), capacity: None, len: Box::new(|| 0), passed: Box::new(|| None) };
        let recorder = Recorder::new(Vec::new(), vec![queue], Managers::default());
        let held = recorder.drawings.held();
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let (address, owner) = (listener.local_addr().unwrap(), Arc::new(()));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Shared::new(recorder.start(&owner).unwrap(), Vec::new()), limit));
        (DashboardHandle { address, tasks, _owner: owner }, held)
    }

    /// A client with little room for what it does not read.
    async fn ask_for(address: SocketAddr, width: u32) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 << 10).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        let request = format!("GET /content?width={width} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        // It may be one too many.
        let _ = stream.write_all(request.as_bytes()).await;
        stream
    }

    /// Whether a client that reads gets the whole page.
    async fn gets_page(address: SocketAddr) -> bool {
        let (mut stream, mut answer) = (TcpStream::connect(address).await.unwrap(), Vec::new());
        let _ = stream.write_all(b"GET /content?width=800 HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
        let _ = stream.read_to_end(&mut answer).await;
        answer.starts_with(b"HTTP/1.1 200") && answer.len() > PAGE
    }

    #[tokio::test]
    async fn a_client_that_reads_nothing_is_dropped_and_holds_nothing_then() {
        let (dashboard, held) = serve_large(Duration::from_secs(3)).await;
        let address = dashboard.address();
        let first = ask_for(address, 400).await;
        timer::within(LIMIT, first.readable()).await.unwrap().unwrap();
        assert!(held.load(Relaxed) > PAGE);
        // The kept drawing goes with the next picture; the one held for the first client goes when its time is over.
        let is_alone = async { while !(gets_page(address).await && held.load(Relaxed) < 2 * PAGE) {} };
        timer::within(LIMIT, is_alone).await.unwrap();
        drop(first);
    }

    #[tokio::test]
    async fn many_slow_clients_hold_few_pictures_and_others_are_answered() {
        let (dashboard, held) = serve_large(LIMIT * 2).await;
        let address = dashboard.address();
        let mut slow = Vec::new();
        for n in 0..CONNECTIONS as u32 {
            slow.push(ask_for(address, 300 + 20 * n).await);
        }
        let answered = async {
            while !gets_page(address).await {
                assert!(held.load(Relaxed) <= drawings::MOST_BYTES, "{held:?}");
            }
        };
        timer::within(LIMIT, answered).await.unwrap();
        assert!(held.load(Relaxed) <= drawings::MOST_BYTES, "{held:?}");
    }

    #[test]
    fn a_host_is_written_without_a_port() {
        assert_eq!(parse_host("[::1]").unwrap(), Host::Ip(std::net::Ipv6Addr::LOCALHOST.into()));
        let error = parse_host("status.example.com:80").unwrap_err().to_string();
        assert!(error.contains("status.example.com:80") && error.contains("without a port"), "{error}");
    }

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
