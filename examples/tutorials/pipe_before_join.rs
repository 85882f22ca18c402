//! Twin of 'Using Pipe for Two-Way Communication' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Connection, Process};

async fn sender(mut conn: Connection<String, ()>) -> mp::Result<()> {
    conn.send("Hello from sender!".into()).await?;
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let (mut parent_conn, child_conn) = mp::pipe()?;
        let mut p = Process::spawn(sender, (child_conn,))?;
        println!("{}", parent_conn.recv().await?);
        p.join().await?
    })
}
