//! A crawler that may be killed at any time: each page of a site is in an SQLite database once, however often that happens.
//!
//! ```text
//! urls: a queue --> fetchers: processes that are kept up --> pages: a queue --> this process --> SQLite
//! ```
//!
//! A fetcher has its URL on lease. It may die over a page (this parser does if elements nest too deep): the URL is then in the queue
//! again, and after the third time among the dead letters. The database has the pages that are left to do, so the next run goes on with that.
//!
//! ```text
//! cargo run --release -p multiprocess-heavy-examples --example crawler -- 127.0.0.1:8080 pages.db
//! ```

use futures::future::{FutureExt, select_all};
use multiprocess::{self as mp, Process, Queue, Restart};
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use std::str::Split;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const FETCHERS: usize = 4;
const TIME: Duration = Duration::from_secs(10);
/// A row is a URL that was found, and its page as soon as that is there.
const TABLE: &str = "
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS pages (url TEXT PRIMARY KEY, status INTEGER, words INTEGER, failure TEXT);";

#[derive(Serialize, Deserialize)]
struct Page {
    url: String,
    content: Result<Content, String>,
}

#[derive(Serialize, Deserialize)]
struct Content {
    status: u16,
    words: u64,
    links: Vec<String>,
}

// ---- what runs in the fetchers

async fn fetch_pages(site: String, urls: Queue<String>, pages: Queue<Page>) -> mp::Result<()> {
    // One at a time, so that a page over which this process dies takes no other along.
    while let Ok(url) = urls.lease().await {
        let content = match tokio::time::timeout(TIME, fetch(&site, &url)).await {
            Ok(text) => text.map(|text| parse(&text)).map_err(|error| error.to_string()),
            Err(late) => Err(late.to_string()),
        };
        pages.put(Page { url: url.clone(), content }).await?;
        url.commit()?;
    }
    Ok(())
}

async fn fetch(site: &str, url: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(site).await?;
    stream.write_all(format!("GET {url} HTTP/1.0\r\nHost: {site}\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn parse(answer: &str) -> Content {
    let (head, text) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let links = text.split("<a href=\"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0));
    let links = links.filter(|link| link.starts_with('/')).map(String::from).collect();
    Content { status, words: words(&mut text.split('<')), links }
}

/// The words of an element and of those inside it.
fn words(tokens: &mut Split<'_, char>) -> u64 {
    let mut count = 0;
    while let Some(token) = tokens.next() {
        let (tag, text) = token.split_once('>').unwrap_or(("", token));
        count += text.split_whitespace().count() as u64;
        match tag {
            "div" => count += words(tokens),
            "/div" => break,
            _ => {}
        }
    }
    count
}

// ---- the database

/// Whether the URL is new.
fn note(db: &Connection, url: &str) -> rusqlite::Result<bool> {
    Ok(db.execute("INSERT OR IGNORE INTO pages (url) VALUES (?1)", [url])? > 0)
}

fn to_do(db: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut urls = db.prepare("SELECT url FROM pages WHERE status IS NULL AND failure IS NULL")?;
    urls.query_map([], |row| row.get(0))?.collect()
}

/// Stores a page and notes its links, both or neither, and returns the new ones; `None` if the page was there already.
fn store(db: &mut Connection, page: Page) -> rusqlite::Result<Option<Vec<String>>> {
    let (status, words, links, failure) = match page.content {
        Ok(Content { status, words, links }) => (Some(status), Some(words as i64), links, None),
        Err(failure) => (None, None, Vec::new(), Some(failure)),
    };
    let change = db.transaction()?;
    let update = "UPDATE pages SET status = ?2, words = ?3, failure = ?4
                  WHERE url = ?1 AND status IS NULL AND failure IS NULL";
    if change.execute(update, params![page.url, status, words, failure])? == 0 {
        return Ok(None);
    }
    let mut new = Vec::new();
    for link in links {
        if note(&change, &link)? {
            new.push(link);
        }
    }
    change.commit()?;
    Ok(Some(new))
}

// ---- the program

async fn crawl(site: String, mut db: Connection) -> Result<u64, Box<dyn std::error::Error>> {
    let (urls, pages) = (Queue::unbounded()?.max_deliveries(3), Queue::bounded(64)?);
    let restart = Restart::on_failure().max(1_000, Duration::from_secs(60)).back_off(Duration::ZERO, Duration::ZERO);
    let start =
        |_| Process::builder().restart(restart.clone()).spawn(fetch_pages, (site.clone(), urls.clone(), pages.clone()));
    let mut fetchers = (0..FETCHERS).map(start).collect::<mp::Result<Vec<_>>>()?;

    note(&db, "/")?;
    let mut next = to_do(&db)?;
    let (mut waiting, mut stored) = (0, 0);
    loop {
        waiting += next.len();
        for url in next {
            urls.put(url).await?;
        }
        if waiting == 0 {
            return Ok(stored);
        }
        let dead = urls.dead_letters();
        let page = tokio::select! {
            page = pages.get() => page?,
            url = dead.get() => Page { url: url?, content: Err("three fetchers died over it".into()) },
            (ended, ..) = select_all(fetchers.iter_mut().map(|fetcher| fetcher.wait().boxed())) => {
                return Err(format!("a fetcher does not stay up: {ended:?}").into());
            }
        };
        next = match store(&mut db, page)? {
            Some(new) => {
                (waiting, stored) = (waiting - 1, stored + 1);
                new
            }
            None => Vec::new(),
        };
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    mp::run(async {
        let mut arguments = std::env::args().skip(1);
        let (Some(site), Some(path)) = (arguments.next(), arguments.next()) else {
            return Err("usage: crawler HOST:PORT DATABASE".into());
        };
        let db = Connection::open(path)?;
        db.execute_batch(TABLE)?;
        let stored = crawl(site, db).await?;
        println!("{stored} pages stored");
        Ok(())
    })
}
