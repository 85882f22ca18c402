//! A progress bar for a map: `Progress` says how far it is, `indicatif` draws it.

use indicatif::ProgressBar;
use multiprocess::{self as mp, Pool};

fn collatz_steps(start: u64) -> u64 {
    let next = |n: &u64| (*n > 1).then(|| if n.is_multiple_of(2) { n / 2 } else { 3 * n + 1 });
    std::iter::successors(Some(start), next).count() as u64 - 1
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(4)?;
        let mut map = pool.map(collatz_steps, 1..200_000);
        let mut progress = map.progress();
        let drawn = tokio::spawn(async move {
            let bar = ProgressBar::new(0);
            while progress.changed().await.is_ok() {
                let now = *progress.borrow_and_update();
                bar.set_length(now.total);
                bar.set_position(now.done);
            }
            bar.finish();
            bar.position()
        });
        let longest = map.await?.into_iter().max();
        println!("{} numbers, at most {} steps", drawn.await.expect("the bar does not panic"), longest.unwrap_or(0));
        Ok(())
    })
}
