//! A closure that captures cannot travel.
use multiprocess::Process;

fn main() {
    let n = 5;
    let _ = Process::spawn(move |x: i32| x + n, (1,));
}
