//! Twelve arguments are the most.
use multiprocess::Process;

type N = u8;

#[allow(clippy::too_many_arguments)]
fn many(_: N, _: N, _: N, _: N, _: N, _: N, _: N, _: N, _: N, _: N, _: N, _: N, _: N) {}

fn main() {
    let _ = Process::spawn(many, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13));
}
