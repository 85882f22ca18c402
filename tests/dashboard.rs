//! The page of a dashboard: what it shows, whom it answers, and that nobody can hold it up. In a real browser, too.

#[path = "common/browser.rs"]
mod browser;

use browser::Browser;
use multiprocess::{self as mp, Dashboard, DashboardHandle, Event, Lock, Manager, Pool, Queue};
use rustix::process::{Pid, Signal, kill_process};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

mp::test_support!();

/// Longer than anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A browser alone takes a minute to start on such a machine.
const BROWSER: Duration = Duration::from_secs(300);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("in time")
}

/// The answer to these bytes, as far as it came before the connection ended.
async fn answer(address: SocketAddr, request: &[u8]) -> String {
    within(async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // It may be closed before all was read.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    })
    .await
}

async fn get(address: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n");
    answer(address, request.as_bytes()).await
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

/// The contents, once they have all of this.
async fn content_with(dashboard: &DashboardHandle, wanted: &[&str]) -> String {
    let start = Instant::now();
    loop {
        let content = get(dashboard.address(), "/content?width=900").await;
        let lacking: Vec<_> = wanted.iter().filter(|text| !content.contains(**text)).collect();
        if lacking.is_empty() {
            return content;
        }
        assert!(start.elapsed() < LIMIT, "never: {lacking:?} in {content}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn waits(go_on: Event) -> bool {
    go_on.blocking_wait().is_ok()
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
}

#[tokio::test]
async fn the_page_shows_what_the_workers_do_and_did() {
    let pool = Pool::new(2).unwrap();
    let dashboard = pool.dashboard("127.0.0.1:0").await.unwrap();
    pool.map(|n: u64| n + 1, 0..100).await.unwrap();
    let go_on = Event::new().unwrap();
    let call = pool.apply_async(waits, (go_on.clone(),));
    let wanted = [
        "<dt>items done</dt><dd>100</dd>",
        "PoolWorker-1",
        "PoolWorker-2",
        ": dashboard::<wbr>waits",
        "No worker died",
    ];
    let content = content_with(&dashboard, &wanted).await;
    let row = content.lines().find(|line| line.starts_with("<tr>") && line.contains("dashboard::<wbr>waits")).unwrap();
    let busy = pool.stats().workers.into_iter().find(|worker| worker.is_busy).unwrap();
    assert!(row.contains(&busy.pid.to_string()), "{row}");
    // Lanes, rates, times, items, memory.
    assert_eq!(content.matches("<svg width=").count(), 5, "{content}");
    let page = get(dashboard.address(), "/").await;
    assert!(
        page.starts_with("HTTP/1.1 200") && page.contains("<main>") && page.contains("dashboard::<wbr>waits"),
        "{page}"
    );
    go_on.set();
    assert!(call.await.unwrap());
    content_with(&dashboard, &["<dt>items done</dt><dd>101</dd>", "a second now"]).await;
}

#[tokio::test]
async fn a_killed_worker_has_a_red_lane_and_its_reason_is_shown() {
    let pool = Pool::new(2).unwrap();
    let dashboard = pool.dashboard("127.0.0.1:0").await.unwrap();
    content_with(&dashboard, &["PoolWorker-2"]).await;
    let call = pool.apply_async(|| std::thread::sleep(LIMIT * 2), ());
    let pid = within(async {
        loop {
            match pool.stats().workers.into_iter().find(|worker| worker.is_busy) {
                Some(worker) => return worker.pid,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    });
    let pid = pid.await;
    kill(pid);
    assert!(within(call).await.is_err());
    let death = format!("(pid {pid}) died while it ran item 0 of dashboard::a_killed_worker");
    let content =
        content_with(&dashboard, &["Died in this minute: PoolWorker-", "fill=\"#D55E00\"", "SIGKILL", &death]).await;
    assert!(content.contains("\u{d7} PoolWorker-"), "also by a sign: {content}");
    let deaths = pool.stats().deaths;
    assert_eq!((deaths.len(), deaths[0].pid), (1, pid));
    assert_eq!(deaths[0].status.and_then(|status| status.signal()), Some(9));
    let item = format!("<li><b>{}</b>, pid {pid}, signal: 9 (SIGKILL), ", deaths[0].name);
    assert!(content.contains(&item), "{item} in {content}");
}

#[tokio::test]
async fn queues_managers_and_locks_are_shown_also_when_a_manager_is_gone() {
    let (queue, manager) = (Queue::bounded(7).unwrap(), Manager::start().await.unwrap());
    let _list = manager.list::<u32>().await.unwrap();
    (0..3).for_each(|n| queue.try_put(n).unwrap());
    let dashboard = Dashboard::new().queue("jobs & <more>", &queue).manager("state", &manager);
    assert!(format!("{dashboard:?}").contains("jobs"));
    let dashboard = dashboard.serve("localhost:0").await.unwrap();
    let lock = Lock::new().unwrap();
    let guard = lock.try_acquire().unwrap();
    let holder = format!("(pid {}) for ", std::process::id());
    let wanted = [
        "Queue jobs &amp; &lt;more&gt;",
        "items: 3 now, of at most 7",
        "<td>state</td><td>1 object</td>",
        "<td>lock</td>",
        &holder,
    ];
    content_with(&dashboard, &wanted).await;
    drop(guard);
    manager.shutdown().await.unwrap();
    content_with(&dashboard, &["does not answer: "]).await;
}

#[tokio::test]
async fn pools_without_workers_and_pools_that_are_dropped_are_shown() {
    let (alone, pool) = (Pool::in_process().unwrap(), Pool::new(1).unwrap());
    let dashboard = Dashboard::new().pool("alone", &alone).pool("short", &pool).serve("127.0.0.1:0").await.unwrap();
    alone.apply(|| 1, ()).await.unwrap();
    content_with(&dashboard, &["Pool alone", "no worker process", "<dd>1</dd>", "Pool short", "PoolWorker-1"]).await;
    // It does not keep it.
    let worker = || pool.stats().workers.first().map(|worker| worker.pid);
    let killed = worker().unwrap();
    kill(killed);
    content_with(&dashboard, &[&format!("pid {killed}, signal: 9 (SIGKILL)")]).await;
    let pid = within(async {
        loop {
            match worker().filter(|pid| *pid != killed) {
                Some(pid) => return pid,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    })
    .await;
    drop(pool);
    // Its last minutes stay, and are shown as such.
    content_with(&dashboard, &["This pool was dropped ", " ago. Below is what ", &format!("pid {killed}, signal: 9")])
        .await;
    within(async {
        while Path::new(&format!("/proc/{pid}")).exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn only_readers_who_ask_for_this_address_are_answered() {
    let pool = Pool::new(1).unwrap();
    let dashboard = pool.dashboard("127.0.0.1:0").await.unwrap();
    let address = dashboard.address();
    let ask = async |method: &str, path: &str, host: &str| {
        answer(address, format!("{method} {path} HTTP/1.1\r\n{host}content-length: 0\r\n\r\n").as_bytes()).await
    };
    for path in ["/", "/content", "/content?width=0", "/content?width=99999999999", "/style.css", "/script.js", "/?x"] {
        let answer = ask("GET", path, "host: localhost\r\n").await;
        assert_eq!(status(&answer), 200, "{path}: {answer}");
        let headers = answer.split("\r\n\r\n").next().unwrap();
        for header in ["content-security-policy: default-src 'none'", "x-content-type-options: nosniff", "no-store"] {
            assert!(headers.contains(header), "{path}: {headers}");
        }
        assert!(!headers.contains("access-control"), "no other site may read it: {headers}");
        let answer = ask("HEAD", path, "host: localhost\r\n").await;
        assert!(status(&answer) == 200 && answer.ends_with("\r\n\r\n"), "{path}: {answer}");
    }
    for path in ["/nothing", "/../etc/passwd", "//", "/style.css/"] {
        assert_eq!(status(&ask("GET", path, "host: localhost\r\n").await), 404, "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        let answer = ask(method, "/", "host: localhost\r\n").await;
        assert!(status(&answer) == 405 && answer.contains("allow: GET, HEAD"), "{method}: {answer}");
    }
    for host in ["evil.example", "evil.example:80", "10.1.2.3", "localhost.evil.example", "[::2]:80"] {
        let answer = ask("GET", "/", &format!("host: {host}\r\n")).await;
        assert!(status(&answer) == 403 && !answer.contains("PoolWorker"), "{host}: {answer}");
    }
    for none in ["", "host: localhost\r\nhost: evil.example\r\n"] {
        assert_eq!(status(&ask("GET", "/", none).await), 400, "{none:?}");
    }
    let named = Dashboard::new().host("Status.Example.com.").serve("127.0.0.1:0").await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: status.example.com\r\n\r\n";
    assert_eq!(status(&answer(named.address(), request).await), 200);
    let wrong = Dashboard::new().host("https://status.example.com/").serve("127.0.0.1:0").await.unwrap_err();
    assert!(wrong.to_string().contains("https://status.example.com/"), "{wrong}");
    assert_eq!(status(&answer(address, request).await), 403);
}

#[tokio::test]
async fn an_address_that_others_reach_is_refused_unless_permitted() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
        let error = Dashboard::new().serve(address).await.unwrap_err();
        assert!(error.to_string().contains("allow_remote"), "{error}");
    }
    for address in ["", "here", "127.0.0.1", "127.0.0.1:99999"] {
        assert!(Dashboard::new().serve(address).await.unwrap_err().to_string().contains("127.0.0.1:0"), "{address}");
    }
    let dashboard = Dashboard::new().allow_remote().serve("0.0.0.0:0").await.unwrap();
    assert!(dashboard.url().starts_with("http://127.0.0.1:"), "{dashboard:?}");
    let address = SocketAddr::from(([127, 0, 0, 1], dashboard.address().port()));
    assert_eq!(status(&get(address, "/").await), 200);
    let taken = Dashboard::new().serve(&address.to_string()).await.unwrap_err();
    assert_eq!(taken.kind(), mp::ErrorKind::Io, "{taken}");
}

#[tokio::test]
async fn garbage_is_refused_and_does_no_harm() {
    let dashboard = Dashboard::new().serve("127.0.0.1:0").await.unwrap();
    let long = format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "x".repeat(100_000));
    let many = format!("GET / HTTP/1.1\r\nhost: localhost\r\n{}\r\n", "a: b\r\n".repeat(5_000));
    let mut random = vec![0; 1000];
    let mut seed = 1_u32;
    random.fill_with(|| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    });
    let requests: [&[u8]; 8] = [
        b"",
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", // TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: local\0host\r\n\r\n",
        long.as_bytes(),
        many.as_bytes(),
    ];
    for request in requests.into_iter().chain([&random[..]]) {
        let mut stream = TcpStream::connect(dashboard.address()).await.unwrap();
        let _ = stream.write_all(request).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = within(stream.read_to_end(&mut answer)).await;
        let status = status(&String::from_utf8_lossy(&answer));
        assert!(status == 0 || (400..500).contains(&status), "{status} for {:?}", &request[..request.len().min(40)]);
    }
    assert_eq!(status(&get(dashboard.address(), "/").await), 200);
}

#[tokio::test]
async fn slow_clients_hold_nothing_up_and_are_dismissed() {
    let dashboard = Dashboard::new().serve("127.0.0.1:0").await.unwrap();
    let mut slow = Vec::new();
    for _ in 0..200 {
        let mut stream = within(TcpStream::connect(dashboard.address())).await.unwrap();
        let _ = stream.write_all(b"GET / HT").await;
        slow.push(stream);
    }
    assert_eq!(status(&get(dashboard.address(), "/").await), 200);
    for mut stream in slow {
        let mut rest = Vec::new();
        // Those that were too many at once, the others when their time was up.
        let _ = within(stream.read_to_end(&mut rest)).await;
        assert!(!String::from_utf8_lossy(&rest).contains("200 OK"));
    }
}

#[tokio::test]
async fn the_drop_of_its_handle_stops_a_dashboard() {
    let pool = Pool::new(1).unwrap();
    let dashboard = pool.dashboard("127.0.0.1:0").await.unwrap();
    let address = dashboard.address();
    let mut open = TcpStream::connect(address).await.unwrap();
    drop(dashboard);
    let mut rest = Vec::new();
    let _ = within(open.read_to_end(&mut rest)).await;
    within(async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert_eq!(pool.apply(|| 1, ()).await.unwrap(), 1);
}

fn make_thumbnail(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

fn read_index(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

fn check_sum(n: u64) -> u64 {
    std::thread::sleep(Duration::from_millis(2));
    n * n
}

/// Some work of each kind, until it is dropped.
async fn work(pool: Pool, jobs: Queue<u64>) {
    let mut seed = 7_u64;
    let mut calls = Vec::new();
    loop {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let ms = 400 + (seed >> 40) % 1800;
        calls.push(pool.apply_async(make_thumbnail, (ms,)));
        if seed >> 61 == 0 {
            calls.push(pool.apply_async(read_index, (3 * ms,)));
        }
        if seed >> 62 == 1 {
            let _ = pool.map(check_sum, 0..300).await;
        }
        let _ = if jobs.len() > 40 { jobs.try_get() } else { jobs.try_put(ms).map(|()| ms).map_err(mp::Error::from) };
        if calls.len() > 9 {
            let _ = calls.remove(0).await;
        }
    }
}

/// Texts of pictures that lie on each other or outside, heads of tables that are broken, words that are broken, and whatever makes the page wider
/// than the window. A word ends behind a hyphen too.
const UGLY: &str = "(() => { const bad = []; \
    for (const svg of document.querySelectorAll('figure > svg')) { \
        const all = svg.getBoundingClientRect(); \
        const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()]); \
        texts.forEach(([text, a], i) => { \
            if (a.left < all.left - 1 || a.right > all.right + 1 || a.top < all.top - 1 || a.bottom > all.bottom + 1) \
                bad.push('outside: ' + text); \
            texts.slice(i + 1).forEach(([other, b]) => { \
                if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2) \
                    bad.push(text + ' on ' + other); }); }); } \
    for (const head of document.querySelectorAll('th')) { \
        const text = document.createRange(); text.selectNodeContents(head); \
        if (text.getClientRects().length > 1) bad.push('broken: ' + head.textContent); } \
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); \
    while (texts.nextNode()) { \
        const node = texts.currentNode, word = document.createRange(); \
        for (const found of node.parentNode.closest('svg, script') ? [] : node.data.matchAll(/[^\\s-]+-?/g)) { \
            word.setStart(node, found.index); word.setEnd(node, found.index + found[0].length); \
            if (new Set([...word.getClientRects()].map(line => line.top)).size > 1) bad.push('broken: ' + found[0]); } } \
    if (document.documentElement.scrollWidth > innerWidth) bad.push('wider than the window: ' + document.documentElement.scrollWidth); \
    return bad.join('; '); })()";

/// `.ci/chromium` installs it.
///
/// For the pictures of the guide `DASHBOARD_SECONDS=170` has it work longer before they are taken. In `target/tmp`,
/// `pngquant --nofs --strip --speed 1 --output GUIDE/dashboard-1280.png 64 dashboard-1280.png` and the same of `dashboard-400-top.png` make
/// them small, and `UPDATE_DOCS=1 cargo test --test docs` puts them into rustdoc.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_browser_the_lane_of_a_killed_worker_turns_red_by_itself() {
    let Some(program) = browser::installed() else {
        assert!(std::env::var_os("CI").is_none(), "this test needs Chromium: run .ci/chromium");
        return eprintln!(
            "SKIPPED: no Chromium is installed, run .ci/chromium; the dashboard was not tried in a browser"
        );
    };
    let pool = Pool::builder().workers(4).build().unwrap();
    let (jobs, manager, lock) = (Queue::bounded(50).unwrap(), Manager::start().await.unwrap(), Lock::new().unwrap());
    let _list = manager.list::<u32>().await.unwrap();
    let _guard = lock.try_acquire().unwrap();
    let dashboard = Dashboard::new().pool("pictures", &pool).queue("jobs", &jobs).manager("state", &manager);
    let dashboard = dashboard.serve("127.0.0.1:0").await.unwrap();
    let work = tokio::spawn(work(pool.clone(), jobs));
    let seconds = std::env::var("DASHBOARD_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
    tokio::time::sleep(Duration::from_secs(seconds)).await;

    let (url, directory) = (dashboard.url(), PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
    let visit = tokio::task::spawn_blocking(move || {
        let mut browser = Browser::start(&program, &directory, BROWSER);
        browser.resize(1280, 900);
        browser.open(&url);
        browser.wait_for("document.querySelectorAll('.lanes svg text').length >= 4");
        browser.wait_for("document.getElementById('state').textContent == 'updates itself'");
        let red = "document.querySelectorAll('.lanes rect[fill=\"#D55E00\"]').length > 0";
        assert_eq!(browser.value(red), false);
        // A worker that is at work.
        let busy = "(() => { const rows = [...document.querySelectorAll('.workers tbody tr')]; \
                    const row = rows.find(row => row.cells[2].textContent.includes('::')); \
                    return row ? Number(row.cells[1].textContent) : 0; })()";
        browser.wait_for(&format!("{busy} > 0"));
        kill(browser.value(busy).as_u64().unwrap() as u32);
        browser.wait_for(red);
        browser.wait_for("document.querySelector('ol.deaths').textContent.includes('SIGKILL')");
        browser.wait_for(
            "document.querySelector('.lanes figcaption').textContent.includes('Died in this minute: PoolWorker-')",
        );
        let mut ugly = Vec::new();
        for width in [1280, 400] {
            browser.resize(width, 900);
            browser.wait_for(
                "(free => free >= 0 && free < 20)(document.querySelector('main').clientWidth - document.querySelector('.lanes > svg').getAttribute('width'))",
            );
            ugly.push(browser.value(UGLY));
            let shot = browser.screenshot(width, u32::MAX);
            std::fs::write(directory.join(format!("dashboard-{width}.png")), shot).unwrap();
        }
        // What comes below it is more of the same.
        std::fs::write(directory.join("dashboard-400-top.png"), browser.screenshot(400, 1300)).unwrap();
        let foreign = browser.value(&format!(
            "performance.getEntriesByType('resource').filter(r => !r.name.startsWith('{url}') && !r.name.startsWith('data:')).length"
        ));
        (ugly, foreign, std::mem::take(&mut browser.complaints))
    });
    // The browser ends at its own deadline.
    let (ugly, foreign, complaints) = visit.await.unwrap();
    work.abort();
    assert_eq!(ugly, ["", ""], "at 1280 and at 400 pixels; see target/tmp/dashboard-*.png");
    assert_eq!(foreign, 0, "it loads nothing from elsewhere");
    assert!(complaints.is_empty(), "{complaints:?}");
}
