use super::{Program, temporary};
use crate::programs::{processes, until};
use rusqlite::{Connection, OpenFlags};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

const PAGES: i64 = 150;
/// The page over which fetchers die, and one that does not exist.
const DEADLY: i64 = 77;
const MISSING: &str = "/missing";

/// A page has its number of words, and links to two further ones, to one that others link to, and to one that is not there.
fn page(n: i64) -> String {
    let links = [2 * n + 1, 2 * n + 2, 7 * n % PAGES].into_iter().filter(|n| *n < PAGES);
    let links: String = links.map(|n| format!("<a href=\"/{n}\"></a>")).collect();
    let text = format!("{links}<a href=\"{MISSING}\"></a><div>{}</div>", "word ".repeat(n as usize));
    if n == DEADLY { "<div>".repeat(400_000) + &text } else { text }
}

/// So many requests may be answered.
static PERMITS: AtomicI64 = AtomicI64::new(0);

/// Answers one request.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    while PERMITS.fetch_update(SeqCst, SeqCst, |permits| (permits > 0).then_some(permits - 1)).is_err() {
        thread::sleep(Duration::from_millis(1));
    }
    let path = line.split(' ').nth(1).unwrap_or_default();
    match path.strip_prefix('/').map(|n| if n.is_empty() { Ok(0) } else { n.parse() }) {
        Some(Ok(n)) => stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{}", page(n)).as_bytes()),
        _ => stream.write_all(b"HTTP/1.0 404 Not Found\r\n\r\n<p>not here"),
    }
}

/// Starts a site, and returns its address.
fn site() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A fetcher that was killed gets no answer.
            thread::spawn(move || _ = answer(stream));
        }
    });
    address
}

/// Has the site answer until the program has stored so many pages; a few more are on their way then.
fn answer_until(path: &Path, count: i64) {
    until("it stores pages", || {
        // One that was spent on a fetcher that is no more is made up for.
        _ = PERMITS.compare_exchange(0, 4, SeqCst, SeqCst);
        stored(path).filter(|stored| *stored >= count)
    });
}

/// URL, status, words, failure.
type Row = (String, Option<u16>, Option<i64>, Option<String>);

/// How many pages are there.
fn stored(path: &Path) -> Option<i64> {
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
    // The program may be at its beginning: there is no table yet, or it is locked.
    db.query_row("SELECT count(*) FROM pages WHERE status IS NOT NULL", [], |row| row.get(0)).ok()
}

#[test]
fn each_page_is_stored_once_though_the_whole_program_is_killed_four_times() {
    let (site, path) = (site(), temporary("pages.db"));
    let start = || Program::start("crawler", [&site, path.to_str().unwrap()]);
    for n in 1..=4 {
        let mut program = start();
        answer_until(&path, n * PAGES / 6);
        // A fetcher alone, which is started again.
        let fetchers = until("there is a fetcher", || {
            let fetchers = processes(program.child(), "Process-");
            (!fetchers.is_empty()).then_some(fetchers)
        });
        kill_process(fetchers[n as usize % fetchers.len()], Signal::KILL).unwrap();
        answer_until(&path, n * PAGES / 6 + 5);
        match n % 2 {
            0 => kill_process_group(Pid::from_child(program.child()), Signal::KILL).unwrap(),
            _ => program.child().kill().unwrap(),
        }
        program.child().wait().unwrap();
        assert!(stored(&path).unwrap() < PAGES, "it was killed in the middle");
    }
    PERMITS.store(i64::MAX / 2, SeqCst);
    let output = start().finish();
    assert!(output.ends_with(" pages stored\n"), "{output}");
    assert_eq!(start().finish(), "0 pages stored\n");

    let db = Connection::open(&path).unwrap();
    let mut rows = db.prepare("SELECT url, status, words, failure FROM pages").unwrap();
    let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))).unwrap();
    let mut rows: Vec<Row> = rows.map(Result::unwrap).collect();
    rows.sort();
    let mut expected: Vec<Row> = (1..PAGES).map(|n| (format!("/{n}"), Some(200), Some(n), None)).collect();
    expected.extend([("/".into(), Some(200), Some(0), None), (MISSING.into(), Some(404), Some(2), None)]);
    // `7 * 0 % PAGES` is the first page by its number.
    expected.push(("/0".into(), Some(200), Some(0), None));
    let deadly = (format!("/{DEADLY}"), None, None, Some("three fetchers died over it".to_string()));
    expected.retain(|row| row.0 != deadly.0);
    expected.push(deadly);
    expected.sort();
    assert_eq!(rows, expected);
    std::fs::remove_file(&path).unwrap();
}
