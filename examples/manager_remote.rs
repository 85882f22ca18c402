//! Two programs, perhaps on two hosts, and one manager. Run without arguments it serves, and runs itself twice more.

use multiprocess::{self as mp, ListProxy, Manager};
use tokio::process::Command;

const KEY: &[u8] = b"secret";

async fn serve() -> mp::Result<()> {
    let manager = Manager::builder().bind("127.0.0.1:0").authkey(KEY).start().await?;
    let words = manager.list::<String>().await?;
    manager.names().set("words", words.clone()).await?;

    let address = manager.address().await?.unwrap_or_default();
    for word in ["hello", "there"] {
        Command::new(std::env::current_exe()?).args([&address, word]).status().await?;
    }
    println!("{:?}", words.to_vec().await?);
    manager.shutdown().await
}

async fn add(address: &str, word: &str) -> mp::Result<()> {
    let manager = Manager::connect(address, KEY).await?;
    let words = manager.names().get::<ListProxy<String>>("words").await?;
    words.ok_or_else(|| mp::Error::other("the manager has no words"))?.push(word.into()).await
}

fn main() -> mp::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    mp::run(async {
        match &arguments[..] {
            [address, word] => add(address, word).await,
            _ => serve().await,
        }
    })
}
