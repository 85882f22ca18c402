//! A log of any size, summed up by all CPUs in little memory: requests, failures, bytes and the slowest answer for each path.
//!
//! Each worker has the file open as its state and reads the blocks that it is told; the results are added up as they come. A
//! worker that dies costs its block's time, as the block is tried again.
//!
//! ```text
//! cargo run --release -p multiprocess-heavy-examples --example log_aggregator -- generate 1024 access.log    # of 1 GiB
//! cargo run --release -p multiprocess-heavy-examples --example log_aggregator -- access.log
//! ```
//!
//! Measured by these two commands, on two CPUs with a load of some 20 beside it: 22 s to generate the GiB, 21 to 61 s to sum it up, and no process had
//! more than 6.9 MiB (VmHWM); with 4 MiB of log it was 6.4 MiB. `MIB=1024 cargo test --release -p multiprocess-heavy-examples --test four_programs`,
//! after `cargo build --release -p multiprocess-heavy-examples --examples`, compares the sums of a GiB with those of `rayon`, while workers are killed: 8 s.

use futures::{StreamExt, TryStreamExt};
use multiprocess::{self as mp, Pool, Retry};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};

const MIB: u64 = 1 << 20;
const USAGE: &str = "usage: log_aggregator generate MIB FILE | log_aggregator FILE";

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Route {
    requests: u64,
    failures: u64,
    bytes: u64,
    slowest_us: u64,
}

#[derive(Default, Serialize, Deserialize)]
struct Summary {
    routes: BTreeMap<String, Route>,
    unreadable: u64,
}

impl Summary {
    fn add(&mut self, path: &str, more: Route) {
        let route = match self.routes.get_mut(path) {
            Some(route) => route,
            // The path is copied for the first of its lines only.
            None => self.routes.entry(path.into()).or_default(),
        };
        route.requests += more.requests;
        route.failures += more.failures;
        route.bytes += more.bytes;
        route.slowest_us = route.slowest_us.max(more.slowest_us);
    }

    fn merge(mut self, other: Self) -> Self {
        other.routes.iter().for_each(|(path, route)| self.add(path, *route));
        self.unreadable += other.unreadable;
        self
    }
}

/// Reads `10.0.3.7 GET /items/42 200 1532 823`: client, method, path, status, bytes, microseconds.
fn parse(line: &[u8]) -> Option<(&str, Route)> {
    let mut fields = std::str::from_utf8(line).ok()?.split_ascii_whitespace().skip(2);
    let path = fields.next()?;
    let mut number = || fields.next()?.parse::<u64>().ok();
    let (status, bytes, slowest_us) = (number()?, number()?, number()?);
    Some((path, Route { requests: 1, failures: u64::from(status >= 500), bytes, slowest_us }))
}

// ---- what runs in the workers

fn open(path: String) -> BufReader<File> {
    let file = File::open(&path).unwrap_or_else(|error| panic!("cannot open {path}: {error}"));
    BufReader::with_capacity(256 << 10, file)
}

/// Sums up the lines that begin in the MiB at `start`.
fn summarise(log: &mut BufReader<File>, start: u64) -> mp::Result<Summary> {
    let (mut summary, mut line) = (Summary::default(), Vec::new());
    // Where the last line of the block before ends, the first one begins.
    let mut at = log.seek(SeekFrom::Start(start.saturating_sub(1)))?;
    if start > 0 {
        at += log.read_until(b'\n', &mut line)? as u64;
    }
    while at < start + MIB {
        line.clear();
        match log.read_until(b'\n', &mut line)? {
            0 => break,
            len => at += len as u64,
        }
        match parse(&line) {
            Some((path, route)) => summary.add(path, route),
            None => summary.unreadable += 1,
        }
    }
    Ok(summary)
}

/// A MiB of lines, or a little more: the same ones each time.
fn lines(block: u64) -> Vec<u8> {
    let mut random = block.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut below = |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % limit
    };
    let mut text = Vec::with_capacity(MIB as usize + 100);
    while text.len() < MIB as usize {
        let (client, item, bytes, us) =
            (below(256), below(40) * below(40), below(100_000), below(1_000) * below(1_000));
        let status = if below(100) == 0 { 503 } else { 200 };
        _ = writeln!(text, "10.0.3.{client} GET /items/{item} {status} {bytes} {us}");
    }
    text
}

// ---- the program

async fn generate(mib: u64, path: &str) -> mp::Result<()> {
    let pool = Pool::new(mp::cpu_count())?;
    let mut file = BufWriter::new(File::create(path)?);
    let mut blocks = pool.imap(lines, 0..mib).retries(20).retry_if(Retry::DIED);
    while let Some(block) = blocks.try_next().await? {
        file.write_all(&block)?;
    }
    Ok(file.flush()?)
}

async fn aggregate(path: &str) -> mp::Result<()> {
    let blocks = (0..std::fs::metadata(path)?.len()).step_by(MIB as usize);
    let pool = Pool::builder().state(open, (path.to_string(),)).build()?;
    let summaries = pool.with_state().imap_unordered(summarise, blocks).retries(20).retry_if(Retry::DIED);
    let whole = summaries.map(|summary| summary?).try_fold(Summary::default(), async |whole, one| Ok(whole.merge(one)));
    let Summary { routes, unreadable } = whole.await?;
    for (path, Route { requests, failures, bytes, slowest_us }) in routes {
        println!("{path} {requests} {failures} {bytes} {slowest_us}");
    }
    println!("{unreadable} lines could not be read");
    Ok(())
}

fn main() -> mp::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    mp::run(async {
        match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["generate", mib, path] => generate(mib.parse().map_err(mp::Error::other)?, path).await,
            [path] => aggregate(path).await,
            _ => Err(mp::Error::other(USAGE)),
        }
    })
}
