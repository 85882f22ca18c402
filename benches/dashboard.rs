//! What a dashboard costs the pool that it shows, when nobody looks and while a page is open.
//!
//! `cargo bench -p multiprocess-benches --features dashboard --bench dashboard -- ROUNDS` (9) prints for calls one at a time and for a `map` of tiny
//! items how many were done in a second and a half, compared with the same round without a dashboard: the median, the least and the most.

use multiprocess::{self as mp, Pool, Process};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Longer than a page waits before it asks again.
const MEASURED: Duration = Duration::from_millis(1500);
const ITEMS: i64 = 100_000;

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Without,
    Unwatched,
    Open,
}

fn increment(n: i64) -> i64 {
    n + 1
}

/// Asks for the content as the page's script does, until it is killed.
fn look(address: String) -> mp::Result<()> {
    let host = address.trim_start_matches("http://").trim_end_matches('/').to_owned();
    loop {
        let mut page = TcpStream::connect(&host)?;
        write!(page, "GET /content?width=1280 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        page.read_to_string(&mut text)?;
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Calls in a second, and items of maps in a second.
async fn measure(mode: Mode) -> mp::Result<[f64; 2]> {
    let pool = Pool::new(2)?;
    pool.map(increment, 0..ITEMS).await?;
    let dashboard = match mode {
        Mode::Without => None,
        Mode::Unwatched | Mode::Open => Some(pool.dashboard("127.0.0.1:0").await?),
    };
    let page = match &dashboard {
        Some(dashboard) if mode == Mode::Open => Some(Process::spawn(look, (dashboard.url(),))?),
        _ => None,
    };
    let (started, mut calls) = (Instant::now(), 0);
    while started.elapsed() < MEASURED {
        calls += pool.apply(increment, (0,)).await?;
    }
    let calls = calls as f64 / started.elapsed().as_secs_f64();
    let (started, mut items) = (Instant::now(), 0);
    while started.elapsed() < MEASURED {
        items += pool.map(increment, 0..ITEMS).await?.len();
    }
    let items = items as f64 / started.elapsed().as_secs_f64();
    if let Some(page) = page {
        assert!(page.is_alive(), "the page could not be read");
        page.kill()?;
    }
    Ok([calls, items])
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let rounds = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(9);
        let mut ratios = [[vec![], vec![]], [vec![], vec![]]];
        for round in 0..rounds {
            let mut modes = [Mode::Without, Mode::Unwatched, Mode::Open];
            modes.rotate_left(round % 3);
            let mut rates = [[0.0; 2]; 3];
            for mode in modes {
                rates[mode as usize] = measure(mode).await?;
            }
            for (of_mode, rate) in ratios.iter_mut().zip(&rates[1..]) {
                of_mode.iter_mut().zip(rate).zip(rates[0]).for_each(|((all, rate), without)| all.push(rate / without));
            }
        }
        for (mode, of_mode) in ["with a dashboard", "with an open page"].iter().zip(&mut ratios) {
            for (what, all) in ["apply", "map"].iter().zip(of_mode) {
                all.sort_by(f64::total_cmp);
                println!("{mode:18} {what:6} {:.3} ({:.3} to {:.3})", all[all.len() / 2], all[0], all[all.len() - 1]);
            }
        }
        Ok(())
    })
}
