//! A mail room: letters are read from a file by a process that opens none, go by stream and sink into a queue, and clerks answer them until the last is done.
//!
//! An open file travels (`Fd`), a stream ends in a queue (`QueueSink`), the program waits until each letter is dealt with and not only taken (`JoinableQueue`), a
//! letter that nobody can read is put aside (`DeadLetters`), and the clerks stamp a page that all of them see (`SharedMemory`).
//!
//! `cargo run --example mail_room`

use futures::{SinkExt, StreamExt, TryStreamExt, stream};
use multiprocess::{self as mp, Fd, JoinableQueue, Process, Queue, SharedMemory};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};

/// Has no right to open the file, and need not: it gets it open.
async fn postman(letters: Fd<File>, room: JoinableQueue<String>) -> mp::Result<usize> {
    let lines = BufReader::new(letters.into_inner()).lines().map(|line| line.map_err(mp::Error::from));
    let mut sink = room.sink();
    let mut count = 0;
    let mut counted = stream::iter(lines).inspect_ok(|_| count += 1);
    // Waits while the queue is full, so a long file is never in memory as a whole.
    sink.send_all(&mut counted).await?;
    drop(counted);
    Ok(count)
}

async fn clerk(
    number: usize,
    room: JoinableQueue<String>,
    answers: Queue<String>,
    page: SharedMemory,
) -> mp::Result<()> {
    let mut letters = room.stream();
    while let Some(letter) = letters.next().await {
        answers.put(format!("Dear {}", letter?)).await?;
        page.write(number, b"x")?;
        room.task_done()?;
    }
    Ok(())
}

/// Gives up on what it cannot read: the letter comes back, and after two attempts it is a dead letter.
async fn sort(sorted: Queue<String>) -> mp::Result<usize> {
    let sorted = sorted.max_deliveries(2);
    let mut read = 0;
    while let Ok(letter) = sorted.try_lease() {
        if letter.contains("???") {
            drop(letter);
            continue;
        }
        letter.commit()?;
        read += 1;
    }
    Ok(read)
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let path = std::env::temp_dir().join(format!("mail-room-{}", std::process::id()));
        writeln!(File::create(&path)?, "Ada\nGrace\n???\nBarbara")?;
        let file = File::open(&path)?;
        std::fs::remove_file(&path)?;

        let (room, answers) = (JoinableQueue::bounded(2)?, Queue::unbounded()?);
        let page = SharedMemory::anonymous(2)?;
        let clerks = [0, 1].map(|number| Process::spawn(clerk, (number, room.clone(), answers.clone(), page.clone())));
        let postman = Process::spawn(postman, (Fd::new(file), room.clone()))?;
        println!("{} letters came", postman.await??);
        room.join().await?; // each is answered
        room.close();
        for clerk in clerks {
            clerk?.await??;
        }
        let mut stamps = [0; 2];
        page.read(0, &mut stamps)?;
        println!("somebody stamped the page: {}", stamps.contains(&b'x'));

        let sorted = Process::spawn(sort, (answers.clone(),))?.await??;
        println!("{sorted} answers go out, and {:?} does not", answers.dead_letters().get().await?);
        Ok(())
    })
}
