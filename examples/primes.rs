//! Port of `primes.py`: which of these numbers are primes, each as soon as it is known.
//!
//! Unlike there, a worker that is killed costs nothing, as its number is tried again.
//!
//! `cargo run --example primes`

use futures::TryStreamExt;
use multiprocess::{self as mp, Pool};

const NUMBERS: [u64; 6] =
    [999_999_999_989, 1_000_000_000_001, 1_000_000_000_039, 1_000_001_970_001, 1_000_000_000_061, 42];

fn is_prime(n: u64) -> (u64, bool) {
    (n, (2..=n.isqrt()).all(|divisor| !n.is_multiple_of(divisor)))
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(4)?;
        let mut results = pool.imap_unordered(is_prime, NUMBERS).chunksize(1).retries(3);
        while let Some((n, prime)) = results.try_next().await? {
            println!("{n} is {} prime", if prime { "a" } else { "no" });
        }
        Ok(())
    })
}
