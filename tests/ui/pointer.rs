//! Nor can a function pointer: it says nothing about which function it is.
use multiprocess::Process;

fn double(x: i32) -> i32 {
    2 * x
}

fn triple(x: i32) -> i32 {
    3 * x
}

fn main() {
    let f: fn(i32) -> i32 = double;
    let _ = Process::spawn(f, (1,));
    for f in [double, triple] {
        let _ = Process::spawn(f, (1,));
    }
}
