//! The programs of this directory as they are, by a real server, while hosts of them are killed.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../../tests/common/alone.rs"]
mod alone;
mod common {
    pub(crate) use crate::alone;
}
#[path = "../../tests/programs/mod.rs"]
mod programs;
#[path = "../../tests/cluster/server.rs"]
mod server;

use programs::{example, finish, processes, until};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use server::Server;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);

fn server() -> Option<Server> {
    Some(Server::start(server::binary()?, ""))
}

/// A program of this test. Dropped, it is killed with all its processes.
struct Program(Option<Child>);

impl Program {
    fn start(name: &str, url: &str, arguments: &[&OsStr]) -> Self {
        let mut command = Command::new(example(name));
        command.args(arguments).env("THUMBS_URL", url).env("RUST_BACKTRACE", "0");
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(Some(command.spawn().unwrap()))
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(self.0.as_ref().unwrap())
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
            let _ = child.wait();
        }
    }

    /// What it has printed, once it has ended in order.
    fn finish(mut self) -> (String, String) {
        let output = finish(self.0.take().unwrap(), DEADLINE);
        let texts = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(output.status.success(), "{}: {texts:?}", output.status);
        texts.into()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A directory that goes with its test.
struct Tree(PathBuf);

impl Tree {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("mp-cluster-treesum-{}", common::alone::unique()));
        for directory in 0..40 {
            let directory = dir.join(directory.to_string());
            std::fs::create_dir_all(&directory).unwrap();
            for file in 0..50_usize {
                std::fs::write(directory.join(file.to_string()), vec![file as u8; file * 997]).unwrap();
            }
        }
        // What takes a while: they are not in memory, and need not be.
        for large in 0..8 {
            std::fs::File::create(dir.join(format!("large-{large}"))).unwrap().set_len(64 << 20).unwrap();
        }
        Self(dir)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn treesum_on_a_cluster_writes_the_same_lines_though_a_host_is_killed() {
    let Some(server) = server() else { return };
    let (tree, url) = (Tree::new(), server.url_of("treesum"));
    let arguments = |arguments: &[&str]| arguments.iter().map(|argument| argument.to_string()).collect::<Vec<_>>();
    let start = |arguments: &[String]| {
        Program::start("cluster_treesum", &url, &arguments.iter().map(OsStr::new).collect::<Vec<_>>())
    };
    let hosts = arguments(&["-j", "2", "--serve", &url]);
    let (mut first, second) = (start(&hosts), start(&hosts));
    let path = tree.0.to_str().unwrap();
    let mut sums = start(&arguments(&["-q", "--cluster", &url, "--", path]));
    // Their output is more than a pipe holds.
    let mut stdout = sums.child().stdout.take().unwrap();
    let lines = std::thread::spawn(move || {
        let mut lines = String::new();
        stdout.read_to_string(&mut lines).unwrap();
        lines
    });
    until("the first host has workers", || {
        let workers = processes(first.0.as_ref().unwrap(), "PoolWorker");
        let is_at_it = |pid: &Pid| {
            let files = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_pid())).into_iter().flatten().flatten();
            files.into_iter().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|file| file.starts_with(&tree.0)))
        };
        workers.iter().any(is_at_it).then_some(())
    });
    first.kill();
    let (_, stderr) = sums.finish();
    let lines = lines.join().unwrap();
    assert_eq!((lines.lines().count(), stderr.as_str()), (40 * 50 + 8, ""));
    let mut check = Command::new("sha256sum");
    let mut check = check.args(["--check", "--quiet", "--strict"]).stdin(Stdio::piped()).spawn().unwrap();
    check.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(check.wait().unwrap().success());
    // The other one ends in order.
    kill_process(second.pid(), Signal::TERM).unwrap();
    let (_, stderr) = second.finish();
    assert!(stderr.contains("batches summed, 0 given back, 0 stopped"), "{stderr}");
}

#[test]
fn treesum_at_a_wrong_address_says_so() {
    for option in ["--cluster", "--serve"] {
        let output = Command::new(example("cluster_treesum")).args([option, "http://h/p"]).arg("/nowhere").output();
        let output = output.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let is_usage = option == "--serve"; // It stands alone.
        assert_eq!(output.status.code(), Some(if is_usage { 2 } else { 1 }), "{stderr}");
        assert!(stderr.contains(if is_usage { "--serve stands alone" } else { "http://h/p" }), "{stderr}");
    }
}

/// A service, and where it listens.
struct Thumbs {
    program: Program,
    address: String,
}

impl Thumbs {
    fn start(url: &str) -> Self {
        let mut program = Program::start("thumbs", url, &["127.0.0.1:0".as_ref()]);
        let mut line = String::new();
        BufReader::new(program.child().stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("serving at http://").expect(&line).to_string();
        Self { program, address }
    }

    fn ask(&self, head: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let head = format!("{head} HTTP/1.0\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
        let status = str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
        (status, answer[end + 4..].to_vec())
    }

    fn thumbnail(&self) -> u16 {
        let (status, body) = self.ask("POST /thumbnail/20", &picture());
        if status == 200 {
            let small = image::load_from_memory(&body).unwrap();
            assert_eq!((small.width(), small.height()), (20, 10));
        }
        status
    }

    fn stats(&self) -> String {
        String::from_utf8(self.ask("GET /stats", b"").1).unwrap()
    }
}

fn picture() -> Vec<u8> {
    file_of(&image::RgbImage::from_fn(200, 100, |x, y| image::Rgb([x as u8, y as u8, 0])))
}

fn file_of<P>(picture: &image::ImageBuffer<P, Vec<u8>>) -> Vec<u8>
where
    P: image::Pixel<Subpixel = u8> + image::PixelWithColorType,
{
    let mut file = Cursor::new(Vec::new());
    picture.write_to(&mut file, image::ImageFormat::Png).unwrap();
    file.into_inner()
}

#[test]
fn thumbs_refuses_what_would_wait_too_long_and_answers_the_rest_once_a_host_comes() {
    let Some(server) = server() else { return };
    let url = server.url_of("thumbs");
    let service = Thumbs::start(&url);
    assert_eq!(service.ask("POST /thumbnail/x", b"").0, 400);
    let statuses = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..100).map(|_| scope.spawn(|| service.thumbnail())).collect();
        // At most 64 wait at the server and 16 here; of a burst fewer may have gone to the server in time.
        until("all have come", || {
            let stats = service.stats();
            let numbers: Vec<u64> = stats.split(' ').filter_map(|word| word.parse().ok()).collect();
            (numbers[0] <= 80 && numbers[0] + numbers[3] == 100).then_some(())
        });
        let host = Program::start("thumbs", &url, &["serve".as_ref()]);
        let statuses: Vec<_> = asked.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(service.ask("POST /thumbnail/20", b"no picture").0, 422);
        until("the host is listed", || service.stats().contains("slots busy").then_some(()));
        kill_process(host.pid(), Signal::TERM).unwrap();
        let (stdout, _) = host.finish();
        assert!(stdout.contains("Served") && stdout.contains("killed: 0"), "{stdout}");
        statuses
    });
    let count = |of: u16| statuses.iter().filter(|status| **status == of).count();
    assert!(count(200) >= 16 && count(429) >= 20 && count(200) + count(429) == 100, "{statuses:?}");
    kill_process(service.program.pid(), Signal::TERM).unwrap();
    service.program.finish();
}

/// The head of a picture of 23 000 x 23 000 grey pixels, which need more memory than a worker of `thumbs` has.
fn vast_picture() -> Vec<u8> {
    let head =
        [&23_000_u32.to_be_bytes()[..], &23_000_u32.to_be_bytes(), &[8, 0, 0, 0, 0], &0x19f53df4_u32.to_be_bytes()]
            .concat();
    [b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", &head[..], b"\0\0\0\0IDAT\x35\xaf\x06\x1e"].concat()
}

#[test]
fn thumbs_answers_what_is_too_large_with_413_and_what_takes_too_long_with_504() {
    let Some(server) = server() else { return };
    let url = server.url_of("thumbs");
    let service = Thumbs::start(&url);
    let host = Program::start("thumbs", &url, &["serve".as_ref()]);
    assert_eq!(service.thumbnail(), 200);
    let large = file_of(&image::GrayImage::new(5000, 5000));
    // All workers stop for longer than a picture may take, as soon as one of them is at it.
    let stopped = || {
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| service.ask("POST /thumbnail/20", &large).0);
            let workers = until("a worker is at it", || {
                let works = |pid: &Pid| {
                    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap_or_default();
                    stat.contains(") R ")
                };
                let workers = processes(host.0.as_ref().unwrap(), "PoolWorker");
                (asked.is_finished() || workers.iter().any(works)).then_some(workers)
            });
            workers.iter().for_each(|worker| _ = kill_process(*worker, Signal::STOP));
            let status = asked.join().unwrap();
            // Those that were not replaced meanwhile.
            workers.iter().for_each(|worker| _ = kill_process(*worker, Signal::CONT));
            status
        })
    };
    // A worker that was at something else gives the picture up to one that replaces it, and there is an answer.
    let status = (0..10).map(|_| stopped()).find(|status| *status != 200);
    assert_eq!(status, Some(504));
    assert_eq!(service.thumbnail(), 200);
    assert_eq!(service.ask("POST /thumbnail/20", &vec![0; 3 << 20]).0, 413);
    let (status, why) = service.ask("POST /thumbnail/20", &vast_picture());
    assert_eq!(status, 413, "{}", String::from_utf8_lossy(&why));
    assert_eq!(service.thumbnail(), 200);
}

#[test]
fn thumbs_loses_no_request_while_workers_and_a_host_are_killed() {
    let Some(server) = server() else { return };
    let url = server.url_of("thumbs");
    let service = Thumbs::start(&url);
    let [mut first, second] = [(); 2].map(|()| Program::start("thumbs", &url, &["serve".as_ref()]));
    until("both are listed", || (service.stats().matches("slots busy").count() == 2).then_some(()));
    let answered = AtomicUsize::new(0);
    let client = || {
        for _ in 0..40 {
            assert_eq!(service.thumbnail(), 200);
            answered.fetch_add(1, Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let clients = [(); 4].map(|()| scope.spawn(client));
        let has_answered = |count| {
            until("more answers", || {
                let failed = clients.iter().any(|client| client.is_finished()) && answered.load(Relaxed) < 120;
                (failed || answered.load(Relaxed) >= count).then_some(())
            });
        };
        // One worker after each ten answers, and one host in the middle.
        for killed in 1..12 {
            has_answered(10 * killed);
            if killed == 6 {
                first.kill();
            }
            let workers = processes(second.0.as_ref().unwrap(), "PoolWorker");
            workers.get(killed % 2).or(workers.first()).into_iter().for_each(|worker| {
                let _ = kill_process(*worker, Signal::KILL);
            });
        }
    });
    assert_eq!(answered.load(Relaxed), 160);
}
