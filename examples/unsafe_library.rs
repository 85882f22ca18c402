//! A C library that trusts its caller, used without trusting the caller: its segfault is an error value.

use multiprocess::{self as mp, ErrorKind, Pool};
use std::os::unix::process::ExitStatusExt;

/// What the C library makes of text that somebody else says is there.
fn length(address: usize) -> usize {
    // SAFETY: none, which is why it runs in a worker: whatever it does there, it does to that process only.
    unsafe { libc::strlen(address as *const libc::c_char) }
}

/// A good string at an address of the worker's own.
fn length_of_greeting() -> usize {
    length(c"hello".as_ptr() as usize)
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(1)?;
        println!("a good address: {} bytes", pool.apply(length_of_greeting, ()).await?);
        match pool.apply(length, (8,)).await {
            Ok(length) => println!("a bad address: {length} bytes?"),
            Err(error) if error.kind() == ErrorKind::ProcessDied => {
                println!("a bad address: signal {}", error.exit_status().and_then(|how| how.signal()).unwrap_or(0));
            }
            Err(error) => return Err(error),
        }
        println!("and again a good one: {} bytes", pool.apply(length_of_greeting, ()).await?);
        Ok(())
    })
}
