//! Arguments travel as one tuple of what the function takes.
use multiprocess::Process;

fn double(x: i32) -> i32 {
    2 * x
}

fn main() {
    let _ = Process::spawn(double, (1, 2));
}
