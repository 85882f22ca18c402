//! The programs of this folder, run as they are: real sockets, a real scrape, exported spans.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../../../tests/programs/mod.rs"]
mod programs;

use prometheus_parse::{LineInfo, Sample, SampleType, Scrape, Value};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

const TESTED: [&str; 4] = ["encrypted", "matrix", "one_trace", "service"];

#[test]
fn every_program_of_the_folder_has_a_test() {
    let files = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap().map(|entry| entry.unwrap().path());
    let sources = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let names: BTreeSet<_> = sources.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(names, TESTED.map(String::from).into());
}

/// What a program prints, which has to end well.
fn output_of(name: &str) -> String {
    let output = programs::finish(programs::start(&programs::example(name), [""; 0]), DEADLINE);
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn two_processes_fill_a_matrix_that_a_third_sees() {
    let printed = "[[0, 0, 0, 0, 0, 0],\n [0, 1, 2, 3, 4, 5],\n [0, 2, 4, 6, 8, 10],\n [0, 3, 6, 9, 12, 15]]\n\
                   sums of the rows: [0, 15, 30, 45]\n";
    let text = output_of("matrix");
    let (shown, wrong) = text.split_once("a wrong shape: ").unwrap();
    assert_eq!(shown, printed);
    assert!(wrong.starts_with("an array of 24 elements cannot be seen in this shape"), "{wrong}");
}

#[test]
fn a_process_and_a_listener_talk_through_tls() {
    assert_eq!(output_of("encrypted"), "asked: Who is there?\nanswered: A listener.\n");
}

/// A line that `one_trace` prints.
#[derive(Debug)]
struct Span<'a> {
    trace: &'a str,
    id: &'a str,
    parent: &'a str,
    process: &'a str,
    name: &'a str,
    events: &'a str,
}

#[test]
fn one_trace_leads_from_the_request_through_the_worker_to_the_workers_of_its_nested_pool() {
    let text = output_of("one_trace");
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("30 pages"));
    let span = |line| {
        let words: Vec<_> = str::split(line, ' ').collect();
        let [trace, id, parent, process, name, events] = words[..] else { panic!("{line}") };
        Span { trace, id, parent, process, name, events }
    };
    let spans: Vec<Span> = lines.map(span).collect();
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let (request, report, chapters) = (named("request"), named("report"), named("chapter"));
    assert_eq!((spans.len(), request.len(), report.len(), chapters.len()), (4, 1, 1, 2), "{text}");
    let (request, report) = (request[0], report[0]);
    assert!(spans.iter().all(|span| span.trace == request.trace), "there is one trace: {text}");
    assert_eq!(request.parent, "0000000000000000", "{text}");
    assert_eq!(report.parent, request.id, "{text}");
    assert!(report.process != request.process, "{text}");
    for chapter in chapters {
        assert_eq!((chapter.parent, chapter.events), (report.id, "events=1"), "{text}");
        assert!(chapter.process != report.process && chapter.process != request.process, "{text}");
    }
}

/// The example `service`, and how its requests were answered.
struct Service {
    program: Option<Child>,
    address: String,
    statuses: Mutex<BTreeMap<u16, usize>>,
}

impl Service {
    fn start() -> Self {
        let mut program = programs::start(&programs::example("service"), ["127.0.0.1:0"]);
        let stdout = program.stdout.take().unwrap();
        let mut service = Self { program: Some(program), address: String::new(), statuses: Mutex::default() };
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        service.address = line.trim().strip_prefix("serving at http://").expect("its first line").to_owned();
        service
    }

    fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("a whole answer");
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn primes(&self, below: u64) -> (u16, String) {
        let answer = self.get(&format!("/primes/{below}"));
        *self.statuses.lock().unwrap().entry(answer.0).or_default() += 1;
        answer
    }

    fn count(&self, status: u16) -> usize {
        self.statuses.lock().unwrap().get(&status).copied().unwrap_or_default()
    }

    fn scrape(&self) -> Scrape {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let strange = text.lines().find(|line| LineInfo::parse(line) == LineInfo::Ignored);
        assert_eq!(strange, None);
        Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(program) = &mut self.program {
            let _ = kill_process_group(Pid::from_child(program), Signal::KILL);
            let _ = program.wait();
        }
    }
}

/// The one sample of this name with these labels.
fn sample<'a>(scrape: &'a Scrape, name: &str, labels: &[(&str, &str)]) -> &'a Sample {
    let has_labels = |sample: &&Sample| labels.iter().all(|(label, value)| sample.labels.get(label) == Some(*value));
    let mut found = scrape.samples.iter().filter(|sample| sample.metric == name).filter(has_labels);
    let first = found.next().unwrap_or_else(|| panic!("no {name} {labels:?} in {scrape:#?}"));
    assert!(found.next().is_none(), "{name} {labels:?} is there twice");
    first
}

fn figure(scrape: &Scrape, name: &str, labels: &[(&str, &str)]) -> f64 {
    match sample(scrape, name, labels).value {
        Value::Counter(value) | Value::Gauge(value) => value,
        ref other => panic!("{name}: {other:?}"),
    }
}

/// The rows of the table of the documentation: a name and its kind.
fn listed() -> Vec<(String, SampleType)> {
    let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../src/observe/metrics.rs"));
    let source = source.unwrap();
    let rows = source.lines().filter_map(|line| line.strip_prefix("/// | `"));
    let row = |row: &str| {
        let mut cells = row.split('|');
        let (name, kind) = (cells.next().unwrap().trim().trim_end_matches('`'), cells.next().unwrap().trim());
        (name.to_owned(), SampleType::parse(kind))
    };
    rows.map(row).collect()
}

#[test]
fn service_under_layers_of_tower_answers_sheds_and_is_scraped() {
    let service = Service::start();

    assert_eq!(service.primes(1_000), (200, "168 primes below 1000".into()));
    assert_eq!(service.primes(1_000), (200, "168 primes below 1000".into()));
    let (status, text) = service.primes(0);
    assert!(status == 500 && text.contains("there is no number below 0"), "{status}: {text}");
    assert_eq!(service.primes(1_000_000_000_000).0, 504);

    // Two run, a few wait, and the others are shed.
    std::thread::scope(|scope| {
        for n in 0..40 {
            let service = &service;
            scope.spawn(move || service.primes(2_000_000_000_000 + n));
        }
    });
    assert_eq!(service.count(503) + service.count(504), 41);
    assert!(service.count(503) >= 10 && service.count(504) >= 3, "{:?}", service.statuses);
    programs::until("it answers again", || {
        (service.primes(2_000) == (200, "303 primes below 2000".into())).then_some(())
    });

    let pool = ("pool", "primes");
    let scrape = programs::until("all its workers are idle", || {
        let scrape = service.scrape();
        let idle = figure(&scrape, "multiprocess_pool_workers", &[pool, ("state", "idle")]);
        (idle == 2.0).then_some(scrape)
    });
    for (name, kind) in listed() {
        let samples: Vec<_> = scrape.samples.iter().filter(|sample| sample.metric == name).collect();
        let is_of_its_kind = |sample: &&Sample| match kind {
            SampleType::Counter => matches!(sample.value, Value::Counter(_)),
            SampleType::Gauge => matches!(sample.value, Value::Gauge(_)),
            SampleType::Histogram => matches!(sample.value, Value::Histogram(_)),
            _ => false,
        };
        assert!(!samples.is_empty() && samples.iter().all(is_of_its_kind), "{name}: {samples:?}");
        assert!(scrape.docs.contains_key(&name), "{name} has no description");
    }
    assert_eq!(listed().len(), 18);

    let items = |outcome| figure(&scrape, "multiprocess_pool_items_total", &[pool, ("outcome", outcome)]);
    assert_eq!(
        (items("done"), items("panicked"), items("died")),
        (2.0, 1.0, 0.0),
        "known answers are not computed again"
    );
    assert!((1.0..=41.0).contains(&items("cancelled")), "{}", items("cancelled"));
    for state in ["queued", "running"] {
        assert_eq!(figure(&scrape, "multiprocess_pool_items", &[pool, ("state", state)]), 0.0, "{state}");
    }
    assert!(figure(&scrape, "multiprocess_pool_workers_restarted_total", &[pool]) >= 1.0);
    assert!(figure(&scrape, "multiprocess_pool_resident_bytes", &[pool]) > 1e6);
    let Value::Histogram(buckets) = &sample(&scrape, "multiprocess_pool_run_seconds", &[pool]).value else { panic!() };
    assert!(buckets.windows(2).all(|two| two[0].count <= two[1].count) && buckets.last().unwrap().count >= 3.0);
    assert_eq!(figure(&scrape, "multiprocess_queue_capacity", &[("queue", "log")]), 1024.0);
    let [put, taken] =
        ["put", "taken"].map(|what| figure(&scrape, &format!("multiprocess_queue_{what}_total"), &[("queue", "log")]));
    let lines = service.statuses.lock().unwrap().values().sum::<usize>() as f64;
    assert!(put == lines && taken <= lines, "a line for each request: {put} of {lines} put, {taken} taken");
    // Each known answer was looked up, and each new one inserted.
    assert!(figure(&scrape, "multiprocess_manager_requests_total", &[("manager", "known")]) >= lines);
    assert_eq!(figure(&scrape, "multiprocess_manager_failed_calls_total", &[("manager", "known")]), 0.0);
    assert_eq!(figure(&scrape, "multiprocess_manager_up", &[("manager", "known")]), 1.0);
    assert_eq!(figure(&scrape, "multiprocess_manager_objects", &[("manager", "known")]), 1.0);
    for (status, count) in service.statuses.lock().unwrap().iter() {
        let status = status.to_string();
        assert_eq!(figure(&scrape, "http_requests_total", &[("status", &status)]), *count as f64, "{status}");
    }
    stop(service);
}

/// The program ends in order, and its logger has written a line for each request.
fn stop(mut service: Service) {
    let requests: usize = service.statuses.lock().unwrap().values().sum();
    let program = service.program.take().unwrap();
    kill_process(Pid::from_child(&program), Signal::TERM).unwrap();
    let output = programs::finish(program, DEADLINE);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {log}", output.status);
    assert_eq!(log.lines().filter(|line| line.starts_with("/primes/")).count(), requests, "{log}");
    assert!(log.lines().any(|line| line.starts_with("a page with all of it: http://127.0.0.1:")), "{log}");
}
