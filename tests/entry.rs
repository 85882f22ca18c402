//! What can be a function that runs elsewhere, and what the compiler says of the rest.

use multiprocess::{self as mp, Process};

mp::test_support!();

struct Shape;

impl Shape {
    fn area(width: f64, height: f64) -> f64 {
        width * height
    }
}

fn largest<T: PartialOrd + Copy>(all: Vec<T>) -> Option<T> {
    all.into_iter().reduce(|a, b| if b > a { b } else { a })
}

async fn later(text: String) -> mp::Result<String> {
    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    Ok(text + "!")
}

#[tokio::test]
async fn functions_of_every_kind_return_their_results() -> mp::Result<()> {
    assert_eq!(Process::spawn(Shape::area, (2.0, 3.0))?.await?, 6.0);
    assert_eq!(Process::spawn(largest::<u8>, (vec![1, 3, 2],))?.await?, Some(3));
    assert_eq!(Process::spawn(largest::<char>, (vec!['a', 'c'],))?.await?, Some('c'));
    assert_eq!(Process::spawn(later, ("hi".to_string(),))?.await??, "hi!");
    assert_eq!(Process::spawn(|a: u8, b: u8| a + b, (1, 2))?.await?, 3);
    assert_eq!(Process::spawn(async |a: u8| a + 1, (1,))?.await?, 2);
    let child = Process::spawn(std::process::id, ())?;
    let pid = child.pid();
    assert_eq!(child.await?, pid);
    Ok(())
}

/// Two functions with equal code may share an address; they must still be told apart by their types.
#[tokio::test]
async fn equal_code_of_other_types_is_not_confused() -> mp::Result<()> {
    fn one(x: u32) -> u32 {
        x
    }
    fn two(x: i32) -> i32 {
        x
    }
    assert_eq!(Process::spawn(one, (u32::MAX,))?.await?, u32::MAX);
    assert_eq!(Process::spawn(two, (-1,))?.await?, -1);
    Ok(())
}
