//! SHA-256 of every file below some directories, in the format of `sha256sum`, on all CPUs.
//!
//! A thread walks the trees, a pool of processes does the sums, and the answers stream back as they come:
//!
//! ```text
//! walk: a stream of batches --> pool.apply, a few per worker at once --> sort --> stdout
//!                                  '-- events: how far a large file is --> progress
//! ```
//!
//! Dropping that stream cancels what runs in the workers. Ctrl-C and SIGTERM do nothing else here.
//!
//! With the feature `cluster` the sums are done by all machines that serve, on the files as they see them (a shared file system):
//!
//! ```text
//! treesum --serve nats://queue:4222/treesum                  # on each of them, until SIGTERM
//! treesum --cluster nats://queue:4222/treesum -- /shared     # the same lines as without
//! ```

use futures_util::{Stream, StreamExt, stream};
use multiprocess::{self as mp, Pool};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::future::ready;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::{ffi::OsStrExt, fs::OpenOptionsExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{fs, thread};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};

const USAGE: &str = "\
usage: treesum [-j N] [-q] [--stats] [--cluster URL] [--] DIR..
       treesum [-j N] --serve URL

Prints a line like sha256sum's for every regular file below each DIR, sorted by path.
Symbolic links are not followed, unless a DIR itself is one.

  -j N           that many worker processes (default: one per CPU)
  -q             no progress and no summary
  --stats        at the end a picture of what each worker did, and how long batches of files took
  --cluster URL  have the machines sum that serve at URL, as nats://HOST:PORT/POOL
  --serve URL    sum for others at URL until SIGTERM; then finish what has begun

Exit status: 0 every file was read, 1 some were not, 2 wrong usage, 130 interrupted, 143 terminated.";

fn main() -> ExitCode {
    mp::run(async {
        let options = match Options::parse(std::env::args_os().skip(1)) {
            Ok(options) => options,
            Err(complaint) => {
                eprintln!("{complaint}{USAGE}");
                return ExitCode::from(2);
            }
        };
        if let Some(url) = &options.serve {
            return serve(options.workers, url).await.unwrap_or_else(failure);
        }
        tokio::select! {
            biased;
            signal = mp::shutdown_signal() => signal.map_or(ExitCode::FAILURE, |signal| signal.exit_code().into()),
            outcome = treesum(options) => outcome.unwrap_or_else(failure),
        }
    })
}

fn failure(error: mp::Error) -> ExitCode {
    eprintln!("treesum: {error}");
    ExitCode::FAILURE
}

/// The pool of this machine, or of a cluster, and how many batches are to be out at a time.
fn pool(options: &Options) -> mp::Result<(Pool, usize)> {
    match &options.cluster {
        // Three batches per worker keep it busy while answers are on their way.
        None => Ok((Pool::builder().workers(options.workers).build()?, 3 * options.workers)),
        #[cfg(feature = "cluster")]
        Some(url) => Ok((Pool::builder().cluster(url.as_str()).build()?, 256)),
        #[cfg(not(feature = "cluster"))]
        Some(_) => Err(without_cluster()),
    }
}

#[cfg(feature = "cluster")]
async fn serve(workers: usize, url: &str) -> mp::Result<ExitCode> {
    let pool = Pool::builder().workers(workers).build()?;
    let mut serving = pool.serve(url);
    let served = tokio::select! {
        served = &mut serving => served?,
        _ = mp::shutdown_signal() => {
            serving.drain(Duration::from_secs(30));
            serving.await?
        }
    };
    eprintln!("treesum: {} batches summed, {} given back, {} stopped", served.items, served.given_back, served.killed);
    Ok(ExitCode::SUCCESS)
}

#[cfg(not(feature = "cluster"))]
async fn serve(_: usize, _: &str) -> mp::Result<ExitCode> {
    Err(without_cluster())
}

#[cfg(not(feature = "cluster"))]
fn without_cluster() -> mp::Error {
    mp::Error::other("this program was built without clusters: build it with `--features cluster`")
}

async fn treesum(options: Options) -> mp::Result<ExitCode> {
    let (pool, most_out) = pool(&options)?;
    let is_local = options.cluster.is_none();
    let (news, found) = walk(options.roots);
    let progress = Progress::new(options.quiet, found);
    let mut digests = Vec::new();
    let mut busy = Duration::ZERO;
    let mut picture = options.stats.then(|| Picture::new(Instant::now()));

    let answers = news
        .filter_map(|batch| ready(batch.map_err(|(path, error)| progress.complain(&path, error)).ok()))
        .map(async |batch| (sums_of(&pool, &batch, &progress, is_local).await, batch))
        .buffer_unordered(most_out);
    let mut answers = std::pin::pin!(answers);
    let mut tick = tokio::time::interval(progress.period());
    tick.tick().await; // the first comes at once, when there is nothing to show
    loop {
        let (answer, batch) = tokio::select! {
            answer = answers.next() => match answer {
                Some(answer) => answer,
                None => break,
            },
            _ = tick.tick() => {
                progress.show();
                continue;
            }
        };
        progress.done(&batch);
        match answer {
            Ok(sums) => {
                busy += sums.busy;
                picture.iter_mut().for_each(|picture| picture.add(&sums, Instant::now()));
                for (path, outcome) in batch.paths.into_iter().zip(sums.outcomes) {
                    match outcome {
                        Ok(digest) => digests.push((path, digest)),
                        Err(error) => progress.complain(&path, error),
                    }
                }
            }
            Err(error) => batch.paths.iter().for_each(|path| progress.complain(path, &error)),
        }
    }

    digests.sort_unstable();
    progress.summarise(digests.len(), busy, pool.workers());
    if let Some(picture) = picture {
        eprint!("{}", picture.drawn(Instant::now()));
    }
    on_a_thread(move || print(&digests)).await?;
    Ok(if progress.failures.get() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The sums of a batch, and meanwhile the progress of one that takes a while; events come from this machine only.
async fn sums_of(pool: &Pool, batch: &Batch, progress: &Progress, is_local: bool) -> mp::Result<Sums> {
    let mut call = pool.apply(sum_files, (batch.paths.clone(),)).retries(1);
    if batch.bytes < 2 * NEWS || !is_local {
        return call.await;
    }
    let mut news = call.events::<u64>();
    let watch = async {
        let mut part = progress.part();
        // What an attempt says that is tried again is too much for a while, as its successor begins at 0.
        while let Some(Ok(summed)) = news.next().await {
            part.is(summed);
        }
    };
    tokio::join!(call, watch).0
}

// ---- what runs in the workers

#[derive(Serialize, Deserialize)]
struct Sums {
    outcomes: Vec<Result<[u8; 32], String>>,
    /// What it took without waiting for a CPU: one process alone would need at least as long.
    busy: Duration,
    /// What it took in all, and where.
    took: Duration,
    worker: u32,
}

/// After so many bytes a worker tells how far it is.
const NEWS: u64 = 8 << 20;

/// Counts the bytes that are summed, and tells now and then.
#[derive(Default)]
struct Meter {
    summed: u64,
    told: u64,
}

impl Meter {
    fn add(&mut self, bytes: usize) {
        self.summed += bytes as u64;
        if self.summed - self.told >= NEWS {
            self.told = self.summed;
            // Progress that finds no room may be left out.
            mp::current_task().map(|task| task.try_emit(self.summed));
        }
    }
}

fn sum_files(paths: Vec<OsString>) -> Sums {
    let (started, waited) = (Instant::now(), waited_for_a_cpu());
    let mut buffer = vec![0; 64 << 10];
    let mut meter = Meter::default();
    let outcomes = paths.iter().map(|path| sum_file(path, &mut buffer, &mut meter).map_err(|error| error.to_string()));
    let outcomes = outcomes.collect();
    let took = started.elapsed();
    let busy = took.saturating_sub(waited_for_a_cpu().saturating_sub(waited));
    Sums { outcomes, busy, took, worker: std::process::id() }
}

fn sum_file(path: &OsStr, buffer: &mut [u8], meter: &mut Meter) -> io::Result<[u8; 32]> {
    // The walk saw a regular file. If a FIFO has taken its place, opening it must not wait for a writer.
    let mut file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("no longer a regular file"));
    }
    let mut hasher = Sha256::new();
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                meter.add(n);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The kernel's second number about this thread: nanoseconds it was ready to run and did not.
fn waited_for_a_cpu() -> Duration {
    let numbers = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(numbers.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0))
}

// ---- the walk

/// Some files for one worker.
#[derive(Default)]
struct Batch {
    paths: Vec<OsString>,
    bytes: u64,
}

type News = Result<Batch, (OsString, io::Error)>;

#[derive(Clone, Copy, Default)]
struct Count {
    files: u64,
    bytes: u64,
}

impl Count {
    /// To open a file costs about as much as to sum this many bytes.
    fn work(self) -> u64 {
        self.bytes + self.files * (16 << 10)
    }
}

/// Every regular file below `roots`, in batches that grow with what was found so far: the first ones are
/// small so that all workers start at once, later ones large enough to make dispatch cheap.
///
/// The walk runs ahead of the consumer of the batches, and the count with it: so the time left is soon known.
fn walk(roots: Vec<PathBuf>) -> (impl Stream<Item = News>, watch::Receiver<Count>) {
    let (news, mut batches) = unbounded_channel();
    let (count, found) = watch::channel(Count::default());
    let mut walker = Walker { news, count, batch: Batch::default(), found: Count::default() };
    // Not `spawn_blocking`: the runtime waits for those when it ends, and a dead file server may take forever.
    thread::spawn(move || {
        if roots.into_iter().all(|root| walker.root(root)) {
            walker.flush();
        }
    });
    (stream::poll_fn(move |context| batches.poll_recv(context)), found)
}

struct Walker {
    news: UnboundedSender<News>,
    count: watch::Sender<Count>,
    batch: Batch,
    found: Count,
}

/// Each move says whether somebody still listens.
impl Walker {
    fn root(&mut self, root: PathBuf) -> bool {
        match fs::metadata(&root) {
            Ok(metadata) if metadata.is_dir() => self.tree(root),
            Ok(metadata) if metadata.is_file() => self.file(root, metadata.len()),
            Ok(_) => self.complain(root, io::Error::other("neither a directory nor a regular file")),
            Err(error) => self.complain(root, error),
        }
    }

    fn tree(&mut self, root: PathBuf) -> bool {
        let mut directories = vec![root];
        while let Some(directory) = directories.pop() {
            // A directory that cannot be opened counts as one that holds this error.
            let (entries, unopened) = match fs::read_dir(&directory) {
                Ok(entries) => (Some(entries), None),
                Err(error) => (None, Some(Err(error))),
            };
            for entry in entries.into_iter().flatten().chain(unopened) {
                let goes_on = match entry.and_then(|entry| Ok((entry.path(), entry.metadata()?))) {
                    Ok((path, metadata)) if metadata.is_file() => self.file(path, metadata.len()),
                    Ok((path, metadata)) if metadata.is_dir() => {
                        directories.push(path);
                        true
                    }
                    Ok(_) => true,
                    Err(error) => self.complain(directory.clone(), error),
                };
                if !goes_on {
                    return false;
                }
            }
        }
        true
    }

    fn file(&mut self, path: PathBuf, bytes: u64) -> bool {
        self.batch.paths.push(path.into());
        self.batch.bytes += bytes;
        self.found.files += 1;
        self.found.bytes += bytes;
        let full = self.batch.paths.len() as u64 >= (self.found.files / 32).clamp(1, 256)
            || self.batch.bytes >= (self.found.bytes / 32).clamp(64 << 10, 4 << 20);
        !full || self.flush()
    }

    fn flush(&mut self) -> bool {
        let batch = std::mem::take(&mut self.batch);
        self.count.send_replace(self.found);
        batch.paths.is_empty() || self.news.send(Ok(batch)).is_ok()
    }

    fn complain(&mut self, path: PathBuf, error: io::Error) -> bool {
        self.news.send(Err((path.into(), error))).is_ok()
    }
}

// ---- what the user sees

/// One line that is written again and again if stderr is a terminal, a line now and then if not; and what went wrong.
struct Progress {
    is_terminal: bool,
    quiet: bool,
    started: Instant,
    found: watch::Receiver<Count>,
    done: Cell<Count>,
    /// Bytes of the batches at work that are summed.
    begun: Cell<u64>,
    failures: Cell<u64>,
}

/// The part of one batch at work.
struct Part<'a> {
    progress: &'a Progress,
    bytes: u64,
}

impl Part<'_> {
    fn is(&mut self, bytes: u64) {
        let begun = &self.progress.begun;
        begun.set(begun.get() - self.bytes + bytes);
        self.bytes = bytes;
    }
}

/// The batch is done, and counts as that.
impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.is(0);
    }
}

impl Progress {
    fn new(quiet: bool, found: watch::Receiver<Count>) -> Self {
        let is_terminal = !quiet && io::stderr().is_terminal();
        let (done, begun, failures) = Default::default();
        Self { is_terminal, quiet, started: Instant::now(), found, done, begun, failures }
    }

    fn part(&self) -> Part<'_> {
        Part { progress: self, bytes: 0 }
    }

    fn period(&self) -> Duration {
        if self.is_terminal { Duration::from_millis(100) } else { Duration::from_secs(2) }
    }

    fn done(&self, batch: &Batch) {
        let Count { files, bytes } = self.done.get();
        self.done.set(Count { files: files + batch.paths.len() as u64, bytes: bytes + batch.bytes });
    }

    /// The path comes with its odd characters escaped, for the terminal's sake.
    fn complain(&self, path: &OsStr, error: impl std::fmt::Display) {
        self.failures.set(self.failures.get() + 1);
        eprintln!("{}treesum: {path:?}: {error}", self.clear());
    }

    fn show(&self) {
        let (found, mut done, elapsed) = (*self.found.borrow(), self.done.get(), self.started.elapsed());
        done.bytes += self.begun.get();
        if self.quiet || done.work() == 0 {
            return;
        }
        let share = done.work() as f64 / found.work() as f64;
        let at_least = if self.found.has_changed().is_ok() { "at least " } else { "" };
        let text = format!(
            "{}/{} files, {}/{}, {}, {at_least}{:.0?} left",
            done.files,
            found.files,
            size(done.bytes as f64),
            size(found.bytes as f64),
            rate(done.bytes, elapsed),
            elapsed.mul_f64(1.0 / share - 1.0),
        );
        let end = if self.is_terminal { "" } else { "\n" };
        eprint!("{}treesum: {text}{end}", self.clear());
    }

    /// Clears the line, on a terminal.
    fn clear(&self) -> &'static str {
        if self.is_terminal { "\r\x1b[K" } else { "" }
    }

    fn summarise(&self, files: usize, busy: Duration, workers: usize) {
        if self.quiet {
            return;
        }
        let (bytes, wall) = (self.done.get().bytes, self.started.elapsed());
        eprintln!(
            "{}treesum: {files} files, {} in {wall:.2?} ({}), {} not read",
            self.clear(),
            size(bytes as f64),
            rate(bytes, wall),
            self.failures.get(),
        );
        eprintln!(
            "treesum: at least {:.2} times as fast as one process (workers: {workers}; their work: {busy:.2?}, \
             waits for a CPU left out)",
            busy.as_secs_f64() / wall.as_secs_f64(),
        );
    }
}

/// What `--stats` draws: from when to when each worker had a batch, as the answers told.
struct Picture {
    started: Instant,
    /// By worker.
    batches: BTreeMap<u32, Vec<(Duration, Duration)>>,
}

/// The width of a lane, and of the longest bar.
const COLUMNS: usize = 60;
/// So many workers have a lane.
const LANES: usize = 32;

impl Picture {
    fn new(started: Instant) -> Self {
        Self { started, batches: BTreeMap::new() }
    }

    /// The answer has come just now.
    fn add(&mut self, sums: &Sums, now: Instant) {
        let end = now - self.started;
        self.batches.entry(sums.worker).or_default().push((end.saturating_sub(sums.took), end));
    }

    fn drawn(&self, now: Instant) -> String {
        let all = now - self.started;
        let mut text =
            format!("\ntreesum: what each worker did in {all:.2?}, from left to right (the higher, the busier)\n");
        for (worker, batches) in self.batches.iter().take(LANES) {
            let busy: Duration = batches.iter().map(|(from, to)| to.saturating_sub(*from)).sum();
            let share = (100.0 * busy.as_secs_f64() / all.as_secs_f64()).min(100.0);
            text += &format!("{worker:>9} |{}| {share:3.0} %, {} batches\n", lane(batches, all), batches.len());
        }
        if self.batches.len() > LANES {
            text += &format!("          and {} more\n", self.batches.len() - LANES);
        }
        text += "\ntreesum: how long batches of files took\n";
        let times = self.batches.values().flatten().map(|(from, to)| to.saturating_sub(*from));
        let mut counts = BTreeMap::<u32, usize>::new();
        times.for_each(|time| *counts.entry((time.as_micros().max(1) as u64).ilog2()).or_default() += 1);
        let (first, last) = (counts.keys().next().copied().unwrap_or(0), counts.keys().last().copied().unwrap_or(0));
        let most = counts.values().copied().max().unwrap_or(1);
        for bucket in first..=last {
            let count = counts.get(&bucket).copied().unwrap_or(0);
            let limit = format!("{:?}", Duration::from_micros(2 << bucket));
            text += &format!("{limit:>12} |{:<COLUMNS$}| {count}\n", "█".repeat((count * COLUMNS).div_ceil(most)));
        }
        text
    }
}

/// How busy a worker was in each part of the time.
fn lane(batches: &[(Duration, Duration)], all: Duration) -> String {
    const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let column = all.as_secs_f64() / COLUMNS as f64;
    let mut shares = [0.0_f64; COLUMNS];
    for (from, to) in batches.iter().map(|(from, to)| (from.as_secs_f64() / column, to.as_secs_f64() / column)) {
        for (at, share) in shares.iter_mut().enumerate().take(to.ceil() as usize).skip(from as usize) {
            *share += (to.min(at as f64 + 1.0) - from.max(at as f64)).max(0.0);
        }
    }
    // What took any time at all is seen.
    shares.map(|share| LEVELS[(share.min(1.0) * 8.0).ceil() as usize]).into_iter().collect()
}

fn rate(bytes: u64, time: Duration) -> String {
    format!("{}/s", size(bytes as f64 / time.as_secs_f64()))
}

fn size(bytes: f64) -> String {
    const UNITS: [(f64, &str); 3] = [(1073741824.0, "GiB"), (1048576.0, "MiB"), (1024.0, "KiB")];
    let unit = UNITS.into_iter().find(|(unit, _)| bytes >= *unit);
    unit.map_or_else(|| format!("{bytes:.0} B"), |(unit, name)| format!("{:.2} {name}", bytes / unit))
}

/// As `sha256sum` does it: a name with a newline, carriage return or backslash is escaped, and its line then
/// starts with a backslash. Other bytes stay as they are, text or not.
fn print(digests: &[(OsString, [u8; 32])]) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    for (path, digest) in digests {
        let path = path.as_bytes();
        if path.iter().any(|byte| b"\\\n\r".contains(byte)) {
            out.write_all(b"\\")?;
        }
        digest.iter().try_for_each(|byte| write!(out, "{byte:02x}"))?;
        out.write_all(b"  ")?;
        for byte in path {
            match byte {
                b'\\' => out.write_all(b"\\\\")?,
                b'\n' => out.write_all(b"\\n")?,
                b'\r' => out.write_all(b"\\r")?,
                _ => out.write_all(&[*byte])?,
            }
        }
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Runs a call that may block for as long as it likes, on a thread that nobody waits for at the end.
async fn on_a_thread<T: Send + 'static>(f: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    thread::spawn(move || done.send(f()));
    result.await.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

// ---- the command line

struct Options {
    workers: usize,
    quiet: bool,
    stats: bool,
    cluster: Option<String>,
    serve: Option<String>,
    roots: Vec<PathBuf>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let workers = mp::cpu_count();
        let mut options = Self { workers, quiet: false, stats: false, cluster: None, serve: None, roots: Vec::new() };
        while let Some(argument) = arguments.next() {
            match argument.to_str() {
                Some("--") => options.roots.extend(arguments.by_ref().map(PathBuf::from)),
                Some("-q") => options.quiet = true,
                Some("--stats") => options.stats = true,
                Some(option @ ("--cluster" | "--serve")) => {
                    let url = arguments.next().and_then(|url| url.into_string().ok());
                    let url = url.ok_or_else(|| format!("treesum: {option} needs a URL\n\n"))?;
                    *if option == "--serve" { &mut options.serve } else { &mut options.cluster } = Some(url);
                }
                Some(option) if option.starts_with("-j") => {
                    let attached = Some(OsString::from(&option[2..])).filter(|rest| !rest.is_empty());
                    let number = attached.or_else(|| arguments.next()).and_then(|n| n.to_str()?.parse().ok());
                    options.workers = number.filter(|n| *n > 0).ok_or("treesum: -j needs a number above 0\n\n")?;
                }
                Some(option) if option.starts_with('-') => {
                    return Err(format!("treesum: there is no option {option}\n\n"));
                }
                _ => options.roots.push(argument.into()),
            }
        }
        match (&options.serve, &options.cluster, options.roots.is_empty()) {
            (None, _, false) | (Some(_), None, true) => Ok(options),
            (None, _, true) => Err(String::new()),
            (Some(_), ..) => Err("treesum: --serve stands alone\n\n".into()),
        }
    }
}
