//! Two programs, perhaps on two hosts, and one manager that lets them call two functions and no other. Run without arguments it serves, and runs
//! itself twice more.

use multiprocess::{self as mp, Exposed, Manager, Proxy};
use tokio::process::Command;

const KEY: &[u8] = b"secret";

/// The object, in the manager's process.
type Words = Vec<String>;

fn add_word(words: &mut Words, word: String) {
    words.push(word);
}

fn all(words: &mut Words) -> Words {
    words.clone()
}

async fn serve() -> mp::Result<()> {
    let functions = [Exposed::method(add_word), Exposed::method(all)];
    let means = [Exposed::maker(Words::new), Exposed::namespace::<Proxy<Words>>()];
    let manager = Manager::builder().bind("127.0.0.1:0").authkey(KEY).expose(functions).expose(means).start().await?;
    let words = manager.create(Words::new, ()).await?;
    manager.names().set("words", words.clone()).await?;

    let address = manager.address().await?.unwrap_or_default();
    for word in ["hello", "there"] {
        Command::new(std::env::current_exe()?).args([&address, word]).status().await?;
    }
    println!("{:?}", words.call(all, ()).await?);
    manager.shutdown().await
}

async fn add(address: &str, word: &str) -> mp::Result<()> {
    let manager = Manager::connect(address, KEY).await?;
    let words = manager.names().get::<Proxy<Words>>("words").await?;
    words.ok_or_else(|| mp::Error::other("the manager has no words"))?.call(add_word, (word.into(),)).await
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
