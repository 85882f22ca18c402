//! Everything that captures nothing can run elsewhere. (It also makes trybuild build rather than check: the size
//! of a closure is asserted when code is generated.)
use multiprocess::Process;

fn plain(a: i32) -> i32 {
    a
}
async fn later() {}
fn generic<T: Default>() -> T {
    T::default()
}
fn number(path: String) -> multiprocess::Result<u16> {
    let text = std::fs::read_to_string(path)?;
    let number = text.trim().parse::<u16>()?;
    Ok(u16::try_from(i32::from(number) + 1)?)
}
struct Counter;
impl Counter {
    fn associated(text: String) -> usize {
        text.len()
    }
}

fn main() {
    multiprocess::init();
    if std::env::args().count() > 100 {
        let _ = Process::spawn(plain, (1,));
        let _ = Process::spawn(later, ());
        let _ = Process::spawn(number, (String::new(),));
        let _ = Process::spawn(generic::<f64>, ());
        let _ = Process::spawn(Counter::associated, (String::new(),));
        let _ = Process::spawn(|x: i32| x + 1, (1,));
        let _ = Process::spawn(async |x: i32| x + 1, (1,));
        let _ = Process::spawn(|x| x + 1, (1,));
        let _ = Process::spawn(std::process::id, ());
    }
}
