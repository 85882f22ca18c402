//! A Rust program and a CPython program do work for each other over `multiprocessing.connection`.
//!
//! The other end is `python_peer.py`, beside this file.

use multiprocess::{self as mp, ErrorKind, connection::Listener};
use std::process::Command;

fn primes_below(limit: usize) -> usize {
    let mut is_prime = vec![true; limit];
    for n in (2..limit).take_while(|n| n * n < limit) {
        (n * n..limit).step_by(n).for_each(|multiple| is_prime[multiple] = false);
    }
    is_prime.iter().skip(2).filter(|is| **is).count()
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let address = std::env::temp_dir().join(format!("python-peer-{}", std::process::id()));
        let key = format!("{:032x}", std::process::id()); // a real one is random, and comes from where secrets are kept
        let listener = Listener::bind(&address.to_string_lossy()).authkey(&key).await?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/python_peer.py");
        let mut python = Command::new("python3").arg(script).arg(&address).env("PEER_KEY", &key).spawn()?;

        let peer = listener.accept().await?;
        for numbers in ["[1, 2, 6]", "[2.5, 3.5]"] {
            peer.send_bytes(numbers.as_bytes()).await?;
            println!("Rust heard: {}", String::from_utf8_lossy(&peer.recv_bytes().await?));
        }
        peer.send_bytes(b"").await?;

        loop {
            match peer.recv_bytes().await {
                Ok(limit) => {
                    let limit = String::from_utf8_lossy(&limit).parse().map_err(mp::Error::other)?;
                    peer.send_bytes(primes_below(limit).to_string().as_bytes()).await?;
                }
                Err(error) if error.kind() == ErrorKind::Closed => break,
                Err(error) => return Err(error),
            }
        }
        assert!(python.wait()?.success());
        Ok(())
    })
}
