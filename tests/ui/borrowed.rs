//! Arguments and results are owned.
use multiprocess::Process;

fn length(text: &str) -> usize {
    text.len()
}

fn name() -> &'static str {
    "name"
}

fn main() {
    let _ = Process::spawn(length, ("text",));
    let _ = Process::spawn(name, ());
}
