//! Nor can a function pointer: it says nothing about which function it is.
use multiprocess::Process;

fn double(x: i32) -> i32 {
    2 * x
}

fn main() {
    let f: fn(i32) -> i32 = double;
    let _ = Process::spawn(f, (1,));
}
