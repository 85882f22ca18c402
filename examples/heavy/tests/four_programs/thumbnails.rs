use super::{DEADLINE, Program};
use crate::programs::until;
use rustix::process::{Pid, Signal, kill_process_group};
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// It is blurred so often that that does not end.
const ENDLESS: &str = "/thumbnail/30/18446744073709551615";

struct Service {
    program: Program,
    address: String,
}

impl Service {
    fn start() -> Self {
        let mut program = Program::start("thumbnails", ["127.0.0.1:0"]);
        let mut line = String::new();
        BufReader::new(program.child().stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("serving at http://").unwrap().to_string();
        let service = Self { program, address };
        // From here on it awaits signals.
        assert_eq!(service.ask("/thumbnail/10/0", &picture()).0, 200);
        service
    }

    fn send(&self, path: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let method = if body.is_empty() { "GET" } else { "POST" };
        let head = format!("{method} {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        stream
    }

    fn ask(&self, path: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let mut stream = self.send(path, body);
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole answer");
        let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
        (status, answer.split_off(end + 4))
    }

    fn metric(&self, name: &str) -> u64 {
        let (status, text) = self.ask("/metrics", b"");
        assert_eq!(status, 200);
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("thumbnails_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }
}

/// A picture whose left half is red and whose right half is blue.
fn picture() -> Vec<u8> {
    let row = [[200, 0, 0]; 60].into_iter().chain([[0, 0, 100]; 60]).flatten();
    encode(120, 80, &row.collect::<Vec<u8>>().repeat(80))
}

fn encode(width: u32, height: u32, pixels: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(pixels).unwrap();
    file
}

/// A file of a few bytes whose picture would take 4.8 GB.
fn bomb() -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 40_000, 40_000);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().unwrap();
    writer.write_chunk(png::chunk::IDAT, b"\x78\x9c").unwrap();
    drop(writer);
    file
}

fn assert_is_thumbnail(answer: (u16, Vec<u8>)) {
    assert_eq!(answer.0, 200, "{}", String::from_utf8_lossy(&answer.1));
    let mut reader = png::Decoder::new(Cursor::new(answer.1)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height), (30, 20));
    let row = [[200, 0, 0]; 15].into_iter().chain([[0, 0, 100]; 15]).flatten();
    assert_eq!(pixels, row.collect::<Vec<u8>>().repeat(20));
}

#[test]
fn no_request_is_lost_while_a_worker_is_killed_every_100_ms() {
    let (service, answered, is_over) = (Service::start(), AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    assert_is_thumbnail(service.ask("/thumbnail/30/0", &picture()));
                    answered.fetch_add(1, Relaxed);
                }
            });
        }
        let start = Instant::now();
        for n in 0.. {
            thread::sleep(Duration::from_millis(100));
            service.program.kill_a_worker(n);
            // A busy machine gets its time.
            let has_done = service.metric("workers_restarted_total") >= 10 && answered.load(Relaxed) >= 20;
            if start.elapsed() > if has_done { Duration::from_secs(2) } else { DEADLINE } {
                break;
            }
        }
        is_over.store(true, Relaxed);
    });
    let (restarted, died) = (service.metric("workers_restarted_total"), service.metric("died_total"));
    assert!(restarted >= 10 && died == 0, "{restarted} restarted, {died} died");
    assert_eq!(service.metric("done_total"), 1 + answered.load(Relaxed) as u64);
}

#[test]
fn a_bomb_and_an_endless_loop_cost_their_own_requests_only() {
    let service = Service::start();
    thread::scope(|scope| {
        let bombs = [(); 2].map(|()| scope.spawn(|| service.ask("/thumbnail/30/0", &bomb()).0));
        let endless = scope.spawn(|| service.ask(ENDLESS, &picture()).0);
        let broken = scope.spawn(|| service.ask("/thumbnail/30/0", b"no picture").0);
        while !endless.is_finished() {
            assert_is_thumbnail(service.ask("/thumbnail/30/0", &picture()));
        }
        assert_eq!(bombs.map(|bomb| bomb.join().unwrap()), [413; 2]);
        assert_eq!((endless.join().unwrap(), broken.join().unwrap()), (504, 422));
    });
    assert_eq!((service.metric("died_total"), service.metric("timed_out_total")), (2, 1));
    assert_is_thumbnail(service.ask("/thumbnail/30/0", &picture()));
}

#[test]
fn requests_beyond_those_that_may_wait_are_refused_at_once() {
    let service = Service::start();
    let mut connections = Vec::new();
    until("a request is refused", || {
        let mut stream = service.send(ENDLESS, &picture());
        let has_queue = service.metric("queued") == 64;
        // An answer that does not come at once is that of a request that waits.
        stream
            .set_read_timeout(Some(if has_queue { Duration::from_millis(200) } else { Duration::from_millis(1) }))
            .unwrap();
        let mut head = [0; 12];
        let is_refused = stream.read_exact(&mut head).is_ok() && head.ends_with(b" 503");
        connections.push(stream);
        is_refused.then_some(())
    });
    assert!(service.metric("rejected_total") > 0);
    // Their clients go away, and their work with them.
    drop(connections);
    until("there is room", || (service.metric("queued") == 0).then_some(()));
    assert_is_thumbnail(service.ask("/thumbnail/30/0", &picture()));
}

#[test]
fn on_sigterm_all_requests_that_have_come_are_answered_and_the_exit_code_is_0() {
    let mut service = Service::start();
    let group = Pid::from_child(service.program.child());
    // One that still comes up has not its name yet.
    let all = multiprocess::cpu_count();
    let workers = until("all workers are up", || Some(service.program.workers().len()).filter(|up| *up == all));
    thread::scope(|scope| {
        let endless: Vec<_> = (0..workers).map(|_| scope.spawn(|| service.ask(ENDLESS, &picture()).0)).collect();
        until("all workers are busy", || (service.metric("running") == workers as u64).then_some(()));
        let waiting = [(); 3].map(|()| scope.spawn(|| service.ask("/thumbnail/30/0", &picture())));
        until("three requests wait", || (service.metric("queued") == 3).then_some(()));
        kill_process_group(group, Signal::TERM).unwrap();
        waiting.into_iter().for_each(|answer| assert_is_thumbnail(answer.join().unwrap()));
        endless.into_iter().for_each(|answer| assert_eq!(answer.join().unwrap(), 504));
    });
    service.program.finish();
}
