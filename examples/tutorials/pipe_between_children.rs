//! Twin of 'Process Communication with Pipe' in 'Python multiprocessing Package', and of its Practice Question 4.

use multiprocess::{self as mp, Connection, Process};

async fn sender(mut conn: Connection<String, ()>) -> mp::Result<()> {
    conn.send("Message from sender!".into()).await?;
    Ok(())
}

async fn receiver(mut conn: Connection<(), String>) -> mp::Result<()> {
    println!("{}", conn.recv().await?);
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let (parent, child) = mp::pipe()?;
        let mut p1 = Process::spawn(sender, (child,))?;
        let mut p2 = Process::spawn(receiver, (parent,))?;
        p1.join().await??;
        p2.join().await?
    })
}
