//! A result, its error included, has to have a serde form.
use multiprocess::Process;

#[derive(Debug)]
struct MyError;

fn parse(text: String) -> Result<i32, MyError> {
    text.parse().map_err(|_| MyError)
}

async fn parse_later(text: String) -> Result<i32, MyError> {
    parse(text)
}

fn never() -> ! {
    std::process::exit(1)
}

fn main() {
    let _ = Process::spawn(parse, (String::new(),));
    let _ = Process::spawn(parse_later, (String::new(),));
    let _ = Process::spawn(never, ());
}
