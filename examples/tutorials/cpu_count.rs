//! Twin of 'Using cpu_count() to Get Number of Cores' in 'What is multiprocessing?'.

use multiprocess as mp;

fn main() {
    println!("{}", mp::cpu_count()); // those that this process may use
}
