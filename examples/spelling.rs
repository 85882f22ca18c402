//! A spelling checker: the ways to give a pool work, and to look after its workers.
//!
//! The word list is loaded once for all workers (`preload`), pages come as a stream (`map_in_pool`), tuples as arguments (`starmap`), the pool grows and shrinks
//! (`resize`), one worker is kept for several calls (`checkout`), each says what it did before it ends (`finalizer`), and a test runs the same functions without
//! processes (`Pool::in_process`).
//!
//! `cargo run --example spelling`

use futures::{StreamExt, TryStreamExt, stream};
use multiprocess::{self as mp, Fd, Pool, PoolStreamExt, Queue, Task, current_task};
use std::collections::HashSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

static WORDS: OnceLock<HashSet<&str>> = OnceLock::new();

/// Runs in the fork server: its copies, the workers, have the list already, and share its memory.
fn load() {
    _ = WORDS.set("the quick brown fox jumps over lazy dog".split(' ').collect());
}

fn misspelt(page: String) -> Vec<String> {
    let words = WORDS.get_or_init(HashSet::new);
    page.split(' ').filter(|word| !words.contains(word)).map(str::to_owned).collect()
}

fn is_word(word: String, or_else: bool) -> bool {
    WORDS.get().map_or(or_else, |words| words.contains(&*word))
}

static SEEN: AtomicU64 = AtomicU64::new(0);

/// Which call of this worker it is.
fn count() -> u64 {
    SEEN.fetch_add(1, Relaxed)
}

/// Ends when it is asked to, so its worker need not be killed.
fn check_for_ever() -> bool {
    let task = current_task().expect("it runs in a pool");
    while !task.is_cancelled() {
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn say_goodbye(goodbyes: Queue<u64>) {
    _ = goodbyes.try_put(SEEN.load(Relaxed));
}

fn main() -> mp::Result<()> {
    mp::run(async {
        mp::preload(load)?;
        mp::preloaded().await?; // not needed: a pool waits for it by itself
        let goodbyes = Queue::unbounded()?;
        let pool = Pool::builder()
            .workers(2)
            .memory_limit(1 << 32) // of address space; an allocation beyond it fails, in its worker only
            .finalizer(say_goodbye, (goodbyes.clone(),))
            .build()?;

        // A stream of pages in, a stream of results out, in order.
        let pages = ["the qquick fox", "the lazy dog", "jumsp over"].map(str::to_owned);
        let wrong: Vec<_> =
            stream::iter(pages.clone()).map_in_pool(&pool, misspelt).try_concat().await?.into_iter().collect();
        println!("misspelt: {wrong:?}");
        // The same, called on the pool; and results as they come, with `imap_unordered`.
        let mut in_order = pool.imap_stream(misspelt, stream::iter(pages.clone()));
        println!("of the first page: {:?}", in_order.next().await.expect("three pages")?);
        drop(in_order); // cancels the rest

        let pairs = ["fox", "fxo"].map(|word| (word.to_owned(), false));
        println!("words: {:?}", pool.starmap(is_word, pairs).await?);

        // Tasks are values: a queue can carry them, a pool runs them.
        println!(
            "a task: {}",
            pool.run(Task::of(is_word, ("dog".to_owned(), false)))
                .retries(2)
                .back_off(Duration::from_millis(10))
                .await?
        );
        let sorted = pool.map_async(misspelt, pages);
        let begun = pool.apply_async(misspelt, ("the dogg".to_owned(),));
        println!("begun at once, awaited later: {:?}", begun.await?);
        println!("and of three pages: {}", sorted.await?.concat().len());

        pool.resize(3).await?;
        let worker = pool.checkout().await?;
        for n in 1..=3 {
            println!("call {n} of one worker: {}", worker.apply(count, ()).await.is_ok());
        }
        drop(worker);

        let stopped = pool.apply(check_for_ever, ()).timeout(Duration::from_millis(20)).grace(Duration::from_secs(60));
        println!("asked to stop, it did: {}", stopped.await?);

        // Descriptors travel too: a worker writes into our pipe.
        let (mut read, write) = std::io::pipe()?;
        pool.apply(
            |mut pipe: Fd<std::io::PipeWriter>| std::io::Write::write_all(&mut *pipe, b"hello").is_ok(),
            (Fd::new(write),),
        )
        .await?;
        println!("through the pipe: {}", std::io::read_to_string(&mut read)?);

        let lost = pool.shutdown(Duration::from_secs(60)).await;
        println!("lost: {}, goodbyes: {}", lost.killed() + lost.not_begun(), goodbyes.len());

        // The same calls on a thread of this process, for tests and debuggers.
        let here = Pool::in_process()?;
        println!("here: {}", here.apply(std::process::id, ()).await? == std::process::id());
        Ok(())
    })
}
