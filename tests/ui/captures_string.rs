//! A closure that captures cannot travel: `cargo check` sees that it is not `Copy`.
use multiprocess::Process;

fn main() {
    let name = String::from("name");
    let _ = Process::spawn(move |x: usize| x + name.len(), (1,));
}
