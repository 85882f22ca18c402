//! Twin of 'Using Pipe for Communication' in 'What is multiprocessing?'.

use multiprocess::{self as mp, Connection, Process};

async fn send_message(mut conn: Connection<String, ()>) -> mp::Result<()> {
    conn.send("Hello from process".into()).await?;
    Ok(()) // the connection closes as it goes out of scope
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let (mut parent_conn, child_conn) = mp::pipe()?;
        let mut process = Process::spawn(send_message, (child_conn,))?;
        process.join().await??;

        println!("{}", parent_conn.recv().await?);
        Ok(())
    })
}
