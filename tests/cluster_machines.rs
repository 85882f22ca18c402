//! A pool on four machines: network namespaces with a link each to a bridge. Three have a server of one JetStream and a host, the
//! fourth has the submitter. Links are cut and slow.
//!
//! It needs root, `ip` and `tc`; where one is missing it says so and passes.
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

use futures::StreamExt;
use multiprocess::cluster::Address;
use multiprocess::{self as mp, Pool};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

#[path = "common/alone.rs"]
mod alone;
mod common {
    pub(crate) use crate::alone;
}
#[path = "cluster/server.rs"]
mod server;
use alone::{Scenario, scenarios, unique};

/// What a process on one of the machines is to do.
const ROLE: &str = "CLUSTER_MACHINES_ROLE";
const URL: &str = "nats://10.77.0.1:4222,10.77.0.2:4222,10.77.0.3:4222/pool";
/// Long enough for a busy machine.
const LEASE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        mp::init();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        return runtime.block_on(play(&role));
    }
    alone::main_once_of(
        scenarios! {
            items_are_answered_once_each_though_the_leaders_machine_is_cut_off
            large_arguments_cross_a_slow_link_once
        },
        &[],
    )
}

fn address() -> Address {
    Address::new(URL).lease(LEASE).replicas(3).redeliver(20)
}

// What runs on the machines.

async fn play(role: &str) -> ExitCode {
    match role {
        "ready" => until_ready().await,
        "host" => return serve().await,
        "submit" => submit().await,
        "map" => map_large().await,
        "leader" => println!("{}", leader().await.expect("a leader")),
        "hosts" => all_hosts_serve().await,
        _ => unreachable!("{role}"),
    }
    ExitCode::SUCCESS
}

async fn api(what: &str, body: &str) -> Option<serde_json::Value> {
    let servers = URL.trim_start_matches("nats://").trim_end_matches("/pool").split(',');
    let servers: Vec<String> = servers.map(|server| format!("nats://{server}")).collect();
    let asked = async {
        let client = async_nats::connect(servers).await.ok()?;
        let reply = client.request(format!("$JS.API.{what}"), body.to_string().into()).await.ok()?;
        serde_json::from_slice(&reply.payload).ok()
    };
    tokio::time::timeout(Duration::from_secs(5), asked).await.ok()?
}

/// All three servers keep a stream.
async fn until_ready() {
    let stream = r#"{"name": "READY", "subjects": ["ready"], "num_replicas": 3}"#;
    let start = Instant::now();
    while !api("STREAM.CREATE.READY", stream).await.is_some_and(|made| made["error"].is_null()) {
        assert!(start.elapsed() < PATIENCE, "the servers do not come together");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    api("STREAM.DELETE.READY", "").await;
}

async fn leader() -> Option<String> {
    let info = api("STREAM.INFO.MP_pool", "").await?;
    Some(info["cluster"]["leader"].as_str()?.to_string())
}

async fn serve() -> ExitCode {
    let pool = Pool::new(1).unwrap();
    match pool.serve(address()).await {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn slow(n: u64) -> u64 {
    std::thread::sleep(Duration::from_millis(50));
    n
}

/// Says how many results have come, and that each came once.
async fn submit() {
    const COUNT: u64 = 400;
    let pool = Pool::builder().cluster(address()).build().unwrap();
    let mut results = pool.imap_unordered(slow, 0..COUNT).retries(20).chunksize(1);
    let mut seen = vec![0; COUNT as usize];
    let mut done = 0;
    while let Some(result) = results.next().await {
        seen[result.expect("no failure") as usize] += 1;
        done += 1;
        println!("{done}");
    }
    assert!(seen.iter().all(|times| *times == 1), "{seen:?}");
    println!("each once");
}

async fn map_large() {
    let pool = Pool::builder().cluster(address().offline_timeout(Duration::from_secs(8))).build().unwrap();
    let lens = pool.map(|bytes: Vec<u8>| bytes.len(), (0..60).map(|n| vec![n; 200 << 10])).chunksize(1).await.unwrap();
    assert_eq!(lens, [200 << 10; 60]);
    println!("all there");
}

/// Three hosts are there, each of which answers.
async fn all_hosts_serve() {
    let pool = Pool::builder().cluster(address()).build().unwrap();
    let start = Instant::now();
    while pool.hosts().len() < 3 {
        assert!(start.elapsed() < PATIENCE, "{:?}", pool.hosts());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let pids = |_: u64| {
        std::thread::sleep(Duration::from_millis(100));
        std::process::id()
    };
    let mut seen = std::collections::HashSet::new();
    while seen.len() < 3 {
        assert!(start.elapsed() < PATIENCE, "{seen:?}");
        seen.extend(pool.map(pids, 0..9).chunksize(1).await.unwrap());
    }
    println!("all serve");
}

// The machines.

struct Machines {
    name: String,
    dir: PathBuf,
    servers: Vec<Child>,
    hosts: Vec<Player>,
}

/// Runs `ip` or `tc`; whether that succeeded.
fn run(program: &str, arguments: &str) -> bool {
    let done = Command::new(program).args(arguments.split(' ')).stderr(Stdio::null()).status();
    done.is_ok_and(|status| status.success())
}

impl Machines {
    /// Four machines, or none where that is not permitted.
    fn new() -> Option<Self> {
        let binary = server::binary()?;
        // Names of links have 15 bytes.
        let number = unique().bytes().fold(7_u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let name = format!("mp{:06x}", number & 0xff_ffff);
        let dir = std::env::temp_dir().join(format!("mp-machines-{}", unique()));
        let mut machines = Self { name, dir, servers: Vec::new(), hosts: Vec::new() };
        if !machines.connect() {
            eprintln!("SKIPPED: network namespaces cannot be made here (root, and `ip` of iproute2)");
            return None;
        }
        for n in 1..=3 {
            machines.start_server(&binary, n);
        }
        machines.play(4, "ready").finish();
        Some(machines)
    }

    fn of(&self, n: usize) -> String {
        format!("{}-{n}", self.name)
    }

    fn connect(&self) -> bool {
        let bridge = self.of(0);
        let mut is_there = run("ip", &format!("netns add {bridge}"))
            && run("ip", &format!("-n {bridge} link add hub type bridge"))
            && run("ip", &format!("-n {bridge} link set hub up"));
        for n in 1..=4 {
            let machine = self.of(n);
            is_there = is_there
                && run("ip", &format!("netns add {machine}"))
                && run("ip", &format!("-n {bridge} link add port{n} type veth peer name eth0 netns {machine}"))
                && run("ip", &format!("-n {bridge} link set port{n} master hub up"))
                && run("ip", &format!("-n {machine} addr add 10.77.0.{n}/24 dev eth0"))
                && run("ip", &format!("-n {machine} link set eth0 up"))
                && run("ip", &format!("-n {machine} link set lo up"));
        }
        is_there
    }

    fn command(&self, n: usize, program: &Path) -> Command {
        // It is not to outlive this process, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "ip", "netns", "exec", &self.of(n)]).arg(program);
        command
    }

    fn start_server(&mut self, binary: &Path, n: usize) {
        let dir = self.dir.join(n.to_string());
        std::fs::create_dir_all(&dir).unwrap();
        let routes = [1, 2, 3].map(|n| format!("\"nats://10.77.0.{n}:6222\"")).join(", ");
        let config = format!(
            "server_name: n{n}\nlisten: \"10.77.0.{n}:4222\"\njetstream {{ store_dir: {:?}, max_file_store: 8GB }}\n\
             cluster {{ name: c, listen: \"10.77.0.{n}:6222\", routes: [{routes}] }}\n",
            dir.join("store")
        );
        std::fs::write(dir.join("server.conf"), config).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let mut command = self.command(n, binary);
        let server = command.arg("-c").arg(dir.join("server.conf")).stdout(Stdio::null()).stderr(log).spawn();
        self.servers.push(server.unwrap());
    }

    fn play(&self, n: usize, role: &str) -> Player {
        let mut command = self.command(n, &std::env::current_exe().unwrap());
        let command = command.env(ROLE, role).env_remove("SCENARIO").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Player { role: role.into(), child, lines }
    }

    fn start_hosts(&mut self) {
        self.hosts = (1..=3).map(|n| self.play(n, "host")).collect();
    }

    fn set_link(&self, n: usize, state: &str) {
        assert!(run("ip", &format!("-n {} link set port{n} {state}", self.of(0))));
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for n in 1..=3 {
                let log = std::fs::read_to_string(self.dir.join(n.to_string()).join("log")).unwrap_or_default();
                let last: Vec<_> = log.lines().rev().take(8).collect();
                eprintln!("the last words of server {n}:\n{}", last.into_iter().rev().collect::<Vec<_>>().join("\n"));
            }
        }
        self.hosts.clear();
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        (0..=4).for_each(|n| _ = run("ip", &format!("netns del {}", self.of(n))));
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A process on a machine. Dropped, it is killed.
struct Player {
    role: String,
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Player {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "{} has ended", self.role);
        line.trim().to_string()
    }

    /// Its last line, once it has ended in order.
    fn finish(mut self) -> String {
        let last = (&mut self.lines).lines().last().map(Result::unwrap).unwrap_or_default();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{}: {status}", self.role);
        last
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn items_are_answered_once_each_though_the_leaders_machine_is_cut_off() {
    let Some(mut machines) = Machines::new() else { return };
    machines.start_hosts();
    let mut submitter = machines.play(4, "submit");
    while submitter.line() != "40" {}
    let leader = machines.play(4, "leader").finish();
    let leader: usize = leader.strip_prefix('n').expect("the name of a server").parse().unwrap();
    machines.set_link(leader, "down");
    // Its host stops its items, and others run them meanwhile.
    let cut = Instant::now();
    while submitter.line() != "160" {}
    std::thread::sleep((2 * LEASE).saturating_sub(cut.elapsed()));
    machines.set_link(leader, "up");
    assert_eq!(submitter.finish(), "each once");
    // The cut off host is back.
    assert_eq!(machines.play(4, "hosts").finish(), "all serve");
    std::io::stdout().flush().unwrap();
}

fn large_arguments_cross_a_slow_link_once() {
    let Some(mut machines) = Machines::new() else { return };
    machines.start_hosts();
    assert_eq!(machines.play(4, "hosts").finish(), "all serve");
    // 12 MB take 6 s.
    if !run("tc", &format!("-n {} qdisc add dev eth0 root tbf rate 16mbit burst 64kb latency 400ms", machines.of(4))) {
        return eprintln!("SKIPPED: this kernel makes no link slow (tbf)");
    }
    let sent = || {
        let command = format!("-n {} -s -j link show eth0", machines.of(4));
        let output = Command::new("ip").args(command.split(' ')).output().unwrap().stdout;
        let links: serde_json::Value = serde_json::from_slice(&output).unwrap();
        links[0]["stats64"]["tx"]["bytes"].as_u64().unwrap()
    };
    let before = sent();
    assert_eq!(machines.play(4, "map").finish(), "all there");
    let (sent, least) = (sent() - before, 60 * (200 << 10));
    assert!(sent < 2 * least, "{sent} bytes were sent for {least}");
}
