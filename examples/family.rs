//! Children of every kind: how they are started, what they print and return, how they end, and who is there.
//!
//! `cargo run --example family`

use multiprocess::{
    self as mp, Deep, ErrorKind, Event, Process, Receiver, Restart, StartMethod, Stdio, SupervisedState, Value,
};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::time::Duration;

/// A list in which each element has the next one.
#[derive(Serialize, Deserialize)]
struct Chain(Option<Box<Chain>>);

fn chain(links: usize) -> Deep<Chain> {
    Deep((0..links).fold(Chain(None), |next, _| Chain(Some(Box::new(next)))))
}

/// What it reads it writes, in capitals.
fn shout() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).expect("text");
    print!("{}", text.to_uppercase());
}

async fn add_up(mut numbers: Receiver<u64>) -> u64 {
    let mut sum = 0;
    while let Ok(number) = numbers.recv().await {
        sum += number;
    }
    sum
}

/// Fails twice, then stays.
async fn moody(attempts: Value<u64>, stay: Event) -> mp::Result<()> {
    assert!(attempts.fetch_add(1) >= 2, "not in the mood");
    stay.wait().await
}

fn main() -> mp::Result<()> {
    mp::run(async {
        // A name, streams, and a start from scratch instead of a fork.
        let builder = Process::builder().name("shouter").start_method(StartMethod::Spawn);
        let mut child = builder.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn(shout, ())?;
        println!("there are {:?}", mp::active_children().iter().map(|child| child.name()).collect::<Vec<_>>());
        child.take_stdin().expect("it is piped").write_all(b"is anybody there?")?;
        let mut said = String::new();
        child.take_stdout().expect("it is piped").read_to_string(&mut said)?;
        child.await?;
        println!("{said}");

        // A child knows its parent.
        let parent = Process::spawn(|| mp::parent_process().map(|parent| parent.pid()), ())?.await?;
        println!("its parent is this process: {}", parent == Some(mp::current_process().pid()));

        // One way, one sender, one receiver: the cheapest way to send values.
        let (mut send, receive) = mp::simplex()?;
        let sum = Process::spawn(add_up, (receive,))?;
        for number in 1..=4 {
            send.send(number).await?;
        }
        drop(send); // ends the loop of the child
        println!("the sum is {}", sum.await?);

        // A value may be nested a thousand levels deep, and deeper if that is said.
        let Deep(Chain(first)) = Process::spawn(chain, (5_000,))?.await?;
        println!("a chain came back: {}", first.is_some());
        let send = |levels| Process::spawn(|chain: Chain| chain.0.is_some(), (chain(levels).0,));
        println!("as an argument: {:?}", send(5_000).map(drop).unwrap_err().kind());
        println!("with a limit of its own: {}", mp::with_depth_limit(10_000, || send(5_000))?.await?);
        let for_a_future = mp::with_depth_limit_async(10_000, async { send(5_000)?.await }).await?;
        println!("with one for all that a future does: {for_a_future}");

        // How a child ends, other than well.
        let error = Process::spawn(|| -> u64 { panic!("by mistake") }, ())?.await.unwrap_err();
        println!("{:?}: {}", error.kind(), error.panic().expect("it has panicked").message());
        let mut child = Process::builder().daemon(true).spawn(|| std::thread::sleep(Duration::MAX), ())?;
        child.kill()?;
        println!("{}", child.wait().await?);
        assert_eq!(child.join().await.unwrap_err().kind(), ErrorKind::ProcessDied);

        // A child that is started again when it fails.
        let (attempts, stay) = (Value::new(0)?, Event::new()?);
        let restart = Restart::on_failure().back_off(Duration::from_millis(1), Duration::from_millis(10));
        let builder = Process::builder().name("moody").restart(restart);
        let mut moody = builder.spawn(moody, (attempts, stay.clone()))?;
        let mut states = moody.states();
        while !matches!(states.get_and_update()?, SupervisedState::Running { restarts: 2, .. }) {
            states.changed().await?;
        }
        stay.set();
        moody.wait().await??;
        println!("it was restarted {} times", moody.restarts());
        Ok(())
    })
}
