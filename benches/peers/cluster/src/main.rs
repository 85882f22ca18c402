//! A cluster pool beside raw JetStream, both by one server with file storage, and beside the pool of one machine.
//!
//!     NATS_SERVER=/path/to/nats-server cargo run --release [ROUNDS [PART]]
//!
//! A part is `calls`, `map`, `large`, `idle` or `losses`. Each round does all of it, one thing after the other; the table has medians, and ratios formed within a round.
//! Raw JetStream is written as its users would: each task is published and that acknowledged, one process pulls by a loop of
//! its own, publishes each answer, and acknowledges the task.

use async_nats::jetstream::{self, consumer::pull, object_store, stream};
use futures::{StreamExt, TryStreamExt, stream as items};
use multiprocess::cluster::Address;
use multiprocess::{self as mp, Pool, Process};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LEASE: Duration = Duration::from_secs(2);
const ONE_BY_ONE: u64 = 300;
const AT_ONCE: usize = 64;
const CALLS: u64 = 20_000;
const RAW_TASKS: u64 = 10_000;
const MAP: u64 = 100_000;
const BUSY: u64 = 3000;
const LARGE: usize = 64 << 20;
const IDLE: Duration = Duration::from_secs(20);

type Failed = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failed> {
    mp::run(async {
        let rounds = std::env::args().nth(1).map_or(Ok(3), |rounds| rounds.parse())?;
        let part = std::env::args().nth(2);
        let binary = std::env::var_os("NATS_SERVER").map_or_else(|| "nats-server".into(), PathBuf::from);
        let mut table = Vec::new();
        for round in 1..=rounds {
            table.push(measured(&binary, part.as_deref()).await?);
            eprintln!("round {round} of {rounds}");
        }
        print(&table);
        Ok(())
    })
}

/// A figure: what it is, its value, and the goal that it is to keep.
struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
    goal: Goal,
}

#[derive(Clone, Copy)]
enum Goal {
    None,
    Most(f64),
    Least(f64),
}

fn print(rounds: &[Vec<Figure>]) {
    println!("| what | median (least to most) | goal |\n|---|---|---|");
    for (at, Figure { name, unit, goal, .. }) in rounds[0].iter().enumerate() {
        let mut values: Vec<f64> = rounds.iter().map(|round| round[at].value).collect();
        values.sort_by(f64::total_cmp);
        let (middle, least, most) = (values[values.len() / 2], values[0], values[values.len() - 1]);
        let goal = match goal {
            Goal::None => "".into(),
            Goal::Most(most) => format!("<= {most}{}", if middle <= *most { "" } else { " MISSED" }),
            Goal::Least(least) => format!(">= {least}{}", if middle >= *least { "" } else { " MISSED" }),
        };
        println!("| {name} | {middle:.2} ({least:.2} to {most:.2}) {unit} | {goal} |");
    }
}

/// The figures of one round, by a server of its own: all of them, or those of one part.
async fn measured(binary: &PathBuf, part: Option<&str>) -> Result<Vec<Figure>, Failed> {
    let mut server = Server::start(binary)?;
    let mut figures = Vec::new();
    let is_wanted = |name: &str| part.is_none_or(|part| part == name);
    let pool = server.pool()?;
    let host = server.host()?;
    pool.apply(tiny, (1,)).await?;
    if is_wanted("calls") {
        in_time("calls", calls(&server, &pool, &mut figures)).await?;
    }
    if is_wanted("map") {
        in_time("map", map(&pool, &mut figures)).await?;
    }
    if is_wanted("large") {
        in_time("large", large(&server, &pool, &mut figures)).await?;
    }
    if is_wanted("idle") {
        in_time("idle", idle(&server, &host, &mut figures)).await?;
    }
    if is_wanted("losses") {
        in_time("losses", losses(&mut server, &pool, host, &mut figures)).await?;
    } else {
        drop(host);
    }
    pool.terminate();
    pool.join().await?;
    // What has ended still tidies up, and would go on trying to in the next round.
    drop(pool);
    server.is_left().await?;
    Ok(figures)
}

/// An error that names the part, instead of a wait without end.
async fn in_time(part: &str, work: impl Future<Output = Result<(), Failed>>) -> Result<(), Failed> {
    let limited = tokio::time::timeout(Duration::from_secs(120), work).await;
    limited.unwrap_or_else(|_| Err(format!("the part `{part}` takes more than two minutes").into()))
}

fn add(figures: &mut Vec<Figure>, name: &'static str, value: f64, unit: &'static str, goal: Goal) {
    figures.push(Figure { name, value, unit, goal });
}

async fn calls(server: &Server, pool: &Pool, figures: &mut Vec<Figure>) -> Result<(), Failed> {
    let raw = Raw::start(server).await?;
    let (raw_p50, raw_rate) = (raw.one_by_one().await?, raw.at_once().await?);
    drop(raw);

    let mut times = Vec::new();
    for n in 0..ONE_BY_ONE {
        let start = Instant::now();
        assert_eq!(pool.apply(tiny, (n,)).await?, n + 1);
        times.push(start.elapsed());
    }
    let p50 = middle(times);
    add(figures, "raw JetStream: one task by one, p50", raw_p50 * 1e3, "ms", Goal::None);
    add(figures, "`apply` one by one, p50, by raw", p50 / raw_p50, "x", Goal::Most(1.5));

    let start = Instant::now();
    let calls = items::iter(0..CALLS).map(|n| pool.apply(tiny, (n,))).buffer_unordered(AT_ONCE);
    let sum = calls.try_fold(0, async |sum, n| Ok(sum + n)).await?;
    assert_eq!(sum, CALLS * (CALLS + 1) / 2);
    let rate = CALLS as f64 / start.elapsed().as_secs_f64();
    add(figures, "raw JetStream: 64 tasks in flight", raw_rate, "tasks/s", Goal::None);
    add(figures, "`apply`, 64 in flight, by raw", rate / raw_rate, "x", Goal::Least(0.6));

    let before = server.published().await?;
    let start = Instant::now();
    assert_eq!(pool.map(tiny, 0..MAP).await?.len() as u64, MAP);
    let rate = MAP as f64 / start.elapsed().as_secs_f64();
    add(figures, "`map` of 100,000 tiny items, by raw", rate / raw_rate, "x", Goal::Least(50.0));
    add(figures, "its messages", (server.published().await? - before) as f64, "", Goal::Most(200.0));
    Ok(())
}

async fn map(pool: &Pool, figures: &mut Vec<Figure>) -> Result<(), Failed> {
    let start = Instant::now();
    pool.map(busy, 0..BUSY).await?;
    let here = start.elapsed();
    let local = Pool::new(2)?;
    local.map(busy, 0..100).await?;
    let start = Instant::now();
    local.map(busy, 0..BUSY).await?;
    let ratio = here.as_secs_f64() / start.elapsed().as_secs_f64();
    local.close();
    local.join().await?;
    add(figures, "`map` of 3000 items of 1 ms, time by that of a local pool", ratio, "x", Goal::Most(1.15));
    Ok(())
}

/// A value crosses the server twice in a call, as argument and as result. So it does by way of an object store: put by one and got by
/// the other, and then back.
async fn large(server: &Server, pool: &Pool, figures: &mut Vec<Figure>) -> Result<(), Failed> {
    let bytes = vec![7_u8; LARGE];
    let stored = server.store_and_load(&bytes).await? + server.store_and_load(&bytes).await?;
    pool.apply(echo, (vec![1; 1 << 20],)).await?;
    let start = Instant::now();
    assert_eq!(pool.apply(echo, (bytes,)).await?.len(), LARGE);
    let called = start.elapsed();
    let rate = |time: Duration| 2.0 * LARGE as f64 / f64::from(1 << 20) / time.as_secs_f64();
    add(figures, "object store: 64 MiB put and got, there and back", rate(stored), "MiB/s", Goal::None);
    add(figures, "argument and result of 64 MiB", rate(called), "MiB/s", Goal::None);
    let ratio = stored.as_secs_f64() / called.as_secs_f64();
    add(figures, "argument and result of 64 MiB, by the object store", ratio, "x", Goal::Least(1.0));
    Ok(())
}

async fn idle(server: &Server, host: &Process<mp::Result<()>>, figures: &mut Vec<Figure>) -> Result<(), Failed> {
    let (wakes, host_wakes, messages) = server.idle(host.pid()).await?;
    add(figures, "idle: this process wakes", wakes, "/s", Goal::Most(2.0));
    add(figures, "idle: its host wakes", host_wakes, "/s", Goal::Most(2.0));
    add(figures, "idle: messages", messages, "/s", Goal::Most(4.0));
    Ok(())
}

async fn losses(
    server: &mut Server,
    pool: &Pool,
    host: Process<mp::Result<()>>,
    figures: &mut Vec<Figure>,
) -> Result<(), Failed> {
    let others = server.host()?;
    while pool.workers() < 4 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut results = pool.imap_unordered(slow, 0..2000);
    for _ in 0..200 {
        results.next().await.ok_or("no result")??;
    }
    host.kill()?;
    // The others go on meanwhile: the last of all is of those that were lost, or later.
    let killed = Instant::now();
    let mut longest = Duration::ZERO;
    while let Some(result) = results.next().await {
        result?;
        longest = killed.elapsed();
    }
    let alone = Duration::from_millis(5) * 1800 / 2;
    let beyond = longest.saturating_sub(alone.saturating_sub(LEASE)).as_secs_f64();
    let answered = beyond.min(longest.as_secs_f64());
    add(figures, "a host is killed: its items are answered within", answered, "s", Goal::Most(3.0));

    let mut results = pool.imap_unordered(slow, 0..100_000);
    for _ in 0..100 {
        results.next().await.ok_or("no result")??;
    }
    server.kill();
    // What hosts had answered already.
    while let Ok(Some(result)) = tokio::time::timeout(Duration::from_millis(300), results.next()).await {
        result?;
    }
    server.run()?;
    let listens = Instant::now();
    results.next().await.ok_or("no result")??;
    let answered = listens.elapsed().as_secs_f64();
    add(figures, "the server is killed: first answer after it listens", answered, "s", Goal::Most(1.5));
    drop(results);
    drop(others);
    Ok(())
}

fn middle(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

fn tiny(n: u64) -> u64 {
    n + 1
}

fn busy(n: u64) -> u64 {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1) {
        std::hint::spin_loop();
    }
    n
}

fn slow(n: u64) -> u64 {
    std::thread::sleep(Duration::from_millis(5));
    n
}

fn echo(bytes: Vec<u8>) -> Vec<u8> {
    bytes
}

async fn serve(url: String) -> mp::Result<()> {
    Pool::new(2)?.serve(Address::new(&url).lease(LEASE)).await.map(drop)
}

struct Server {
    binary: PathBuf,
    dir: PathBuf,
    port: u16,
    monitor: u16,
    child: Option<Child>,
}

impl Server {
    fn start(binary: &PathBuf) -> Result<Self, Failed> {
        let free = || Ok::<_, std::io::Error>(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port());
        let dir = std::env::temp_dir().join(format!("cluster-figures-{}", std::process::id()));
        let mut server = Self { binary: binary.clone(), dir, port: free()?, monitor: free()?, child: None };
        server.run()?;
        Ok(server)
    }

    fn run(&mut self) -> Result<(), Failed> {
        let mut command = Command::new(&self.binary);
        command.args(["-js", "-a", "127.0.0.1", "-p", &self.port.to_string(), "-m", &self.monitor.to_string(), "-sd"]);
        self.child = Some(command.arg(&self.dir).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        let start = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            if start.elapsed() > Duration::from_secs(10) {
                return Err(format!("{} does not listen", self.binary.display()).into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    fn pool(&self) -> Result<Pool, Failed> {
        Ok(Pool::builder().cluster(Address::new(format!("{}/figures", self.url())).lease(LEASE)).build()?)
    }

    fn host(&self) -> Result<Process<mp::Result<()>>, Failed> {
        Ok(Process::builder().kill_on_drop(true).spawn(serve, (format!("{}/figures", self.url()),))?)
    }

    async fn jetstream(&self) -> Result<jetstream::Context, Failed> {
        Ok(jetstream::new(async_nats::connect(self.url()).await?))
    }

    /// How many messages were ever put into the pool's stream.
    async fn published(&self) -> Result<u64, Failed> {
        let stream = self.jetstream().await?.get_stream("MP_figures").await?;
        Ok(stream.cached_info().state.last_sequence)
    }

    /// How long it takes to put a value into an object store and to get it, by two connections.
    async fn store_and_load(&self, bytes: &[u8]) -> Result<Duration, Failed> {
        let config = object_store::Config { bucket: "figures".into(), ..Default::default() };
        let store = self.jetstream().await?.create_object_store(config).await?;
        let reader = self.jetstream().await?.get_object_store("figures").await?;
        let start = Instant::now();
        store.put("value", &mut &bytes[..]).await?;
        let mut back = Vec::with_capacity(bytes.len());
        reader.get("value").await?.read_to_end(&mut back).await?;
        let took = start.elapsed();
        assert_eq!(back.len(), bytes.len());
        self.jetstream().await?.delete_object_store("figures").await?;
        Ok(took)
    }

    /// Of an idle pool and an idle host: how often each wakes, and how many messages the server passes on, per second.
    async fn idle(&self, host: u32) -> Result<(f64, f64, f64), Failed> {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let here = std::process::id();
        // To ask the server wakes this process, so it is asked outside of what is counted.
        let sent = self.sent().await?;
        let before = (switches(here), switches(host));
        tokio::time::sleep(IDLE).await;
        let after = (switches(here), switches(host));
        let sent = self.sent().await? - sent;
        let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / IDLE.as_secs_f64();
        Ok((rate(before.0, after.0), rate(before.1, after.1), sent as f64 / IDLE.as_secs_f64()))
    }

    /// Messages that have come to the server and left it.
    async fn sent(&self) -> Result<u64, Failed> {
        let [came, left] = self.counts(["in_msgs", "out_msgs"]).await?;
        Ok(came + left)
    }

    /// Returns when nobody is connected to the server any more.
    async fn is_left(&self) -> Result<(), Failed> {
        let left = async {
            while self.counts(["connections"]).await? != [0] {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        };
        tokio::time::timeout(Duration::from_secs(30), left).await?
    }

    async fn counts<const N: usize>(&self, names: [&str; N]) -> Result<[u64; N], Failed> {
        let mut stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.monitor)).await?;
        stream.write_all(b"GET /varz HTTP/1.0\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let number = |name: &str| {
            let rest = text.split(&format!("\"{name}\":")).nth(1)?.trim_start();
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok()
        };
        let mut counts = [0; N];
        for (count, name) in counts.iter_mut().zip(names) {
            *count = number(name).ok_or_else(|| format!("no {name}"))?;
        }
        Ok(counts)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// How often the threads of a process have gone to sleep.
fn switches(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |task: std::fs::DirEntry| {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        line.trim().parse::<u64>().ok()
    };
    tasks.filter_map(of).sum()
}

/// A stream, a process that works, and a connection that asks.
struct Raw {
    context: jetstream::Context,
    client: async_nats::Client,
    _host: Process<Result<(), String>>,
}

/// Tasks that the worker asks for at a time.
const BATCH: usize = 256;

impl Raw {
    async fn start(server: &Server) -> Result<Self, Failed> {
        let context = server.jetstream().await?;
        let client = async_nats::connect(server.url()).await?;
        let config = stream::Config {
            name: "RAW".into(),
            subjects: vec!["raw.tasks".into()],
            retention: stream::RetentionPolicy::WorkQueue,
            ..Default::default()
        };
        let stream = context.create_stream(config).await?;
        let consumer = pull::Config { durable_name: Some("worker".into()), ..Default::default() };
        stream.create_consumer(consumer).await?;
        let host = Process::builder().kill_on_drop(true).spawn(raw_worker, (server.url(),))?;
        Ok(Self { context, client, _host: host })
    }

    /// Tasks go by another connection: no answer is to come before the server knows who wants it.
    async fn answers(&self) -> Result<async_nats::Subscriber, Failed> {
        let answers = self.client.subscribe("raw.answers").await?;
        self.client.flush().await?;
        Ok(answers)
    }

    async fn one_by_one(&self) -> Result<f64, Failed> {
        let mut answers = self.answers().await?;
        let mut times = Vec::new();
        for n in 0..ONE_BY_ONE + 20 {
            let start = Instant::now();
            self.context.publish("raw.tasks", n.to_le_bytes().to_vec().into()).await?.await?;
            let answer = answers.next().await.ok_or("no answer")?;
            assert_eq!(answer.payload[..], (n + 1).to_le_bytes());
            times.push(start.elapsed());
        }
        Ok(middle(times.split_off(20)))
    }

    async fn at_once(&self) -> Result<f64, Failed> {
        let mut answers = self.answers().await?;
        let room = tokio::sync::Semaphore::new(AT_ONCE);
        let start = Instant::now();
        let publishing = items::iter(0..RAW_TASKS).map(Ok::<_, Failed>).try_for_each_concurrent(AT_ONCE, |n| {
            let room = &room;
            async move {
                room.acquire().await?.forget();
                self.context.publish("raw.tasks", n.to_le_bytes().to_vec().into()).await?.await?;
                Ok(())
            }
        });
        let answered = async {
            let mut sum = 0;
            for _ in 0..RAW_TASKS {
                let answer = answers.next().await.ok_or("no answer")?;
                sum += u64::from_le_bytes(answer.payload[..].try_into()?);
                room.add_permits(1);
            }
            Ok::<_, Failed>(sum)
        };
        let ((), sum) = tokio::try_join!(publishing, answered)?;
        assert_eq!(sum, RAW_TASKS * (RAW_TASKS + 1) / 2);
        Ok(RAW_TASKS as f64 / start.elapsed().as_secs_f64())
    }
}

async fn raw_worker(url: String) -> Result<(), String> {
    work(&url).await.map_err(|error| error.to_string())
}

/// Asks for tasks when half of what it asked for has come; there are always some to come.
async fn work(url: &str) -> Result<(), Failed> {
    let client = async_nats::connect(url).await?;
    let mut inbox = client.subscribe("raw.inbox").await?;
    let mut outstanding = 0;
    loop {
        if outstanding <= BATCH / 2 {
            let request = format!("{{\"batch\":{BATCH},\"expires\":30000000000}}");
            let next = "$JS.API.CONSUMER.MSG.NEXT.RAW.worker";
            client.publish_with_reply(next, "raw.inbox", request.into()).await?;
            outstanding += BATCH;
        }
        let message = inbox.next().await.ok_or("the connection has ended")?;
        let Some(reply) = message.reply.filter(|_| message.payload.len() == 8) else {
            // The request is over.
            outstanding = 0;
            continue;
        };
        outstanding = outstanding.saturating_sub(1);
        let n = u64::from_le_bytes(message.payload[..].try_into()?);
        client.publish("raw.answers", tiny(n).to_le_bytes().to_vec().into()).await?;
        client.publish(reply, "+ACK".into()).await?;
    }
}
