//! Values arrive as they were sent, by every way that they can go, or are refused by name.
//!
//! The zoo has a value for each class of types that serde formats confuse, and for the crates whose types people pass
//! around. Each goes through a queue alone, and with some others (so that the compiler has less to do) as an argument and
//! as the result of a process, through a queue, as an item of `Pool::map`, and into and out of a manager's dictionary and
//! list. `docs/guide/values.md` says in words what the same classes do.
#![allow(clippy::unwrap_used, clippy::type_complexity, reason = "tests fail by it; the types are what is tested")]

mod attributes;
mod beyond;
mod crates;
mod deep;
mod generated;
mod handles;
mod odd;
mod standard;

use multiprocess::{self as mp, DictProxy, ListProxy, Manager, Pool, Process, Queue};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::time::Duration;

mp::test_support!();

/// A value where serde reads it from a buffer of its own, and in lists that are long enough for rows, between large parts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Around<T> {
    before: Vec<u64>,
    tagged: Tagged<T>,
    untagged: Untagged<T>,
    many: Vec<T>,
    after: String,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Tagged<T> {
    Holds { one: Option<T>, many: Vec<T> },
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged<T> {
    Holds { one: Option<T>, many: Vec<T> },
}

impl<T: Clone> Around<T> {
    fn of(value: &T) -> Self {
        let (one, many) = (|| Some(value.clone()), || vec![value.clone(); 9]);
        Self {
            before: vec![1; 9_000],
            tagged: Tagged::Holds { one: one(), many: many() },
            untagged: Untagged::Holds { one: one(), many: many() },
            many: many(),
            after: "x".repeat(66_000),
        }
    }
}

/// What can be sent.
trait Animal: Serialize + DeserializeOwned + Send + Sync + Clone + Unpin + 'static {}
impl<T: Serialize + DeserializeOwned + Send + Sync + Clone + Unpin + 'static> Animal for T {}

fn second<T>(_: u8, value: T) -> T {
    value
}

fn same<T>(value: T) -> T {
    value
}

/// The ways that values are sent, and what went wrong on them.
struct Ways {
    runtime: tokio::runtime::Runtime,
    pool: Pool,
    manager: Manager,
    sent: usize,
    wrong: Vec<String>,
}

/// No value takes so long.
const LIMIT: Duration = Duration::from_secs(60);

impl Ways {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (pool, manager) = runtime.block_on(async { (Pool::new(1).unwrap(), Manager::start().await.unwrap()) });
        Self { runtime, pool, manager, sent: 0, wrong: Vec::new() }
    }

    /// The value alone through a queue.
    fn by_queue<T: Animal>(&self, value: &T) -> mp::Result<T> {
        let queue = Queue::unbounded()?;
        queue.try_put(value.clone())?;
        queue.try_get()
    }

    /// What each way makes of `value`, and how often it arrives there.
    fn send<T: Animal>(&self, value: &T) -> Vec<(&'static str, usize, mp::Result<Vec<T>>)> {
        let go = async {
            let process = async { Ok(vec![Process::spawn(second::<T>, (7, value.clone()))?.await?]) };
            let queue = async {
                let queue = Queue::bounded(2)?;
                queue.put(value.clone()).await?;
                queue.put(value.clone()).await?;
                Ok(vec![queue.get().await?, queue.get().await?])
            };
            let map = self.pool.map(same::<T>, vec![value.clone(), value.clone()]);
            let dict = async {
                let dict: DictProxy<u8, T> = self.manager.dict().await?;
                let before = dict.insert(1, value.clone()).await?;
                assert!(before.is_none(), "there was nothing");
                Ok([dict.get(&1).await?, dict.remove(&1).await?].into_iter().flatten().collect())
            };
            let list = async {
                let list: ListProxy<T> = self.manager.list().await?;
                list.push(value.clone()).await?;
                Ok([list.get(0).await?, list.pop().await?].into_iter().flatten().collect())
            };
            vec![
                ("process", 1, process.await),
                ("queue", 2, queue.await),
                ("map", 2, map.await),
                ("dict", 2, dict.await),
                ("list", 2, list.await),
            ]
        };
        self.runtime.block_on(async { tokio::time::timeout(LIMIT, go).await }).expect("it does not hang")
    }

    /// Sends several values as one, by every way. `changes` names those of two that differ.
    fn group<T: Animal>(&mut self, names: &str, values: T, changes: impl Fn(&T, &T) -> Vec<String>) {
        for (way, count, arrived) in self.send(&values) {
            match arrived {
                Err(error) => self.wrong.push(format!("{way}: one of {names} is refused: {error}")),
                Ok(all) if all.len() != count => self.wrong.push(format!("{way}: {names} arrive {} times", all.len())),
                Ok(all) => {
                    let changes = all.iter().flat_map(|arrived| changes(arrived, &values));
                    self.wrong.extend(changes.map(|change| format!("{way}: {change}")));
                }
            }
        }
    }

    /// Sends one value alone through a queue.
    fn alone<T: Animal + PartialEq + Debug>(&mut self, name: &str, value: &T) {
        self.sent += 1;
        match self.by_queue(value) {
            Ok(arrived) if arrived == *value => {}
            Ok(arrived) => self.wrong.push(format!("alone: {name} = {value:?} becomes {arrived:?}")),
            Err(error) => self.wrong.push(format!("alone: {name} = {value:?} is refused: {error}")),
        }
    }

    /// Sends one value through a queue in all that may surround it.
    fn around<T: Animal + PartialEq + Debug>(&mut self, name: &str, value: &T) {
        match self.by_queue(&Around::of(value)) {
            Ok(arrived) if arrived == Around::of(value) => {}
            // serde's buffer has no place for so large numbers.
            Err(error) if error.to_string().contains("128") => {}
            Ok(arrived) => self.wrong.push(format!("around: {name} = {value:?} becomes {arrived:?}")),
            Err(error) => self.wrong.push(format!("around: {name} is refused: {error}")),
        }
    }

    /// The value, whose type has no equality, arrives with the same text.
    fn alike<T: Animal>(&mut self, name: &str, value: T, text: impl Fn(&T) -> String) {
        self.sent += 1;
        for (way, _, arrived) in self.send(&value) {
            match arrived {
                Ok(all) if !all.is_empty() && all.iter().all(|arrived| text(arrived) == text(&value)) => {}
                Ok(all) => {
                    let all: Vec<_> = all.iter().map(&text).collect();
                    self.wrong.push(format!("{way}: {name} = {} becomes {all:?}", text(&value)));
                }
                Err(error) => self.wrong.push(format!("{way}: {name} = {} is refused: {error}", text(&value))),
            }
        }
    }

    /// No serde format carries this value: it is refused with an error that says `why`, or, without one, it arrives changed.
    fn beyond<T: Animal + PartialEq + Debug>(&mut self, name: &str, value: T, why: Option<&str>) {
        self.sent += 1;
        let what = match (self.by_queue(&value), why) {
            (Err(error), Some(why)) if error.to_string().contains(why) => return,
            (Ok(arrived), None) if arrived != value => return,
            (Err(error), _) => format!("is refused: {error}"),
            (Ok(arrived), _) => format!("becomes {arrived:?}"),
        };
        self.wrong.push(format!("{name} = {value:?} {what}, but was to be {}", why.unwrap_or("changed")));
    }
}

/// Sends each value alone, and up to eight together by every way, under the texts of their expressions.
macro_rules! equal {
    ($ways:ident:) => {};
    ($ways:ident: $a:expr; $b:expr; $c:expr; $d:expr; $e:expr; $f:expr; $g:expr; $h:expr; $($rest:tt)*) => {
        equal!(@ $ways, 0 $a, 1 $b, 2 $c, 3 $d, 4 $e, 5 $f, 6 $g, 7 $h);
        equal!($ways: $($rest)*);
    };
    ($ways:ident: $a:expr; $b:expr; $c:expr; $d:expr; $($rest:tt)*) => {
        equal!(@ $ways, 0 $a, 1 $b, 2 $c, 3 $d);
        equal!($ways: $($rest)*);
    };
    ($ways:ident: $a:expr; $($rest:tt)*) => {
        equal!(@ $ways, 0 $a);
        equal!($ways: $($rest)*);
    };
    (@ $ways:ident, $($at:tt $value:expr),*) => {
        let values = ($($value,)*);
        $( $ways.alone(stringify!($value), &values.$at); )*
        $ways.group(concat!($(stringify!($value), "; "),*), values, |arrived, sent| {
            let mut changes = Vec::new();
            $(if arrived.$at != sent.$at {
                changes.push(format!("{} becomes {:?}", stringify!($value), arrived.$at));
            })*
            changes
        });
    };
}
pub(crate) use equal;

/// Each value arrives as it was sent, by every way. There are at least `least`.
fn arrive(send: fn(&mut Ways), least: usize) {
    let mut ways = Ways::new();
    send(&mut ways);
    // Some values are large.
    let wrong: Vec<String> = ways.wrong.iter().map(|text| text.chars().take(1000).collect()).collect();
    assert!(wrong.is_empty(), "{} of them go wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(ways.sent >= least, "only {} values", ways.sent);
}

// The zoo has at least 300 values. Its parts run at the same time.

#[test]
fn values_of_the_standard_library_arrive_as_they_were_sent_by_every_way() {
    arrive(standard::send, 170);
}

#[test]
fn values_with_attributes_of_serde_arrive_as_they_were_sent_by_every_way() {
    arrive(attributes::send, 120);
}

#[test]
fn values_of_other_crates_arrive_as_they_were_sent_by_every_way() {
    arrive(crates::send, 130);
}

#[test]
fn odd_values_arrive_as_they_were_sent_by_every_way() {
    arrive(odd::send, 50);
}

#[test]
fn large_values_arrive_as_they_were_sent_by_every_way() {
    arrive(odd::send_large, 15);
}

#[test]
fn other_large_values_arrive_as_they_were_sent_by_every_way() {
    arrive(odd::send_other_large, 10);
}

#[test]
fn values_beyond_any_format_are_refused_or_arrive_changed_as_is_documented() {
    arrive(beyond::send, 20);
}
