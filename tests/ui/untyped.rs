//! The parameter of a closure has a type, or one that follows from what is done with it.
use multiprocess::Process;

fn main() {
    let _ = Process::spawn(|x| x.len(), (String::new(),));
}
